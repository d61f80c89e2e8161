"""Tables on the terminal, from the same documents that `--json` prints."""

import shlex
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape

from loadtest.record.table import Unbroken
from modelathe.interpreter import program
from optimize.report import ratios as words

RUNTIMES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
}
WIDE = 100
"""Columns of a terminal from which on every figure has room."""


def terminal() -> Console:
    """Return what is printed to."""
    # A pipe or a file gets lines as long as they need to be.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def say(console: Console, text: str) -> None:
    """Print a text: on a terminal broken between words, elsewhere as long as it is."""
    console.print(text, soft_wrap=not console.is_terminal)


def number(value: int | None) -> str:
    """Return 12,345, or a dash for what is not known."""
    return "-" if value is None else f"{value:,}"


def metric(document: dict[str, Any]) -> str:
    """Return a score's name, with a word where less of it is better."""
    return f"{document['metric']}{'' if document.get('higher_is_better', True) else ', less is better'}"


def moved(deviation: dict[str, float] | float) -> str:
    """Return how far outputs move with the batch that their sample is in: one figure, or one for each output."""
    if not isinstance(deviation, dict):
        return f"{deviation:.2g}"
    if len(deviation) == 1:
        return f"{next(iter(deviation.values())):.2g}"
    return ", ".join(f"{output} {value:.2g}" for output, value in deviation.items())


def score(document: dict[str, Any]) -> str:
    """Return `accuracy 0.9889 [0.9796, 0.9963]`."""
    return f"{metric(document)} {document['value']:.4f} [{document['low']:.4f}, {document['high']:.4f}]"


def run(document: dict[str, Any]) -> None:
    """Print the proof of an `optimize run`: each model, the ratios, the gates, the endpoint and what was published."""
    console = terminal()
    runtime = RUNTIMES[document["recipe"]["target"]["runtime"]]
    where = f"for {runtime}, judged on a CPU" if document["ratios"]["unmeasured"] else f"in {runtime}"
    console.print(f"{document['workload']}: from the trained model to the endpoint, {where}")
    _journey(console, document)
    places = [f"{place} {found['value']:.4f}" for place, found in document["places"].items() if found]
    console.print(f"{metric(document['trained']['quality'])}, in {len(places)} places: {', '.join(places)}")
    _ratios(console, document["ratios"])
    _warnings(console, document["warnings"])
    for entry in document.get("tried", ()):
        say(console, f"the preset {entry['preset']} was tried before, and refused: {escape(entry['why'])}")
        if entry["page"]:
            console.print(f"  its page: {entry['page']}", soft_wrap=True)
    gates(console, document["gates"])
    if document["load"]:
        _load(console, document["load"])
    if document["version"]:
        version = document["version"]
        forced = " (forced)" if version.get("forced") else ""
        forced += " (speed and endpoint not measured)" if version.get("unmeasured") else ""
        loaded = f", loaded at {version['url']}" if version.get("url") else ""
        kind = "candidate" if version.get("state") == "staged" else "published"
        console.print(f"{kind}: {version['model']} version {version['number']}{forced}{loaded}", soft_wrap=True)
        if document.get("comparison"):
            _comparison(console, document["comparison"])
        where = shlex.quote(version["repository"])
        if version.get("state") == "staged":
            line = f"{program('serve')} promote {version['model']} {version['number']} --repository {where}"
            console.print(f"promote it with: {line}", soft_wrap=True)
        elif not version.get("url"):
            console.print(f"serve it with: {program('serve')} up {where}", soft_wrap=True)
    console.print(f"bundle: {document['bundle']}", soft_wrap=True)
    sound = all(gate["passed"] for gate in document["gates"]) and not document["ratios"]["unmeasured"]
    if sound and not document["version"]:
        say(
            console,
            "nothing was published: the same with --repository FOLDER proves and publishes it",
        )
    if document.get("report"):
        console.print(f"proof page: {document['report']}", soft_wrap=True)
    if tracking := document.get("tracking"):
        _tracking(console, tracking)


def step(document: dict[str, Any], bundle: str) -> None:
    """Print one element of `steps[]`."""
    console = terminal()
    console.print(f"{document['name']}: {score(document['quality'])}, trained {score(document['trained'])}")
    cost = document["cost"]
    console.print(f"{cost['bytes']:,} bytes, {cost['parameters']:,} parameters, {number(cost['macs'])} MACs a sample")
    _ratios(console, document["ratios"])
    _warnings(console, document["warnings"])
    console.print(f"bundle: {bundle}", soft_wrap=True)


def quality(document: dict[str, Any]) -> None:
    """Print what `optimize evaluate` found."""
    console = terminal()
    console.print(
        f"{document['predictor']}: {score(document['quality'])} on {document['quality']['samples']:,} samples"
    )
    for also in document["also"]:
        console.print(f"  {score(also)}")


def difference(document: dict[str, Any], first: str, second: str) -> None:
    """Print what `optimize compare` found."""
    console = terminal()
    say(console, f"{score(document['first'])}  {first}")
    say(console, f"{score(document['second'])}  {second}")
    console.print(
        f"difference {document['difference']:+.4f}, "
        f"paired 95 % interval [{document['low']:+.4f}, {document['high']:+.4f}]: {document['verdict']}; "
        f"{len(document['flipped']):,} samples differ, {len(document['worsened']):,} of them for the worse"
    )


def lineage(description: dict[str, Any]) -> None:
    """Print what `optimize show` found."""
    console = terminal()
    source = description["workload"]["source"] or f"{description['name']}, made in Python, without a file"
    console.print(f"workload {source}, written by modelathe {description['modelathe']}", soft_wrap=True)
    for line in description["workload"].get("inferred", ()):
        console.print(f"  read from its data: {line}", markup=False, soft_wrap=True)
    if not description["lineage"]:
        console.print("the trained model, untouched")
    for place, entry in enumerate(description["lineage"], 1):
        config = ", ".join(f"{key} = {value}" for key, value in entry["config"].items())
        say(console, f"{place}. {entry['name']} ({config}), seed {entry['seed']}")
        console.print(
            f"   {score(entry['quality'])}; {entry['cost']['bytes']:,} bytes, {number(entry['cost']['macs'])} MACs"
        )


def runs(entries: list[dict[str, Any]]) -> None:
    """Print what `optimize runs` found, three lines for each."""
    console = terminal()
    for entry in entries:
        version = f", version {entry['version']['number']}" if entry["version"] else ""
        refused = f" by {', '.join(entry['refused'])}" if entry["refused"] else ""
        name = entry["name"] or "unknown"
        console.print(f"{entry['folder']}  {name}  {entry['when']}  {entry['bytes']:,} bytes", soft_wrap=True)
        console.print(f"  {entry['state']}{refused}{version}: {', '.join(entry['steps'])}", soft_wrap=True)
        if entry["ratios"]:
            reached = entry["ratios"]["throughput"].items()
            speeds = [f"{words.times(value)} the throughput at batch {batch}" for batch, value in reached]
            gained = ", ".join([f"{entry['ratios']['size']:.2f}× smaller", *speeds])
            before = f"{entry['trained']['value']:.4f}"
            console.print(f"  {score(entry['quality'])}, trained {before}; {gained}", soft_wrap=True)
        if entry["page"]:
            console.print(f"  {entry['page']}", soft_wrap=True)
    if not entries:
        console.print("no runs")


def gates(console: Console, entries: list[dict[str, Any]]) -> None:
    """Print one line for each gate."""
    for entry in entries:
        word = "[green]passed[/]" if entry["passed"] else "[red]NO    [/]"
        say(console, f"{word} {entry['name']}: {entry['measured']}, wanted {entry['limit']}")
        if entry["advice"]:
            say(console, f"       {entry['advice']}")


def _journey(console: Console, document: dict[str, Any]) -> None:
    """Print one row for each model; a narrow terminal gets fewer columns."""
    batches = list(document["trained"]["cost"]["latency_ms"])
    wide = console.width >= WIDE
    table = Unbroken(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column(metric(document["trained"]["quality"]), no_wrap=wide)
    for title in ("bytes", *(("parameters", "MACs") if wide else ()), *(f"ms at {batch}" for batch in batches)):
        table.add_column(title, justify="right", no_wrap=True)
    rows = [("trained", document["trained"]), *((element["name"], element) for element in document["steps"])]
    for name, entry in rows:
        cost = entry["cost"]
        counts = [number(cost[key]) for key in ("bytes", *(("parameters", "macs") if wide else ()))]
        times = [f"{cost['latency_ms'][batch]:.3g}" for batch in batches]
        table.add_row(name, _interval(entry["quality"], wide), *counts, *times)
    if document["endpoint"]:
        table.add_row("endpoint", _interval(document["endpoint"]["quality"], wide))
    console.print(table)


def _interval(document: dict[str, Any], wide: bool) -> str:
    return f"{document['value']:.4f}" + (f" [{document['low']:.3f}, {document['high']:.3f}]" if wide else "")


def _ratios(console: Console, ratios: dict[str, Any]) -> None:
    speeds = []
    for batch, ratio in ratios["throughput"].items():
        undecided = ", undecided" if ratios["verdict"][batch] == "undecided" else ""
        interval = words.interval(ratios["interval"][batch])
        speeds.append(f"{words.times(ratio)} the throughput at batch {batch} {interval}{undecided}")
    line = ", ".join([f"{ratios['size']:.2f}× smaller", *speeds])
    say(console, f"against the trained model's FP32 ONNX in ONNX Runtime: {line}")
    if ratios["unmeasured"]:
        return
    say(
        console,
        "times faster are taken round by round, milliseconds are medians over all rounds: their quotients may differ",
    )
    controls = "; ".join(f"batch {batch} {words.control(ratio)}" for batch, ratio in ratios["control"].items())
    say(console, f"A/A control, the trained model against itself in {ratios['rounds']} rounds: {controls}")


def _tracking(console: Console, tracking: dict[str, str]) -> None:
    if tracking["error"]:
        text = f"not tracked at {tracking['uri']}: {tracking['error']}; the result stands as it is"
        _warnings(console, [text])
    else:
        text = f"tracked: run {tracking['run']} of experiment {tracking['experiment']} at {tracking['uri']}"
        say(console, escape(text))


def _comparison(console: Console, found: dict[str, Any]) -> None:
    """Print what was published beside the version that was live; what is worse now in red."""
    console.print(f"beside version {found['number']}, which was live:")
    for line in found["told"]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    for line in found["better"]:
        console.print(f"[red]version {found['number']} is better: {escape(line)}[/]", soft_wrap=True)


def _warnings(console: Console, warnings: list[str]) -> None:
    for warning in warnings:
        say(console, f"[yellow]warning:[/] {escape(warning)}")


def _load(console: Console, load: dict[str, Any]) -> None:
    latency, requests = load["latency_ms"], load["requests"]
    state = "valid" if load["valid"] else "INVALID"
    say(
        console,
        f"load test ({state}): {requests['done']:,} requests, {load['rate']['achieved']:,.0f} per second, "
        f"p50 {latency['p50']:.2f} ms, p99 {latency['p99']:.2f} ms",
    )
