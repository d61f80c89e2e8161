"""Effect: what a method costs and gains on one layer, or one group of layers, with all others left alone."""

import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelathe.tensors import TensorSpec, generated
from optimize.graph import graph
from optimize.model.errors import NoEffect
from optimize.predict import inner
from optimize.source.workload import fewest

if TYPE_CHECKING:
    import onnx_ir

    from optimize.judge.evaluate import Quality
    from optimize.step.contract import Context, Method


@dataclass(frozen=True)
class Effect:
    """What one method does to the model where it treats one layer, or one group of layers, alone.

    Args:
        name: of the layer or group.
        method: as recipes spell it.
        metric: the workload's first score.
        loss: how much worse the treated model's score is, over the judged samples; positive is worse.
        low, high: paired 95 % interval of `loss`.
        error: root mean square of the change of an output over that of the output, the largest of all outputs.
        bytes_saved: the untreated file's minus the treated one's.
        speedup: how many times faster than the untreated file, by batch size.
        interval: 95 % interval of `speedup`.
        control: 95 % interval of how many times faster the untreated file is than itself, in the same rounds.
        members: the layers of a group, as a recipe's `exclude` names them.
    """

    name: str
    method: str
    metric: str
    loss: float
    low: float
    high: float
    error: float
    bytes_saved: int
    speedup: Mapping[str, float] = field(default_factory=dict)
    interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    control: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    members: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Untreated:
    """The float model that every effect is against: its ONNX file, its quality, and the trained model's."""

    path: Path
    quality: "Quality"
    trained: "Quality"


def untreated(path: Path, context: "Context") -> Untreated:
    """Judge the float ONNX file `path` on the evaluation samples of `context.workload`."""
    from optimize.judge.evaluate import evaluate
    from optimize.predict.module import TorchPredictor
    from optimize.predict.runtimes import open_graph

    workload = context.workload
    trained = evaluate(TorchPredictor(context.trained, workload.outputs), workload)
    with open_graph(path, context.target) as predictor:
        return Untreated(path, evaluate(predictor, workload, trained.outputs), trained)


def treat(method: "Method", config: Any, subject: Any, folder: Path, context: "Context") -> Any:
    """Apply a method to a copy of `subject` and return what it made: an ONNX file in `folder`, or a module.

    Raises:
        BadRecipe: the target's runtime lacks what the method writes.
        NoEffect: the method changed nothing.
        Whatever else the method raises.
    """
    from optimize.judge import ensure
    from optimize.step.contract import fingerprint

    config = method.suited(config, context.target)
    made = method.apply(config, ensure.copy(subject, folder), replace(context, scratch=folder))
    if fingerprint(made) == fingerprint(subject):
        raise NoEffect("nothing changed", fix="leave the layer out")
    return made


def effect(name: str, method: str, path: Path, against: Untreated, context: "Context") -> Effect:
    """Judge the file of a model of which the layer or group `name` was treated; its speed is not measured."""
    from optimize.judge import measure
    from optimize.judge.evaluate import compare, evaluate, relative_error
    from optimize.predict.runtimes import open_graph

    with open_graph(path, context.target) as predictor:
        quality = evaluate(predictor, context.workload, against.trained.outputs)
    before, after = against.quality.scores[0], quality.scores[0]
    loss, low, high = compare(context.workload, after, before).loss
    saved = measure.file_bytes(against.path) - measure.file_bytes(path)
    changed = max(
        (
            relative_error(quality.outputs[output], array)
            for output, array in against.quality.outputs.items()
            if array.dtype.kind == "f"
        ),
        default=0.0,
    )
    return Effect(name, method, before.metric, loss, low, high, changed, saved)


def others(path: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Return globs that together match every node of an ONNX file but `names`."""
    kept = set(names)
    return tuple(glob.escape(str(node.name)) for node in graph.load(path).graph if node.name and node.name not in kept)


def gains(path: Path, names: Sequence[str], inputs: Sequence[TensorSpec]) -> dict[str, float]:
    """Return what there is to gain at each of these nodes: its share of the multiplications plus that of the bytes.

    Estimated, not measured, so that a search that goes by it ends the same way every time.

    Args:
        path: a float ONNX file.
        names: of nodes with a constant weight.
        inputs: their typical sizes count, for one sample.
    """
    nodes = {str(node.name): node for node in graph.quantizable(path).graph if node.name in names}
    sizes = {name: sum(weight.size for weight in _weights(node)) for name, node in nodes.items()}
    results = {name: str(node.outputs[0].name) for name, node in nodes.items()}
    values = next(inner.values(path, list(results.values()), [generated(inputs, fewest(inputs))]))
    work = {name: sizes[name] * _uses(node, values[results[name]].shape) for name, node in nodes.items()}
    return {name: work[name] / max(sum(work.values()), 1) + sizes[name] / max(sum(sizes.values()), 1) for name in nodes}


def _weights(node: "onnx_ir.Node") -> list["onnx_ir.TensorProtocol"]:
    return [value.const_value for value in node.inputs if value is not None and value.const_value is not None]


def _uses(node: "onnx_ir.Node", result: tuple[int, ...]) -> float:
    """Return how often each weight of the node is multiplied with something, given the shape of its result."""
    if node.op_type == "Gather":
        return 0
    if node.op_type in ("Conv", "ConvTranspose"):
        # A transposed one multiplies at the points of its input, of which a stride makes more.
        strides = node.attributes.get_ints("strides", ()) if node.op_type == "ConvTranspose" else ()
        return math.prod(result[2:]) / math.prod(strides)
    # [steps, directions, batch, hidden] or [..., rows, columns].
    return result[0] if node.op_type in ("LSTM", "GRU") else math.prod(result[:-1])
