"""`serve canary`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadtest.plan.options import Number
from modelathe.commandline import PATH, document, emit, json_option, quiet_option, reporting, say
from modelathe.errors import UsageError
from serve.commands.versions import repository_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.rollout.canary import Comparison, Judgement


LEAST_SHARE = 1e-6


def _share(_context: click.Context, option: click.Parameter, value: float) -> float:
    if value < LEAST_SHARE:
        raise UsageError(
            f"{option.opts[0]} {value:g} can hardly pass: millions of requests show so small a share, none show 0",
            fix=f"give {LEAST_SHARE:f} or more, as in 0.001",
        )
    return value


SHARE: dict[str, Any] = {"type": Number(0, 1), "callback": _share, "show_default": True, "default": 0.01}


@click.command()
@click.argument("model")
@click.argument("old", type=click.IntRange(1))
@click.argument("new", type=click.IntRange(1))
@repository_option
@click.option("--requests", type=PATH, help="Requests: what `loadtest run --data` takes.")
@click.option(
    "--count", type=click.IntRange(1), default=400, show_default=True, help="Requests to make without a file."
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Samples of a request.")
@click.option("--min-agreement", type=Number(-1, 1), default=0.99, show_default=True, help="Of each row.")
@click.option("--max-unlike", **SHARE, help="Share of rows that may be below that.")
@click.option("--max-flips", **SHARE, help="Share of rows that may change label.")
@click.option("--max-difference", type=Number(0), help="Largest difference of a float output.")
@click.option("--max-slowdown", type=Number(0, min_open=True), default=1.1, show_default=True, help="New/old.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the requests that are made.")
@quiet_option
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
    max_unlike: float,
    max_flips: float,
    max_difference: float | None,
    max_slowdown: float,
    seed: int,
    as_json: bool,
) -> None:
    """Send the same requests to versions OLD and NEW of MODEL and say whether NEW may take its place.

    A throw-away server loads both. Rows of float outputs are like by their cosine and length, short ones by their
    relative error; their largest value names the label. Rows of other outputs are equal or not. Ends with 3 when a
    threshold is broken, or when the requests do not decide it; nothing is promoted.

    \b
    Example:
      serve canary digits_cnn 1 2 --requests recorded.npz && serve promote digits_cnn 2
    """
    from loadtest.plan.data import payload, read
    from loadtest.plan.data.request import Signature
    from modelathe.tensors import TensorSpec
    from serve.config.errors import CanaryRefused
    from serve.repository import tree as repositories
    from serve.rollout import canary as canaries
    from serve.rollout import rollout

    for version in (old, new):
        rollout.known(repository, model, version)
    lineage = repositories.read_lineage(repository, model, old)
    specs = [TensorSpec.from_document(spec).served for spec in lineage["inputs"]]
    outputs = [TensorSpec.from_document(spec).served for spec in lineage["outputs"]]
    if requests:
        sent = read.read(requests, Signature(specs, outputs), batch, model).payloads
    else:
        sent = payload.generate(specs, count, seed, batch)
    with reporting() as report:
        report(f"{len(sent)} requests to each version", 0.0)
        found = canaries.compare(repository, model, old, new, sent)
    judged = found.judge(canaries.Thresholds(min_agreement, max_unlike, max_flips, max_difference, max_slowdown))
    result = {"model": model, **found.document(), "thresholds": [entry.document() for entry in judged]}
    if not as_json:
        click.echo(f"{model}: version {old} {found.latency_ms['old']:.2f} ms, {new} {found.latency_ms['new']:.2f} ms")
        for entry in judged:
            say(f"{entry.verdict} {entry.name}: {entry.measured}, wanted {entry.limit}")
    refused = [entry for entry in judged if not entry.passed]
    if refused:
        broken = [entry for entry in refused if entry.verdict == "broken"]
        what = f"version {new} is not like {old}" if broken else f"whether version {new} is like {old} is undecided"
        refusal = CanaryRefused(
            f"{what}: {'; '.join(f'{entry.name}: {entry.measured}' for entry in broken or refused)}"
            + (f"; it said: {found.refused}" if found.refused else ""),
            where=str(repository / model),
            fix=_way_out(found, broken or refused),
        )
        refusal.partial = result
        raise refusal
    if as_json:
        emit(document(**result))


def _way_out(found: "Comparison", judged: "Sequence[Judgement]") -> str:
    """Return what to do about judgements none of which is passed."""
    if found.failed:
        return "leave the old one live, or publish a version that answers what that answers"
    if not len(found.rows.likeness):
        return "send requests that both answer"
    more = [entry.requests for entry in judged if entry.verdict == "undecided" and entry.requests]
    if len(more) < len(judged):
        return "leave the old one live, or give thresholds that allow what was measured"
    return f"send more requests, about {max(more):,}"
