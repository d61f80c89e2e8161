import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from rich.console import Console

from loadtest.judge import breakdown
from loadtest.judge.summary import summarize
from loadtest.plan.plan import Plan
from loadtest.record.results import DROPPED, ERROR, OK, TIMEOUT, Flight, Writer, read
from loadtest.record.statistics import number
from loadtest.report import page
from loadtest.report.terminal import headline, text
from tests.browser import assert_fits, chromium, measured, needs_browser

SERVER = {
    "success": 90,
    "fail": 0,
    "success_ns": 90 * 8_000_000,
    "queue_ns": 90 * 2_000_000,
    "compute_input_ns": 90 * 500_000,
    "compute_infer_ns": 90 * 5_000_000,
    "compute_output_ns": 90 * 500_000,
    "inference_count": 180,
    "execution_count": 45,
}
END = {
    "end": 1.1,
    "client_cpu": 0.2,
    "client_cores": 1,
    "gone": False,
    "errors": [{"verdict": ERROR, "text": "boom", "count": 2}],
}


def write(path: Path, flights: list[Flight], end: dict[str, Any] | None, **plan: Any) -> Path:
    parts = [{"model": "m", "version": "3", "payloads": 1, "batch": 2, "tolerance": plan.pop("tolerance", None)}]
    load = {"rate": 100.0} if plan.get("concurrency") is None else {}
    stated = {"duration": 1.0, "thresholds": ("errors < 10%",)}
    written = asdict(Plan("grpc://h:1", **stated | load | plan))
    header = {"plan": written, "parts": parts, "model": "m", "model_version": "3", "url": "grpc://h:1", "versions": {}}
    with Writer(path, header) as writer:
        for flight in flights:
            writer.add(flight)
        if end is not None:
            writer.finish(end)
    return path


def flights(lag: float = 0.0002, service: float = 0.009) -> list[Flight]:
    """90 answered, 4 timed out, 2 failed, 4 dropped: they were due as the run ended."""
    times = [n / 100 for n in range(96)] + [1.0] * 4
    sent = [Flight(n, at, 0, at + lag, at + lag + service) for n, at in enumerate(times[:90])]
    sent += [Flight(n, times[n], 0, times[n], times[n] + 0.5, TIMEOUT) for n in range(90, 94)]
    sent += [Flight(n, times[n], 0, times[n], times[n] + 0.001, ERROR) for n in range(94, 96)]
    return sent + [Flight(n, times[n], 0, verdict=DROPPED) for n in range(96, 100)]


def test_the_document(tmp_path: Path) -> None:
    document = summarize(write(tmp_path / "r", flights(), END | {"server": SERVER}))
    assert document["valid"]
    assert document["why"] == ""
    assert document["requests"] == {
        "planned": 100,
        "sent": 96,
        "done": 90,
        "failed": 6,
        "timed_out": 4,
        "dropped": 4,
        "mismatched": 0,
        "retried": 0,
        "late": 0,
    }
    assert document["rate"] == {"offered": 100.0, "achieved": 90.0, "samples": 180.0}
    assert document["latency_ms"]["p50"] == pytest.approx(9.2)
    assert document["service_ms"]["p50"] == pytest.approx(9.0)
    # 4 of the 94 requests that count timed out; an error's quick answer does not count.
    assert document["latency_ms"]["p99"] == pytest.approx(500)
    assert document["lag_ms"]["p99"] == pytest.approx(0.2)
    server = document["server"]
    assert server["reconciled"]
    assert (server["queue_ms"], server["compute_ms"], server["request_ms"]) == (2, 6, 8)
    assert server["mean_batch"] == 4
    assert server["overhead"] == pytest.approx(9 / 8 - 1)


def test_the_first_line_counts_what_was_not_sent(tmp_path: Path) -> None:
    document = summarize(write(tmp_path / "r", flights(), END | {"server": SERVER}))
    assert headline(document) == "valid run: 90 of 100 requests answered, 6 failed, 4 dropped"


GOOD = flights()
INVALID = {
    "interrupted": (GOOD, None, {}, "interrupted"),
    "server gone": (GOOD, END | {"gone": True}, {}, "stopped answering"),
    "late": (flights(lag=0.002), END, {}, "lag p99 is 2.00 ms, 1.10 ms are allowed"),
    "client busy": (GOOD, END | {"client_cpu": 0.9}, {"rate": None, "concurrency": 8}, "used 90% of its core"),
    "nothing done": ([flight for flight in GOOD if flight.verdict != OK], END, {}, "not one of 10 requests"),
    "nothing at all": ([], END | {"errors": []}, {}, "not one of 0 requests"),
}


@pytest.mark.parametrize(("rows", "end", "plan", "why"), INVALID.values(), ids=INVALID.keys())
def test_a_run_that_proves_nothing_says_why(
    rows: list[Flight], end: dict[str, Any] | None, plan: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "r", rows, end and {"server": SERVER} | end, **plan)
    document = summarize(path)
    assert not document["valid"]
    assert why in document["why"]
    assert document["fix"]
    assert headline(document).startswith("INVALID RUN")
    assert why.split()[0] in on_terminal(document, 100)
    page.write(path, tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "INVALID RUN" in html and '<div class="verdict bad">' in html and '"verdict good"' not in html


def test_a_late_open_loop_is_allowed_a_tenth_of_the_median(tmp_path: Path) -> None:
    assert summarize(write(tmp_path / "r", flights(lag=0.002, service=0.03), END))["valid"]


def test_a_busy_client_is_no_fault_of_an_open_loop_that_is_punctual(tmp_path: Path) -> None:
    assert summarize(write(tmp_path / "r", GOOD, END | {"client_cpu": 0.9}))["valid"]


def test_a_dropped_request_is_late_until_the_end(tmp_path: Path) -> None:
    rows = [Flight(n, n / 100, 0, n / 100, n / 100 + 0.009) for n in range(98)]
    rows += [Flight(n, 0.2, 0, verdict=DROPPED) for n in range(98, 100)]
    document = summarize(write(tmp_path / "r", rows, END))
    assert document["lag_ms"]["p99"] == pytest.approx(800)
    assert "left late" in document["why"]


def test_requests_of_others_are_noted(tmp_path: Path) -> None:
    for change, words in ((5, "5 successes more"), (-5, "5 successes fewer")):
        server = SERVER | {"success": SERVER["success"] + change}
        document = summarize(write(tmp_path / f"r{change}", GOOD, END | {"server": server}))
        assert document["valid"]
        assert not document["server"]["reconciled"]
        assert any(words in note for note in document["notes"])


def test_late_and_retried_requests_are_counted(tmp_path: Path) -> None:
    rows = flights()
    for flight in rows[:3]:
        flight.tries = 2
    for flight in rows[10:17]:
        flight.sent = flight.planned + 0.005
    document = summarize(write(tmp_path / "r", rows, END, retries=1))
    assert document["requests"]["retried"] == 3
    assert document["requests"]["late"] == 7
    notes = " ".join(document["notes"])
    assert "7 requests (7.0%) left late" in notes
    assert "3 requests were sent more than once" in notes


def test_a_client_may_use_the_cores_that_its_workers_have(tmp_path: Path) -> None:
    closed = {"rate": None, "concurrency": 8, "workers": 2}
    busy = END | {"client_cpu": 1.5, "client_cores": 2}
    assert summarize(write(tmp_path / "r", GOOD, busy, **closed))["valid"]
    document = summarize(write(tmp_path / "r", GOOD, busy | {"client_cpu": 1.7}, **closed))
    assert "used 85% of its 2 cores" in document["why"]


def test_models_of_a_mix_have_a_row_each(tmp_path: Path) -> None:
    rows = [Flight(n, n / 100, n % 3, n / 100, n / 100 + (0.002 if n % 3 == 2 else 0.001)) for n in range(90)]
    path = write(tmp_path / "r", rows, END)
    text_of = path.read_text()
    first, rest = text_of.split("\n", 1)
    header = json.loads(first)
    part = header["parts"][0]
    header["parts"] = [part | {"model": "a", "payloads": 2}, part | {"model": "b", "payloads": 1}]
    path.write_text(json.dumps(header) + "\n" + rest)
    document = summarize(path)
    assert [(row["model"], row["done"]) for row in document["models"]] == [("a", 60), ("b", 30)]
    assert document["models"][1]["latency_ms"]["p50"] == pytest.approx(2)
    assert "b " in on_terminal(document, 80)
    page.write(path, tmp_path / "page.html")
    assert "By model" in (tmp_path / "page.html").read_text()


def test_failures_are_drawn_by_kind(tmp_path: Path) -> None:
    rows = flights()
    for flight in rows[90:96]:
        flight.error = "HTTP 503: queue 7 full" if flight.n % 2 else "no answer in time"
    path = write(tmp_path / "r", rows, END)
    assert read(path).kinds == ["", "no answer in time", "HTTP 503"]
    assert [(name, len(moments)) for name, moments in breakdown.failures(read(path))] == [
        ("not sent", 4),
        ("no answer in time", 3),
        ("HTTP 503", 3),
    ]
    page.write(path, tmp_path / "page.html")
    assert "Failures over time" in (tmp_path / "page.html").read_text()


def test_the_page_of_a_run_that_sent_nothing_shows_why(tmp_path: Path) -> None:
    dropped = [Flight(n, n / 10, 0, verdict=DROPPED) for n in range(10)]
    for rows in (dropped, []):
        path = write(tmp_path / "r", rows, END | {"errors": []})
        page.write(path, tmp_path / "page.html")
        html = (tmp_path / "page.html").read_text()
        assert "INVALID RUN" in html
        assert ("Failures over time" in html) == bool(rows)


def on_terminal(document: dict[str, Any], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(text(document))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_report_fits_a_narrow_terminal(tmp_path: Path) -> None:
    shown = on_terminal(summarize(write(tmp_path / "r", flights(), END | {"server": SERVER})), 60)
    assert all(len(line) <= 60 for line in shown.splitlines())
    for wanted in ("9.20", "500", "90.0 requests/s", "2.00 ms queue", "boom"):
        assert wanted in shown
    assert "…" not in shown


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    path = write(tmp_path / "r", flights(), END | {"server": SERVER})
    page.write(path, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    outside_script = html[: html.index("<script>")] + html[html.index("</head>") :]
    assert len(html.encode()) < 1_400_000
    assert "@media print" in html and "@media screen and (prefers-color-scheme: dark)" in html
    assert "http://" not in outside_script
    assert "https://" not in outside_script
    assert " src=" not in outside_script
    for title in ("Latency by percentile", "Latency over time", "Throughput over time", "Where the time goes"):
        assert title in outside_script
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_what_a_server_says_cannot_break_the_page(tmp_path: Path) -> None:
    nasty = END | {"server": None, "errors": [{"verdict": ERROR, "text": "<script>alert(1)</script>", "count": 1}]}
    page.write(write(tmp_path / "r", flights(), nasty), tmp_path / "page.html")
    assert "<script>alert" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.5, "1.50"),
        (99.96, "100.0"),
        (1234.5, "1,234"),
        (None, "-"),
        (float("nan"), "-"),
    ],
)
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_an_invalid_run_says_everywhere_what_is_sound(tmp_path: Path) -> None:
    rows = [Flight(n, n / 100, 0, n / 100 + (0.03 if n % 20 == 0 else 0.0), n / 100 + 0.04) for n in range(100)]
    path = write(tmp_path / "r", rows, END | {"errors": []})
    document = summarize(path)
    assert document["sound"]["text"]
    page.write(path, tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    shown = " ".join(on_terminal(document, 200).split())
    for line in (*document["sound"]["text"], *document["sound"]["how"]):
        assert line in shown
        assert str(escape(line)) in html


def runs(*figures: tuple[float, bool, bool]) -> list[dict[str, Any]]:
    """Documents of runs by the rate achieved, whether they are valid, and whether they keep their objective."""
    return [
        {"rate": {"achieved": rate}, "valid": valid, "thresholds": [{"text": "p99 < 9ms", "passed": passed}]}
        for rate, valid, passed in figures
    ]


def test_the_knee_is_the_fastest_run_that_keeps_the_objective() -> None:
    found = runs((50, True, True), (90, True, True), (120, True, False))
    assert page.knee(found)[0] is found[1]
    assert page.knee(runs((50, True, True), (90, True, True)))[0] is None
    assert page.knee(runs((50, True, False), (90, False, True)))[0] is None
    unstated = [run | {"thresholds": []} for run in runs((50, True, True), (98, True, True), (100, True, True))]
    assert page.knee(unstated)[0] is unstated[1]
    assert page.knee(unstated[:2])[0] is None


@needs_browser
@pytest.mark.slow
def test_pages_fit_a_phone_and_are_light_on_paper(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"run-{rate}", flights(), END | {"server": SERVER}, rate=float(rate)) for rate in (60, 90)
    ]
    page.write(paths[0], tmp_path / "page.html")
    page.write_several([(path.name, summarize(path)) for path in paths], tmp_path / "several.html")
    for name in ("page.html", "several.html"):
        assert_fits(tmp_path / name, tmp_path)
    dark = "--blink-settings=preferredColorScheme=0"
    assert measured(tmp_path / "page.html", tmp_path, 1280, dark)["paper"] == "rgb(15, 22, 32)"
    chromium(dark, f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "page.html").as_uri())
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_the_vendored_script_is_of_the_version_that_the_charts_are_written_for() -> None:
    """Plotly's Python side writes what its own plotly.js reads, which the whole bundle in the package names."""
    from plotly.offline import get_plotlyjs

    def major(script: str) -> str:
        found = re.search(r"plotly\.js.*? v(\d+)\.", script[:300])
        assert found
        return found[1]

    assert major(page.plotly()) == major(get_plotlyjs())
