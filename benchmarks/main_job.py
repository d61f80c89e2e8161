"""The figures of the main job, for both workloads: `make bench`.

Runs each recipe from the trained model to the endpoint, then drives sentence_embedding to saturation: served by Triton
and in this process, in the same rounds, with the same model, cores and mean batch. Writes build/bench/main_job.json.
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import beside
import click
from rich.console import Console
from rich.table import Table

from loadtest.judge import summary
from loadtest.load import drive
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from optimize.model.errors import GateRefused
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.predict.specs import output_specs
from optimize.report import page
from optimize.runs import pipeline, recipe
from optimize.source.load import load_workload
from optimize.source.workload import Workload
from optimize.step import bundle
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.server import tritonserver as server
from serve.server.endpoint import Endpoint

OUTPUT = Path("build/bench")
EXAMPLES = ("digits_cnn", "sentence_embedding")
SATURATED, MODERATE = 64, 8
WANTED = {
    "digits_cnn: times smaller": ("≥", 8.0),
    "digits_cnn: throughput at batch 32": ("≥", 3.0),
    "digits_cnn: accuracy lost": ("≤", 0.005),
    "digits_cnn: endpoint answers that differ from the bundle": ("≤", 0),
    "sentence_embedding: times smaller": ("≥", 3.8),
    "sentence_embedding: throughput at batch 8": ("≥", 1.7),
    "sentence_embedding: throughput at batch 32": ("≥", 1.9),
    "sentence_embedding: hit@10 kept": ("≥", 0.99),
    "sentence_embedding: fidelity": ("≥", 0.88),
    "served over in-process, FP32": ("≥", 0.88),
    "served over in-process, INT8": ("≥", 0.85),
    "server's success count minus the client's": ("=", 0),
    "client's mean service time over the server's, minus 1": ("in", 0.10),
}


def main_job(name: str) -> dict[str, Any]:
    """Run one example's recipe; a refusal by a gate still has its figures."""
    made = load_workload(f"examples/{name}.py:workload")
    plan = recipe.load(Path(f"examples/{name}.toml"))
    try:
        return pipeline.run(plan, made, repository=OUTPUT / "model_repository")
    except GateRefused as refusal:
        return refusal.partial


def job_figures(name: str, run: dict[str, Any]) -> dict[str, float]:
    """Return the figures of one run, by the names in `WANTED`."""
    ratios = run["ratios"]
    figures = {f"{name}: throughput at batch {batch}": value for batch, value in ratios["throughput"].items()}
    figures[f"{name}: times smaller"] = ratios["size"]
    trained, result = run["trained"]["quality"]["value"], run["result"]["quality"]["value"]
    metric = run["result"]["quality"]["metric"]
    figures[f"{name}: {metric} lost"] = trained - result
    figures[f"{name}: {metric} kept"] = result / trained
    figures |= {f"{name}: {score['metric']}": score["value"] for score in run["result"]["also"]}
    if run["endpoint"]:
        figures[f"{name}: endpoint answers that differ from the bundle"] = run["endpoint"]["parity"]["mismatched"]
    return figures


def published(made: Workload, graphs: dict[str, Path], target: Target) -> Path:
    """Publish each ONNX file as a model of its own, and return the repository."""
    place = OUTPUT / "saturation"
    for name, graph in graphs.items():
        with OnnxPredictor(graph) as onnx:
            outputs = onnx.predict(payload.generate(made.inputs, 1, 0)[0])
        specs = output_specs(made, graph, outputs)
        with staging.stage(place, name, Source(graph, made.inputs, specs), target) as staged:
            staging.publish(staged, {})
    return place


def drive_once(running: Endpoint, made: Workload, model: str, concurrency: int) -> dict[str, Any]:
    """Return the load test's document for one closed loop."""
    plan = Plan(running.http, duration=beside.SECONDS, concurrency=concurrency, seed=0, warmup=1.0)
    results = OUTPUT / "load.jsonl"
    drive.run(plan, [Part(model, payload.generate(made.inputs, 16, 0))], results)
    return summary.summarize(results)


def saturation(folder: Path) -> dict[str, Any]:
    """Return the served figures of a sentence_embedding, FP32 and INT8, with a server of its own in every round.

    Args:
        folder: of the last bundle of its run.
    """
    last = bundle.load(folder)
    made, target = last.workload, recipe.load(Path("examples/sentence_embedding.toml")).target
    assert last.graph is not None
    graphs = {"fp32": folder.parent / "0-trained" / "model.onnx", "int8": last.graph}
    place = published(made, graphs, target)

    def served(name: str, concurrency: int) -> dict[str, Any]:
        with server.running(place, models=[name]) as running:
            return drive_once(running, made, name, concurrency)

    def saturated(name: str) -> dict[str, float]:
        load = served(name, SATURATED)
        return {"rate": load["rate"]["achieved"], "batch": load["server"]["mean_batch"]}

    def alone(name: str, batch: int) -> dict[str, float]:
        with OnnxPredictor(graphs[name], cores=target.cores) as onnx:
            return {"rate": beside.in_process(onnx, made.inputs, batch)}

    found = {name: beside.measure(partial(saturated, name), partial(alone, name)) for name in graphs}
    return {"rounds": found, "moderate": served("int8", MODERATE)}


def served_figures(found: dict[str, Any]) -> dict[str, float]:
    """Return the figures of `saturation`, by the names in `WANTED`."""
    figures = {
        f"served over in-process, {name.upper()}": told["ratio"]["value"] for name, told in found["rounds"].items()
    }
    load = found["moderate"]
    figures["server's success count minus the client's"] = load["server"]["success"] - load["requests"]["done"]
    figures["client's mean service time over the server's, minus 1"] = load["server"]["overhead"]
    return figures


def reached(value: float, rule: tuple[str, float]) -> bool:
    """Judge one figure."""
    sign, limit = rule
    return {"≥": value >= limit, "≤": value <= limit, "=": value == limit, "in": 0 <= value <= limit}[sign]


def show(figures: dict[str, float], found: dict[str, Any]) -> None:
    """Print every figure beside what was wanted, and what the rounds of serving gave."""
    table = Table(title="main job", title_justify="left")
    for title in ("figure", "measured", "wanted", ""):
        table.add_column(title, justify="right" if title in ("measured", "wanted") else "left")
    for name, (sign, limit) in WANTED.items():
        value = figures.get(name)
        wanted = f"0 to {limit:g}" if sign == "in" else f"{sign} {limit:g}"
        verdict = "not measured" if value is None else "reached" if reached(value, (sign, limit)) else "MISSED"
        table.add_row(name, "" if value is None else f"{value:.4g}", wanted, verdict)
    console = Console(width=110)
    console.print(table)
    for name, told in found.get("rounds", {}).items():
        console.print(beside.line(name, told), markup=False)


@click.command()
@click.option("--served/--no-served", default=True, help="Also drive the server to saturation.")
def main(served: bool) -> None:
    """Run the main job on both examples and print the figures beside what was wanted."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    runs = {name: main_job(name) for name in EXAMPLES}
    figures = {key: value for name, run in runs.items() for key, value in job_figures(name, run).items()}
    found = saturation(Path(runs["sentence_embedding"]["bundle"])) if served else {}
    if served:
        figures |= served_figures(found)
    machine = page.environment() | {"date": time.strftime("%F")}
    (OUTPUT / "main_job.json").write_text(
        json.dumps({"machine": machine, "figures": figures, "served": found}, indent=2)
    )
    show(figures, found)


if __name__ == "__main__":
    main()
