"""What a plan makes of the load: kinds of arrival and profile, limits, think time, retries, patience, traces."""

import io
import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

from loadtest.cli import main
from loadtest.judge.summary import summarize
from loadtest.load import drive, loop
from loadtest.plan import schedule
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Fresh, Part
from loadtest.record.results import OK, TIMEOUT, Flight, Results, read
from loadtest.report import page
from loadtest.report.terminal import text
from loadtest.send import wire
from loadtest.send.sender import encoder
from modelathe.errors import BadInput
from modelathe.tensors import BATCH, TensorSpec

SCHEMES = pytest.mark.parametrize("scheme", ["http", "grpc"])
SPEC = TensorSpec("x", "float32", (BATCH, 4))
PAYLOADS = payload.generate([SPEC], 16, 0, batch=2)
REFUSAL = (503, grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")


def run(server: Any, path: Path, scheme: str = "http", parts: list[Part] | None = None, **plan: Any) -> Results:
    plan = {"duration": 1.0, "warmup": 0.0, **plan}
    drive.run(Plan(server.url(scheme), **plan), parts or [Part("double", PAYLOADS)], path / "r.jsonl")
    return read(path / "r.jsonl")


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """The command line takes over SIGTERM; the test runner gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


SHAPES = [("constant", profile) for profile in ("flat", "ramp:to=300", "step:to=300,steps=4", "spike:to=400", "sine")]
SHAPES += [("poisson", "flat"), ("gamma:burstiness=0.5", "flat"), ("poisson", "ramp:to=300")]


def test_all_shapes_are_tried_here() -> None:
    assert {name.partition(":")[0] for name, _ in SHAPES} == set(schedule.ARRIVALS)
    assert {name.partition(":")[0] for _, name in SHAPES} == set(schedule.PROFILES)


@pytest.mark.timed
@pytest.mark.parametrize(("arrival", "profile"), SHAPES)
def test_what_arrives_follows_the_schedule(stand_in, arrival: str, profile: str, tmp_path: Path) -> None:
    with stand_in() as server:
        results = run(server, tmp_path, rate=100.0, arrival=arrival, profile=profile, seed=5)
        # The first inference is the probe's.
        arrived = np.sort(server.arrivals[1:])
    due = np.array(list(schedule.times(100.0, 1.0, 5, arrival, profile)))
    np.testing.assert_allclose(results.planned, due, atol=1e-5)
    assert len(arrived) == len(due)
    # The shapes agree to a tenth of the run, wherever a busy machine holds all of it up.
    late = arrived - due
    assert np.median(np.abs(late - np.median(late))) < 0.1


@SCHEMES
@pytest.mark.parametrize("load", [{"concurrency": 3}, {"rate": 200.0}])
def test_a_limit_of_requests(stand_in, scheme: str, load: dict[str, Any], tmp_path: Path) -> None:
    with stand_in() as server:
        results = run(server, tmp_path, scheme, requests=25, duration=60.0, **load)
        assert server.inferences == 26
    assert results.of(OK).sum() == len(results.planned) == 25
    assert results.end["end"] < 30


def test_users_think_between_their_requests(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        results = run(server, tmp_path, concurrency=1, think=0.05)
    pauses = results.sent[1:] - results.done[:-1]
    assert len(pauses) > 2
    assert pauses.min() >= 0.049


@pytest.mark.timed
@SCHEMES
@pytest.mark.parametrize("load", [{"concurrency": 2}, {"rate": 100.0}])
def test_retries_are_counted_and_their_latency_goes_on(
    stand_in, scheme: str, load: dict[str, Any], tmp_path: Path
) -> None:
    with stand_in(refuse=REFUSAL, since=20, until=24) as server:
        results = run(server, tmp_path, scheme, retries=5, **load)
        assert server.inferences == 1 + results.tries.sum()
    assert results.of(OK).all()
    assert results.tries.sum() == len(results.tries) + 5
    assert (results.sent >= results.planned).all()
    again = results.tries > 1
    # `sent` is the first try's: the answer to a later one is further away from it than answers are otherwise.
    assert np.median((results.done - results.sent)[again]) > np.median((results.done - results.sent)[~again])
    if "concurrency" in load:
        np.testing.assert_array_equal(results.planned, results.sent)


@SCHEMES
def test_retries_are_off_unless_asked_for_and_end(stand_in, scheme: str, tmp_path: Path) -> None:
    with stand_in(refuse=REFUSAL, since=10) as server:
        none = run(server, tmp_path, scheme, concurrency=1, requests=15, duration=10.0)
    assert none.tries.max() == 1
    assert (~none.of(OK)).sum() == 7
    with stand_in(refuse=REFUSAL, since=10) as server:
        some = run(server, tmp_path, scheme, concurrency=1, requests=10, retries=2, duration=10.0)
    assert sorted(Counter(some.tries.tolist()).items()) == [(1, 8), (3, 2)]


@pytest.mark.timed
@SCHEMES
@pytest.mark.parametrize("load", [{"concurrency": 2}, {"rate": 30.0}])
def test_nothing_times_out_until_the_end_and_then_patience_ends(
    stand_in, scheme: str, load: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PATIENCE", 0.4)
    with stand_in(hang=threading.Event(), since=20) as server:
        results = run(server, tmp_path, scheme, **load)
    left = results.of(TIMEOUT)
    assert left.any()
    assert results.of(OK).sum() + left.sum() == len(results.planned)
    assert (results.done[left] > 1.4).all()
    assert "within 0.4 s of the end of the run" in summarize(tmp_path / "r.jsonl")["errors"][0]["text"]


def test_a_trace_is_replayed_at_its_times(stand_in, tmp_path: Path) -> None:
    times = [100.0, 100.2, 100.2, 100.9, 101.0]
    (tmp_path / "t.csv").write_text("\n".join(map(str, times)))
    with stand_in() as server:
        results = run(server, tmp_path, trace=str(tmp_path / "t.csv"), speed=2.0, duration=30.0, warmup=0.1)
    np.testing.assert_allclose(results.planned, [0, 0.1, 0.1, 0.45, 0.5], atol=1e-6)
    assert results.of(OK).all()
    assert results.end["end"] < 15


def test_a_bad_trace_is_refused_before_anything_is_sent(stand_in, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1\n0\n")
    with stand_in() as server:
        with pytest.raises(BadInput, match="line 2 is before"):
            run(server, tmp_path, trace=str(tmp_path / "t.csv"))
        assert server.inferences == 0
    assert not (tmp_path / "r.jsonl").exists()


@SCHEMES
def test_parts_get_their_shares(stand_in, scheme: str, tmp_path: Path) -> None:
    small = Part("double", payload.generate([SPEC], 4, 0, batch=1), weight=3.0)
    large = Part("double", payload.generate([SPEC], 4, 1, batch=8), weight=1.0)
    with stand_in() as server:
        results = run(server, tmp_path, scheme, [small, large], concurrency=4, requests=400, duration=60.0)
    assert results.of(OK).all()
    share = (results.payload < 4).mean()
    assert share == pytest.approx(0.75, abs=5 * np.sqrt(0.75 * 0.25 / 400))
    document = summarize(tmp_path / "r.jsonl")
    assert [part["batch"] for part in document["parts"]] == [1, 8]
    samples = np.where(results.payload < 4, 1, 8).sum()
    assert document["rate"]["samples"] == pytest.approx(samples / len(results.payload) * document["rate"]["achieved"])


def cli(server: Any, tmp_path: Path, *options: object) -> dict[str, Any]:
    fixed = ("--url", server.http, "--warmup", "0s", "--output", tmp_path / "r.jsonl", "--json")
    done = CliRunner().invoke(main, ["run", "double", *map(str, (*fixed, *options))])
    assert done.exit_code in (0, 3), done.output  # a busy machine may make a run invalid
    return summarize(tmp_path / "r.jsonl")


@pytest.mark.timed
def test_as_fast_as_possible_keeps_all_places_in_flight_busy(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        document = cli(server, tmp_path, "--rate", "max", "--in-flight", 5, "--duration", "500ms")
    assert document["plan"]["concurrency"] == 5
    results = read(tmp_path / "r.jsonl")
    moments = np.sort(np.concatenate([results.sent, results.done]))
    middle = moments[(moments > 0.1) & (moments < 0.4)]
    in_flight = [(results.sent <= at).sum() - (results.done < at).sum() for at in middle]
    assert np.median(in_flight) == 5


def recording(tmp_path: Path, wrong: int = -1) -> Path:
    lines = []
    for n in range(10):
        x = np.full((1 + n % 2, 4), n, np.float32)
        y = x * 2 + (n == wrong)
        tensors = {name: {"name": name, "shape": list(array.shape), "datatype": "FP32", "data": array.tolist()}
                   for name, array in (("x", x), ("y", y))}  # fmt: skip
        lines.append({"at": 7 + n / 20, "model": "double", "inputs": [tensors["x"]], "outputs": [tensors["y"]]})
    path = tmp_path / "recorded.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_recording_is_replayed_with_its_times_and_values(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        document = cli(server, tmp_path, "--trace", recording(tmp_path), "--speed", 2)
        assert server.inferences == 1 + 10
    results = read(tmp_path / "r.jsonl")
    assert document["plan"]["duration"] == pytest.approx(0.25)
    np.testing.assert_allclose(results.planned, np.arange(10) / 40, atol=1e-6)
    assert results.payload.tolist() == list(range(10))
    assert document["checked"] == document["requests"]["done"] == 10
    assert document["parts"][0]["batches"] == [1, 2] * 5


def test_times_without_requests_and_requests_without_times(stand_in, tmp_path: Path) -> None:
    (tmp_path / "times.jsonl").write_text("\n".join(json.dumps({"at": n / 50}) for n in range(5)))
    with stand_in() as server:
        times = cli(server, tmp_path, "--trace", tmp_path / "times.jsonl")
        assert (times["parts"][0]["payloads"], times["requests"]["done"]) == (16, 5)
        both = cli(server, tmp_path, "--trace", tmp_path / "times.jsonl", "--data", recording(tmp_path))
        assert (both["parts"][0]["payloads"], both["checked"]) == (10, 5)
        cli(server, tmp_path, "--data", recording(tmp_path), "--concurrency", 1, "--requests", 25)
    assert read(tmp_path / "r.jsonl").payload.tolist() == [n % 10 for n in range(25)]


@SCHEMES
def test_wrong_outputs_are_counted_and_shown_everywhere(stand_in, scheme: str, tmp_path: Path) -> None:
    from rich.console import Console

    from loadtest.plan.data import read as data

    with stand_in() as server:
        signature = data.Signature([SPEC], [TensorSpec("y", "float32", (BATCH, 4))])
        found = data.read(recording(tmp_path, wrong=3), signature)
        parts = [Part("double", found.payloads, tolerance=1e-5, expected=found.expected)]
        results = run(server, tmp_path, scheme, parts, concurrency=1, requests=50, duration=60.0)
    document = summarize(tmp_path / "r.jsonl")
    assert document["requests"]["mismatched"] == 5
    assert document["checked"] == 50
    assert [sample["n"] for sample in document["mismatches"]] == [3, 13, 23, 33, 43]
    assert document["mismatches"] == results.end["mismatches"]
    assert document["mismatches"][0] == {
        "n": 3, "payload": 3, "output": "y", "index": [0, 0], "expected": 7.0, "got": 6.0
    }  # fmt: skip
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(text(document))
    assert "[0, 0]" in console.export_text()
    page.write(tmp_path / "r.jsonl", tmp_path / "r.html")
    assert "<td>[0, 0]</td><td>7</td><td>6</td>" in (tmp_path / "r.html").read_text()


def test_fresh_values_and_one_constant_request(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        fresh = cli(server, tmp_path, "--fresh", "--duration", "300ms", "--concurrency", 2)
        assert fresh["parts"][0]["fresh"]
        constant = cli(server, tmp_path, "--constant", "--duration", "300ms", "--concurrency", 2)
    assert any("the same values" in note for note in constant["notes"])
    assert not any("the same values" in note for note in fresh["notes"])


@SCHEMES
def test_fresh_requests_differ_on_the_wire(scheme: str) -> None:
    make = {"http": wire.HttpRequests("h:1").request, "grpc": wire.grpc_request}[scheme]
    encode = encoder(make, [Part("double", PAYLOADS, fresh=Fresh([SPEC], 2, 0))], None)
    sent = [encode(Flight(n, 0.0, n % 16)) for n in range(50)]
    assert len(set(sent)) == 50
    assert encode(Flight(3, 9.0, 0)) == sent[3]


BAD_DATA = {
    "d.npz": b"PK",
    "d.json": b'{"data": [{"x": [1, 2, 3, 4]}, {"x": [1, 2, 3]}]}',
    "d.jsonl": b'{"inputs": [{"name": "x", "shape": [9, 4], "datatype": "FP32", "data": []}]}',
    "d.txt": b"one line",
    "d.csv": b"1,2,3,4",
    "d/x": b"123",
    "d/.hidden": b"",
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line_and_nothing_is_sent(stand_in, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(BAD_DATA[name])
    given = path.parent if path.parent != tmp_path else path
    with stand_in() as server:
        options = ("--url", server.http, "--data", str(given), "--output", str(tmp_path / "r.jsonl"))
        done = CliRunner().invoke(main, ["run", "double", *options])
        assert server.inferences == 0
    assert done.exit_code == 4, done.output
    [error, fix] = done.stderr.strip().splitlines()
    assert error.startswith(f"error: {given}")
    assert fix.startswith("  fix: ")
    assert not (tmp_path / "r.jsonl").exists()
