"""`serve canary`."""

from dataclasses import asdict
from pathlib import Path

import click

from loadtest.commandline import PATH, document, emit, json_option, reporting
from serve.commands.versions import repository_option


@click.command()
@click.argument("model")
@click.argument("old", type=click.IntRange(1))
@click.argument("new", type=click.IntRange(1))
@repository_option
@click.option("--requests", type=PATH, help="Requests: what `loadtest run --data` takes.")
@click.option(
    "--count", type=click.IntRange(1), default=200, show_default=True, help="Requests to make without a file."
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Samples of a request.")
@click.option("--min-agreement", type=click.FloatRange(0, 1), default=0.99, show_default=True, help="Mean likeness.")
@click.option("--max-difference", type=click.FloatRange(0), help="Largest difference of a float output.")
@click.option(
    "--max-slowdown", type=click.FloatRange(0, min_open=True), default=1.1, show_default=True, help="New/old."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the requests that are made.")
@json_option
def canary(
    model: str,
    old: int,
    new: int,
    repository: Path,
    requests: Path | None,
    count: int,
    batch: int,
    min_agreement: float,
    max_difference: float | None,
    max_slowdown: float,
    seed: int,
    as_json: bool,
) -> None:
    """Send the same requests to versions OLD and NEW of MODEL and say whether NEW may take its place.

    A throw-away server loads both. Likeness is the cosine of float outputs, row by row, and the share of equal rows of
    others. Ends with 3 when a threshold is broken; nothing is promoted.

    \b
    Example:
      serve canary digits_cnn 1 2 --requests recorded.npz && serve promote digits_cnn 2
    """
    from loadtest import payload
    from loadtest.data import read
    from loadtest.data.request import Signature
    from loadtest.tensors import TensorSpec
    from serve import canary as canaries
    from serve import repository as repositories
    from serve import rollout
    from serve.errors import CanaryRefused

    for version in (old, new):
        rollout.known(repository, model, version)
    lineage = repositories.read_lineage(repository, model, old)
    specs = [TensorSpec.from_document(spec) for spec in lineage["inputs"]]
    outputs = [TensorSpec.from_document(spec) for spec in lineage["outputs"]]
    if requests:
        sent = read.read(requests, Signature(specs, outputs), batch, model).payloads
    else:
        sent = payload.generate(specs, count, seed, batch)
    with reporting() as report:
        report(f"{len(sent)} requests to each version", 0.0)
        found = canaries.compare(repository, model, old, new, sent)
    judged = found.judge(canaries.Thresholds(min_agreement, max_difference, max_slowdown))
    result = {"model": model, **asdict(found), "thresholds": [asdict(entry) for entry in judged]}
    if not as_json:
        click.echo(f"{model}: version {old} {found.latency_ms['old']:.2f} ms, {new} {found.latency_ms['new']:.2f} ms")
        for entry in judged:
            click.echo(f"{'passed' if entry.passed else 'broken'} {entry.name}: {entry.measured}, wanted {entry.limit}")
    broken = [entry for entry in judged if not entry.passed]
    if broken:
        refusal = CanaryRefused(
            f"version {new} is not like {old}: {'; '.join(f'{entry.name}: {entry.measured}' for entry in broken)}"
            + (f"; it said: {found.refused}" if found.refused else ""),
            where=str(repository / model),
            fix="leave the old one live, or give thresholds that allow it",
        )
        refusal.partial = result
        raise refusal
    if as_json:
        emit(document(**result))
