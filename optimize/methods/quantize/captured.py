"""Captured: a module as torch.export writes it down, with torchao's INT8 rounding put into it, on its way to ONNX."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from optimize.graph import graph
from optimize.machine import cpu
from optimize.model.errors import BadModel
from optimize.source.workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.fx import GraphModule

WRAPPED = "module.module."
"""What `prepared` puts before the names of the user's own modules."""


def prepared(module: "nn.Module", workload: Workload, name: str, *, symmetric: bool) -> "nn.Module":
    """Return the module with its weights rounded to int8 and its activations to uint8 or int8, ready to train.

    Args:
        module: a private copy; its parameters are those that training changes.
        workload: gives the inputs; a training batch gives the ranges their sizes.
        name: of the method, for messages.
        symmetric: activations become int8 around zero.

    Raises:
        BadModel: torch.export or torchao cannot follow the module.
    """
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_, _fuse_linear_bn_

    from optimize.methods.export.onnx import followed, reason, wrapped
    from optimize.train import fit as train

    try:
        with graph.quiet():
            wrapper = wrapped(module, workload.inputs, workload.outputs)
            captured = followed(wrapper, workload.inputs, strict=False).module(check_guards=False)
            _tell_calls_apart(captured)
            _fuse_conv_bn_(captured)
            _fuse_linear_bn_(captured)
            inserted = prepare_qat_pt2e(captured, _quantizer(symmetric))
    # The module itself runs, or there would be no trained model to compare with.
    except Exception as error:
        raise BadModel(
            f"{name} cannot follow it: {reason(error)}",
            where=type(module).__name__,
            fix="keep data-dependent Python (int(), .item(), if on a tensor) out of forward, or use quantize.static",
        ) from error
    made = _module(inserted, [spec.name for spec in workload.inputs])
    # The buffers of the ranges get their size from the first batch, and a checkpoint needs them to have one.
    with torch.no_grad():
        made(**next(train.tensors(workload))[0])
    return made


def _tell_calls_apart(captured: "GraphModule") -> None:
    """Name each further call of a module as one of its own: torchao takes all calls for one layer, and refuses it."""
    calls: Counter[tuple[str, Any]] = Counter()
    for node in captured.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            key, (path, kind) = list(stack.items())[-1]
            calls[path, node.target] += 1
            if (number := calls[path, node.target]) > 1:
                node.meta["nn_module_stack"] = {**stack, key: (f"{path}@{number}", kind)}


def _quantizer(symmetric: bool) -> Any:
    """Return torchao's rules for the layers that a CPU runs in INT8; the activations around zero if `symmetric`."""
    import torch
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    # What ONNX Runtime then runs on this CPU must not overflow; it is the activations that get 7 bits.
    reduced = not symmetric and cpu.reduced_range(None, "cpu")
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True, reduce_range=reduced)
    if symmetric:
        spec = replace(
            config.input_activation,
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_symmetric,
        )
        config = replace(config, input_activation=spec, output_activation=spec)
    return x86.X86InductorQuantizer().set_global(config)


def _module(inserted: "GraphModule", names: list[str]) -> "nn.Module":
    """Return a module around a captured graph that takes its inputs by name and follows `train()` and `eval()`."""
    from torch import nn
    from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train

    class Captured(nn.Module):
        """A graph has its batch norms and dropouts written into it in one of the modes."""

        def __init__(self) -> None:
            super().__init__()
            self.module = inserted

        def train(self, mode: bool = True) -> Self:
            if mode != self.training:
                (move_exported_model_to_train if mode else move_exported_model_to_eval)(self.module)
            self.training = mode
            return self

        def forward(self, **inputs: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
            returned: tuple[torch.Tensor, ...] = self.module(*(inputs[name] for name in names))
            return returned

    return Captured().eval()


def rounds(module: "nn.Module") -> bool:
    """Say whether torchao found something to round in a module that `prepared` returned."""
    return any("activation_post_process" in name for name, _ in module.named_modules())


def converted(trained: "nn.Module", workload: Workload) -> "nn.Module":
    """Return the module with its weights stored in int8; `trained`, from `prepared`, is of no use afterwards."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    with graph.quiet():
        made = convert_pt2e(trained.module)
        return _module(made, [spec.name for spec in workload.inputs])


def to_onnx(module: "nn.Module", workload: Workload, path: Path) -> Path:
    """Write a converted module to `path` as Q/DQ and return the path.

    Raises:
        BadGraph: no exporter can follow it, or an axis stays frozen.
    """
    from optimize.methods.export import verify
    from optimize.methods.export.onnx import written

    def check(file: Path) -> None:
        # The module and its graph round apart.
        verify.check(file, module, workload.inputs, workload.outputs, values=False)

    written(module, workload.inputs, workload.outputs, path, check)
    made = graph.load(path)
    graph.shorten_names(made.graph)
    for node in made.graph:
        node.name = (node.name or "").removeprefix(WRAPPED)
    return graph.save(made, path)
