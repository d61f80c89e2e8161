"""export.fuse: attention, GELU and layer normalization become one operator each, of ONNX Runtime's own.

The patterns are those of onnxscript's ort_fusions, which look at shapes. An ONNX file as modelathe keeps it has none
inside, and shape inference finds few through dynamic dims, so they are seen while the graph runs at several sizes. The
passes end at MultiHeadAttention, whose projections stay products of their own: no quantizer here takes the packed
Attention beyond that. Whether it pays is for a measurement to say: on a CPU these kernels can be slower than what ONNX
Runtime makes of the plain operators when it loads them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from modelathe.tensors import TensorSpec
from optimize.graph import graph
from optimize.model.errors import BadGraph, BadRecipe, NoEffect
from optimize.predict import inner

if TYPE_CHECKING:
    import onnx_ir

    from optimize.source.workload import Workload
    from optimize.step.contract import Context

TOLERANCE = 1e-4
"""Largest difference between the graph before and after, as a share of the output's largest value (at least 1)."""
CENTRES = ("Softmax", "Gelu", "Erf", "LayerNormalization")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Fuse:
    """Fuse attention (MultiHeadAttention), GELU (BiasGelu) and LayerNorm (SkipLayerNormalization)."""


def matches(subject: Path) -> list[str]:
    """List the nodes around which a pattern may lie."""
    return [str(node.name) for node in graph.load(subject).graph if node.op_type in CENTRES]


def apply(config: Fuse, subject: Path, context: "Context") -> Path:
    """Fuse the graph in place of its file; results stay the same up to rounding, which is checked.

    Raises:
        BadRecipe: the target's runtime has no such operators.
        NoEffect: no pattern was found.
        BadGraph: the fused graph answers otherwise.
    """
    if context.target.runtime != "onnxruntime":
        raise BadRecipe(
            f"export.fuse writes operators of ONNX Runtime, the target's runtime is {context.target.runtime}",
            fix='leave it out, or set runtime = "onnxruntime"',
        )
    model = graph.load(subject)
    modules = {output.name: graph.module_of(node) for node in model.graph for output in node.outputs}
    before = _own_operators(model)
    _record_shapes(model, subject, context.workload.inputs)
    with graph.quiet():
        _fuse(model)
    if _own_operators(model) == before:
        raise NoEffect(
            "export.fuse found no attention, no GELU after a bias and no LayerNorm after a sum",
            fix=f"leave it out; it looked around: {', '.join(matches(subject)) or 'nothing in this model'}",
        )
    graph.clean(model)
    for node in model.graph:
        if node.domain:
            node.name = f"{modules.get(node.outputs[0].name, '')}/{node.op_type}".lstrip("/")
    graph.number_names(model.graph)
    fused = graph.save(model, subject.with_name(f".fused-{subject.name}"))
    _compare(subject, fused, context.workload)
    return graph.move(fused, subject)


def _own_operators(model: "onnx_ir.Model") -> int:
    """Return how many operators are ONNX Runtime's own."""
    return sum(node.domain == "com.microsoft" for node in model.graph)


def _record_shapes(model: "onnx_ir.Model", path: Path, inputs: Sequence[TensorSpec]) -> None:
    """Give every inner value the type and the dims that it has when the graph runs."""
    import onnx_ir

    from optimize.methods.export import verify

    tried = verify.sizes_to_try(inputs)
    results = {str(output.name): output for node in model.graph for output in node.outputs if output.name}
    found = [
        {name: (array.shape, array.dtype) for name, array in values.items()}
        for values in inner.values(path, list(results), (verify.generate(inputs, sizes) for sizes in tried))
    ]
    for name, value in results.items():
        shapes = [each[name][0] for each in found]
        if value.is_graph_output():
            continue
        if len({len(shape) for shape in shapes}) == 1:
            value.shape = onnx_ir.Shape(_dim(sizes, tried) for sizes in zip(*shapes, strict=True))
        value.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(found[0][name][1]))


def _dim(sizes: tuple[int, ...], tried: Sequence[Mapping[str, int]]) -> int | str | None:
    """Return the size where it never changed, the dim that it followed, or None."""
    if len(set(sizes)) == 1:
        return sizes[0]
    return next((name for name in tried[0] if tuple(some[name] for some in tried) == sizes), None)


def _fuse(model: "onnx_ir.Model") -> None:
    """Apply onnxscript's passes for encoders, in the order of its own `fuse_xformers`."""
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import optimize
    from onnxscript.rewriter.ort_fusions import (
        bias_gelu,
        erfgelu,
        gelu,
        mha,
        mha_bias,
        mha_scale,
        sdpa,
        sdpa_via_mha,
        shape_optimization,
        skip_normalization,
    )

    optimize(model)
    shape_optimization.rules.apply_to_model(model)
    optimize(model)
    erfgelu.fuse_erfgelu(model)
    skip_normalization.fuse_skip_layer_normalization(model)
    passes.CommonSubexpressionEliminationPass()(model)
    sdpa.fuse_sdpa(model, apply_shape_inference=True)
    mha.fuse_mha2(model)
    mha_scale.fuse_mha_scale(model)
    mha_bias.fuse_mha_bias(model)
    gelu.fuse_gelu(model)
    bias_gelu.fuse_bias_gelu(model)
    sdpa_via_mha.replace_sdpa_by_mha(model)
    # Inlines the functions that no later pass took up.
    optimize(model)
    _join_transposes(model)


def _join_transposes(model: "onnx_ir.Model") -> None:
    """Make one Transpose of the way that torch's own attention layer splits [length, batch, width] into heads.

    MultiHeadAttention wants [batch, length, width] and splits it itself; without this its inputs go there and back.
    """
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

    def pattern(op: Any, x: Any, first: Any, second: Any, third: Any) -> Any:
        rows = op.Transpose(op.Reshape(x, first), perm=[1, 0, 2])
        heads = op.Reshape(rows, second, _outputs=["heads"])
        return op.Reshape(op.Transpose(heads, perm=[0, 2, 1, 3]), third, _outputs=["joined"])

    def same(context: Any, x: "onnx_ir.Value", heads: "onnx_ir.Value", **_: Any) -> bool:
        if x.shape is None or heads.shape is None or len(x.shape) != 3 or len(heads.shape) != 4:
            return False
        length, batch, width = x.shape
        return (heads.shape[0], heads.shape[2]) == (batch, length) and _product(heads.shape[1], heads.shape[3]) == width

    def replacement(op: Any, x: Any, **_: Any) -> Any:
        return op.Transpose(x, perm=[1, 0, 2])

    RewriteRuleSet([RewriteRule(pattern, replacement, same)]).apply_to_model(model)


def _product(one: object, other: object) -> int | None:
    return one * other if isinstance(one, int) and isinstance(other, int) else None


def _compare(before: Path, after: Path, workload: "Workload") -> None:
    """Run both files on generated inputs of several sizes and on a real batch.

    Raises:
        BadGraph: naming the output that differs.
    """
    from optimize.methods.export import verify
    from optimize.predict.onnxruntime import OnnxPredictor

    generated = [verify.generate(workload.inputs, sizes, seed=1) for sizes in verify.sizes_to_try(workload.inputs)]
    with OnnxPredictor(before) as one, OnnxPredictor(after) as other:
        for inputs in (*generated, workload.first()):
            fused = other.predict(inputs)
            for name, wanted in one.predict(inputs).items():
                scale = max(1.0, float(np.abs(np.nan_to_num(wanted, posinf=0, neginf=0)).max(initial=0.0)))
                if not np.allclose(fused[name], wanted, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
                    raise BadGraph(f"export.fuse changed output {name!r}", where=str(before), fix="leave it out")
