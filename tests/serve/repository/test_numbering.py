"""A version's number is never given again."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelathe import files
from modelathe.client import connect
from serve.config.errors import BadRepository
from serve.config.settings import Settings
from serve.config.target import Target
from serve.repository import numbering, staging
from serve.repository import tree as repository
from serve.repository.source import Source
from serve.rollout import rollout
from serve.server.tritonserver import running
from tests.conftest import TINY, TINY_INPUTS, TINY_OUTPUTS, TINY_WEIGHT, save_tiny


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("onnx") / "tiny.onnx")


def add(place: Path, onnx: Path, model: str = TINY, **asked: bool) -> int:
    made = Settings(**asked)  # type: ignore[arg-type]
    with staging.stage(place, model, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1), made) as staged:
        return staging.publish(staged, {}).number


def fail(place: Path, onnx: Path) -> None:
    """Publish a version that is taken back half-way: its folder is there, its configuration is not."""
    with staging.stage(place, TINY, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1)) as staged:
        (place / TINY / str(staged.number)).mkdir()
        (place / TINY / str(staged.number) / "something").touch()
        with pytest.raises(BadRepository, match="published by another command"):
            staging.publish(staged, {})
        (place / TINY / str(staged.number) / "something").unlink()
        (place / TINY / str(staged.number)).rmdir()


OPERATIONS = st.lists(st.sampled_from(["add", "live", "fail", "keep 1", "keep 2", "rollback", "all"]), max_size=12)


@given(operations=OPERATIONS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbers_only_grow(
    operations: list[str], onnx: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # what is durable is not asked here
    place = tmp_path_factory.mktemp("numbers") / "repository"
    given_out = [add(place, onnx), add(place, onnx)]
    for operation in operations:
        there = (place / TINY).exists()
        if operation == "add" or not there:
            given_out.append(add(place, onnx))
        elif operation == "live":
            rollout.promote(place, TINY, max(repository.numbers(place, TINY)))
        elif operation == "fail":
            fail(place, onnx)
            given_out.append(add(place, onnx))
        elif operation == "rollback" and any(one.state == "previous" for one in rollout.standings(place, TINY)):
            rollout.promote(place, TINY, rollout.before(place, TINY))
        elif operation.startswith("keep"):
            rollout.remove(place, TINY, int(operation[-1]))
        elif operation == "all":
            rollout.remove_model(place, TINY)
    given_out.append(add(place, onnx))
    assert given_out == sorted(set(given_out))


def test_models_are_numbered_apart(tmp_path: Path, onnx: Path) -> None:
    place = tmp_path / "repository"
    assert [add(place, onnx, model) for model in ("a", "a", "b")] == [1, 2, 1]
    assert json.loads((place / numbering.MARKS).read_text()) == {"a": 2, "b": 1}
    assert repository.models(place) == ["a", "b"]


def test_a_repository_of_before_is_numbered_on(tmp_path: Path, onnx: Path) -> None:
    place = tmp_path / "repository"
    for _ in range(3):
        add(place, onnx)
    (place / numbering.MARKS).unlink()
    rollout.remove_model(place, TINY)
    assert add(place, onnx) == 4


def test_two_commands_do_not_take_one_number(tmp_path: Path, onnx: Path) -> None:
    place = tmp_path / "repository"
    add(place, onnx)
    with staging.stage(place, TINY, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1)) as staged:
        assert add(place, onnx) == staged.number
        # What the other one published is gone again, its number is not free for all that.
        rollout.remove_model(place, TINY)
        with pytest.raises(BadRepository, match="version 2 was published by another command meanwhile"):
            staging.publish(staged, {})
    assert not (place / TINY).exists()


@pytest.mark.parametrize("text", ["", "[]", '{"tiny": "many"}', '{"tiny": null}', "\0"])
def test_what_cannot_be_read_is_not_guessed(tmp_path: Path, onnx: Path, text: str) -> None:
    place = tmp_path / "repository"
    add(place, onnx)
    files.write(place / numbering.MARKS, text)
    with pytest.raises(BadRepository, match="does not say which numbers were given"):
        add(place, onnx)


def test_a_cache_does_not_answer_for_what_was_removed(
    tmp_path: Path, onnx: Path, server_prefix: Path, publish_tiny: Callable[..., staging.Version]
) -> None:
    place, x = tmp_path / "repository", np.ones((1, 4), np.float32)
    add(place, onnx, cache=True)
    publish_tiny(place, "other")
    with running(place, grace=0) as endpoint, connect(endpoint.grpc) as client:
        np.testing.assert_allclose(client.infer(TINY, {"x": x})["y"], x @ TINY_WEIGHT, rtol=1e-6)
        rollout.remove_model(place, TINY, endpoint)
        heavier = save_tiny(tmp_path / "heavier.onnx", TINY_WEIGHT * 100)
        rollout.promote(place, TINY, add(place, heavier, cache=True), endpoint)
        np.testing.assert_allclose(client.infer(TINY, {"x": x})["y"], x @ TINY_WEIGHT * 100, rtol=1e-6)
