"""The proof page: one self-contained HTML file written from an `optimize run` document."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined

from loadtest.record.statistics import number
from loadtest.report import page as load_pages
from modelathe import files
from modelathe.notebook import View
from optimize.methods.table import BY_NAME
from optimize.report import figures, ratios, table

NAME, LOAD = "report.html", "load.jsonl"
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "torch", "onnx", "numpy")


def write(document: dict[str, Any], folder: Path) -> Path:
    """Write the page into the run's folder, whole or not at all, and return its path.

    Args:
        document: of `optimize run`; `endpoint`, `load` and `version` may be None. Its `environment`, when it has one,
            is shown in place of this machine's.
        folder: the run's folder. Its `digests.json` is shown, and the charts of its `load.jsonl`, when they are there.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    return save(render(document, folder), folder / NAME)


def save(text: str, page: Path) -> Path:
    """Write a page, whole or not at all, and return its path.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    return files.write(page, text)


def render(document: dict[str, Any], folder: Path, *, alone: bool = False) -> str:
    """Return the page as HTML; arguments as for `write`. Of a page that will lie `alone`, no other is linked."""
    load = document["load"]
    machine = document.get("environment") or environment(document["recipe"]["target"]["device"])
    results = folder / LOAD
    return (
        templates()
        .get_template("page.html")
        .render(
            run=document,
            verdict=verdict(document),
            earlier=earlier(document),
            refused=[gate for gate in document["gates"] if not gate["passed"]],
            loss=loss(document),
            models=models(document),
            batches=list(document["trained"]["cost"]["latency_ms"]),
            places=places(document),
            environment=machine,
            digests=digests(document, folder),
            recipe=tomli_w.dumps(document["recipe"]),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            load_body=load_pages.body(load, results if results.is_file() else None) if load else "",
            served=document.get("served"),
            figures=[figures.score(document), figures.sizes(document), *figures.latencies(document)],
            plotly=load_pages.plotly() if load and results.is_file() else "",
        )
    )


def templates() -> Environment:
    """Return what renders the pages of this folder."""
    found = Environment(
        loader=ChoiceLoader([FileSystemLoader(Path(__file__).parent), PackageLoader("loadtest.report", "templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        number=number, score="{:.4f}".format, change=figures.change, whole=table.number, metric=table.metric
    )
    found.filters.update(moved=table.moved)
    found.filters.update(interval=ratios.interval, control=ratios.control, times=ratios.times)
    found.filters.update(gate_tone=figures.gate_tone)
    found.globals.update(speed_tone=figures.speed_tone)
    return found


def verdict(document: dict[str, Any]) -> dict[str, str]:
    """Return what became of the run: a `title`, a `text`, `state`: published, forced, refused, undecided or bundle."""
    gates, version = document["gates"], document["version"]
    refused = [gate["name"] for gate in gates if not gate["passed"]]
    quoted = ", ".join(f"“{name}”" for name in refused)
    named = f"the {'gate' if len(refused) == 1 else 'gates'} {quoted}"
    unmeasured = (version or {}).get("unmeasured", "")
    untold = f" Its speed and its endpoint were {unmeasured}; quality was judged on a CPU." if unmeasured else ""
    if version and version["forced"]:
        title = f"FORCED: {version['model']} version {version['number']} is published against a refusal"
        return {
            "state": "forced",
            "title": title,
            "text": f"Refused by {named}; its lineage says forced for ever.{untold}",
        }
    if version and unmeasured:
        title = f"UNMEASURED: {version['model']} version {version['number']} is published without its endpoint's proof"
        return {"state": "forced", "title": title, "text": untold.strip()}
    if version:
        title = f"Published as {version['model']} version {version['number']}"
        text = (
            f"All {len(gates)} gates passed. The model was served by a real Triton server and tested under load there."
        )
        return {"state": "published", "title": title, "text": text}
    if refused:
        where = "after it was served" if document["endpoint"] else "before it was served"
        text = f"{len(gates) - len(refused)} of {len(gates)} gates passed. Stopped {where}: nothing was published."
        open_ = all(figures.gate_tone(gate) == "open" for gate in gates if not gate["passed"])
        title = f"Undecided: {named} could not tell" if open_ else f"Refused by {named}"
        return {"state": "undecided" if open_ else "refused", "title": title, "text": text}
    text = f"All {len(gates)} gates passed. Nothing was served or published: the run was not given a repository."
    return {"state": "bundle", "title": f"Bundle of {document['workload']}, not published", "text": text}


def head(document: dict[str, Any]) -> View:
    """Return what stands at the head of the page: the verdict, what refused it, size, speed and quality."""
    said, lost, told = verdict(document), loss(document), document["ratios"]
    refused = [
        f"{gate['name']}: {gate['measured']}; wanted {gate['limit']}. {gate['advice']}"
        for gate in document["gates"]
        if not gate["passed"]
    ]
    shown = {"smaller": f"{told['size']:.2f}×"}
    for batch in document["trained"]["cost"]["latency_ms"]:
        unsure = ", undecided" if told["verdict"][batch] == "undecided" else ""
        ends = f"95 % interval {ratios.interval(told['interval'][batch])}{unsure}"
        shown[f"the throughput at batch {batch}"] = f"{ratios.times(told['throughput'][batch])}, {ends}"
    if told["unmeasured"]:
        shown["no speed"] = told["unmeasured"]
    quality = f"{figures.change(lost['value'])}: {lost['gate']['measured']}; wanted {lost['gate']['limit']}"
    shown[f"{table.metric(document['trained']['quality'])}, {lost['place']}"] = quality
    shown["page"] = document["report"]
    title = f"{document['workload']}: {said['title']}"
    return View(title, shown, [*earlier(document), said["text"], *refused, *document["warnings"]])


def earlier(document: dict[str, Any]) -> list[str]:
    """Return a sentence for each preset that was tried before the run's own."""
    tried = document.get("tried", ())
    return [f"The preset {entry['preset']} was tried before, and refused: {entry['why']}." for entry in tried]


def loss(document: dict[str, Any]) -> dict[str, Any]:
    """Return the change of the gated metric: `value` at the `place` nearest to the user, the `gate` that judged it."""
    reached = document["endpoint"] or document["result"]
    judged = [gate for gate in document["gates"] if gate["name"].startswith("quality: ")]
    return {
        "value": reached["quality"]["value"] - document["trained"]["quality"]["value"],
        "place": "at the endpoint" if document["endpoint"] else "in ONNX Runtime",
        "gate": judged[-1],
    }


def models(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the journey up to the endpoint: scores, cost, and ratios taken within the same rounds.

    `size` and `speed` are against the trained model's FP32 ONNX, `before` is the speed against the step before.
    """
    rows = [{"name": "trained model", "entry": document["trained"], "size": None, "speed": {}, "before": {}}]
    for step in document["steps"]:
        told = step["ratios"]
        found = {"size": told["size"], "speed": told["throughput"], "before": told["before"]}
        rows.append({"name": step["name"], "entry": step, **found})
    return rows


def places(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the same metric at each place that the model passed: name, what ran there, scores.

    Each has the `mark` of its first score, and what the `budget` allows, on the scale of `figures.score`.
    """
    trained, endpoint = document["trained"], document["endpoint"]
    ends = [document["result"], endpoint]
    torch = [step for step in document["steps"] if BY_NAME[step["name"]][1].stage == "torch"]
    found = [("PyTorch", "trained model", trained)]
    found += [("PyTorch", f"after {step['name']}", step) for step in torch[-1:]]
    found.append(("ONNX Runtime", f"after {document['steps'][-1]['name']}", document["result"]))
    found += [("Triton endpoint", "the same file, served", endpoint)] if endpoint else []
    scale, worst, first = figures.score_scale(document), figures.limit(document), trained["quality"]["value"]
    gates = [gate for gate in document["gates"] if gate["name"].startswith("quality: ")]
    left, right = sorted((scale.at(worst), scale.at(first)))
    rows = []
    for name, subject, entry in found:
        score = entry["quality"]
        tone = figures.gate_tone(gates[-1] if entry is endpoint else gates[0]) if entry in ends else ""
        mark = scale.point(name, (score["value"], score["low"], score["high"]), tone, "")
        budget = (left, right - left)
        rows.append(
            {"name": name, "subject": subject, "scores": [score, *entry["also"]], "mark": mark, "budget": budget}
        )
    return rows


def environment(device: str = "cpu") -> dict[str, str]:
    """Return what the figures of this machine depend on, by name: processor, cores, system and package versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"processor": _processor(), "cores usable": str(cores), "system": platform.platform(terse=True)}
    if device == "cuda":
        import torch

        found["GPU"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    found["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def digests(document: dict[str, Any], folder: Path) -> dict[str, str]:
    """Return what the run was made from, and of what was published, by name."""
    found: dict[str, str] = {}
    state = folder / "digests.json"
    if state.is_file():
        found |= json.loads(state.read_text(encoding="utf-8"))
    if document["version"]:
        found["published version"] = document["version"]["digest"]
    return found
