"""The last stretch of a run: serve the result with a real server, compare, load, and publish what was proven.

Everything is tried on a private copy of what will be published, byte for byte, so that the user's repository only ever
holds versions that passed (or that say `forced`).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from loadtest.judge import summary
from loadtest.load import drive
from loadtest.plan.data import answers as answers_of
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from modelathe.client import Client, connect
from modelathe.errors import ModelatheError
from modelathe.tensors import Arrays
from optimize.judge import gate, parity
from optimize.judge.evaluate import Quality, collect, compare, judge
from optimize.judge.gate import Gate
from optimize.model.errors import BadWorkload
from optimize.predict.endpoint import EndpointPredictor, from_served, to_served
from optimize.predict.predictor import cut
from optimize.predict.runtimes import open_graph
from optimize.predict.specs import output_specs
from optimize.runs.baseline import graph_of
from optimize.runs.recipe import Recipe
from optimize.runs.run import Run
from optimize.source import sample
from optimize.source.workload import Workload, fewest
from optimize.step.bundle import Bundle
from serve.config import model_config
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.rollout import rollout
from serve.server import install
from serve.server import tritonserver as server
from serve.server.endpoint import Endpoint
from serve.server.options import Listen

REQUESTS, THREADS, PAYLOADS = 256, 16, 16


@dataclass(frozen=True)
class Proof:
    """What the endpoint showed: its quality and parity, the load test, all gates, and the version when published.

    Where nothing was served, `endpoint`, `load` and `served` are None. `served` sets the load test beside that of the
    trained FP32 model.
    """

    endpoint: dict[str, Any] | None
    load: dict[str, Any] | None
    gates: list[Gate]
    version: dict[str, Any] | None
    served: dict[str, Any] | None = None


def check(repository: Path, workload: Workload, target: Target) -> None:
    """Say before anything starts that nothing could be published.

    Raises:
        BadWorkload: the model takes no single samples, and a server sends what comes.
        BadRepository: the repository is a file, cannot be written, or the model's name is not usable.
        NotInstalled: the server's environment, or the target's runtime in it, is missing.
    """
    if (few := fewest(workload.inputs)) > 1:
        raise BadWorkload(
            f"its inputs are declared from a batch of {few}, and a server gives a model single samples too",
            where=workload.source or workload.name,
            fix="declare the batch from 1, as modelathe.tensors.BATCH does, or run it without --repository",
        )
    staging.check(repository, workload.name)
    install.environment().require(model_config.backend(target))


def prove(this: Run, made: Bundle, quality: Quality, repository: Path, gates: list[Gate]) -> Proof:
    """Serve `made`, judge it at the endpoint, and publish it unless a gate says no; a running `serve up` loads it.

    Args:
        this: the run; its recipe gives budget, target and load, its folder takes the load test's results.
        made: the bundle to publish.
        quality: the bundle's own quality in the target's runtime.
        repository: where it is published.
        gates: what was judged so far; all of them passed, or the run is forced.

    Raises:
        ModelRefused: the server over `repository` does not load it; what it served it still serves.
    """
    workload, recipe = made.workload, this.recipe
    specs = output_specs(workload, graph_of(made), quality.outputs)
    this.progress("serving the result", 0.0)
    model, source = workload.name, Source(graph_of(made), workload.inputs, tuple(specs))
    with staging.stage(repository, model, source, recipe.target, recipe.serve) as staged:
        with server.running(staged.path, listen=Listen(log=this.folder / "server.log"), cache=False) as endpoint:
            served, compared, found = _compare(this, endpoint, made, staged)
            loaded = _load(this, endpoint, staged, compared["tolerance"], "load")
        beside = _trained(this, repository, compared["tolerance"])
        gates = [*gates, *found, *gate.load(recipe.budget, loaded)]
        version = None
        if this.terms.force or all(entry.passed for entry in gates):
            this.progress("publishing", 0.9)
            told = {"parity": compared, "deviation": compared["deviation"], "tolerance": compared["tolerance"]}
            version = _publish(staged, made, gates, told)
    return Proof({**served.document(), "parity": compared}, loaded, gates, version, _beside(this, beside, loaded))


def unproven(this: Run, made: Bundle, quality: Quality, repository: Path, gates: list[Gate], why: str) -> Proof:
    """Publish `made` from a machine that can neither serve nor time it; its lineage says so for ever.

    Args:
        this: the run; its recipe gives the target and how it is served.
        made: as for `prove`, and so are `repository` and `gates`.
        quality: judged on the CPU.
        repository: where it is published.
        gates: what was judged.
        why: what was not measured.
    """
    workload, recipe = made.workload, this.recipe
    specs = output_specs(workload, graph_of(made), quality.outputs)
    deviation = made.lineage[-1].get("deviation", 0.0)
    unknown = {"deviation": deviation, "tolerance": answers_of.tolerance(deviation), "unmeasured": why}
    source = Source(graph_of(made), workload.inputs, tuple(specs))
    with staging.stage(repository, workload.name, source, recipe.target, recipe.serve) as staged:
        version = _publish(staged, made, gates, unknown)
    return Proof(None, None, gates, {**version, "unmeasured": why})


def _compare(
    this: Run, endpoint: Endpoint, made: Bundle, staged: staging.Staged
) -> tuple[Quality, dict[str, Any], list[Gate]]:
    """Judge the endpoint with the workload's metric, and both lanes of parity with the bundle."""
    workload, recipe, trained = made.workload, this.recipe, this.trained
    largest = model_config.max_batch_size(workload.inputs, recipe.target, recipe.serve)
    this.progress("evaluating the endpoint", 0.2)
    with (
        open_graph(graph_of(made), recipe.target) as graph,
        EndpointPredictor(f"{endpoint.grpc}/{workload.name}") as predictor,
    ):
        answers, targets = collect(predictor, workload, largest)
        wanted, _ = collect(graph, workload, largest)
        same = parity.lane("same batches", [(answers, wanted)], answers_of.EXACT)
        this.progress("comparing under the server's batching", 0.6)
        samples = list(_samples(workload))
        alone = [graph.predict(sample) for sample in samples]
    deviation = made.lineage[-1].get("deviation", 0.0)
    tolerance = answers_of.tolerance(deviation)
    batched = list(zip(_ask(endpoint, staged, samples), alone, strict=True))
    mixed = parity.lane("batched by the server", batched, tolerance)
    served = judge(workload, answers, targets, trained.reference)
    first, reached = trained.quality.scores[0], served.scores[0]
    gates = [gate.parity(lane) for lane in (same, mixed)]
    at_endpoint = gate.quality(recipe.budget, first, reached, compare(workload, reached, first), this.terms.strict)
    gates.append(replace(at_endpoint, name=f"{at_endpoint.name} at the endpoint"))
    found = {
        "requests": same["requests"] + mixed["requests"],
        "mismatched": same["mismatched"] + mixed["mismatched"],
        "max_abs_diff": float(np.max([same["max_abs_diff"], mixed["max_abs_diff"]])),
        "tolerance": tolerance,
        "deviation": deviation,
        "lanes": [same, mixed],
    }
    return served, found, gates


def _samples(workload: Workload) -> Iterator[Arrays]:
    for batch in sample.rows(workload, "evaluation", REQUESTS):
        yield from cut(batch.inputs, 1)


def _ask(endpoint: Endpoint, staged: staging.Staged, samples: list[Arrays]) -> list[Arrays]:
    """Send every sample as a request of its own, many at a time, so that the server forms the batches."""
    mine = local()
    clients: list[Client] = []

    def ask(sample: Arrays) -> Arrays:
        if not hasattr(mine, "client"):
            mine.client = connect(endpoint.grpc)
            clients.append(mine.client)
        answer: Arrays = mine.client.infer(staged.model, to_served(staged.inputs, sample))
        return from_served(staged.outputs, answer)

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(ask, samples))
    finally:
        for client in clients:
            client.close()


def _trained(this: Run, repository: Path, tolerance: answers_of.Tolerance) -> dict[str, Any]:
    """Serve the trained model's FP32 ONNX as the result was, and return its load test, or `error`: why there is none.

    The result is judged by itself: that the trained model cannot be served is no reason against it.
    """
    recipe, trained = this.recipe, this.trained
    graph = graph_of(trained.bundle)
    try:
        specs = output_specs(trained.bundle.workload, graph, trained.quality.outputs)
        source = Source(graph, trained.bundle.workload.inputs, tuple(specs))
        model = trained.bundle.workload.name
        this.progress("serving the trained model", 0.0)
        log = Listen(log=this.folder / "trained-server.log")
        with (
            staging.stage(repository, model, source, recipe.target, recipe.serve) as staged,
            server.running(staged.path, listen=log, cache=False) as endpoint,
        ):
            return _load(this, endpoint, staged, tolerance, "trained-load")
    except ModelatheError as failure:
        return {"error": failure.what}


def _beside(this: Run, trained: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return what the trained model and the result were served at, by core or GPU, and for what price."""
    target, price = this.recipe.target, this.terms.price
    unit, units = ("core", target.cores) if target.device == "cpu" else ("GPU", 1)

    def side(load: dict[str, Any]) -> dict[str, Any]:
        if "error" in load:
            return {"error": load["error"]}
        samples = load["rate"]["samples"]
        return {
            "error": "",
            "valid": load["valid"],
            "requests": load["rate"]["achieved"],
            "samples": samples,
            "per_unit": samples / units,
            "p50_ms": load["latency_ms"]["p50"],
            "p99_ms": load["latency_ms"]["p99"],
            "per_million": price / 3600 / samples * 1e6 if price is not None and samples else None,
        }

    sides = {"trained": side(trained), "result": side(result)}
    sound = all(not one["error"] and one["valid"] and one["requests"] for one in sides.values())
    ratio = sides["result"]["requests"] / sides["trained"]["requests"] if sound else None
    return {"unit": unit, "units": units, "price": price, "ratio": ratio, **sides}


def _load(
    this: Run, endpoint: Endpoint, staged: staging.Staged, tolerance: answers_of.Tolerance, name: str
) -> dict[str, Any]:
    """Return the document of the recipe's load test, whose results are written to a file of that name."""
    recipe, folder = this.recipe, this.folder
    this.progress(f"load test, {recipe.load.duration:g} s", 0.0)
    plan = _plan(endpoint, recipe)
    results = folder / f"{name}.jsonl"
    payloads = payload.generate([spec.served for spec in staged.inputs], PAYLOADS, recipe.seed)
    drive.run(plan, [Part(staged.model, payloads, tolerance=tolerance)], results)
    return summary.summarize(results)


def _plan(endpoint: Endpoint, recipe: Recipe) -> Plan:
    asked = recipe.load
    return Plan(
        endpoint.http,
        duration=asked.duration,
        concurrency=asked.concurrency if asked.rate is None else None,
        rate=asked.rate,
        seed=recipe.seed,
        warmup=1.0,
        thresholds=gate.sentences(recipe.budget),
    )


def _publish(staged: staging.Staged, made: Bundle, gates: list[Gate], told: dict[str, Any]) -> dict[str, Any]:
    forced = not all(entry.passed for entry in gates)
    lineage = {
        "workload": made.workload.source,
        "lineage": list(made.lineage),
        "gates": [entry.document() for entry in gates],
        **told,
        "forced": forced,
    }
    version = staging.publish(staged, lineage)
    promoted = rollout.promote(staged.repository, version.model, version.number)
    published = {"model": version.model, "number": version.number, "digest": version.digest, "forced": forced}
    return {**published, "url": promoted.url, "repository": str(staged.repository)}
