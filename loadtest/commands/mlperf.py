"""`loadtest mlperf`: the scenarios of MLPerf Inference."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadtest.plan.options import (
    SHAPE,
    Duration,
    Number,
    default_output,
    kept,
    largest_batch,
    parts_of,
    plan_of,
    traffic_options,
)
from modelathe.commandline import PATH, document, emit, finite, json_option, quiet_option
from modelathe.errors import BadInput, Refused, UsageError

if TYPE_CHECKING:
    from loadtest.mlperf.rules import Settings
    from loadtest.plan.plan import Plan
    from loadtest.plan.traffic import Part

_SCENARIOS = ("single-stream", "multi-stream", "server", "offline")
_PROBE = 2.0


@click.command()
@click.argument("model")
@click.option("--scenario", type=click.Choice(_SCENARIOS), required=True, help="Which of MLPerf's four.")
@click.option(
    "--mode",
    type=click.Choice(("performance", "accuracy")),
    default="performance",
    show_default=True,
    help="What to find out.",
)
@click.option(
    "--target-qps",
    type=Number(min=0),
    default=0.0,
    help="server: queries/s. offline: expected samples/s, else measured.",
)
@click.option(
    "--benchmark",
    metavar="NAME",
    help="server: MLPerf's benchmark that MODEL is, as resnet50; it has the latency's bound.",
)
@click.option(
    "--target-latency", type=Duration(), help="server: for 99 % of them.  [default: the benchmark's, else 10ms]"
)
@click.option("--duration", type=Duration(), help="At least so long.  [default: 600 s, the rule]")
@click.option("--queries", type=int, help="At least so many; offline: samples.  [default: the rule]")
@click.option("--batch", type=int, default=1, show_default=True, help="offline, accuracy: samples in a request.")
@click.option("--concurrency", type=int, default=16, show_default=True, help="offline: requests in flight.")
@click.option("--labels", type=PATH, metavar="FILE.npy", help="accuracy: the right class of every sample.")
@click.option("--label-output", default="", help="accuracy: the output with classes or scores.  [default: the first]")
@click.option(
    "--reference", type=Number(min=0, max=1), help="accuracy: the reference's top-1 accuracy, such as 0.7646."
)
@click.option("--reference-version", help="accuracy: the version that is the reference, such as 1.")
@click.option("--gate", type=click.Choice(("99%", "99.9%")), default="99%", show_default=True, help="accuracy: of it.")
@traffic_options
@click.option("--output", type=PATH, metavar="DIR", help="A new folder for results and log.")
@quiet_option
@json_option
def mlperf(model: str, mode: str, output: Path | None, as_json: bool, **options: Any) -> None:
    """Run a scenario of MLPerf Inference against MODEL with MLPerf's rules.

    A shorter run, or one with generated samples, says first which rules it does not keep. The name and the rules are
    MLCommons'; an official result needs its own LoadGen.

    \b
    Examples:
      loadtest mlperf digits --url grpc://127.0.0.1:8001 --scenario server \\
          --target-qps 100 --target-latency 15ms --data samples.npz
      loadtest mlperf resnet --url grpc://127.0.0.1:8001 --scenario server \\
          --target-qps 100 --benchmark resnet50 --data samples.npz
      loadtest mlperf digits --url grpc://127.0.0.1:8001 --scenario offline \\
          --mode accuracy --data samples.npz --labels labels.npy --reference 0.97
    """
    from loadtest.mlperf.summary import lines, log
    from loadtest.record import results
    from modelathe import files

    folder = output or default_output(f"mlperf-{model}")
    results.check_new(folder)
    options = SHAPE | options
    values = (_accuracy if mode == "accuracy" else _performance)(model, options, folder, as_json)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "mlperf.json", json.dumps(finite(values), indent=1, default=str))
    if mode == "performance":
        files.write(folder / "mlperf_log_summary.txt", log(values))
    if not as_json:
        click.echo("\n".join(lines(values)))
        click.echo(f"\nresults: {folder}")
    if values["result"] == "INVALID":
        failure = Refused(f"the run is INVALID: {'; '.join(values['unmet'])}", where=str(folder))
        failure.partial = values
        raise failure
    if as_json:
        emit(values)


def _performance(model: str, options: dict[str, Any], folder: Path, quiet: bool) -> dict[str, Any]:
    from loadtest.judge.summary import summarize
    from loadtest.load import drive
    from loadtest.mlperf import rules
    from loadtest.record.results import read
    from loadtest.report import live

    if options["scenario"] == "server" and not options["target_qps"]:
        raise UsageError("--target-qps is missing", fix="give the queries per second that the server shall hold")
    if options["scenario"] != "offline" and options["batch"] != 1:
        raise UsageError("--batch is for offline", fix="the scenario says how many samples a query has")
    samples = rules.RULES[options["scenario"]].samples if options["scenario"] != "offline" else options["batch"]
    chosen = options | {"batch": samples, "seed": rules.SEED}
    if samples > (most := largest_batch(plan_of(chosen), model, chosen)):
        raise UsageError(
            f"a request of {samples} samples, where the model takes {most}",
            fix="use another scenario" if options["scenario"] != "offline" else f"give --batch up to {most}",
        )
    parts = parts_of(plan_of(chosen), model, chosen)
    data = len(parts[0].payloads) * samples if options["data"] else 0
    settings = _settings(options, data, lambda: _expected(plan_of(chosen | {"duration": _PROBE}), parts))
    shape = rules.options(settings, samples, options["concurrency"])
    plan = plan_of(chosen | {"concurrency": None} | shape)
    if options["scenario"] != "offline":
        parts = [replace(part, drawn=True) for part in parts]
    folder.mkdir(parents=True, exist_ok=True)  # not before, so that a wrong option leaves none behind
    path = folder / f"{options['scenario']}.jsonl"
    with kept(path), live.shown(plan, quiet=quiet) as show:
        drive.run(plan, parts, path, show)
    run = summarize(path)
    figures = rules.figures(settings, read(path), data)
    if not run["valid"]:
        figures["unmet"], figures["result"] = [run["why"], *figures["unmet"]], "INVALID"
        figures["broken"], figures["compliant"] = [run["why"], *figures["broken"]], False
    places = {"model": model, "url": plan.url, "mode": "performance", "settings": asdict(settings)}
    return document(**figures, **places, results=str(path), run=run)


def _settings(options: dict[str, Any], data: int, expected: Callable[[], float]) -> "Settings":
    from loadtest.mlperf.rules import BOUNDS, TARGET_LATENCY, Settings, official_rules

    benchmark = options["benchmark"] or ""
    if benchmark and benchmark not in BOUNDS:
        raise UsageError(f"MLPerf has no latency bound for {benchmark!r}", fix=f"use one of {', '.join(BOUNDS)}")
    bound = BOUNDS.get(benchmark, TARGET_LATENCY)
    official = official_rules(options["scenario"], data)
    return Settings(
        options["scenario"],
        official.duration if options["duration"] is None else options["duration"],
        official.queries if options["queries"] is None else options["queries"],
        options["target_qps"] or (expected() if options["scenario"] == "offline" else 0.0),
        bound if options["target_latency"] is None else options["target_latency"],
        benchmark,
    )


def _expected(plan: "Plan", parts: "list[Part]") -> float:
    """Return the samples per second of a short closed loop: how many samples Offline has to prepare."""
    import tempfile

    from loadtest.judge.summary import summarize
    from loadtest.load import drive

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.jsonl"
        drive.run(plan, parts, path)
        found = summarize(path)
    if not found["rate"]["samples"]:
        raise BadInput(f"the server answered nothing: {found['why']}", where=plan.url, fix=found["fix"])
    return float(found["rate"]["samples"])


def _accuracy(model: str, options: dict[str, Any], folder: Path, quiet: bool) -> dict[str, Any]:
    from loadtest.mlperf import accuracy
    from loadtest.mlperf.rules import RULES
    from modelathe.client import connect

    labels_at, reference, other = options["labels"], options["reference"], options["reference_version"]
    if (reference is None) == (other is None) or (reference is not None and not labels_at):
        raise UsageError(
            "accuracy mode needs a reference", fix="give --labels with --reference, or --reference-version"
        )
    if reference is not None and not 0 < reference <= 1:
        raise UsageError(f"--reference is {reference:g}", fix="give a share of right answers, such as 0.7646")
    if not options["data"]:
        raise UsageError("accuracy mode needs the samples of a data set", fix="give --data FILE.npz")
    plan = plan_of(options)
    samples = parts_of(plan, model, options | {"batch": 1})[0].payloads
    labels = accuracy.read_labels(labels_at, len(samples)) if labels_at else None
    with connect(plan.url, connection=plan.connection) as client:
        specs, _ = client.metadata(model, options["version"])

        def say(version: str) -> Any:
            infer = partial(client.infer, model, version=version)
            return accuracy.classes(infer, samples, specs, options["batch"], options["label_output"])

        found = say(options["version"])
        if other is not None:
            outcome = accuracy.against_version(found, say(other), labels)
        else:
            assert labels is not None and reference is not None
            outcome = accuracy.against_labels(found, labels, reference)
    values = accuracy.document(outcome)
    gate = options["gate"]
    text = f"{outcome.name} is {outcome.ratio:.4%} of the reference's, the gate is {gate}"
    unmet = [] if values["gates"][gate] else [text]
    return document(
        compliant=not unmet,
        broken=unmet,
        result="INVALID" if unmet else "VALID",
        unmet=unmet,
        scenario=RULES[options["scenario"]].name,
        mode="accuracy",
        model=model,
        url=plan.url,
        gate=gate,
        **values,
    )
