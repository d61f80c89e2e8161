import numpy as np
import pytest
import torch
from torch import nn

from modelathe.errors import ModelatheError, UsageError
from optimize.model.errors import BadGraph, BadModel
from optimize.predict.endpoint import EndpointPredictor
from optimize.predict.module import forward
from optimize.predict.onnxruntime import OnnxPredictor, RtxPredictor


class Returns(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> object:
        return self.value(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (lambda x: x, ["a"]),
        (lambda x: (x, x + 1), ["a", "b"]),
        (lambda x: [x], ["a"]),
        (lambda x: {"b": x + 1, "a": x}, ["a", "b"]),
    ],
)
def test_outputs_get_the_declared_names(returned: object, names: list[str]) -> None:
    x = torch.zeros(2)
    answer = forward(Returns(returned), {"x": x}, names)
    assert list(answer) == names
    assert all(torch.equal(answer[name], x + number) for number, name in enumerate(names))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda x: (x, x), "2 unnamed tensors"),
        (lambda x: {"other": x}, "a dict with"),
        (lambda x: None, "returns NoneType"),
        (lambda x: (x, "text"), "returns tuple"),
    ],
)
def test_other_outputs_are_refused_with_the_way_out(returned: object, said: str) -> None:
    with pytest.raises(BadModel, match=said) as error:
        forward(Returns(returned), {"x": torch.zeros(2)}, ["logits"])
    assert "outputs" in error.value.fix


def test_an_input_the_model_does_not_take() -> None:
    with pytest.raises(BadModel, match="does not take its inputs"):
        forward(Returns(lambda x: x), {"picture": torch.zeros(2), "other": torch.zeros(2)}, ["logits"])
    with pytest.raises(BadModel, match="does not take its inputs"):
        forward(nn.Linear(3, 2), {"input": torch.zeros(2, 4)}, ["logits"])


def test_a_corrupt_onnx_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(BadGraph) as error:
        OnnxPredictor(path)
    assert error.value.where == str(path)


def test_a_gpu_that_tensorrt_for_rtx_does_not_take(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    import onnxruntime

    # What it says beside an H200: there is no device of its own.
    monkeypatch.setattr("optimize.predict.onnxruntime._register_rtx", lambda _name: None)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", list)
    with pytest.raises(BadGraph, match="no H100 or H200") as error:
        RtxPredictor(tmp_path / "model.onnx", "cuda")
    assert 'runtime = "onnxruntime"' in error.value.fix


@pytest.mark.parametrize("url", ["127.0.0.1:8001/model", "grpc://127.0.0.1:8001", "ftp://127.0.0.1:1/model"])
def test_a_malformed_endpoint(url: str) -> None:
    with pytest.raises(UsageError):
        EndpointPredictor(url)


def test_an_absent_endpoint() -> None:
    with pytest.raises(ModelatheError) as error, EndpointPredictor("grpc://127.0.0.1:1/model") as absent:
        absent.predict({"x": np.zeros((1, 2), np.float32)})
    assert error.value.exit_code == 5
