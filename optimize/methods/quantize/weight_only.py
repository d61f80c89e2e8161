"""quantize.weight_only: dense weights and embedding tables in 8 or 4 bits, activations in float.

Weights are rounded to nearest in blocks along the input axis, each block with a scale of its own, and unpacked inside
the product (ONNX Runtime's MatMulNBits); the finer the blocks, the nearer and the larger (Dettmers and Zettlemoyer,
"The case for 4-bit precision", arXiv 2212.09720). It keeps quality best of all INT8 methods and gains little or no
speed: it saves memory. A table in 8 bits has one scale a row and needs standard operators only. For TensorRT, which has
no packed products, a weight is a DequantizeLinear: in 4 bits in blocks, the largest up to `block_size` of which its
input axis is whole ones, as TensorRT asks for; in 8 bits with one scale for each output channel.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.graph import graph, share, table
from optimize.model.errors import BadGraph, BadRecipe, NoEffect
from optimize.step import options
from serve.config.target import TENSORRT, Target

if TYPE_CHECKING:
    import onnx_ir

    from optimize.step.contract import Context

Bits = Literal["int8", "int4", "float"]
Block = Literal["16", "32", "64", "128", "256"]
PRODUCTS, TABLES = ("MatMul", "Gemm"), ("Gather",)
OPSET = 21
"""The first opset with 4 bits, and with scales for blocks."""
MOST = {"int8": 127, "int4": 7}
ACCURACY = {"float": 1, "int8": 4}
"""What ONNX Runtime's MatMulNBits calls the least precision of the activations: 1 is float32, 4 is int8."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WeightOnly:
    """Weights and embedding tables in 8 or 4 bits, everything else in float."""

    weights: Bits = Field(default="int8", description="Dense weights.")
    tables: Bits = Field(default="int8", description="Embedding tables.")
    block_size: Block = Field(
        default="32", description="Values along the input axis that share a scale; for TensorRT at most so many."
    )
    symmetric: bool = Field(default=True, description="Blocks have no zero point.")
    activations: Literal["float", "int8"] = Field(
        default="float",
        description="What the dense layers multiply the weights with; int8 rounds activations block by block inside "
        "the product, which is faster and less exact.",
    )
    exclude: tuple[str, ...] = options.EXCLUDED_NODES
    partial: bool = options.PARTIAL


def suited(config: WeightOnly, target: Target) -> WeightOnly:
    """Return the config.

    Raises:
        BadRecipe: the target's runtime has no such operators.
    """
    if target.runtime not in ("onnxruntime", *TENSORRT):
        raise BadRecipe(
            f"quantize.weight_only writes operators of ONNX Runtime, the target's runtime is {target.runtime}",
            fix='leave it out, or set runtime = "onnxruntime"',
        )
    wrong = {
        "symmetric = false": not config.symmetric,
        'activations = "int8"': config.activations == "int8",
        'tables = "int4"': config.tables == "int4",
    }
    for said in (said for said, is_wrong in wrong.items() if is_wrong and target.runtime in TENSORRT):
        raise BadRecipe(f"quantize.weight_only: TensorRT takes no {said}", fix="leave that key out")
    return config


def matches(subject: Path) -> list[str]:
    """List the nodes with weights that can be quantized."""
    model = graph.quantizable(subject)
    return graph.names_of(model, (*PRODUCTS, *TABLES))


def apply(config: WeightOnly, subject: Path, context: "Context") -> Path:
    """Quantize the graph in place of its file.

    Raises:
        NoEffect: nothing is left to quantize.
    """
    engine = context.target.runtime in TENSORRT
    model = graph.quantizable(subject)
    kept = set(graph.excluded(model, config.exclude))
    found = {"weights": graph.names_of(model, PRODUCTS), "tables": graph.names_of(model, TABLES)}
    chosen = {
        name: bits
        for what, bits in (("weights", config.weights), ("tables", config.tables))
        for name in found[what]
        if bits != "float" and name not in kept
    }
    if not chosen:
        raise NoEffect(
            "quantize.weight_only: no weight is left to quantize",
            fix=f"it could match: {', '.join([*found['weights'], *found['tables']]) or 'nothing in this model'}",
        )
    for node in [node for node in model.graph if node.name in chosen and node.op_type == "Gemm"]:
        _split_gemm(model, node)
    if engine:
        return graph.save(_unpacked(model, chosen, int(config.block_size)), subject)
    ties = _ties(model, chosen, int(config.block_size))
    for node in [node for node in model.graph if node.name in chosen and node.op_type == "Gather"]:
        if node.name in ties or chosen[str(node.name)] == "int8":
            del chosen[str(node.name)]
            if node.name not in ties:
                table.round_rows(model, node)
    graph.save(model, subject)
    return graph.rewrite(
        subject,
        lambda source, destination: _pack(config, chosen, Path(source), Path(destination)),
        lambda packed: _look_up(packed, ties),
    )


def _unpacked(model: "onnx_ir.Model", chosen: Mapping[str, str], block_size: int) -> "onnx_ir.Model":
    """Let the chosen products take weights that a DequantizeLinear before them gives, in place; and round tables."""
    for node in [node for node in model.graph if node.name in chosen]:
        if node.op_type == "Gather":
            table.round_rows(model, node, pairs=True)
        else:
            node.replace_input_with(1, _dequantized(model, node, chosen[str(node.name)], block_size))
    model.opset_imports[""] = max(OPSET, model.opset_imports[""])
    graph.clean(model)
    return model


def _dequantized(model: "onnx_ir.Model", node: "onnx_ir.Node", bits: str, block_size: int) -> "onnx_ir.Value":
    import ml_dtypes
    import numpy as np
    import onnx_ir

    weight = graph.constant(node.inputs[1]).astype(np.float32)
    size = _whole(str(node.name), len(weight), block_size) if bits == "int4" else len(weight)
    starts = range(0, len(weight), size)
    reached = np.stack([np.abs(weight[start : start + size]).max(axis=0) for start in starts])
    scale = np.maximum(reached, table.SMALLEST) / MOST[bits]
    rounded = np.rint(weight / np.repeat(scale, size, axis=0))
    stored = rounded.astype(ml_dtypes.int4 if bits == "int4" else np.int8)
    arrays = {"rounded": stored, "scale": (scale if bits == "int4" else scale[0]).astype(np.float32)}
    values = [onnx_ir.Value(name=f"{node.name}_{key}", const_value=onnx_ir.tensor(arrays[key])) for key in arrays]
    for value in values:
        model.graph.register_initializer(value)
    where = {"axis": 0, "block_size": size} if bits == "int4" else {"axis": 1}
    floats = onnx_ir.node("DequantizeLinear", values, attributes=where, name=f"{node.name}_dequantized")
    model.graph.insert_before(node, floats)
    return floats.outputs[0]


def _whole(name: str, length: int, block_size: int) -> int:
    """Return the largest block up to `block_size` of which an input axis is whole ones.

    Raises:
        BadGraph: there is none.
    """
    fitting = [size for size in map(int, get_args(Block)) if size <= block_size and length % size == 0]
    if not fitting:
        raise BadGraph(
            f"quantize.weight_only: {name} has {length} inputs, and TensorRT takes 4 bits in whole blocks only",
            fix=f'exclude = ["{name}"], or weights = "int8"',
        )
    return max(fitting)


def _ties(model: "onnx_ir.Model", chosen: Mapping[str, str], block_size: int) -> dict[str, str]:
    """Return for each table the product whose weight is the same numbers and gets as many bits."""
    found: dict[str, str] = {}
    tables = {weight: source for source, weight, turned in share.twins(model) if turned}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" and node.name in chosen else None
        source = tables.get(weight) if weight is not None else None
        if source is None or source.const_value is None or source.const_value.shape.numpy()[1] % block_size:
            continue
        for user, _ in source.uses():
            if user.op_type == "Gather" and chosen.get(str(user.name)) == chosen[str(node.name)]:
                found.setdefault(str(user.name), str(node.name))
    return found


def _look_up(model: "onnx_ir.Model", ties: Mapping[str, str]) -> None:
    """Let each table in `ties` be looked up in the packed weight of its product, in place."""
    import numpy as np
    import onnx_ir

    packed = {str(node.name).rpartition("_Q")[0]: node for node in model.graph if node.op_type == "MatMulNBits"}
    for node in [node for node in model.graph if node.name in ties]:
        product = packed[ties[str(node.name)]]
        rows = product.attributes.get_int("N", 0)
        shape = onnx_ir.Value(name=f"{node.name}_rows", const_value=onnx_ir.tensor(np.array([rows, -1])))
        model.graph.register_initializer(shape)
        flat = [onnx_ir.node("Reshape", [value, shape]) for value in product.inputs[1:]]
        data, *scales = (one.outputs[0] for one in flat)
        row = onnx_ir.node(
            "GatherBlockQuantized",
            [data, node.inputs[1], *scales],
            domain="com.microsoft",
            attributes={
                "gather_axis": 0,
                "quantize_axis": 1,
                "block_size": product.attributes.get_int("block_size", 0),
                "bits": product.attributes.get_int("bits", 0),
            },
            name=node.name,
        )
        onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], [*flat, row], node.outputs, row.outputs)


def _split_gemm(model: "onnx_ir.Model", node: "onnx_ir.Node") -> None:
    """Make MatMul, under the same name, and Add of a Gemm, of which ONNX Runtime has no packed version."""
    import numpy as np
    import onnx_ir

    number = node.attributes.get_float
    if node.attributes.get_int("transA", 0) or number("alpha", 1.0) != 1.0 or number("beta", 1.0) != 1.0:
        raise BadGraph(f"quantize.weight_only: {node.name} scales its product", fix=f'exclude = ["{node.name}"]')
    weight = graph.constant(node.inputs[1])
    turned = np.ascontiguousarray(weight.T if node.attributes.get_int("transB", 0) else weight)
    value = onnx_ir.Value(name=f"{node.name}_weight", const_value=onnx_ir.tensor(turned))
    model.graph.register_initializer(value)
    product = onnx_ir.node("MatMul", [node.inputs[0], value], name=node.name)
    product.outputs[0].name = f"{node.name}_product"
    nodes, result = [product], product.outputs[0]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes.append(onnx_ir.node("Add", [result, node.inputs[2]], name=f"{node.name}_bias"))
        result = nodes[-1].outputs[0]
    onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, [result])


def _pack(config: WeightOnly, chosen: Mapping[str, str], source: Path, destination: Path) -> None:
    """Write `source` with the chosen nodes packed; an INT8 table is done already."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    model = onnx.load(source)
    for bits in (8, 4):
        names = {name for name, kind in chosen.items() if kind == f"int{bits}"}
        if not names:
            continue
        algorithm = DefaultWeightOnlyQuantConfig(
            block_size=int(config.block_size),
            is_symmetric=config.symmetric,
            accuracy_level=ACCURACY[config.activations],
            op_types_to_quantize=("MatMul", "Gather") if bits == 4 else ("MatMul",),
            bits=bits,
        )
        others = [node.name for node in model.graph.node if node.name not in names]
        packer = MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=algorithm)
        packer.process()
        model = packer.model.model
    external = model.ByteSize() >= graph.LARGEST_FILE
    onnx.save(model, destination, save_as_external_data=external, location=f"{destination.name}.data")
