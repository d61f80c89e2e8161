"""export.onnx: a torch module becomes one ONNX file with the workload's names and dynamic axes."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from modelathe.tensors import Arrays, Dim, TensorSpec
from optimize.graph import graph, pooling
from optimize.methods.export import verify
from optimize.model.errors import BadGraph
from serve.repository import scratch

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from optimize.step.contract import Context


OTHERWISE = "keep data-dependent Python (int(), .item(), if on a tensor) out of forward"
CAUSES = {
    "ONNX has no operator": "write it in operators that ONNX has, or compute it outside of the model",
    "pack_padded|PackedSequence|PackPadded": "run the layer over the padded batch, without pack_padded_sequence, and "
    "take each sample's last step: y.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, y.shape[2]))[:, 0]",
    "fake tensor in the exported program": "compute it with torch's operators alone: no torch.autograd.grad, numpy or "
    "other libraries in forward",
    "Could not find an implementation": "let forward compute in float32: no autocast, .bfloat16() or .half() in it, "
    "and .float() where another dtype comes in",
}
"""Ways out by what an exporter, or ONNX Runtime of what it wrote, says."""
IR_VERSION = 10
"""What ONNX Runtime 1.18 and newer reads, as tritonserver has carried since release 24.05; opset 20 goes with it."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Onnx:
    """Export to ONNX."""

    # From 23 on attention is one operator, which no quantizer here knows; below 18 the exporter does not go.
    opset: int = Field(default=20, ge=18, le=22, description="Version of the ONNX operator set that the file asks for.")


def matches(subject: object) -> list[str]:
    """Return nothing: an export takes the whole model."""
    return []


def apply(config: Onnx, module: "nn.Module", context: "Context") -> Path:
    """Export the module into the step's scratch folder, unless the same was made of it already."""
    if context.exported is not None and config == Onnx():
        return context.exported
    workload = context.workload
    destination = context.scratch / "model.onnx"
    return export(module, workload.inputs, workload.outputs, destination, config.opset, real=workload.first())


def export(
    module: "nn.Module",
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    destination: Path,
    opset: int = 20,
    *,
    real: Arrays | None = None,
) -> Path:
    """Write `module` to `destination` as ONNX, checked against the module itself at several sizes.

    The exporters differ in what they can follow, so they are tried in turn until one yields a graph that is valid,
    answers as the module does and has no frozen axis.

    Args:
        module: takes `inputs` by name and returns one tensor for each of `outputs`, as
            `optimize.predict.module.forward` says.
        inputs: every `Dim` with room between its minimum and maximum becomes a dynamic axis of that name.
        outputs: names of the graph's outputs.
        destination: the file to write; weights of 2 GB and more go to `<name>.data` beside it.
        opset: version of the ONNX operator set.
        real: a batch of the user's own inputs, on which the two are compared as well.

    Returns:
        `destination`.

    Raises:
        BadModel: the module does not take these inputs or does not return these outputs.
        BadGraph: no exporter can follow the module, its forward branches on values, or an axis stays frozen; names the
            line or the axis.
    """

    def check(file: Path) -> None:
        verify.check(file, module, inputs, outputs, real=real)

    return written(module, inputs, outputs, destination, check, opset)


def written(
    module: "nn.Module",
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    destination: Path,
    check: Callable[[Path], None],
    opset: int = 20,
) -> Path:
    """Write `module` as `export` does, with a check of the caller's own, which raises BadGraph of what will not do."""
    from optimize.model.copies import folded

    module = module.eval()
    shapes = verify.output_dims(module, inputs, outputs)
    verify.warm(module, inputs, outputs)
    plain = folded(module)
    temporary = destination.with_name(f".{destination.name}")
    failures: list[BadGraph] = []
    for exporter in (_dynamo, _strict_dynamo, _legacy):
        try:
            subject = _traceable(plain) if exporter is _legacy else plain
            model = _captured(exporter, subject, inputs, outputs, opset)
            graph.name_nodes(model.graph)
            graph.clean(model)
            pooling.relu_first(model)
            graph.name_boundary(model, [spec.name for spec in inputs], outputs)
            graph.shape_boundary(model.graph, inputs, shapes)
            model.ir_version = min(model.ir_version, IR_VERSION)
            graph.save(model, temporary)
            check(temporary)
        except BadGraph as failure:
            failures.append(_with_way_out(failure))
            temporary.unlink(missing_ok=True)
            if exporter is _strict_dynamo and "data-dependent" in failure.what.lower():
                # The tracer would write down the branch that its examples take, as if there were no other.
                raise BadGraph(
                    f"cannot be exported: its forward branches on values{_line(failures[0])}",
                    where=type(module).__name__,
                    fix="choose with torch.where or torch.cond instead of if, and check values outside of forward",
                ) from failure
            continue
        return graph.move(temporary, destination)
    raise _telling(failures)


def _with_way_out(failure: BadGraph) -> BadGraph:
    """Return a failure with the way out that its words call for: ONNX Runtime's own knows nothing of the module."""
    fix = next((fix for word, fix in CAUSES.items() if re.search(word, failure.what)), failure.fix)
    return failure if fix == failure.fix else BadGraph(failure.what, where=failure.where, fix=fix)


def _traceable(module: "nn.Module") -> "nn.Module":
    """Return a module without torch's own attention, whose sizes the tracer freezes."""
    from torch import nn

    from optimize.model.attention import substitute_all
    from optimize.model.copies import copied

    if not any(isinstance(layer, nn.MultiheadAttention) for layer in module.modules()):
        return module
    return substitute_all(copied(module))


def _telling(failures: Sequence[BadGraph]) -> BadGraph:
    """Return the failure that names the cause: dynamo's own, unless it stopped at a size or another one knows more.

    A frozen axis found by running a graph says more than an exporter that gave up; but what the tracer has frozen is
    the cause only where dynamo could not keep the same size free.
    """
    first, *others = failures
    known = (failure for failure in failures if failure.fix in CAUSES.values())
    at_sizes = any(word in first.what for word in ("frozen", "specialized", "Constraint", "Could not guard"))
    frozen = (failure for failure in (others if at_sizes else others[:1]) if "frozen" in failure.what)
    return next(known, next(frozen, first))


def _captured(
    exporter: Callable[..., "onnx_ir.Model"],
    module: "nn.Module",
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    opset: int,
) -> "onnx_ir.Model":
    """Run one exporter in silence; whatever it raises becomes one BadGraph."""
    from optimize.model.attention import without_fast_path, without_mask_check

    try:
        with graph.quiet(), without_fast_path(), without_mask_check():
            model = exporter(wrapped(module, inputs, outputs), inputs, len(outputs), opset)
    # The module itself was tried at these sizes before, so whatever is raised here is the exporter's.
    except Exception as error:
        whole = f"{reason(error)} {_innermost(error)}"
        cause = next((fix for word, fix in CAUSES.items() if re.search(word, whole)), OTHERWISE)
        raise BadGraph(f"cannot be exported: {reason(error)}", where=type(module).__name__, fix=cause) from error
    if (found := model.graph.opset_imports.get("")) != opset:
        raise BadGraph(f"the exporter wrote opset {found} where {opset} was asked for", fix="ask for another opset")
    return model


def reason(error: BaseException) -> str:
    """Return the line of the innermost cause that says what went wrong; exporters wrap theirs in pages."""
    error = _innermost(error)
    if operator := re.search(r"(?:No ONNX function found for .*?op='|Exporting the operator ')([\w.:]+)'", str(error)):
        return f"ONNX has no operator for {operator[1]}"
    if "pack_padded_sequence" in str(error):
        return "torch.export does not follow pack_padded_sequence"
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "specialized" in line or "Could not" in line]
    return f"{type(error).__name__}: {(telling or lines or [''])[0]}"


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    """Return the place in the user's code that torch.export stopped at, as far as it says one."""
    found = re.search(r'raised this error:\s+File "(.+)", line (\d+)', str(_innermost(error)))
    return f" ({found[1]}, line {found[2]})" if found else ""


def wrapped(module: "nn.Module", inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> "nn.Module":
    """Return a module that takes the inputs in order and returns a tuple in the order of the outputs."""
    from torch import nn

    from optimize.predict.module import by_argument, named

    # Now: a tracer does not follow the reading of a signature.
    arguments = by_argument(module, [spec.name for spec in inputs])

    class Wrapper(nn.Module):
        """Positions are all that ONNX knows."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
            if arguments is None:
                returned = self.module(*args)
            else:
                returned = self.module(**dict(zip(arguments.values(), args, strict=True)))
            return tuple(named(returned, outputs, type(module).__name__).values())

    return Wrapper().eval()


def _dynamo(wrapper: "nn.Module", inputs: Sequence[TensorSpec], outputs: int, opset: int) -> "onnx_ir.Model":
    return _export_program(wrapper, inputs, outputs, opset, strict=False)


def _strict_dynamo(wrapper: "nn.Module", inputs: Sequence[TensorSpec], outputs: int, opset: int) -> "onnx_ir.Model":
    # Follows int(x.shape[0]), which the other one turns into a constant.
    return _export_program(wrapper, inputs, outputs, opset, strict=True)


def _export_program(
    wrapper: "nn.Module", inputs: Sequence[TensorSpec], outputs: int, opset: int, *, strict: bool
) -> "onnx_ir.Model":
    import torch

    program = followed(wrapper, inputs, strict=strict)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=[f"input_{index}" for index in range(len(inputs))],
        output_names=[f"output_{index}" for index in range(outputs)],
        verbose=False,
    )
    if exported is None:
        raise BadGraph("the exporter returned nothing", fix="ask for another opset")
    return exported.model


def followed(wrapper: "nn.Module", inputs: Sequence[TensorSpec], *, strict: bool) -> "ExportedProgram":
    """Return what torch.export makes of a module as `wrapped` returns it, its declared dims dynamic.

    Raises:
        Whatever torch.export raises.
    """
    import torch

    dims = {
        dim.name: torch.export.Dim(dim.name, min=dim.minimum, max=dim.maximum)
        for spec in inputs
        for dim in spec.dims
        if isinstance(dim, Dim) and dim.minimum < dim.maximum
    }
    dynamic = tuple(
        {axis: dims[dim.name] for axis, dim in enumerate(spec.dims) if isinstance(dim, Dim) and dim.name in dims}
        for spec in inputs
    )
    return torch.export.export(wrapper, _examples(inputs), dynamic_shapes=(dynamic,), strict=strict)


def _legacy(wrapper: "nn.Module", inputs: Sequence[TensorSpec], outputs: int, opset: int) -> "onnx_ir.Model":
    """Trace instead of following the code; the tracer ends at opset 20."""
    import onnx
    import onnx.version_converter
    import onnx_ir
    import torch

    names = [f"input_{index}" for index in range(len(inputs))]
    with scratch.folder() as folder:
        file = folder / "model.onnx"
        torch.onnx.export(
            wrapper,
            _examples(inputs),
            file,
            dynamo=False,
            opset_version=min(opset, 20),
            input_names=names,
            output_names=[f"output_{index}" for index in range(outputs)],
            dynamic_axes={
                name: {axis: dim.name for axis, dim in enumerate(spec.dims) if isinstance(dim, Dim)}
                for name, spec in zip(names, inputs, strict=True)
            },
        )
        model = onnx.load(file)
    return onnx_ir.from_proto(onnx.version_converter.convert_version(model, opset))


def _examples(inputs: Sequence[TensorSpec]) -> "tuple[torch.Tensor, ...]":
    """Return example inputs whose sizes differ from each other and from 1, which exporters take for fixed."""
    import torch

    arrays = verify.generate(inputs, verify.sizes_to_try(inputs)[1])
    return tuple(torch.from_numpy(arrays[spec.name]) for spec in inputs)
