import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from loadtest.judge.breakdown import column
from loadtest.load.readings import parse
from loadtest.record.results import DROPPED, OK, TIMEOUT, Flight, Writer, read
from modelathe.errors import BadInput

HEADER = {"plan": {"duration": 1.0}, "model": "m", "url": "grpc://127.0.0.1:1"}
FLIGHTS = [
    Flight(1, 0.5, 1, sent=0.51, done=0.6),
    Flight(0, 0.0, 0, sent=0.01, done=0.9, verdict=TIMEOUT),
    Flight(2, 0.75, 0, verdict=DROPPED),
]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    with Writer(tmp_path / "r.jsonl", HEADER) as writer:
        for flight in FLIGHTS:
            writer.add(flight)
        writer.finish({"end": 1.0, "server": None})
    return tmp_path / "r.jsonl"


def test_what_was_written_is_read_in_planned_order(whole: Path) -> None:
    results = read(whole)
    assert results.planned.tolist() == [0, 0.5, 0.75]
    np.testing.assert_array_equal(results.sent, [0.01, 0.51, np.nan])
    np.testing.assert_array_equal(results.done, [0.9, 0.6, np.nan])
    assert results.of(OK).tolist() == [False, True, False]
    assert results.of(TIMEOUT, DROPPED).tolist() == [True, False, True]
    assert results.end == {"end": 1.0, "server": None}


def test_every_line_is_json_with_the_stated_keys(whole: Path) -> None:
    first, *rows, last = [json.loads(line) for line in whole.read_text().splitlines()]
    assert first["format"] == 1
    assert {"plan", "model", "url"} <= set(first)
    assert [set(row) for row in rows] == [{"n", "planned", "sent", "done", "verdict", "payload", "worker"}] * 3
    assert rows[2]["sent"] is None
    assert {"end", "server"} <= set(last)


def test_lines_are_in_the_file_while_the_run_goes_on(tmp_path: Path) -> None:
    with Writer(tmp_path / "r.jsonl", HEADER) as writer:
        writer.add(FLIGHTS[0])
        writer.flush()
        results = read(tmp_path / "r.jsonl")
        assert len(results.planned) == 1
        assert results.end is None


def test_half_a_line_at_the_end_is_ignored(whole: Path) -> None:
    text = whole.read_text()
    whole.write_text(text[: text.rindex('"dropped"')])
    results = read(whole)
    assert len(results.planned) == 2
    assert results.end is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello\n", "line 1"),
        (b'{"format": 99}\n', "format 99"),
        (b'{"a": 1}\n', "line 1"),
        (b"[]\n", "line 1"),
        (b"\xff\xfe\x00", "line 1"),
        (json.dumps({"format": 1, **HEADER}).encode() + b'\n{"n":0}\n{}\n', "line 2"),
        (
            json.dumps({"format": 1, **HEADER}).encode() + b'\n{"n":0,"planned":0,"sent":0,"done":0,"verdict":"?"}\n',
            "line 2",
        ),
    ],
)
def test_what_is_no_result_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path / "r.jsonl")
    assert "r.jsonl" in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match="not a result file"):
        read(tmp_path)


ROWS = 200_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "r.jsonl"
    with Writer(path, HEADER) as writer:
        for n in range(ROWS):
            at = n / 1e4
            writer.add(Flight(n, at, n % 16, at + 1e-5, at + (5.0 if n == 123_456 else 0.003)))
        writer.finish({"end": 20.0, "server": None})
    return path


def test_a_large_file_is_read_without_a_list_of_its_lines(large: Path) -> None:
    tracemalloc.start()
    results = read(large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(results.planned) == ROWS
    # The arrays, and two more copies of them while they are put together and in order; a dict alone takes more.
    assert peak < 250 * ROWS
    assert results.end is not None


def test_the_line_that_is_wrong_is_named_in_a_large_file_too(large: Path, tmp_path: Path) -> None:
    lines = large.read_text().splitlines(keepends=True)
    lines[150_000] = lines[150_000].replace('"ok"', '"fine"')
    (tmp_path / "r.jsonl").write_text("".join(lines))
    with pytest.raises(BadInput, match="line 150001"):
        read(tmp_path / "r.jsonl")


def test_names_of_failures_are_bounded(tmp_path: Path) -> None:
    with Writer(tmp_path / "r.jsonl", HEADER) as writer:
        for n in range(500):
            writer.add(Flight(n, 0.0, 0, 0.0, 0.1, "error", error=f"number {n}: x"))
    results = read(tmp_path / "r.jsonl")
    assert len(results.kinds) <= 50
    assert results.kinds[results.kind[499]] == "other errors"
    assert results.kinds[results.kind[0]] == "number 0"


def test_a_metric_that_is_nan_leaves_the_file_readable(tmp_path: Path) -> None:
    page = 'nv_gpu_power_usage{gpu_uuid="A"} Nan\nnv_gpu_utilization{gpu_uuid="A"} +Inf\nnv_cpu_utilization 0.3\n'
    assert parse(page, set()) == {"machine_cpu": 0.3}
    with Writer(tmp_path / "r.jsonl", HEADER) as writer:
        writer.reading({"reading": 0.5, "gpu_watts": float("nan"), "machine_cpu": 0.3})
        writer.finish({"end": 1.0, "server": {"batches": {1: 5}}})
    for line in (tmp_path / "r.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    results = read(tmp_path / "r.jsonl")
    assert results.readings == [{"reading": 0.5, "gpu_watts": None, "machine_cpu": 0.3}]
    np.testing.assert_array_equal(column(results, "gpu_watts")[1], [np.nan])


def test_a_nan_that_an_older_version_wrote_is_read(whole: Path) -> None:
    first, *rest = whole.read_text().splitlines(keepends=True)
    whole.write_text(first + '{"reading": 0.5, "gpu_watts": NaN, "machine_cpu": 0.3}\n' + "".join(rest))
    results = read(whole)
    assert len(results.planned) == 3
    assert np.isnan(results.readings[0]["gpu_watts"])
    whole.write_text(first + '{"reading": 0.5, "gpu_watts": NaN}\n{"reading": nonsense}\n')
    with pytest.raises(BadInput, match="line 3"):
        read(whole)
