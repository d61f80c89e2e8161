"""Inner: the values inside a graph, for given inputs."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from modelathe.tensors import Array, Arrays
from optimize.graph import graph


def values(path: Path, names: Sequence[str], batches: Iterable[Arrays]) -> Iterator[dict[str, Array]]:
    """Yield, for each batch, the values `names`: results of nodes, or inputs of the graph.

    Args:
        path: an ONNX file; left as it is.
        names: names of values in the graph.
        batches: inputs by name.

    Raises:
        BadGraph: ONNX Runtime cannot run it.
    """
    from optimize.predict.onnxruntime import OnnxPredictor

    model = graph.load(path)
    there = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    wanted = set(names)
    for value in [output for node in model.graph for output in node.outputs]:
        if value.name in wanted - there:
            model.graph.outputs.append(value)
    opened = graph.save(model, path.with_name(f".opened-{path.name}"))
    try:
        with OnnxPredictor(opened) as predictor:
            for batch in batches:
                found = {**batch, **predictor.predict(batch)}
                yield {name: found[name] for name in names}
    finally:
        for file in opened.parent.glob(f"{opened.name}*"):
            file.unlink()
