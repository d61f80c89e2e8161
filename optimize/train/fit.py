"""Train: the one training loop, for distillation, healing between cuts of a pruning schedule, and fake quantization."""

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from modelathe.errors import MachineError
from optimize.model.errors import BadData, BadModel, BadWorkload, NoEffect, first_line
from optimize.model.randomness import Stream
from optimize.predict.module import forward
from optimize.source import padding, splits
from optimize.source.batch import Batch, guarded
from optimize.source.workload import Workload
from optimize.train import processes
from optimize.train.checkpoint import Checkpoint

if TYPE_CHECKING:
    from optimize.step.contract import Context

Tensors = Mapping[str, torch.Tensor]
Objective = Callable[[nn.Module, Tensors, Any], torch.Tensor]
"""`objective(module, inputs, targets)` returns the scalar to make small, a mean over the batch's samples."""
Sample = tuple[dict[str, torch.Tensor], Any]
"""A batch as tensors by name, and its targets: a tensor, or what else the batch holds."""
SILENCE = 30.0
"""Seconds of an epoch after which its loss so far is told, and told again."""
SEED_STEP = 1_000_003
"""Between the seeds of two epochs, so that no epoch draws what another run's with the next seed draws."""


def fit(
    module: nn.Module, context: "Context", objective: Objective, *, name: str, epochs: int, learning_rate: float
) -> nn.Module:
    """Train `module` in place on the workload's training batches and return it in evaluation mode.

    AdamW, its rate `learning_rate` in the first epoch, then falling along a cosine to zero. On the GPU where there is
    one, and under torchrun on the share of the batches that is this process's. Goes on after the last epoch that
    `context.checkpoint` knows of: the weights become those of a training that was never killed, bit for bit, on a CPU
    and where the data depend on nothing but the call of `training()` and torch's random numbers.

    Args:
        module: has at least one parameter that requires a gradient.
        context: its seed, workload, checkpoint and progress are used; `context.trained` is put into evaluation mode,
            and is on the device of the training as long as that lasts.
        objective: what to make small.
        name: of the method, for messages.
        epochs: passes over the training data.
        learning_rate: the peak.

    Raises:
        NoEffect: every parameter is frozen.
        BadModel: the objective stopped being finite.
    """
    if not trainable(module):
        raise NoEffect(
            f"{name}: every parameter is frozen", where=context.workload.name, fix="set requires_grad on some of them"
        )
    device = processes.device()
    context.trained.eval().to(device)
    module.train().to(device)
    try:
        _epochs(module, context, objective, name, epochs, learning_rate)
    finally:
        context.trained.cpu()
        module.cpu()
    return module.eval()


def _epochs(
    module: nn.Module, context: "Context", objective: Objective, name: str, epochs: int, learning_rate: float
) -> None:
    def gradients(batch: Sample) -> float:
        value = objective(module, *batch)
        with backward(context.workload):
            torch.autograd.backward(value)
        return value.item()

    processes.align(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate)
    checkpoint = Checkpoint(context.checkpoint, module, optimizer)
    done = _resume(checkpoint, name)
    if done:
        context.progress(f"{name}: resumes after epoch {done} of {epochs}", done / epochs)
    for epoch in range(done, epochs):
        # Anew for every epoch, so that one after a restart draws what it would have drawn without. The model's random
        # numbers are each process's own, those of the data the same in all of them.
        torch.manual_seed(context.seed + (epoch * processes.size() + processes.rank()) * SEED_STEP)
        data = _data(context.workload, Stream(context.seed + epoch * SEED_STEP))

        def rate(batch: int, epoch: int = epoch) -> float:
            # Until the first epoch has shown how many batches there are, the peak.
            gone = (epoch - 1 + min(batch / checkpoint.batches, 1)) / (epochs - 1) if epoch else 0.0
            return learning_rate * 0.5 * (1 + math.cos(math.pi * gone))

        def tell(batches: int, loss: float, epoch: int = epoch) -> None:
            within = min(batches / checkpoint.batches, 1) if checkpoint.batches else 0.0
            context.progress(f"{name}: epoch {epoch + 1}, batch {batches}, loss {loss:.4f}", (epoch + within) / epochs)

        mean, checkpoint.batches = _epoch(module, data, gradients, optimizer, rate, tell)
        if not math.isfinite(mean):
            raise BadModel(f"{name}: the loss became {mean} in epoch {epoch + 1}", fix="lower learning_rate")
        checkpoint.save(epoch + 1)
        context.progress(f"{name}: epoch {epoch + 1}, loss {mean:.4f}", (epoch + 1) / epochs)


def _resume(checkpoint: Checkpoint, name: str) -> int:
    """Restore what was saved on every process, and return how many epochs are done."""
    with processes.agreeing():
        done = checkpoint.load()
    if processes.size() > 1:
        told = processes.tell({"done": done})
        with processes.agreeing():
            if told != {"done": done}:
                raise MachineError(
                    f"{name}: the processes do not see the same checkpoint",
                    fix="give all machines one folder for --output, or start anew with another one",
                )
    return done


def trainable(module: nn.Module) -> list[str]:
    """Return the names of the parameters that training could change."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def label_loss(workload: Workload, outputs: Tensors, targets: Any) -> torch.Tensor:
    """Return the workload's own loss.

    Raises:
        BadWorkload: the user's function raised, or returned something else than a scalar made from the outputs.
    """
    assert workload.loss is not None
    given = workload.loss
    told = {"outputs": outputs, "targets": targets}
    value = guarded(lambda: given(outputs, targets), "loss()", workload.source, told)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise BadWorkload(
            f"loss() returned {shape}", where=workload.source, fix="return a scalar tensor made from the outputs"
        )
    return value.reshape(())


def healing(context: "Context") -> Objective:
    """Return the objective for a model that was cut: the workload's loss where it has one, else the trained model.

    Without a loss the outputs are drawn towards the trained model's, each scaled by the variance of the latter.
    """
    workload = context.workload

    def by_labels(module: nn.Module, inputs: Tensors, targets: Any) -> torch.Tensor:
        return label_loss(workload, forward(module, inputs, workload.outputs), targets)

    def by_outputs(module: nn.Module, inputs: Tensors, _targets: Any) -> torch.Tensor:
        with torch.no_grad():
            wanted = forward(context.trained, inputs, workload.outputs)
        return difference(forward(module, inputs, workload.outputs), wanted, padding.tokens(workload, inputs))

    return by_labels if workload.loss is not None else by_outputs


def difference(given: Tensors, wanted: Tensors, where: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean squared difference of each output in units of the variance of the wanted one, summed.

    Args:
        given: outputs by name.
        wanted: what they should be.
        where: from `padding.tokens`; of outputs for each token only the tokens count.

    Raises:
        BadModel: no output holds floating point numbers.
    """
    parts = [
        scaled_error(padding.kept(given[name], where), padding.kept(value, where))
        for name, value in wanted.items()
        if value.is_floating_point()
    ]
    if not parts:
        raise BadModel(
            f"no output can be learnt: {', '.join(f'{name} is {value.dtype}' for name, value in wanted.items())}",
            fix="return logits or embeddings from the model",
        )
    return torch.stack(parts).sum()


def scaled_error(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of two tensors of one shape in units of the variance of the second."""
    return ((given - wanted) ** 2).mean() / wanted.var(correction=0).clamp(min=1e-12)


def _epoch(
    module: nn.Module,
    batches: Iterator[Sample],
    gradients: Callable[[Sample], float],
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    tell: Callable[[int, float], None],
) -> tuple[float, int]:
    """Train on one pass over the data; return the mean loss of the batches, and how many there were."""
    total, count, told = 0.0, 0, time.monotonic()
    while True:
        optimizer.zero_grad()
        loss, samples = 0.0, 0
        with processes.agreeing():
            batch = next(batches, None)
            if batch is not None:
                loss, samples = gradients(batch), len(next(iter(batch[0].values())))
        mean = processes.average(module, loss, samples)
        if mean is None:
            processes.average_buffers(module)
            return total / count, count
        for group in optimizer.param_groups:
            group["lr"] = rate(count)
        optimizer.step()
        total, count = total + mean, count + 1
        if time.monotonic() - told > SILENCE:
            tell(count, total / count)
            told = time.monotonic()


def _data(workload: Workload, stream: Stream) -> Iterator[Sample]:
    """Yield this process's share of one epoch: every process reads all batches and takes each `size`-th.

    Raises:
        BadData: the processes were given different batches, so that their shares are none of one whole.
    """
    batches = workload.batches("training")
    for number in itertools.count():
        with stream.drawn():
            together = list(itertools.islice(batches, processes.size()))
        if not number and processes.size() > 1:
            _check_same(together, workload)
        if len(together) > processes.rank():
            yield _on(together[processes.rank()], processes.device())
        if len(together) < processes.size():
            return


def _check_same(together: Sequence[Batch], workload: Workload) -> None:
    found = [digest for batch in together for digest in splits.digests(batch, workload.inputs)]
    if not processes.same(hashlib.sha256(b"".join(found)).hexdigest()):
        raise BadData(
            "training() gave the processes different batches",
            where=workload.source or workload.name,
            fix="give each all of them in one order: seed what shuffles, and leave the sharing to modelathe",
        )


@contextlib.contextmanager
def backward(workload: Workload) -> Iterator[None]:
    """Make one line of what the backward pass of the user's model raises.

    Raises:
        BadModel: of any exception.
    """
    try:
        yield
    except Exception as error:
        raise BadModel(
            f"gradients cannot be taken through the model: {type(error).__name__}: {first_line(error)}",
            where=workload.name,
            fix="let forward change no tensor in place that gradients need (x = x + y, not x += y), and see that the "
            "backward of your own functions runs",
        ) from error


def tensors(workload: Workload, kind: str = "training", device: torch.device | str = "cpu") -> Iterator[Sample]:
    """Yield the inputs of one epoch as tensors by name, and the targets: tensors for arrays, also by name."""
    return as_tensors(workload.batches(kind), device)


def as_tensors(batches: Iterable[Batch], device: torch.device | str = "cpu") -> Iterator[Sample]:
    """Yield the same of these batches."""
    return (_on(batch, device) for batch in batches)


def _on(batch: Batch, device: torch.device | str) -> Sample:
    inputs = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in batch.inputs.items()}
    return inputs, _targets_on(batch.targets, device)


def _targets_on(targets: Any, device: torch.device | str) -> Any:
    if isinstance(targets, Mapping):
        return {name: _targets_on(value, device) for name, value in targets.items()}
    if isinstance(targets, np.ndarray) and targets.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(targets)).to(device)
    return targets
