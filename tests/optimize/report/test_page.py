"""The proof page: what it shows, what it never does, and what a failing write leaves."""

import errno
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loadtest.judge.summary import summarize
from loadtest.plan.plan import Plan
from loadtest.record.results import Flight
from optimize.report import figures, page, table
from tests.browser import assert_fits, needs_browser
from tests.loadtest.report.test_report import END
from tests.loadtest.report.test_report import write as write_results

BATCHES = ("1", "32")


def scores(value: float, fidelity: float) -> dict[str, Any]:
    quality = {"metric": "accuracy", "value": value, "low": value - 0.0111, "high": value + 0.0074, "samples": 540}
    quality["higher_is_better"] = True
    return {
        "quality": quality,
        "also": [{**quality, "metric": "fidelity", "value": fidelity, "low": fidelity - 0.01, "high": fidelity}],
    }


def cost(size: int, parameters: int, macs: int, latency: tuple[float, float]) -> dict[str, Any]:
    times = dict(zip(BATCHES, latency, strict=True))
    throughput = {batch: int(batch) * 1000 / time for batch, time in times.items()}
    return {"bytes": size, "parameters": parameters, "macs": macs, "latency_ms": times, "throughput": throughput}


def step(name: str, config: dict[str, Any], value: float, spent: dict[str, Any], **more: Any) -> dict[str, Any]:
    trained = scores(0.9907, 1.0)["quality"]
    return {
        "name": name,
        "config": config,
        "seed": 7,
        "trained": trained,
        **scores(value, value),
        "cost": spent,
        **more,
    }


def ratio(value: float, low: float, high: float, verdict: str = "not slower") -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "spread": [low - 0.1, high + 0.1], "verdict": verdict}


def told(size: float, one: float, many: float, before: dict[str, Any]) -> dict[str, Any]:
    values = {"1": one, "32": many}
    return {
        "size": size,
        "latency": values,
        "throughput": values,
        "interval": {batch: [value * 0.96, value * 1.03] for batch, value in values.items()},
        "verdict": dict.fromkeys(values, "not slower"),
        "before": before,
        "control": {"1": ratio(1.01, 0.98, 1.02), "32": ratio(0.99, 0.93, 1.05, "undecided")},
        "rounds": 15,
        "unmeasured": "",
    }


def gate(name: str, passed: bool = True, measured: str = "1", limit: str = "≤ 2", advice: str = "") -> dict[str, Any]:
    told = {"name": name, "passed": passed, "measured": measured, "limit": limit, "advice": advice}
    return {**told, "machine": False, "undecided": "the interval holds the limit" in advice}


def lane(name: str, requests: int, largest: float, tolerance: float) -> dict[str, Any]:
    found = {"max_abs_diff": largest, "tolerance": tolerance}
    return {"lane": name, "requests": requests, "mismatched": 0, "output": "logits", **found}


def load_report() -> dict[str, Any]:
    points = {"mean": 3.21, "p50": 2.98, "p90": 4.31, "p95": 4.87, "p99": 7.65, "p999": 11.4, "max": 15.9}
    server = {"success": 12470, "fail": 0, "reconciled": True, "executions": 3461, "request_ms": 3.02, "queue_ms": 1.24}
    server |= {"compute_ms": 1.67, "service_ms": 3.19, "overhead": 0.056, "mean_batch": 3.6}
    url = "http://127.0.0.1:8000"
    plan = asdict(Plan(url, 5.0, concurrency=8))
    part = {"model": "digits_cnn", "version": "3", "payloads": 16, "batch": 1, "tolerance": 1e-5}
    requests = {
        "planned": 12470,
        "sent": 12470,
        "done": 12470,
        "failed": 0,
        "dropped": 0,
        "mismatched": 0,
        "timed_out": 0,
    }
    return {
        "valid": True,
        "why": "",
        "fix": "",
        "fault": "",
        "sound": None,
        "notes": [],
        "model": "digits_cnn",
        "url": url,
        "version": "3",
        "plan": plan,
        "parts": [part],
        "models": [],
        "requests": requests,
        "rate": {"offered": 2494.0, "achieved": 2493.4, "samples": 2493.4},
        "latency_ms": points,
        "service_ms": {name: value - 0.02 for name, value in points.items()},
        "corrected_ms": {name: value + 0.34 for name, value in points.items()},
        "longest_gap": {"seconds": 0.04, "at": 1.5},
        "responses": None,
        "lag_ms": {"p99": 0.03, "max": 0.2},
        "client_cpu": 0.41,
        "client_cores": 1,
        "checked": 12470,
        "mismatches": [],
        "server": server,
        "errors": [],
        "thresholds": [],
    }


def served(price: float | None = 0.36) -> dict[str, Any]:
    def side(samples: float, p99: float) -> dict[str, Any]:
        cost = price and price / 3600 / samples * 1e6
        figures = {"requests": samples, "samples": samples, "per_unit": samples / 2, "per_million": cost}
        return {"error": "", "valid": True, **figures, "p50_ms": 2.98, "p99_ms": p99}

    sides = {"trained": side(811.0, 21.3), "result": side(2493.4, 7.65)}
    return {"unit": "core", "units": 2, "price": price, "ratio": 2493.4 / 811.0, **sides}


def published() -> dict[str, Any]:
    pruned = cost(66_914, 63_562, 1_262_784, (0.131, 1.92))
    healed = cost(66_930, 63_562, 1_262_784, (0.133, 1.94))
    exported = cost(66_951, 63_562, 1_262_784, (0.130, 1.91))
    final = cost(23_391, 63_562, 1_262_784, (0.118, 1.203))
    same = {"1": ratio(1.0, 0.99, 1.01), "32": ratio(1.0, 0.98, 1.02)}
    gained = {"1": ratio(2.38, 2.3, 2.5), "32": ratio(3.42, 3.3, 3.5)}
    lost = {"1": ratio(0.88, 0.85, 0.92, "slower"), "32": ratio(1.59, 1.5, 1.7)}
    result = told(489_213 / 23_391, 2.644, 5.461, lost)
    cut, taught = told(7.31, 2.38, 3.42, gained), told(7.31, 2.37, 3.41, same)
    quality = "0.9870 (-0.0037, 95 % interval [-0.0093, +0.0019])"
    wide = "the interval holds the limit: about 2,711 samples decide"
    return {
        "format": 1,
        "modelathe": "0.1.0",
        "workload": "digits_cnn",
        "recipe": {
            "seed": 7,
            "target": {"device": "cpu", "runtime": "onnxruntime", "cores": 2, "batch": [1, 32]},
            "budget": {"max_drop": 0.005},
            "load": {"duration": 5.0, "concurrency": 8},
            "step": [{"use": "prune.channels", "ratio": 0.5}, {"use": "quantize.static"}],
        },
        "resumed": False,
        "trained": {**scores(0.9907, 1.0), "cost": cost(489_213, 121_930, 4_872_192, (0.312, 6.57))},
        "steps": [
            step("prune.channels", {"ratio": 0.5, "exclude": []}, 0.6537, pruned, ratios=cut),
            step(
                "distill.logits",
                {"epochs": 20, "learning_rate": 0.002, "teacher": None},
                0.9889,
                healed,
                ratios=taught,
            ),
            step("export.onnx", {}, 0.9891, exported, deviation={"logits": 1.2e-6}, ratios=taught),
            step("quantize.static", {"method": "minmax"}, 0.9870, final, deviation={"logits": 0.0312}, ratios=result),
        ],
        "warnings": ["quantize.static made it slower at batch 1: 0.88× [0.85, 0.92], against the step before"],
        "result": {**scores(0.9870, 0.9944), "cost": final},
        "endpoint": {
            **scores(0.9852, 0.9926),
            "parity": {
                "requests": 796,
                "mismatched": 0,
                "max_abs_diff": 0.0307,
                "tolerance": 0.039,
                "deviation": {"logits": 0.0312},
                "lanes": [lane("same batches", 540, 0.0, 1e-5), lane("batched by the server", 256, 0.0307, 0.039)],
            },
        },
        "ratios": result,
        "load": load_report(),
        "served": served(),
        "bundle": "build/runs/digits_cnn/4-quantize.static",
        "version": {
            **{"model": "digits_cnn", "number": 3, "digest": "9f2c" * 16, "forced": False},
            **{"url": None, "repository": "model repository"},
        },
        "gates": [
            gate("quality: accuracy", measured=quality, limit="drop ≤ 0.005", advice=wide),
            gate("promise: smaller", measured="20.91×", limit="> 1×"),
            gate("promise: faster at batch 1", measured="2.64× [2.51, 2.73]", limit="interval above 0.97×"),
            gate("promise: faster at batch 32", measured="5.46× [5.33, 5.59]", limit="interval above 0.97×"),
            gate("parity: same batches", measured="0 of 540 differ, largest difference 0", limit="≤ 1e-05"),
            gate(
                "parity: batched by the server", measured="0 of 256 differ, largest difference 0.031", limit="≤ 0.039"
            ),
            gate("quality: accuracy at the endpoint", measured=quality, limit="drop ≤ 0.005", advice=wide),
            gate("load: answered", measured="12,470 answered, 0 not", limit="valid, all answered"),
        ],
    }


def bundle_only() -> dict[str, Any]:
    document = published()
    nothing = dict.fromkeys(("endpoint", "load", "served", "version"))
    return {**document, **nothing, "gates": document["gates"][:4]}


def refused() -> dict[str, Any]:
    document = bundle_only()
    measured = "0.9648 (-0.0259, 95 % interval [-0.0407, -0.0130])"
    document["gates"][0] = gate("quality: accuracy", False, measured, "drop ≤ 0.005", "prune less, or distill longer")
    return document


def forced() -> dict[str, Any]:
    document = published()
    document["gates"][6] = gate("quality: accuracy at the endpoint", False, "0.95", "drop ≤ 0.005", "prune less")
    document["version"]["forced"] = True
    return document


SHAPES = {"published": published, "bundle": bundle_only, "refused": refused, "forced": forced}


class Reader(HTMLParser):
    """Takes a page apart: the text that a person sees, all addresses, the styles, and tags left open."""

    EMPTY = ("meta", "br", "link", "img", "input")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.styles = ""
        self.open: list[str] = []
        self.feed(source)
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag in ("td", "th", "tr", "p", "li", "br", "small", "h1", "div"):
            self.texts.append(" ")
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.addresses.append(value or "")
            if name == "style":
                self.styles += value or ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        elif not self.open or self.open[-1] != "script":
            self.texts.append(data)


def read(document: dict[str, Any], folder: Path) -> Reader:
    return Reader(page.write(document, folder).read_text(encoding="utf-8"))


def score_texts(entry: dict[str, Any]) -> Iterator[str]:
    for score in [entry["quality"], *entry["also"]]:
        yield f"{score['value']:.4f} [{score['low']:.4f}, {score['high']:.4f}]"
        yield score["metric"]


def cost_texts(entry: dict[str, Any]) -> Iterator[str]:
    spent = entry["cost"]
    yield from (f"{spent[key]:,}" for key in ("bytes", "parameters", "macs"))
    yield from (f"{time:#.3g}" for time in spent["latency_ms"].values())
    yield from (f"{rate:,.0f}" for rate in spent["throughput"].values())


def model_texts(document: dict[str, Any]) -> Iterator[str]:
    for entry in (document["trained"], *document["steps"], document["result"]):
        yield from score_texts(entry)
        yield from cost_texts(entry)
    yield f"{document['ratios']['size']:.2f}×"
    for batch in BATCHES:
        low, high = document["ratios"]["interval"][batch]
        yield f"{document['ratios']['throughput'][batch]:.2f}×"
        yield f"[{low:.2f}, {high:.2f}]"
        control = document["ratios"]["control"][batch]
        least, most = control["spread"]
        yield f"{control['value']:.2f}× [{control['low']:.2f}, {control['high']:.2f}], spread {least:.2f} to {most:.2f}"
    yield f"in each of {document['ratios']['rounds']} rounds"
    yield from document["warnings"]
    for number, entry in enumerate(document["steps"], 1):
        yield from (f"{before['value']:.2f}× the step before" for before in entry["ratios"]["before"].values())
        config = ", ".join(
            f"{key} = {json.dumps(value)}" for key, value in entry["config"].items() if value is not None
        )
        deviation = f" {table.moved(entry['deviation'])}" if "deviation" in entry else ""
        yield f"{number} {entry['name']} {config or 'no options'} {entry['seed']}{deviation}"


def endpoint_texts(document: dict[str, Any]) -> Iterator[str]:
    yield from score_texts(document["endpoint"])
    for entry in document["endpoint"]["parity"]["lanes"]:
        figures = f"{entry['max_abs_diff']:.2g} {entry['tolerance']:.2g}"
        yield f"{entry['lane']} {entry['requests']} {entry['mismatched']} {entry['output']} {figures}"
    load = document["load"]
    for key in ("latency_ms", "service_ms", "corrected_ms"):
        yield " ".join(f"{value:#.3g}" for value in load[key].values())
    yield f"{load['requests']['done']:,} of {load['requests']['planned']:,} requests answered"
    yield f"{load['rate']['achieved']:,.1f} requests/s"
    yield from (f"{load['server'][f'{name}_ms']:#.3g} ms {name}" for name in ("queue", "compute"))
    for side in ("trained", "result"):
        yield f"{document['served'][side]['requests']:,.0f} {document['served'][side]['samples']:,.0f}"
        yield f"{document['served'][side]['per_million']:#.3g}"
    yield f"{document['served']['ratio']:.2f}×"
    yield f"{load['server']['mean_batch']:#.3g} samples"
    yield f"{document['version']['model']} version {document['version']['number']}"
    yield document["version"]["digest"]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes, so that a longer write fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_figure_of_the_document_is_on_the_page(shape: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    document = shape()
    shown = read(document, tmp_path)
    expected = [document["modelathe"], document["workload"], document["bundle"], *model_texts(document)]
    expected += [entry[key] for entry in document["gates"] for key in ("name", "measured", "limit", "advice")]
    expected += endpoint_texts(document) if document["endpoint"] else []
    assert [text for text in expected if text not in shown.text] == []
    assert not shown.open, "tags left open"


def test_what_was_forced_and_not_measured_says_both() -> None:
    document = refused()
    document["version"] = {
        "model": "m",
        "number": 1,
        "digest": "d",
        "forced": True,
        "unmeasured": "not measured: no GPU",
    }
    found = page.verdict(document)
    assert found["title"].startswith("FORCED")
    assert "Refused by" in found["text"] and "not measured: no GPU" in found["text"]
    document["version"]["forced"] = False
    assert page.verdict(document)["title"].startswith("UNMEASURED")


def test_what_could_not_be_counted_is_a_dash_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = published()
    for entry in (document["trained"], *document["steps"], document["result"]):
        entry["cost"]["macs"] = None
    assert "None" not in read(document, tmp_path).text
    table.run({**document, "places": {}})
    workload = {"source": "user.py:workload"}
    table.lineage({"workload": workload, "modelathe": "0.1.0", "lineage": document["steps"]})
    assert "- MACs" in capsys.readouterr().out


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_page_needs_no_network(shape: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    shown = read(shape(), tmp_path)
    assert shown.addresses == []
    assert "url(" not in shown.styles and "@import" not in shown.styles
    assert "default-src 'none'" in (tmp_path / page.NAME).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("shape", "title"),
    [
        (published, "Published as digits_cnn version 3"),
        (bundle_only, "Bundle of digits_cnn, not published"),
        (refused, "Refused by the gate “quality: accuracy”"),
        (forced, "FORCED: digits_cnn version 3 is published against a refusal"),
    ],
)
def test_the_verdict_comes_first(shape: Callable[[], dict[str, Any]], title: str, tmp_path: Path) -> None:
    text = read(shape(), tmp_path).text
    assert text.index(title, text.index("proof of")) < text.index("smaller")


def test_a_ratio_that_may_be_one_says_so(tmp_path: Path) -> None:
    document = published()
    assert "not distinguishable" not in read(document, tmp_path).text
    document["ratios"]["interval"]["1"] = [0.98, 1.14]
    assert "[0.98, 1.14]: not distinguishable from 1×" in read(document, tmp_path).text


def test_a_ratio_that_is_undecided_says_so(tmp_path: Path) -> None:
    document = published()
    assert "undecided, it may be slower" not in read(document, tmp_path).text
    document["ratios"]["interval"]["1"] = [0.96, 1.14]
    document["ratios"]["verdict"]["1"] = "undecided"
    assert "[0.96, 1.14]: undecided, it may be slower" in read(document, tmp_path).text


def test_a_refusal_says_at_once_what_to_do(tmp_path: Path) -> None:
    document = refused()
    text = read(document, tmp_path).text
    assert "3 of 4 gates passed" in text
    measured = text.index(document["gates"][0]["measured"])
    assert measured < text.index("prune less, or distill longer") < text.index("smaller")


def test_a_closed_loop_claims_no_planned_times(tmp_path: Path) -> None:
    closed, load = published(), load_report()
    load |= {"corrected_ms": None, "plan": load["plan"] | {"concurrency": None, "rate": 9.0}}
    texts = [read(one, tmp_path).text for one in (closed, closed | {"load": load})]
    assert ["corrected is" in text for text in texts] == [True, False]
    assert ["a closed loop has no planned times" in text for text in texts] == [True, False]
    assert "from the planned time" not in texts[0]


def test_an_invalid_load_test_says_so_and_bears_missing_figures(tmp_path: Path) -> None:
    document = forced()
    load = document["load"]
    nothing = dict.fromkeys(load["latency_ms"], float("nan"))
    load |= {"valid": False, "why": "the server stopped answering", "latency_ms": nothing, "service_ms": nothing}
    load |= {"server": None, "client_cpu": None, "errors": [{"count": 1204, "text": "connection refused"}]}
    text = read(document, tmp_path).text
    assert "INVALID RUN" in text and "the server stopped answering" in text and "1,204 connection refused" in text


def test_the_torch_model_beside_the_endpoint_is_the_last_one_that_torch_made() -> None:
    places = page.places(published())
    subjects = ["trained model", "after distill.logits", "after quantize.static", "the same file, served"]
    assert [place["subject"] for place in places] == subjects
    assert [place["scores"][0]["value"] for place in places] == [0.9907, 0.9889, 0.9870, 0.9852]
    for mark in (place["mark"] for place in places):
        assert -1e-9 <= mark.left <= mark.at <= mark.left + mark.width <= 100 + 1e-9


def test_a_run_that_only_quantized_compares_with_the_trained_model_alone(tmp_path: Path) -> None:
    document = bundle_only()
    document["steps"] = document["steps"][2:]
    assert [place["subject"] for place in page.places(document)] == ["trained model", "after quantize.static"]
    assert "One metric, two places" in read(document, tmp_path).text


def test_each_step_is_against_the_trained_model_and_the_step_before() -> None:
    document = published()
    rows = page.models(document)
    assert rows[0]["speed"] == rows[0]["before"] == {}
    assert rows[1]["speed"]["32"] == 3.42
    assert rows[-1]["speed"] == document["ratios"]["throughput"]
    assert rows[-1]["before"]["1"]["verdict"] == "slower"


def test_the_table_says_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    document = {**published(), "places": {}}
    table.run(document)
    said = capsys.readouterr().out
    assert f"warning: {document['warnings'][0]}" in said
    assert "itself in 15 rounds: batch 1 1.01× [0.98, 1.02], spread 0.88 to 1.12; batch 32 0.99×" in said
    document["ratios"]["verdict"]["32"] = "undecided"
    table.run(document)
    assert "5.46× the throughput at batch 32 [5.24, 5.62], undecided" in capsys.readouterr().out


def test_the_line_that_serves_stands_where_no_server_has_loaded_it(capsys: pytest.CaptureFixture[str]) -> None:
    document = {**published(), "places": {}}
    table.run(document)
    assert "serve it with: serve up 'model repository'" in capsys.readouterr().out
    document["version"]["url"] = "http://127.0.0.1:8000"
    table.run(document)
    said = capsys.readouterr().out
    assert "serve it with" not in said and "loaded at http://127.0.0.1:8000" in said


def test_the_loss_is_the_one_at_the_endpoint() -> None:
    served = page.loss(published())
    assert served["place"] == "at the endpoint"
    assert served["value"] == pytest.approx(0.9852 - 0.9907)
    assert served["gate"]["name"] == "quality: accuracy at the endpoint"
    assert page.loss(bundle_only())["value"] == pytest.approx(0.9870 - 0.9907)


def test_texts_are_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    document = refused()
    document |= {"workload": bad, "bundle": bad}
    for entry in (document["trained"], *document["steps"], document["result"]):
        entry["quality"] = {**entry["quality"], "metric": bad}
    document["steps"][0]["config"] = {bad: bad}
    document["gates"][0] |= {"name": f"quality: {bad}", "measured": bad, "limit": bad, "advice": bad}
    document["recipe"]["step"][0]["use"] = bad
    assert bad in read(document, tmp_path).text
    assert bad not in (tmp_path / page.NAME).read_text(encoding="utf-8")


def test_files_beside_the_page_are_shown(tmp_path: Path) -> None:
    (tmp_path / "digests.json").write_text(json.dumps({"recipe": "ab12" * 16, "data": "cd34" * 16}))
    shown = read(published(), tmp_path)
    assert shown.addresses == []
    assert "recipe " + "ab12" * 16 in shown.text and "data " + "cd34" * 16 in shown.text


def test_the_machine_of_the_document_stands_before_this_one(tmp_path: Path) -> None:
    here = page.environment()
    assert int(here["cores usable"]) >= 1 and here["processor"] and here["torch"]
    assert f"processor {here['processor']}" in read(published(), tmp_path).text
    there = read({**published(), "environment": {"processor": "Slide Rule 9000"}}, tmp_path).text
    assert "processor Slide Rule 9000" in there and f"torch {here['torch']}" not in there


def test_a_failing_write_leaves_the_old_page_whole(tmp_path: Path) -> None:
    old = page.write(published(), tmp_path).read_bytes()
    with full_disk(10_000), pytest.raises(OSError) as failure:
        page.write(refused(), tmp_path)
    assert failure.value.errno == errno.EFBIG
    assert [file.name for file in tmp_path.iterdir()] == [page.NAME]
    assert (tmp_path / page.NAME).read_bytes() == old


def test_a_failing_first_write_leaves_nothing(tmp_path: Path) -> None:
    with full_disk(10_000), pytest.raises(OSError):
        page.write(published(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_method_that_is_used_twice_has_a_row_for_each_use() -> None:
    document = published()
    document["steps"].insert(1, document["steps"][0])
    name = document["steps"][0]["name"]
    for chart in (figures.score(document), figures.sizes(document), *figures.latencies(document)):
        assert {f"1 {name}", f"2 {name}"} < {row.name for row in chart.rows}


def test_red_was_lost_grey_is_undecided_and_neither_looks_like_success() -> None:
    document = published()
    tones = {row.name: row.tone for row in figures.score(document).rows}
    assert tones["trained"] == "" and tones["1 prune.channels"] == "bad"
    # Their gates passed on the value, but the interval holds the limit.
    assert tones["4 quantize.static"] == tones["endpoint"] == "open"
    document["gates"][0] |= {"undecided": False}
    document["gates"][6] |= {"undecided": False, "passed": False}
    tones = {row.name: row.tone for row in figures.score(document).rows}
    assert (tones["4 quantize.static"], tones["endpoint"]) == ("good", "bad")
    assert figures.speed_tone(1.2, [1.1, 1.3]) == "good"
    assert figures.speed_tone(0.8, [0.7, 0.9]) == "bad"
    assert figures.speed_tone(1.2, [0.9, None]) == figures.speed_tone(None, [None, None]) == "open"


def test_the_axis_of_the_score_shows_the_width_of_the_budget() -> None:
    """A step that lost a third of the score stands beyond the axis, which would else hide what is judged."""
    chart = figures.score(published())
    left, width = chart.budget
    assert width > 8 and left == pytest.approx(chart.line)
    lost = next(row for row in chart.rows if row.name == "1 prune.channels")
    assert (lost.beyond, lost.text) == ("low", "0.6537")
    assert all(not row.beyond for row in chart.rows if row is not lost)
    falling = published()
    for entry in (falling["trained"], *falling["steps"], falling["result"], falling["endpoint"]):
        entry["quality"]["higher_is_better"] = False
    assert figures.limit(falling) == pytest.approx(0.9907 + 0.005)
    assert figures.score(falling).budget[1] > 8


@pytest.mark.parametrize(
    ("shape", "classes"),
    [
        (published, "verdict good"),
        (bundle_only, "verdict warn"),
        (refused, "verdict bad"),
        (forced, "verdict bad forced"),
    ],
)
def test_the_verdict_has_the_colour_of_what_became_of_the_run(
    shape: Callable[[], dict[str, Any]], classes: str, tmp_path: Path
) -> None:
    assert f'<section class="{classes}">' in page.write(shape(), tmp_path).read_text()


def test_a_gate_that_could_not_decide_is_grey_and_no_refusal(tmp_path: Path) -> None:
    document = refused()
    document["gates"][0] |= {"undecided": True}
    html = page.write(document, tmp_path).read_text()
    assert '<section class="verdict open">' in html and "UNDECIDED" in html and "REFUSED" not in html


def test_what_the_trained_model_is_served_at_stands_beside_it(tmp_path: Path) -> None:
    document = published()
    assert "cost of a million samples" in read(document, tmp_path).text
    document["served"] = served(price=None)
    assert "million" not in read(document, tmp_path).text
    document["served"] |= {"trained": {"error": "no such operator"}, "ratio": None}
    assert "not measured: no such operator" in read(document, tmp_path).text


def with_charts(folder: Path) -> Path:
    """Write the whole page of a run with its load test."""
    results = write_results(
        folder / page.LOAD, [Flight(n, n / 100, 0, n / 100, n / 100 + 0.004) for n in range(96)], END
    )
    return page.write({**published(), "load": summarize(results)}, folder)


def test_the_whole_page_with_its_load_report_is_small_and_is_made_for_paper(tmp_path: Path) -> None:
    html = with_charts(tmp_path).read_text()
    assert len(html.encode()) < 1_500_000
    assert "Latency by percentile" in html and "@media print" in html and "@page" in html
    assert "@media screen and (prefers-color-scheme: dark)" in html, "paper would be dark"
    assert len(page.write(bundle_only(), tmp_path).read_bytes()) < 100_000


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_page_fits_a_phone(shape: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    assert_fits(page.write(shape(), tmp_path) if shape is not published else with_charts(tmp_path), tmp_path)
