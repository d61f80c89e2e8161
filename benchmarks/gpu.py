"""Batched serving on a GPU: `make bench-gpu`. Without one it says so and ends; it needs no network.

MiniLM and a ResNet-50-shaped network, FP32 and FP16, are exported, get their largest batch from the measured
time of a call at several batch sizes, are published for a CUDA target, served, and driven to saturation, in turns with
the same file in this process. Writes benchmarks/results/gpu-DATE-DEVICE.json and the same figures as a table, .md.
"""

import json
import os
import re
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import beside
import click
import networks
import numpy as np

from loadtest.judge import summary
from loadtest.load import drive
from loadtest.plan import schedule
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from optimize.judge import measure
from optimize.judge.ruler import Speeds
from optimize.machine import doctor
from optimize.methods.export.onnx import export
from optimize.methods.quantize import half
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.predict.specs import output_specs
from optimize.report import page
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config import curve
from serve.config.settings import Settings
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.server import install
from serve.server import tritonserver as server
from serve.server.endpoint import Endpoint
from serve.server.options import Listen

RESULTS = Path("benchmarks/results")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NETWORKS = {"minilm": networks.minilm, "resnet50": networks.resnet50}
FP32, FP16, SINGLE, AGAIN = "fp32", "fp16", "unbatched", "fp16 again"
WANTED = {
    "served over in process, FP32": 0.90,
    "served over in process, FP16": 0.90,
    "FP16 over FP32, served": 2.0,
    "batched over unbatched, FP16 served": 10.0,
}
"""The least that is wanted, for each network."""


@dataclass(frozen=True)
class Effort:
    """How long it is measured.

    Args:
        pairs: turns of every served model and of this process, each with servers of its own.
        seconds: of one load, and of one stretch of calls in this process.
        concurrency: samples in flight at saturation, in units of the largest batch; one process has 1,000 requests in
            flight at most.
        samples: in a request.
    """

    pairs: int = 9
    seconds: float = 5.0
    concurrency: int = 4
    samples: int = 1


def graphs(made: Workload, target: Target, folder: Path) -> dict[str, Path]:
    """Export the network and convert a copy to FP16 arithmetic; inputs and outputs keep their types."""
    module, full, converted = made.build(), folder / "fp32.onnx", folder / "fp16.onnx"
    export(module, made.inputs, made.outputs, full)
    shutil.copyfile(full, converted)
    context = Context(made, module, target, 0, folder, lambda _text, _share: None)
    half.apply(half.Half(compute=True), converted, context)
    return {FP32: full, FP16: converted}


def served_as(speeds: Speeds, samples: int = 1) -> dict[str, Settings]:
    """Return the settings of every model: the largest batch from the curve of its file; one takes requests singly.

    Args:
        speeds: the curves.
        samples: in a request; no batch may be smaller.
    """
    found = {name: curve.fill(Settings(), speeds.latency_ms(name), "cuda") for name in (FP32, FP16)}
    made = {name: replace(asked, max_batch=max(samples, asked.max_batch or 1)) for name, asked in found.items()}
    return made | {SINGLE: Settings(max_batch=samples)}


def publish(
    place: Path, made: Workload, files: Mapping[str, Path], settings: Mapping[str, Settings], target: Target
) -> None:
    """Publish each of the settings as a model of its own."""
    for name, asked in settings.items():
        graph = files.get(name, files[FP16])
        with OnnxPredictor(graph, target.device) as onnx:
            outputs = onnx.predict(payload.generate(made.inputs, 1, 0)[0])
        specs = output_specs(made, graph, outputs)
        with staging.stage(place, name, Source(graph, made.inputs, specs), target, asked) as staged:
            staging.publish(staged, {})


def load(running: Endpoint, made: Workload, model: str, effort: Effort, **how: Any) -> dict[str, Any]:
    """Return the load test's document; `how` is a `concurrency`, or a `rate` with its `arrival`.

    Raises:
        SystemExit: a request failed, so that the figures would be those of something else.
    """
    plan = Plan(running.http, duration=effort.seconds, seed=0, warmup=1.0, **how)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "load.jsonl"
        drive.run(plan, [Part(model, payload.generate(made.inputs, 16, 0, batch=effort.samples))], file)
        told = summary.summarize(file)
    if told["requests"]["failed"] or told["requests"]["mismatched"]:
        raise SystemExit(f"{made.name}, {model}: {told['why']}")
    return told


def turns(
    place: Path,
    made: Workload,
    files: Mapping[str, Path],
    settings: Mapping[str, Settings],
    target: Target,
    effort: Effort,
) -> list[dict[str, Any]]:
    """Drive every model to saturation and call the same files here, one at a time, in random order in every turn.

    Each load has a server of its own and each file is opened anew, for one that is started once has one luck for all
    turns. FP16 is served twice, the A/A control.

    Each turn holds by model `served` samples a second, the `batch` that the server formed, what the client says
    against the figure (`why`), and for files `alone`: samples a second here, in calls of a batch of the first turn.
    """
    connections = {
        name: min(schedule.MOST_IN_FLIGHT, effort.concurrency * (asked.max_batch or 1) // effort.samples)
        for name, asked in settings.items()
    }
    # The model without batches gets as many requests as its twin.
    connections[SINGLE] = connections[FP16]

    def served(name: str) -> dict[str, Any]:
        with server.running(place, models=[name]) as running:
            told = load(running, made, name, effort, concurrency=connections[name])
        return {"served": told["rate"]["samples"], "batch": told["server"]["mean_batch"], "why": told["why"]}

    def alone(name: str) -> dict[str, Any]:
        with OnnxPredictor(files[name], target.device, target.cores) as onnx:
            return {"alone": beside.in_process(onnx, made.inputs, batches[name], effort.seconds)}

    batches = {name: max(1, round(served(name)["batch"])) for name in files}
    visits = [(name, name, served) for name in settings] + [(AGAIN, FP16, served)]
    visits += [(name, name, alone) for name in files]
    rng, found = np.random.default_rng(0), []
    for _ in range(effort.pairs):
        turn: dict[str, Any] = {name: {} for name in (*settings, AGAIN)}
        for index in rng.permutation(len(visits)):
            name, model, ask = visits[index]
            turn[name] |= ask(model)
        found.append(turn)
    return found


def half_load(running: Endpoint, made: Workload, rate: float, effort: Effort) -> dict[str, Any]:
    """Return the load test's document for Poisson arrivals of samples at half of `rate`, FP16."""
    return load(running, made, FP16, effort, rate=rate / 2 / effort.samples, arrival="poisson")


def figures(found: Sequence[Mapping[str, Any]], speeds: Speeds, half_loaded: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of one network by name; ratios are taken within turns, as `optimize.judge.ruler` says."""

    def ratio(over: tuple[str, str], under: tuple[str, str]) -> float:
        # Seconds for a sample, so that a larger ratio is faster.
        taken = {side: {1: [1 / turn[side[0]][side[1]] for turn in found]} for side in (over, under)}
        return Speeds({"over": taken[over], "under": taken[under]}).ratios("over", "under")[1].value

    def median(model: str, key: str) -> float:
        return statistics.median(turn[model][key] for turn in found)

    best = {name: max(speeds.throughput(name).values()) for name in (FP32, FP16)}
    return {
        "served over in process, FP32": ratio((FP32, "served"), (FP32, "alone")),
        "served over in process, FP16": ratio((FP16, "served"), (FP16, "alone")),
        "FP16 over FP32, served": ratio((FP16, "served"), (FP32, "served")),
        "batched over unbatched, FP16 served": ratio((FP16, "served"), (SINGLE, "served")),
        "FP16 served over FP16 served again": ratio((FP16, "served"), (AGAIN, "served")),
        "FP16 over FP32, in process, best batches": best[FP16] / best[FP32],
        "samples a second, FP32 served": median(FP32, "served"),
        "samples a second, FP16 served": median(FP16, "served"),
        "samples a second, FP16 unbatched": median(SINGLE, "served"),
        "samples in a batch, FP16": median(FP16, "batch"),
        "ms, p99 at half load, Poisson, FP16": half_loaded["latency_ms"]["p99"],
    }


def measured(made: Workload, target: Target, effort: Effort, folder: Path) -> dict[str, Any]:
    """Export, publish, serve and drive one network on the target's device.

    Args:
        made: the network and what it takes.
        target: the device, and the batch sizes of the curve.
        effort: how long.
        folder: an empty one, for the files.
    """
    files = graphs(made, target, folder)
    speeds = measure.speed(files, made.inputs, target, baseline=FP32)
    settings = served_as(speeds, effort.samples)
    place = folder / "model_repository"
    publish(place, made, files, settings, target)
    found = turns(place, made, files, settings, target, effort)
    with server.running(place, models=[FP16], listen=Listen(log=folder / "server.log")) as running:
        half_loaded = half_load(running, made, statistics.median(turn[FP16]["served"] for turn in found), effort)
    return {
        "source": made.source,
        "figures": figures(found, speeds, half_loaded),
        "latency_ms": {name: speeds.latency_ms(name) for name in files},
        "settings": {name: asked.document() for name, asked in settings.items()},
        "turns": found,
        "half load": {"valid": half_loaded["valid"], "why": half_loaded["why"], "rate": half_loaded["rate"]},
    }


def table(document: Mapping[str, Any]) -> str:
    """Return the figures in Markdown, each beside what is wanted of it."""
    lines = [
        f"# GPU-batched serving, {document['date']}",
        "",
        ", ".join(f"{name}: {value}" for name, value in document["machine"].items()) + ".",
        f"Of {document['effort']['pairs']} turns, ratios within turns, {document['effort']['samples']} in a request; "
        "printed by `make bench-gpu`.",
    ]
    for network, found in document["networks"].items():
        lines += ["", f"## {network}", "", "| figure | measured | wanted | |", "| --- | ---: | ---: | --- |"]
        for name, value in found["figures"].items():
            least = WANTED.get(name)
            wanted = "" if least is None else f"≥ {least:g}"
            verdict = "" if least is None else "reached" if value >= least else "MISSED"
            lines.append(f"| {name} | {value:.4g} | {wanted} | {verdict} |")
        chosen = found["settings"][FP16]
        lines += ["", f"From `{found['source']}`. FP16 batches up to {chosen['max_batch']}."]
        if doubts := sorted({entry["why"] for turn in found["turns"] for entry in turn.values() if entry.get("why")}):
            lines.append(f"The load test says of some runs: {'; '.join(doubts)}.")
    return "\n".join(lines) + "\n"


def write(found: Mapping[str, Any], gpu: str, effort: Effort, folder: Path) -> str:
    """Write both files of a run, named after the day and the device, and return the table."""
    day = time.strftime("%F")
    machine = page.environment() | {"GPU": gpu}
    document = {"date": day, "machine": machine, "effort": asdict(effort), "networks": found}
    # nvidia-smi's line is "driver version, name"; the driver stands in the document.
    device = re.sub("[^a-z0-9]+", "-", gpu.rpartition(", ")[2].lower()).strip("-")
    several = f"-{effort.samples}-samples" if effort.samples > 1 else ""
    stem = f"gpu-{day}-{device}{several}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=2))
    text = table(document)
    (folder / f"{stem}.md").write_text(text)
    return text


def lend_libraries() -> None:
    """Let the server find the CUDA libraries that torch's packages brought into this environment."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    folders = sorted({str(file.parent) for file in packages.rglob("lib*.so.*")})
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, [*folders, os.environ.get("LD_LIBRARY_PATH")]))


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(NETWORKS)))
@click.option("--pairs", default=Effort.pairs, help="Turns; 9 at least for a figure that is quoted.")
@click.option("--seconds", default=Effort.seconds, help="Length of every load and of every stretch of calls.")
@click.option("--samples", default=Effort.samples, help="Samples in a request.")
def main(names: tuple[str, ...], pairs: int, seconds: float, samples: int) -> None:
    """Measure the networks and print the figures beside what is wanted; without a GPU, say so."""
    if why := doctor.lacks_gpu():
        click.echo(f"not run: {why}")
        raise SystemExit(0 if why == "no GPU" else 1)
    # Only where the server has no CUDA provider yet; pip's own PIP_NO_INDEX and PIP_FIND_LINKS do it without a network.
    install.install(gpu=True)
    lend_libraries()
    effort = Effort(pairs, seconds, samples=samples)
    target, found = Target(device="cuda", batch=BATCHES), {}
    for made in (NETWORKS[name]() for name in names or NETWORKS):
        click.echo(f"{made.name}: {made.source}", err=True)
        with tempfile.TemporaryDirectory() as folder:
            found[made.name] = measured(made, target, effort, Path(folder))
    click.echo(write(found, doctor.gpu()[0].found, effort, RESULTS))


if __name__ == "__main__":
    main()
