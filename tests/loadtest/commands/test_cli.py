import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loadtest.cli import main
from loadtest.judge import baseline
from modelathe.commandline import FORMAT
from tests.loadtest.program import loadtest

SCHEMES = pytest.mark.parametrize("scheme", ["http", "grpc"])
STABLE = {
    "valid": None,
    "why": None,
    "fault": None,
    "requests": {"planned", "sent", "done", "failed", "dropped", "mismatched"},
    "rate": {"offered", "achieved"},
    "latency_ms": {"p50", "p90", "p95", "p99", "p999", "max"},
    "service_ms": {"p50", "p90", "p95", "p99", "p999", "max"},
    "lag_ms": {"p99"},
    "client_cpu": None,
    "server": {"queue_ms", "compute_ms", "mean_batch"},
    "thresholds": None,
}


@pytest.mark.timed
@SCHEMES
@pytest.mark.parametrize(
    "load", [("--concurrency", 4), ("--rate", 100, "--arrival", "poisson")], ids=["closed", "open"]
)
def test_a_run_against_a_real_server(endpoint, scheme: str, load: tuple[object, ...], tmp_path: Path) -> None:
    results, page = tmp_path / "r.jsonl", tmp_path / "r.html"
    url = getattr(endpoint, scheme)
    done = loadtest(
        "run", "tiny", "--url", url, "--duration", "1s", "--batch", 2, "--tolerance", 1e-5, *load,
        "--output", results, "--html", page, "--json",
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert document["format"] == FORMAT
    for key, inner in STABLE.items():
        assert inner is None or inner <= set(document[key]), key
    requests, server = document["requests"], document["server"]
    assert requests["planned"] == requests["done"] > 20
    # The server's count is per request and ours too; the warm-up and the metadata are in neither.
    assert server["success"] == requests["done"]
    assert server["reconciled"]
    assert server["fail"] == 0
    assert server["mean_batch"] >= 2
    # A request cannot have been shorter for us than for the server; only the clocks' grain is allowed.
    assert server["service_ms"] > server["request_ms"] > 0
    assert server["queue_ms"] + server["compute_ms"] <= server["request_ms"] * 1.01
    # A busy machine may make the run invalid, and then the exit code says so too.
    assert done.returncode == (0 if document["valid"] else 3)
    assert (document["why"] == "") == document["valid"]
    assert page.stat().st_size > 100_000
    again = loadtest("report", results, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["requests"] == requests


def test_a_run_from_the_repositorys_lineage_and_from_data(endpoint, model_repository: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32))
    for source in (("--repository", model_repository), ("--data", tmp_path / "d.npz")):
        done = loadtest(
            "run", "tiny", "--url", endpoint.http, "--duration", "300ms", "--warmup", "0s", *source,
            "--batch", 3, "--output", tmp_path / "r.jsonl", "--json", "--allow-invalid",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["parts"][0]["batch"] == 3
        assert document["requests"]["failed"] == 0
    assert document["parts"][0]["payloads"] == 3


@pytest.mark.timed
def test_the_text_report(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        done = loadtest("run", "double", "--url", server.http, "--duration", "1s", "--output", tmp_path / "r.jsonl")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert re.fullmatch(r"valid run: .+ requests answered, 0 failed, 0 dropped", first)
    assert any(line.startswith("latency is") for line in rest)
    assert str(tmp_path / "r.jsonl") in done.stdout.replace("\n", "")
    assert loadtest("report", tmp_path / "r.jsonl").stdout.startswith(first)


@pytest.mark.timed
def test_a_server_that_dies_keeps_the_report_and_exits_5(stand_in, tmp_path: Path) -> None:
    with stand_in(die=200) as server:
        done = loadtest(
            "run", "double", "--url", server.http, "--rate", 100, "--duration", "60s", "--warmup", "0s",
            "--output", tmp_path / "r.jsonl", "--json",
        )  # fmt: skip
    document = json.loads(done.stdout)
    assert done.returncode == 5
    assert document["error"]["exit"] == 5
    assert document["requests"]["done"] > 100
    assert "stopped answering" in document["why"] and document["fault"] == "gone"


def test_an_invalid_run_exits_3(stand_in, tmp_path: Path) -> None:
    with stand_in(wrong=True, since=40) as server:
        done = loadtest(
            "run", "double", "--url", server.http, "--duration", "500ms", "--warmup", "0s", "--tolerance", "1e-5",
            "--output", tmp_path / "r.jsonl",
        )  # fmt: skip
    assert done.returncode == 3
    assert "INVALID RUN" in done.stdout
    assert "error: " in done.stderr


def test_an_invalid_run_may_be_allowed_and_keeps_the_word(stand_in, tmp_path: Path) -> None:
    options = ("--duration", "500ms", "--warmup", "0s", "--tolerance", "1e-5", "--allow-invalid")
    with stand_in(wrong=True, since=40) as server:
        done = loadtest("run", "double", "--url", server.http, *options, "--output", tmp_path / "r.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("INVALID RUN: ")
    with stand_in(die=20) as server:
        options = ("--duration", "60s", "--warmup", "0s", "--allow-invalid")
        done = loadtest("run", "double", "--url", server.http, *options, "--output", tmp_path / "r.jsonl")
    assert done.returncode == 5


BAD_OPTIONS = {
    "rate 0": (("--rate", 0), 2, "rate"),
    "duration 0": (("--duration", "0s"), 2, "duration"),
    "duration without unit": (("--duration", "10"), 2, "10s"),
    "both loops": (("--rate", 1, "--concurrency", 1), 2, "one of the three"),
    "profile in a closed loop": (("--profile", "ramp:to=5"), 2, "--rate"),
    "a share without weight": (("--mix", "other"), 2, "MODEL=WEIGHT"),
    "a model that is not there": (("--mix", "other=1"), 4, "other"),
    "arrival in a closed loop": (("--arrival", "poisson"), 2, "--rate"),
    "unknown arrival": (("--rate", 1, "--arrival", "bursty"), 2, "poisson"),
    "batch 0": (("--batch", 0), 2, "batch"),
    "batch too large": (("--batch", 9), 2, "at most 8"),
    "shape of no input": (("--shape", "z:1"), 2, "--shape"),
    "shape without sizes": (("--shape", "x"), 2, "NAME:D1,D2"),
    "no such data": (("--data", "none.npz"), 4, "none.npz"),
    "no such repository": (("--repository", "missing"), 4, "lineage.json"),
    "no such version": (("--version", 7), 4, "double/7"),
    "folder of the output": (("--output", "none/r.jsonl"), 4, "no such folder"),
    "folder of the page": (("--html", "none/r.html"), 4, "no such folder"),
    "unknown option": (("--haste", 3), 2, "--haste"),
    "speed of nothing": (("--speed", 3), 2, "--trace"),
    "rate of infinity": (("--rate", "inf"), 2, "max"),
    "fast as possible with a shape": (("--rate", "max", "--profile", "sine"), 2, "--rate in numbers"),
    "nothing in flight": (("--rate", "max", "--in-flight", 0), 2, "concurrency"),
    "in flight twice": (("--concurrency", 2, "--in-flight", 2), 2, "--in-flight"),
    "fresh and constant": (("--fresh", "--constant"), 2, "--constant"),
    "fresh and checked": (("--fresh", "--tolerance", 0), 2, "--fresh"),
    "fresh data": (("--fresh", "--data", "d.npz"), 2, "--data"),
    "sequences checked against nothing": (("--sequence", 3, "--tolerance", 0), 2, "--sequence"),
    "recorded shapes": (("--shape", "x:4", "--data", "d.jsonl"), 2, "recorded traffic"),
    "weights of 0": (("--shape", "x:4=0"), 2, "weight above 0"),
    "weight of no shape": (("--shape", "=2"), 2, "NAME:D1,D2"),
    "no such trace": (("--trace", "none.csv"), 4, "none.csv"),
    "data without an ending": (("--data", "/dev/null"), 4, "folder, or a file that ends with"),
}


@pytest.fixture
def sigterm() -> Iterator[None]:
    """The command line takes over SIGTERM; the test runner gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize(("options", "code", "named"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_input_is_one_clear_error(
    stand_in,
    options: tuple[object, ...],
    code: int,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # In this process, because sixteen interpreters would take longer than all the other tests.
    with stand_in() as server, pytest.raises(SystemExit) as left:
        main(["run", "double", "--url", server.http, *map(str, options)])
    out, err = capsys.readouterr()
    assert left.value.code == code
    assert out == ""
    assert err.count("error: ") == 1
    assert named in err
    assert list(tmp_path.iterdir()) == []


@SCHEMES
def test_an_unknown_model_and_an_absent_server(stand_in, scheme: str, tmp_path: Path) -> None:
    with stand_in() as server:
        done = loadtest("run", "nope", "--url", server.url(scheme), "--json")
        assert done.returncode == 4
        assert json.loads(done.stdout)["error"]["kind"] == "ModelMissing"
        assert "double" in done.stderr
        url = server.url(scheme)
    done = loadtest("run", "double", "--url", url, "--json")
    assert done.returncode == 5
    assert json.loads(done.stdout)["error"]["kind"] == "ServerAbsent"


def test_a_report_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("hello\n")
    done = loadtest("report", tmp_path / "r.jsonl")
    assert done.returncode == 4
    assert "line 1" in done.stderr


@pytest.mark.parametrize("command", [("list",), ("list", "--json"), ("show", "soak")])
def test_a_reader_who_leaves_ends_the_command_quietly(command: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        arguments = [sys.executable, "-m", "loadtest", "scenario", *command]
        done = subprocess.run(arguments, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


@pytest.mark.parametrize("command", [(), ("run",), ("report",), ("compare",), ("capacity",), ("merge",), ("manifest",)])
def test_help_has_an_example_and_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        "import sys; from loadtest.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print([name for name in ('torch', 'onnx', 'onnxruntime', 'plotly') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert not command or "Example" in done.stdout


def test_a_baseline_of_another_load_is_refused_before_any_is_sent(stand_in, tmp_path: Path) -> None:
    short = ("--duration", "500ms", "--warmup", "0s", "--output", tmp_path / "r.jsonl")
    kept, page = tmp_path / "kept.json", tmp_path / "page.html"
    with stand_in() as server:
        command = ("run", "double", "--url", server.http)
        first = loadtest(*command, *short, "--concurrency", 2, "--allow-invalid")
        assert first.returncode == 0, first.stderr
        baseline.write(baseline.read(tmp_path / "r.jsonl"), kept)  # the command would refuse it on a busy machine
        (tmp_path / "r.jsonl").unlink()
        sent = server.inferences
        done = loadtest(*command, *short, "--concurrency", 3, "--baseline", kept)
        assert done.returncode == 4
        assert "concurrency is 2" in done.stderr
        assert (server.inferences, (tmp_path / "r.jsonl").exists()) == (sent, False)
        options = ("--concurrency", 2, "--baseline", kept, "--threshold", "errors == 0", "--html", page)
        loadtest(*command, *short, *options, "--allow-invalid")
    text = page.read_text()
    assert "<td>errors == 0</td>" in text
    assert "Beside the baseline" in text
    assert "<th>p99 ms</th>" in text
