"""A batch with bad requests in it: what everybody gets, and how many runs of the model that costs."""

import importlib.util
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.record import counts
from modelathe.client import connect
from modelathe.errors import RequestRejected
from serve.pipelines import publish
from serve.server.endpoint import Endpoint
from tests.serve.backends.test_backend import TABLE, ask_at_once, imported
from tests.serve.backends.test_backend import lab as lab

BAD = 99.0
MODELS = Path(publish.__file__).with_name("models")


@pytest.fixture(scope="module")
def backend() -> Iterator[types.SimpleNamespace]:
    with imported("onnxruntime") as modules:
        triton = modules.instance.pb
        triton.Logger = types.SimpleNamespace(log_info=lambda text: None, log_error=lambda text: None)
        triton.Tensor = lambda name, array: types.SimpleNamespace(name=name, as_numpy=lambda: array)
        triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START, triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 1, 2
        triton.TritonError = type("Refused", (), {"INTERNAL": 1, "INVALID_ARG": 2, "__init__": keep})
        triton.InferenceResponse = lambda tensors=(), error=None: types.SimpleNamespace(tensors=tensors, error=error)
        triton.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
        yield modules


def keep(self: object, text: str, code: int) -> None:
    self.text, self.code = text, code  # type: ignore[attr-defined]


def instance(backend: types.SimpleNamespace, whole: bool = False) -> object:
    """An instance of y = 2 x, and of y = the sum of the batch where it is `whole`; it counts its runs."""

    class Doubling(backend.instance.Instance):
        batching, finite_only, states, inputs, outputs = True, True, {}, ["x", "more"], ["y"]
        slots, single = 0, ()
        public_text = staticmethod(str)
        runs = 0

        def run(self, names: list[str], feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.runs += 1
            if (feed["x"] == BAD).any():
                raise RuntimeError("bad")
            total = feed["x"] + feed.get("more", 0)
            return {"y": total.sum(0, keepdims=True) if whole else 2 * total}

    return Doubling()


def request(value: float, **more: float) -> types.SimpleNamespace:
    values = {"x": value, **more}
    tensors = {
        name: types.SimpleNamespace(as_numpy=lambda value=value: np.full((1, 1), value, np.float32))
        for name, value in values.items()
    }
    return types.SimpleNamespace(
        tensors=tensors, requested_output_names=lambda: ["y"], flags=lambda: 0, correlation_id=lambda: 0
    )


def said(answer: types.SimpleNamespace) -> float | str:
    return answer.error.text if answer.error else float(answer.tensors[0].as_numpy()[0, 0])


@given(size=st.integers(1, 64), data=st.data())
@settings(deadline=None)
def test_one_refused_request_costs_two_runs_for_each_halving(
    backend: types.SimpleNamespace, size: int, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, size - 1))
    values = [float(number) for number in range(size)]
    values[place] = BAD
    made = instance(backend)
    answers = [said(answer) for answer in made.execute([request(value) for value in values])]
    assert answers == ["the model refused the request: bad" if value == BAD else 2 * value for value in values]
    assert made.runs <= 2 * math.ceil(math.log2(size)) + 1


@given(st.lists(st.sampled_from([1.0, 2.0, BAD, math.nan]), min_size=1, max_size=40))
@settings(deadline=None)
def test_many_bad_requests_cost_no_more_than_each_alone_twice(
    backend: types.SimpleNamespace, values: list[float]
) -> None:
    made = instance(backend)
    answers = [said(answer) for answer in made.execute([request(value) for value in values])]
    told = {BAD: "the model refused the request: bad"}
    nonfinite = "the model refused the request: the input x holds NaN or infinity"
    assert answers == [nonfinite if math.isnan(value) else told.get(value, 2 * value) for value in values]
    assert made.runs <= 2 * len(values)


def test_what_is_refused_before_the_run_spoils_no_batch(backend: types.SimpleNamespace) -> None:
    made = instance(backend)
    answers = made.execute([request(1), request(math.nan), request(2, more=3.0), request(3), request(4, more=0.0)])
    assert [said(answer) for answer in answers if not answer.error] == [2, 10, 6, 8]
    assert "NaN" in answers[1].error.text
    assert made.runs == 2  # those with the optional input, and those without


def test_an_output_of_the_whole_batch_is_asked_for_one_by_one(backend: types.SimpleNamespace) -> None:
    made = instance(backend, whole=True)
    assert [said(answer) for answer in made.execute([request(1), request(2), request(BAD)])][:2] == [1, 2]
    made.runs = 0
    assert [said(answer) for answer in made.execute([request(value) for value in range(8)])] == list(range(8))
    assert made.runs == 9


def test_a_bad_text_in_a_pipelines_batch_costs_two_calls_for_each_halving(
    backend: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(MODELS))
    specification = importlib.util.spec_from_file_location("text_bls", MODELS / "text_bls" / "model.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    calls = []

    def call(encodings: list[float]) -> dict[str, np.ndarray]:
        calls.append(len(encodings))
        if BAD in encodings:
            raise module.said.__globals__["Refused"]("bad", 2)
        return {"y": np.array(encodings).reshape(-1, 1)}

    made = module.TritonPythonModel()
    made._call = call
    encoded = {place: [float(place), place + 0.5] for place in range(16)} | {5: [BAD]}
    answers = made._together(encoded)
    assert answers.pop(5).error.text == "bad"
    assert {place: answer.tensors[0].as_numpy().ravel().tolist() for place, answer in answers.items()} == {
        place: texts for place, texts in encoded.items() if place != 5
    }
    assert len(calls) == 2 * 4 + 1
    for name in ("step", "tokens"):
        sys.modules.pop(name, None)


@pytest.mark.timed
def test_a_real_batch_is_halved(lab: Endpoint) -> None:
    numbers = [1, 2, 3, 4, 5, 99, 6, 7]
    with connect(lab.grpc) as client:
        before, log = counts.counted(client, "gather"), len(lab.log.read_text())
        answers = ask_at_once(lab, "gather", [{"ids": np.array([[number]])} for number in numbers])
        counted = counts.counted(client, "gather") - before
    assert isinstance(answers.pop(5), RequestRejected)
    for number, answer in zip((*numbers[:5], *numbers[6:]), answers, strict=True):
        np.testing.assert_array_equal(answer["rows"], TABLE[[[[number]]]][0])
    assert counted.execution_count < len(numbers)
    text = lab.log.read_text()[log:]
    assert 1 <= text.count("its halves are run") <= 3
    assert text.count("a request failed") == 1
