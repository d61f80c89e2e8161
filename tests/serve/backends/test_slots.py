"""How many sequences there may be at a time, and what one more is told."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from modelathe.errors import BadInput
from modelathe.tensors import BATCH, TensorSpec
from serve.config import model_config, settings
from serve.config.target import Target
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from serve.watch import probe
from tests.serve.backends.test_backend import save
from tests.serve.backends.test_features import Session
from tests.serve.kinds import publish
from tests.serve.server.test_server import eventually

X, Y, SUM, TOTAL = (TensorSpec(name, "float32", (BATCH, 1)) for name in ("x", "y", "sum", "total"))
STATE = {"sum": "total"}
STRATEGIES = ("oldest", "direct")


def build(**sequence: object) -> model_config.ModelConfig:
    made = settings.read({"max_batch": 2, "sequence": {"state": STATE, **sequence}}, "m")
    return model_config.build("m", [X, SUM], [Y, TOTAL], Target(cores=1), [1], made)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> Iterator[tuple[Endpoint, Path]]:
    from onnx import TensorProto as T

    here = tmp_path_factory.mktemp("slots")
    place, onnx = here / "repository", here / "model.onnx"
    save(
        onnx,
        [("Add", ["x", "sum"], ["total"]), ("Identity", ["total"], ["y"])],
        [("x", T.FLOAT, ["batch", 1]), ("sum", T.FLOAT, ["batch", 1])],
        [("y", T.FLOAT, ["batch", 1]), ("total", T.FLOAT, ["batch", 1])],
    )
    memory = {"state": STATE, "slots": 2, "idle_s": 3}
    publish(place, "two", onnx, [X, SUM], [Y, TOTAL], {"max_batch": 1, "sequence": memory})
    for strategy in STRATEGIES:
        made = {"max_batch": 1, "nonfinite": "refuse", "sequence": {"state": STATE, "strategy": strategy}}
        publish(place, strategy, onnx, [X, SUM], [Y, TOTAL], made)
    with running(place, grace=0) as endpoint:
        yield endpoint, place


def test_one_sequence_more_is_refused_at_once_and_in_words(served: tuple[Endpoint, Path]) -> None:
    from tritonclient.utils import InferenceServerException

    endpoint, place = served
    one, two, three = (Session(endpoint, "two", number) for number in (1, 2, 3))
    try:
        assert [one.send(1, sequence_start=True), two.send(2, sequence_start=True)] == [1, 2]
        with pytest.raises(InferenceServerException, match="all 2 slots for sequences are taken") as refused:
            three.send(3, sequence_start=True)
        assert "UNAVAILABLE" in str(refused.value.status())
        with pytest.raises(InferenceServerException, match="no slot here; begin it again") as refused:
            three.send(4)
        assert "UNAVAILABLE" in str(refused.value.status())
        # Those that have a slot go on, a sequence of one request needs none, and the probe sends such.
        assert [one.send(1), two.send(2)] == [2, 4]
        assert three.send(5, sequence_start=True, sequence_end=True) == 5
        assert probe.health(endpoint, place) == dict.fromkeys(("two", *STRATEGIES), "answers")
        assert one.send(1, sequence_end=True) == 3
        assert three.send(3, sequence_start=True) == 3

        def freed() -> bool:
            """Whether a sequence without requests has lost its slot."""
            try:
                return one.send(7, sequence_start=True) == 7
            except InferenceServerException:
                return False

        assert not freed()
        assert eventually(freed)
    finally:
        for session in (one, two, three):
            session.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sequence_whose_first_request_was_refused_has_not_begun(served: tuple[Endpoint, Path], strategy: str) -> None:
    from tritonclient.utils import InferenceServerException

    session = Session(served[0], strategy, 7)
    try:
        with pytest.raises(InferenceServerException, match="NaN or infinity"):
            session.send(float("nan"), sequence_start=True)
        with pytest.raises(InferenceServerException, match="no slot here; begin it again"):
            session.send(1)
        assert [session.send(2, sequence_start=True), session.send(3)] == [2, 5]
        with pytest.raises(InferenceServerException, match="NaN or infinity"):
            session.send(float("nan"))
        assert session.send(4, sequence_end=True) == 9  # a later one that is refused leaves the state as it was
    finally:
        session.close()


def test_slots_are_more_than_the_largest_batch() -> None:
    config = build()
    assert config.parameters["modelathe.slots"].string_value == "256"
    assert config.sequence_batching.oldest.max_candidate_sequences > 256
    assert build(slots=1000).parameters["modelathe.slots"].string_value == "1000"
    with pytest.raises(BadInput, match="slots are the rows of the largest batch"):
        build(slots=3, strategy="direct")
