"""A real server whose backend processes are killed, stopped or overloaded, and what is done about it."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from loadtest.record.counts import counted
from modelathe.client import connect
from modelathe.errors import ModelatheError
from serve.config import settings
from serve.config.target import Target
from serve.repository import scratch, staging
from serve.repository.source import Source
from serve.server import control, processes
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from serve.watch import healing, probe
from serve.watch.healing import Rest, Watch, watching
from tests.conftest import TINY, TINY_INPUTS, TINY_OUTPUTS, save_tiny
from tests.serve.server.test_server import eventually

ONE = {"x": np.ones((1, 4), np.float32)}
AGAIN = "was dead; the model is loaded again"


@pytest.fixture
def place(tmp_path: Path, server_prefix: Path) -> Path:
    return tmp_path / "model_repository"


def publish(place: Path, model: str = TINY, **asked: object) -> None:
    onnx = save_tiny(place.parent / "tiny.onnx")
    made = settings.read(asked, model)
    with staging.stage(place, model, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=2), made) as staged:
        staging.publish(staged, {})


def living(endpoint: Endpoint, model: str = TINY) -> set[int]:
    return {pid for pid, served in processes.scan(endpoint.pid).living.items() if served == model}


def failures(endpoint: Endpoint, count: int, model: str = TINY) -> list[str]:
    """What was said instead of an answer to so many different requests."""
    said = []
    with connect(endpoint.grpc) as client:
        for number in range(count):
            try:
                client.infer(model, {"x": np.full((1, 4), number, np.float32)})
            except ModelatheError as error:
                said.append(error.what)
    return said


@contextmanager
def load(endpoint: Endpoint, threads: int, model: str = TINY) -> Iterator[list[str]]:
    """Ask from several threads while the block lasts; the list has an entry for each answer, "" for a good one."""
    stop, said = threading.Event(), []

    def ask() -> None:
        with connect(endpoint.grpc) as client:
            while not stop.is_set():
                try:
                    client.infer(model, ONE)
                    said.append("")
                except ModelatheError as error:
                    said.append(error.what)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(ask) for _ in range(threads)]
        try:
            yield said
        finally:
            stop.set()
            for future in futures:
                future.result()


def test_one_of_two_killed_processes_is_replaced_while_the_other_answers(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "LEFT", 0.5)
    publish(place, instances=2)
    with running(place, grace=0) as endpoint, watching(endpoint, place), load(endpoint, 3) as said:
        assert eventually(lambda: len(said) > 100)
        before = living(endpoint)
        os.kill(min(before), signal.SIGKILL)
        assert eventually(lambda: AGAIN in caplog.text)
        # A request that was with the dead process comes back a second late.
        assert eventually(lambda: len(said) > 1000 and not any(said[-500:]))
        # While the new ones were made, the other one answered: nobody was told that there is no model.
        assert all("is not healthy" in words for words in said if words), {words for words in said if words}
        # What Triton keeps of the old ones is ended.
        assert eventually(lambda: len(living(endpoint)) == 2 and not living(endpoint) & before)
        assert not failures(endpoint, 50)


def test_all_killed_processes_are_replaced(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(place, instances=2)
    with running(place, grace=0) as endpoint:
        watch = Watch(endpoint, place)
        watch.look()
        for pid in living(endpoint):
            os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: bool(watch.look()) or AGAIN in caplog.text)
        assert not failures(endpoint, 20)
        assert len(living(endpoint)) == 2


def test_what_still_answers_is_not_taken_away(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(place, instances=2)
    with running(place, grace=0) as endpoint:
        watch = Watch(endpoint, place)
        watch.look()
        (place / TINY / "1" / "model.onnx").write_bytes(b"no graph")
        victim, other = sorted(living(endpoint))
        os.kill(victim, signal.SIGKILL)
        assert eventually(lambda: bool(watch.look()) or "loading it again failed" in caplog.text)
        watch.look()
        assert caplog.text.count("loading it again failed") == 1  # the next try comes later
        assert living(endpoint) == {other}
        assert len(failures(endpoint, 20)) < 20


def test_a_server_too_busy_to_say_that_it_is_ready_keeps_what_answers(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unloaded: list[str] = []
    monkeypatch.setattr(control, "unload", lambda url, secret, model: unloaded.append(model))
    publish(place, instances=2)
    with running(place, grace=0) as endpoint:
        watch = Watch(endpoint, place)
        watch.look()
        monkeypatch.setattr(control, "_says_yes", lambda url, path: None)
        os.kill(min(living(endpoint)), signal.SIGKILL)
        assert eventually(lambda: bool(watch.look()) or AGAIN in caplog.text)
        assert not unloaded
        assert not failures(endpoint, 20)


def test_a_promotion_under_way_is_not_undone(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(place)
    with running(place, grace=0) as endpoint:
        watch = Watch(endpoint, place)
        watch.look()
        os.kill(living(endpoint).pop(), signal.SIGKILL)
        with scratch.locked(place / TINY):
            assert eventually(lambda: bool(watch.look()) or "another command works in this folder" in caplog.text)
            assert not living(endpoint)
        assert eventually(lambda: bool(watch.look()) or bool(living(endpoint)))
        assert not failures(endpoint, 5)


def test_an_overloaded_model_is_left_alone(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(place, queue=1, queue_delay_us=200_000, max_batch=2)
    with caplog.at_level(logging.INFO), running(place, grace=0) as endpoint:
        watch, before = Watch(endpoint, place), living(endpoint)
        with load(endpoint, 8) as said:
            assert eventually(lambda: any("maximum queue size" in words for words in said))
            while "silent: the server says" not in caplog.text:
                watch.ask()
                watch.look()
        assert living(endpoint) == before
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert not failures(endpoint, 5)


def test_a_server_that_says_nothing_is_silent_not_dead(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(healing, "PATIENCE", 0.5)
    monkeypatch.setattr(control, "ANSWER", 0.5)
    publish(place)
    with caplog.at_level(logging.INFO), running(place, grace=0) as endpoint:
        watch, before = Watch(endpoint, place), living(endpoint)
        watch.ask()
        os.kill(endpoint.pid, signal.SIGSTOP)
        try:
            for _ in range(healing.IN_A_ROW + 1):
                watch.ask()
                watch.look()
        finally:
            os.kill(endpoint.pid, signal.SIGCONT)
        assert f"{TINY} is silent" in caplog.text
        assert "dead" not in caplog.text
        assert living(endpoint) == before
        assert not failures(endpoint, 5)


def test_a_process_that_hangs_is_replaced(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(place)
    with running(place, grace=0) as endpoint:
        watch, before = Watch(endpoint, place), living(endpoint)
        os.kill(min(before), signal.SIGSTOP)
        assert eventually(lambda: bool(watch.ask()) or AGAIN in caplog.text)
        assert not failures(endpoint, 5)
        assert living(endpoint) - before


def test_the_probe_outlives_its_own_exceptions(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = {"scan": 3, "question": 3}

    def faulty(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            faults[name] -= 1
            if faults[name] >= 0:
                raise KeyError(name)
            return real(*arguments)

        return call

    publish(place)
    with running(place, grace=0) as endpoint, watching(endpoint, place):
        # The start itself looks at the processes too.
        monkeypatch.setattr(processes, "scan", faulty("scan", processes.scan))
        monkeypatch.setattr(probe, "question", faulty("question", probe.question))
        assert eventually(lambda: max(faults.values()) < 0)
        for name in faults:
            assert 1 <= caplog.text.count(f"the probe failed and goes on: KeyError({name!r})") <= 2  # not at each look
        os.kill(living(endpoint).pop(), signal.SIGKILL)
        assert eventually(lambda: AGAIN in caplog.text)
        assert not failures(endpoint, 5)


def test_a_cache_does_not_answer_for_a_dead_process(place: Path) -> None:
    publish(place, cache=True)
    with running(place, grace=0) as endpoint:
        for _ in range(3):
            assert probe.health(endpoint, place) == {TINY: "answers"}
        with connect(endpoint.grpc) as client:
            assert counted(client, TINY).execution_count >= 3
        os.kill(living(endpoint).pop(), signal.SIGKILL)
        assert probe.health(endpoint, place)[TINY].startswith("dead: ")
        watch = Watch(endpoint, place)
        for _ in range(healing.IN_A_ROW):
            watch.ask()
        assert not failures(endpoint, 5)


def test_status_counts_the_processes(place: Path) -> None:
    publish(place, instances=2)
    with running(place, grace=0) as endpoint:
        os.kill(min(living(endpoint)), signal.SIGKILL)
        assert eventually(lambda: len(living(endpoint)) == 1)
        said = probe.health(endpoint, place)[TINY]
        assert said == "dead: 1 of its 2 backend processes are gone" or "is not healthy" in said


def test_a_process_that_ends_during_a_look_is_not_lost_sight_of(tmp_path: Path) -> None:
    file = tmp_path / "tiny" / "1" / "model.py"
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    for _ in range(100):
        with subprocess.Popen([processes.STUB, file], executable="/bin/cat") as child:
            assert eventually(lambda pid=child.pid: processes.scan(os.getpid()).living.get(pid) == TINY)
            child.kill()
            while child.pid not in (found := processes.scan(os.getpid())).dead:
                assert child.pid in found.living


def test_rests_grow_and_are_forgotten() -> None:
    rest, now, lengths = Rest(), 1000.0, []
    for _ in range(8):
        rest.begin(now)
        lengths.append(rest.length)
        now = rest.until + 1
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60]
    rest.begin(rest.until + healing.LONGEST_REST)
    assert rest.length == healing.FIRST_REST
