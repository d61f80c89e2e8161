"""Settings: defaults say nothing, wrong ones are named, and those without effect are refused."""

from pathlib import Path
from typing import Any

import pytest

from modelathe.errors import BadInput, UsageError
from modelathe.tensors import BATCH, Dim, TensorSpec
from serve.config import model_config, settings
from serve.config.target import Target

X = TensorSpec("x", "float32", (BATCH, Dim("tokens", 1, 8, 64)))
Y = TensorSpec("y", "float32", (BATCH, 3))
UNBATCHED = (TensorSpec("x", "float32", (4,)), TensorSpec("y", "float32", (3,)))


def build(asked: dict[str, Any], target: Target | None = None, tensors: tuple[TensorSpec, ...] = (X, Y)) -> Any:
    made = settings.read(asked, "test")
    return model_config.build("m", tensors[:1], tensors[1:], target or Target(cores=4), [1], made)


def test_a_document_holds_what_was_asked_for() -> None:
    assert settings.Settings().document() == {}
    asked = {"instances": 2, "buckets": {"tokens": (8, 64)}, "sequence": {"start": "x"}}
    made = settings.read(asked, "test")
    assert settings.read(made.document(), "again") == made
    assert set(made.document()) == set(asked)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"instanses": 2}, "unknown key 'instanses'"),
        ({"instances": 0}, "instances = 0 cannot be"),
        ({"queue_delay_us": -1}, "queue_delay_us = -1 cannot be"),
        ({"timeout_ms": float("inf")}, "timeout_ms = inf cannot be"),
        ({"on_timeout": "wait"}, "on_timeout = 'wait' cannot be"),
        ({"sequence": {"begin": "x"}}, "unknown key 'sequence.begin'"),
        ({"resources": {"memory": 0}}, "resources.memory = 0 cannot be"),
    ],
)
def test_a_wrong_key_or_value_is_named(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        settings.read(asked, "test")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"max_batch": 65}, "max_batch = 65 is above the largest batch of the model, 64"),
        ({"max_batch": 8, "preferred": [4, 16]}, "above the largest batch, 8"),
        ({"accelerator": "tensorrt"}, "accelerator: only a GPU has that"),
        ({"gpus": [0], "cuda_graphs": True}, "gpus, cuda_graphs: only a GPU has that"),
        ({"weight": 2}, "weight: it weighs who gets resources, and there are none"),
        ({"on_timeout": "delay"}, "on_timeout: there is no timeout_ms"),
        ({"buckets": {"words": [8]}}, "buckets: the inputs' dims that change size are tokens"),
        ({"sequence": {"start": "z"}}, "sequence: the tensors are x, y"),
        ({"sequence": {"start": "x"}, "queue": 3}, "queue: not together with a sequence"),
        ({"sequence": {"state": {"x": "y"}}}, "sequence: the state x must have fixed dims"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        build(asked)


@pytest.mark.parametrize(("dtype", "taken"), [("object", False), ("float32", False), ("uint64", True), ("int32", True)])
def test_which_ids_of_sequences_reach_a_model(dtype: str, taken: bool) -> None:
    tensors = (TensorSpec("who", dtype, (BATCH, 1)), X, Y)
    made = settings.read({"sequence": {"id": "who"}}, "test")

    def build_with_ids() -> Any:
        return model_config.build("m", tensors[:2], tensors[2:], Target(cores=4), [1], made)

    if taken:
        assert build_with_ids().sequence_batching.control_input[0].name == "who"
        return
    with pytest.raises(BadInput, match=f"the input who has the dtype {dtype}") as caught:
        build_with_ids()
    assert "let it take one of uint64, int64, uint32, int32" in caught.value.fix


def test_a_gpu_takes_an_accelerator_and_graphs_only_with_it() -> None:
    cuda = Target(device="cuda", cores=4)
    assert build({"accelerator": "tensorrt", "cuda_graphs": True}, cuda)
    with pytest.raises(BadInput, match="cuda_graphs: for the accelerator, which is not set"):
        build({"cuda_graphs": True}, cuda)


def test_batching_needs_a_batch_axis() -> None:
    with pytest.raises(BadInput, match="queue_delay_us: the server forms no batches of it"):
        build({"queue_delay_us": 5}, tensors=UNBATCHED)


def test_the_cores_are_shared_out() -> None:
    assert build({"instances": 2}).parameters["intra_op_thread_count"].string_value == "2"
    assert build({"instances": 8}).parameters["intra_op_thread_count"].string_value == "1"
    assert build({"instances": 2, "threads": 3}).parameters["intra_op_thread_count"].string_value == "3"


def test_pairs_change_the_file_which_changes_what_was(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[serve]\nqueue_delay_us = 100\ninstances = 2\nbuckets = {tokens = [8, 64]}\n")
    pairs = ["instances=3", "preferred=[4, 8]", "on_timeout=delay", "timeout_ms=1.5", "resources={memory = 2}"]
    made = settings.gather(file, pairs, {"queue_delay_us": 7, "cache": True})
    assert (made.queue_delay_us, made.instances, made.cache, made.preferred) == (100, 3, True, (4, 8))
    assert (made.on_timeout, made.timeout_ms, made.resources) == ("delay", 1.5, {"memory": 2})
    assert made.buckets == {"tokens": (8, 64)}
    with pytest.raises(UsageError, match="--set instances: has no value"):
        settings.gather(None, ["instances"], {})
    for content, says in (
        (b"[serve\n", "is not TOML"),
        (b"[serve]\non_timeout = '\xff'\n", "is not TOML"),
        (b"[srve]\ninstances = 2\n", r"has no table \[serve\]"),
        (b"serve = 3\n", r"has no table \[serve\]"),
    ):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=says):
            settings.gather(file, [], {})
