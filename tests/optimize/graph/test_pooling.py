"""A ReLU stands before a max-pooling where it is free there, and after it where a float result is quantized."""

from pathlib import Path

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, TensorSpec
from optimize.graph import graph, pooling
from optimize.methods.export.onnx import export

IMAGE = (TensorSpec("input", "float32", (BATCH, 3, 12, 12)),)


def exported(folder: Path, *middle: nn.Module) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *middle, nn.Conv2d(16, 16, 3), nn.Flatten())
    return export(model.eval(), IMAGE, ["y"], folder / "model.onnx")


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("middle", [(nn.MaxPool2d(2), nn.ReLU()), (nn.ReLU(), nn.MaxPool2d(2, padding=1))])
def test_an_export_lets_the_convolution_take_the_relu(middle: tuple[nn.Module, ...], tmp_path: Path) -> None:
    path = exported(tmp_path, *middle)
    assert kinds(path)[:3] == ["Conv", "Relu", "MaxPool"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert "Relu" not in kinds(tmp_path / "optimized.onnx")


class Branch(nn.Module):
    """What the pooling returns is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        pooled = torch.max_pool2d(self.conv(input), 2)
        return torch.cat([pooled, pooled.relu()], 1)


def test_a_pooling_that_others_read_stays(tmp_path: Path) -> None:
    path = export(Branch().eval(), IMAGE, ["y"], tmp_path / "model.onnx")
    assert kinds(path) == ["Conv", "MaxPool", "Relu", "Concat"]


@pytest.mark.parametrize(("floats", "order"), [((0,), ["MaxPool", "Relu"]), ((0, 1), ["Relu", "MaxPool"])])
def test_a_pooling_comes_first_only_where_quantization_follows(
    floats: tuple[int, ...], order: list[str], tmp_path: Path
) -> None:
    path = exported(tmp_path, nn.ReLU(), nn.MaxPool2d(2))
    model = graph.load(path)
    names = graph.names_of(model, ("Conv",))
    between = pooling.pool_first(model, [names[index] for index in floats])
    assert [node.op_type for node in model.graph if node.name in between] == order
    image = torch.randn(2, 3, 12, 12).numpy()
    onnx_ir.save(model, tmp_path / "moved.onnx")
    before, after = (
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"input": image})[0]
        for file in (path, tmp_path / "moved.onnx")
    )
    assert (before == after).all()
