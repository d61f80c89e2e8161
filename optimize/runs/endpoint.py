"""The last stretch of a run: serve the result with a real server, compare, load, and publish what was proven.

Everything is tried on a private copy of what will be published, byte for byte, so that the user's repository only ever
holds versions that passed (or that say `forced`). What is published is a candidate: a version that is live stays so
unless the user promotes the new one, in the same command or later.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from optimize.judge import gate, parity, rival, speed
from optimize.judge.evaluate import Quality, collect, compare, judge
from optimize.judge.gate import Gate
from optimize.model.errors import BadWorkload
from optimize.predict.endpoint import EndpointPredictor, from_served, to_served
from optimize.predict.predictor import cut
from optimize.predict.runtimes import open_graph
from optimize.predict.specs import output_specs
from optimize.runs.baseline import counting, graph_of
from optimize.runs.recipe import Recipe
from optimize.runs.run import Run
from optimize.source import sample
from optimize.source.workload import Workload, fewest
from optimize.step.bundle import Bundle
from serve.config import model_config
from serve.config.settings import Settings
from serve.config.target import Target
from serve.repository import staging, tree
from serve.repository.source import Source
from serve.repository.tree import now, total
from serve.rollout import rollout
from serve.server import install
from serve.server import tritonserver as server
from serve.server.endpoint import Endpoint
from serve.server.options import Listen

REQUESTS, THREADS, PAYLOADS = 256, 16, 16


@dataclass(frozen=True)
class Proof:
    """What the endpoint showed: its quality and parity, the load test, all gates, and the version when published.

    Where nothing was served, `endpoint`, `load` and `served` are None. `comparison` is with the version that was live,
    if one was. `served` sets the load test beside that of the trained FP32 model.
    """

    endpoint: dict[str, Any] | None
    load: dict[str, Any] | None
    gates: list[Gate]
    version: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None
    served: dict[str, Any] | None = None


@dataclass(frozen=True)
class Release:
    """What is to be published.

    Args:
        made: the bundle.
        quality: the bundle's own in the target's runtime.
        repository: where it is published.
        told: what its lineage says of the run, beside what is found here.
        page: returns the page of the proof that goes with the version, as HTML.
        usual: how the trained model is served, which is loaded for comparison.
    """

    made: Bundle
    quality: Quality
    repository: Path
    told: Mapping[str, Any]
    page: Callable[[Proof], str]
    usual: Settings = model_config.DEFAULT


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


def prove(this: Run, release: Release, gates: list[Gate]) -> Proof:
    """Serve the result, judge it at the endpoint, and publish it unless a gate says no.

    It is live at once, also on a running `serve up`, where no version was, or where the terms promote it.

    Args:
        this: the run; its recipe gives budget, target and load, its folder takes the load test's results.
        release: what is to be published.
        gates: what was judged so far; all of them passed, or the run is forced.

    Raises:
        ModelRefused: the server over the repository does not load it; what it served it still serves.
    """
    this.progress("serving the result", 0.0)
    with _staged(this, release) as staged:
        with server.running(
            staged.path, listen=Listen(log=this.folder / "server.log"), grace=0, cache=False
        ) as endpoint:
            served, compared, found = _compare(this, endpoint, release.made, staged)
            loaded = _load(this, endpoint, staged, compared["tolerance"], "load")
        beside = _beside(this, _trained(this, release, compared["tolerance"]), loaded)
        gates = [*gates, *found, *gate.load(this.recipe.budget, loaded)]
        proof = Proof({**served.document(), "parity": compared}, loaded, gates, served=beside)
        if not (this.terms.force or all(entry.passed for entry in gates)):
            return proof
        told = {"parity": compared, "deviation": compared["deviation"], "tolerance": compared["tolerance"]}
        return _publish(this, replace(release, told={**release.told, **told}), staged, proof)


def unproven(this: Run, release: Release, gates: list[Gate]) -> Proof:
    """Publish from a machine that can neither serve nor time the result; its lineage says so for ever.

    Args:
        this: the run; its recipe gives the target and how it is served.
        release: what is to be published, its quality judged on the CPU.
        gates: what was judged.
    """
    deviation = release.made.lineage[-1].get("deviation", 0.0)
    told = {"deviation": deviation, "tolerance": answers_of.tolerance(deviation)}
    told["unmeasured"] = speed.lacking(this.recipe.target)
    with _staged(this, release) as staged:
        return _publish(this, replace(release, told={**release.told, **told}), staged, Proof(None, None, gates))


@contextmanager
def _staged(this: Run, release: Release) -> Iterator[staging.Staged]:
    workload, graph = release.made.workload, graph_of(release.made)
    specs = output_specs(workload, graph, release.quality.outputs)
    source = Source(graph, workload.inputs, tuple(specs))
    with staging.stage(release.repository, workload.name, source, this.recipe.target, this.recipe.serve) as staged:
        yield staged


def _compare(
    this: Run, endpoint: Endpoint, made: Bundle, staged: staging.Staged
) -> tuple[Quality, dict[str, Any], list[Gate]]:
    """Judge the endpoint with the workload's metric, and both lanes of parity with the bundle."""
    workload, recipe, trained = made.workload, this.recipe, this.trained
    largest = model_config.max_batch_size(workload.inputs, recipe.target, recipe.serve)
    told = counting(this.progress, "evaluating the endpoint", "samples", this.sets.judging)
    with (
        open_graph(graph_of(made), recipe.target) as graph,
        EndpointPredictor(f"{endpoint.grpc}/{workload.name}") as predictor,
    ):
        answers, targets = collect(predictor, workload, largest, told)
        wanted, _ = collect(graph, workload, largest)
        same = parity.lane("same batches", [(answers, wanted)], answers_of.EXACT)
        this.progress("comparing under the server's batching", 0.0)
        samples = list(_samples(workload))
        alone = [graph.predict(sample) for sample in samples]
    deviation = made.lineage[-1].get("deviation", 0.0)
    tolerance = answers_of.tolerance(deviation)
    batched = list(zip(_ask(endpoint, staged, samples), alone, strict=True))
    mixed = parity.lane("batched by the server", batched, tolerance)
    served = judge(workload, answers, targets, trained.reference)
    first, reached = trained.quality.scores[0], served.scores[0]
    gates = [gate.parity(lane) for lane in (same, mixed)]
    difference = compare(workload, reached, first)
    at_endpoint = gate.quality(recipe.budget, first, reached, difference, this.terms.strict, recipe.names)
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


def _trained(this: Run, release: Release, tolerance: answers_of.Tolerance) -> dict[str, Any]:
    """Serve the trained model's FP32 ONNX, and return its load test, or `error`: why there is none.

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
            staging.stage(release.repository, model, source, recipe.target, release.usual) as staged,
            server.running(staged.path, listen=log, grace=0, cache=False) as endpoint,
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
    told = counting(this.progress, f"load test, {recipe.load.duration:g} s", "s", recipe.load.duration)
    plan = _plan(endpoint, recipe)
    results = folder / f"{name}.jsonl"
    payloads = payload.generate([spec.served for spec in staged.inputs], PAYLOADS, recipe.seed)
    parts = [Part(staged.model, payloads, tolerance=tolerance)]
    drive.run(plan, parts, results, lambda state: None if state.warming else told(state.elapsed))
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


def _publish(this: Run, release: Release, staged: staging.Staged, proof: Proof) -> Proof:
    """Publish what was staged, compared with what is live; make it live where nothing is, or where the terms say so."""
    made, repository = release.made, staged.repository
    version: dict[str, Any] = {
        **{"model": staged.model, "number": staged.number, "digest": total(staged.digests)},
        "forced": not all(entry.passed for entry in proof.gates),
        **{key: value for key, value in release.told.items() if key == "unmeasured"},
        "repository": str(repository),
    }
    if (live := rival.find(repository, staged.model)) is not None:
        new = rival.Candidate(
            made.workload, graph_of(made), release.quality, this.trained.reference, this.recipe.target
        )
        proof = replace(proof, comparison=rival.against(repository, live, new, this.progress))
    proof = replace(proof, version=version)
    this.progress("publishing", 0.9)
    lineage = {
        "workload": made.workload.source,
        "published": now(),
        "lineage": list(made.lineage),
        "gates": [entry.document() for entry in proof.gates],
        **release.told,
        "comparison": proof.comparison,
        "forced": version["forced"],
    }
    staging.publish(staged, lineage, release.page(proof))
    url = None
    if live is None or this.terms.promote:
        url = rollout.promote(repository, staged.model, staged.number).url
    # A configuration of the user's own may name the newest version, whatever its number.
    state = "live" if staged.number in tree.live(repository, staged.model) else "staged"
    return replace(proof, version={**version, "state": state, "url": url})
