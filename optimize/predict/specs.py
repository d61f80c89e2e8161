"""Specs: what an ONNX file answers, as TensorSpecs."""

from pathlib import Path

from modelathe.tensors import UNBOUNDED, Arrays, Dim, TensorSpec
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.source.workload import Workload


def output_specs(workload: Workload, graph: Path, outputs: Arrays) -> list[TensorSpec]:
    """Return TensorSpecs of the outputs, batch axis first.

    Args:
        workload: gives the ranges of the dims that an output shares with an input.
        graph: the ONNX file; says which of an output's dims change size.
        outputs: some answers of it, which have the dtypes and the typical sizes.
    """
    shared = {dim.name: dim for spec in workload.inputs for dim in spec.dims if isinstance(dim, Dim)}
    with OnnxPredictor(graph) as onnx:
        shapes = {output.name: output.shape for output in onnx.session.get_outputs()}

    def dims(name: str) -> list[int | Dim]:
        sizes = outputs[name].shape[1:]
        return [
            shared.get(stated, Dim(stated, 1, size, UNBOUNDED)) if isinstance(stated, str) else size
            for stated, size in zip(shapes[name][1:], sizes, strict=True)
        ]

    batch = workload.inputs[0].dims[0]
    return [TensorSpec(name, str(outputs[name].dtype), (batch, *dims(name))) for name in workload.outputs]
