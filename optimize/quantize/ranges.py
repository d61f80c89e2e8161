"""Ranges: the largest magnitudes that float values inside a graph reach on given batches."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from loadtest.tensors import Arrays
from optimize.export import graph


def largest(path: Path, names: Sequence[str], batches: Iterable[Arrays]) -> dict[str, float]:
    """Return the largest magnitude that each of the values `names` reaches.

    Args:
        path: an ONNX file; left as it is.
        names: float32 values: results of nodes, or inputs of the graph.
        batches: inputs by name.
    """
    import onnx_ir

    from optimize.predict import OnnxPredictor

    model = graph.load(path)
    there = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    for value in [output for node in model.graph for output in node.outputs]:
        if value.name in names and value.name not in there:
            value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
            model.graph.outputs.append(value)
    found = dict.fromkeys(names, 0.0)
    opened = graph.save(model, path.with_name(f".opened-{path.name}"))
    try:
        with OnnxPredictor(opened) as predictor:
            for batch in batches:
                values = {**batch, **predictor.predict(batch)}
                for name in names:
                    found[name] = max(found[name], float(np.abs(values[name]).max(initial=0.0)))
    finally:
        for file in opened.parent.glob(f"{opened.name}*"):
            file.unlink()
    return found
