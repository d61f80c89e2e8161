"""Removing versions: what is live, what it would be rolled back to and what is to be kept stays, for any counts."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig

from serve.config import model_config
from serve.repository import tree as repository
from serve.rollout import rollout
from tests.serve.commands.test_up import serve

PAST = st.sampled_from(["staged", "failed", "lived"])


def lay_out(place: Path, past: Sequence[str], live: int | None) -> None:
    """Write versions 1, 2, … with what became of them, without a model in them, and serve one."""
    config = ModelConfig(name="m", backend="onnxruntime")
    config.version_policy.specific.versions.extend([live] if live else [99])
    for number, happened in enumerate(past, 1):
        (place / "m" / str(number)).mkdir(parents=True)
        lineage = {"digests": {}, "lived": [f"2026-01-{number:02}"] if happened == "lived" else []}
        lineage |= {"failed": {"why": "refused"}} if happened == "failed" else {}
        (place / "m" / str(number) / repository.LINEAGE).write_text(json.dumps(lineage))
    (place / "m" / repository.CONFIG).write_text(model_config.text(config))


@settings(max_examples=60, deadline=None)
@given(past=st.lists(PAST, min_size=1, max_size=9), keep=st.integers(1, 12), data=st.data())
def test_never_what_is_live_previous_or_kept(past: list[str], keep: int, data: st.DataObject) -> None:
    live = data.draw(st.none() | st.integers(1, len(past)))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "repository"
        lay_out(place, past, live)
        numbers = range(1, len(past) + 1)
        lived = [number for number in numbers if past[number - 1] == "lived" and number != live]
        spared = {*lived[-1:], *numbers[-keep:], *([live] if live else [])}
        gone = rollout.remove(place, "m", keep)
        assert gone == sorted(set(numbers) - spared)
        assert repository.numbers(place, "m") == sorted(spared)
        assert rollout.remove(place, "m", keep) == []


def test_more_are_kept_than_there_are(tmp_path: Path) -> None:
    lay_out(tmp_path / "repository", ["lived", "lived", "staged", "staged"], 2)
    done = serve("remove", "m", "--keep", "6", "--repository", str(tmp_path / "repository"))
    assert done.stdout == "removed: nothing\n", done.stderr
    assert repository.numbers(tmp_path / "repository", "m") == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 3])
def test_all_removes_that_model_alone(tmp_path: Path, count: int) -> None:
    place = tmp_path / "repository"
    lay_out(place, ["staged"] * count, 1)
    (place / "m").rename(place / "other")
    lay_out(place, ["staged"] * count, 1)
    assert rollout.remove_model(place, "m") == list(range(1, count + 1))
    assert repository.models(place) == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]
