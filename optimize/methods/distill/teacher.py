"""Teacher: what the trained model says to a batch, the student that learns it, and the precision of both."""

import hashlib
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from optimize.machine import cpu
from optimize.model.errors import BadModel, BadWorkload, NoEffect
from optimize.predict.module import forward
from optimize.train import processes
from optimize.train.fit import Tensors, tensors, trainable

if TYPE_CHECKING:
    from optimize.step.contract import Context

Precision = Literal["float32", "bfloat16"]
REMEMBERED = 256_000_000
"""Bytes of the teacher's outputs that are kept."""


class Teacher:
    """The trained model's outputs by name, as detached tensors.

    What it said is kept, up to a limit, by the inputs it was asked about: a training set that comes again in the same
    batches costs the teacher's time only once.
    """

    def __init__(self, context: "Context", precision: Precision) -> None:
        self._module, self._names, self._precision = context.trained, context.workload.outputs, precision
        self._known: dict[bytes, dict[str, torch.Tensor]] = {}
        self._free = REMEMBERED

    def __call__(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Return the outputs for one batch."""
        key = _key(inputs)
        if key in self._known:
            return self._known[key]
        with torch.no_grad():
            said = outputs(self._module, inputs, self._names, self._precision)
        weight = sum(tensor.nbytes for tensor in said.values())
        if weight <= self._free:
            self._free -= weight
            self._known[key] = said
        return said


def precision(asked: Precision | Literal["auto"], context: "Context", method: str) -> Precision:
    """Return the precision to compute in; whoever asks for bfloat16 where it is slow is told."""
    on_cpu = processes.device().type == "cpu"
    if asked == "auto":
        fast = cpu.has_bfloat16() if on_cpu else torch.cuda.is_bf16_supported(including_emulation=False)
        chosen: Precision = "bfloat16" if fast else "float32"
        context.progress(f"{method}: computes in {chosen}", 0.0)
        return chosen
    if asked == "bfloat16" and on_cpu and cpu.lacks_bfloat16():
        context.progress(f"{method}: this CPU computes bfloat16 in software: float32 is several times faster here", 0.0)
    return asked


def outputs(
    module: nn.Module, inputs: Tensors, names: tuple[str, ...], precision: Precision
) -> dict[str, torch.Tensor]:
    """Return a module's outputs by name, computed in `precision`, floating point ones as float32."""
    device = next(iter(inputs.values())).device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        returned = forward(module, inputs, names)
    return {name: value.float() if value.is_floating_point() else value for name, value in returned.items()}


def output_of(context: "Context", name: str, method: str) -> str:
    """Return the output of that name, the first one for an empty name.

    Raises:
        BadWorkload: there is no such output.
        BadModel: it holds no floating point numbers.
    """
    names = context.workload.outputs
    output = name or names[0]
    if output not in names:
        raise BadWorkload(f"{method}: there is no output {output!r}", fix=f"outputs: {', '.join(names)}")
    inputs, _ = next(tensors(context.workload))
    with torch.no_grad():
        tensor = forward(context.trained.eval(), inputs, names)[output]
    if not tensor.is_floating_point():
        raise BadModel(
            f"{method}: output {output!r} is {tensor.dtype}, which cannot be learnt",
            where=context.workload.name,
            fix="return floating point numbers from the model, and name that output",
        )
    return output


def student(name: str, module: nn.Module, context: "Context", method: str) -> nn.Module:
    """Return the module to train: `module`, or the workload's student of that name.

    Raises:
        BadModel: it does not take the trained model's inputs, or has other outputs; found before any training.
        BadWorkload: there is no such student.
        NoEffect: every parameter of it is frozen.
    """
    workload = context.workload
    chosen = workload.build(name) if name else module
    what = f"students[{name!r}]" if name else "the model"
    if not trainable(chosen):
        raise NoEffect(
            f"{method}: every parameter of {what} is frozen",
            where=workload.name,
            fix="set requires_grad on some of them",
        )
    inputs, _ = next(tensors(workload))
    with torch.no_grad():
        wanted = forward(context.trained.eval(), inputs, workload.outputs)
        try:
            given = forward(chosen.eval(), inputs, workload.outputs)
        except BadModel as error:
            raise BadModel(
                f"{method}: {what} cannot learn from the trained model: it {error.what}",
                where=workload.source or workload.name,
                fix="let the student take the same inputs by name and return the same outputs",
            ) from error
    for output, tensor in wanted.items():
        if given[output].shape != tensor.shape:
            raise BadModel(
                f"{method}: {what} returns {output!r} with the shape {tuple(given[output].shape)}, "
                f"the trained model with {tuple(tensor.shape)}",
                where=workload.source or workload.name,
                fix="end the student with a layer that brings its outputs to the trained model's shapes",
            )
        if given[output].dtype != tensor.dtype:
            raise BadModel(
                f"{method}: {what} returns {output!r} as {given[output].dtype}, the trained model as {tensor.dtype}",
                where=workload.source or workload.name,
                fix="let the student's forward convert its outputs to the trained model's types",
            )
    return chosen


def _key(inputs: Tensors) -> bytes:
    data = hashlib.blake2b()
    for name, tensor in sorted(inputs.items()):
        data.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        data.update(tensor.cpu().contiguous().view(-1).numpy().data)
    return data.digest()
