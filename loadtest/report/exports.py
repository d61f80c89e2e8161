"""Exports: a run in the formats of other tools: CSV, Prometheus's text format, JUnit's XML, a GitHub step summary."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

import numpy as np

from loadtest.judge import thresholds
from loadtest.record.results import VERDICTS, Results
from loadtest.record.statistics import number
from loadtest.report.terminal import facts, headline, latencies, plan_line
from modelathe import files

_COLUMNS = ("planned", "sent", "done", "verdict", "model", "payload", "tries", "kind")
_ROWS = 50_000
_QUANTILES = {"p50": "0.5", "p90": "0.9", "p95": "0.95", "p99": "0.99", "p999": "0.999", "max": "1"}


def csv(results: Results, destination: Path) -> None:
    """Write one row per request, in the order in which they were due; times are seconds after the start."""
    import csv as library

    parts = results.header["parts"]
    models = np.repeat([part["model"] for part in parts], [part["payloads"] for part in parts])
    with replacing(destination) as file:
        writer = library.writer(file)
        writer.writerow(_COLUMNS)
        for start in range(0, len(results.planned), _ROWS):
            block = slice(start, start + _ROWS)
            times = (_times(column[block]) for column in (results.planned, results.sent, results.done))
            verdicts = (VERDICTS[code] for code in results.verdict[block])
            payloads = results.payload[block].tolist()
            kinds = (results.kinds[code] for code in results.kind[block])
            tries = results.tries[block].tolist()
            writer.writerows(zip(*times, verdicts, models[payloads], payloads, tries, kinds, strict=True))


def _times(column: Any) -> list[str]:
    return ["" if at != at else f"{at:.6f}" for at in column.tolist()]


def prometheus(values: dict[str, Any], destination: Path) -> None:
    """Write the figures in Prometheus's text format, as its node exporter or push gateway takes them.

    Args:
        values: the document of a run.
        destination: the file.
    """
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()
    model = {"model": values["model"]}

    def gauge(name: str, text: str, figures: dict[str, float], label: str = "") -> None:
        metric = Gauge(f"loadtest_{name}", text, ["model", *([label] if label else [])], registry=registry)
        for key, figure in figures.items():
            if figure is not None and figure == figure:
                metric.labels(**model, **({label: key} if label else {})).set(figure)

    gauge("valid", "Whether the run counts.", {"": float(values["valid"])})
    gauge("requests", "Requests, by what became of them.", values["requests"], "state")
    gauge("rate_per_second", "Requests per second; samples likewise.", values["rate"], "kind")
    for name, figures in latencies(values):
        seconds = {quantile: figures[at] / 1e3 for at, quantile in _QUANTILES.items()}
        gauge(f"{name}_seconds", f"The {name} by quantile.", seconds, "quantile")
    gauge("lag_seconds", "How late requests left.", {"0.99": values["lag_ms"]["p99"] / 1e3}, "quantile")
    if values["client_cpu"] is not None:
        gauge("client_cores", "Cores that the client used.", {"": values["client_cpu"]})
    server = values["server"] or {}
    spent = {part: server[f"{part}_ms"] / 1e3 for part in ("request", "queue", "compute") if f"{part}_ms" in server}
    gauge("server_seconds", "Mean time of a request by the server's own count.", spent, "stage")
    verdicts = {one["text"]: float(one["passed"]) for one in values["thresholds"]}
    gauge("threshold_passed", "Whether a threshold was kept.", verdicts, "threshold")
    files.write(destination, generate_latest(registry))


def junit(values: dict[str, Any], destination: Path) -> None:
    """Write one test case for the run's validity and one for each threshold, as CI systems read them."""
    cases = [("the run is valid", values["valid"], f"{values['why']}; {values['fix']}"), *_verdicts(values)]
    failed = sum(not passed for _, passed, _ in cases)
    counts = {"tests": str(len(cases)), "failures": str(failed), "errors": "0"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": f"loadtest {values['model']}", **counts})
    for name, passed, why in cases:
        case = ElementTree.SubElement(suite, "testcase", {"classname": f"loadtest.{values['model']}", "name": name})
        if not passed:
            ElementTree.SubElement(case, "failure", {"message": _printable(why)})
    ElementTree.SubElement(suite, "system-out").text = _printable(f"{headline(values)}\n{plan_line(values)}")
    files.write(destination, ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True))


def _verdicts(values: dict[str, Any]) -> Iterator[tuple[str, bool, str]]:
    for one in values["thresholds"]:
        yield one["text"], one["passed"], thresholds.line(one)


def _printable(text: str) -> str:
    """Return a text without the characters that XML cannot hold, whatever a server said."""
    return "".join(character if character.isprintable() or character in "\n\t" else "?" for character in text)


def summary(values: dict[str, Any], destination: Path) -> None:
    """Append the report as Markdown, for the file that GITHUB_STEP_SUMMARY names."""
    keys = ("mean", "p50", "p90", "p99", "p999", "max")
    good = values["valid"] and all(one["passed"] for one in values["thresholds"])
    lines = [f"### {'✅' if good else '❌'} {_plain(headline(values))}", ""]
    lines += [f"{_plain(text)}  " for text in (values["why"], *values["notes"], plan_line(values)) if text]
    lines += ["", "| ms | mean | p50 | p90 | p99 | p99.9 | max |", "| --- |" + " ---: |" * len(keys)]
    for name, figures in latencies(values):
        lines.append(f"| {name} | {' | '.join(number(figures[key]) for key in keys)} |")
    if values["thresholds"]:
        lines += ["", "| threshold | measured | |", "| --- | ---: | --- |"]
    for one in values["thresholds"]:
        mark = "✅" if one["passed"] else f"❌ {one['why']}".rstrip()
        lines.append(f"| {_plain(one['text'])} | {number(one['measured'])} | {mark} |")
    lines += ["", "| | |", "| --- | --- |", *(f"| {name} | {_plain(fact)} |" for name, fact in facts(values))]
    if values["errors"]:
        lines += ["", "| count | error |", "| ---: | --- |"]
    lines += [f"| {error['count']:,} | {_plain(error['text'])} |" for error in values["errors"]]
    with destination.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")


def _plain(text: str) -> str:
    """Return a text that Markdown and HTML leave as it is."""
    for character, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(character, written)
    return text


WHOLE: dict[str, Callable[[Results, dict[str, Any], Path], None]] = {
    "csv": lambda results, values, path: csv(results, path),
    "prometheus": lambda results, values, path: prometheus(values, path),
    "junit": lambda results, values, path: junit(values, path),
    "summary": lambda results, values, path: summary(values, path),
}
"""By the name of the option that asks for it."""


@contextmanager
def replacing(destination: Path) -> Iterator[IO[str]]:
    """Yield a text file that takes the place of `destination` at the end of the block, whole or not at all."""
    with files.writing(destination) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        yield file
        file.detach()
