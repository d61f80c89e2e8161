"""`serve why`: why a version is what it is: what was done, what it lost and won, who said yes, and where it is from."""

import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from modelathe.commandline import document, emit, json_option
from modelathe.errors import MachineError
from serve.commands.versions import repository_option
from serve.config.errors import BadRepository

TOLD = ("config", "number", "model", "forced", "commit", "workload")
"""Keys of a lineage that stand in a line of their own, or in none."""


@click.command()
@click.argument("model")
@click.argument("version", type=click.IntRange(1), required=False)
@repository_option
@click.option("--open", "show", is_flag=True, help="Open the page of its proof in a browser.")
@json_option
def why(model: str, version: int | None, repository: Path, show: bool, as_json: bool) -> None:
    """Tell why VERSION of MODEL, or the one that answers now, is what it is, and where the page of its proof lies.

    \b
    Example:
      serve why digits_cnn --repository build/model_repository
    """
    from serve.repository import tree as repositories
    from serve.rollout import rollout
    from serve.server import state

    endpoint = state.serving(repository)
    states = {standing.number: standing.state for standing in rollout.standings(repository, model)}
    numbers = [rollout.known(repository, model, version)] if version else rollout.serving(repository, model, endpoint)
    lineages = [repositories.read_lineage(repository, model, number) for number in numbers]
    pages = {number: repositories.page(repository / model / str(number)) for number in numbers}
    if as_json:
        at = {str(number): str(page) for number, page in pages.items() if page}
        emit(document(model=model, url=endpoint and endpoint.http, versions=lineages, pages=at))
    else:
        click.echo(
            f"{model}: " + (f"served at {endpoint.http}" if endpoint else "no server runs; by its configuration")
        )
        for number, lineage in zip(numbers, lineages, strict=True):
            for line in (*_lines(lineage, states[number]), f"  page: {pages[number] or 'none'}"):
                click.echo(line)
    for number in numbers if show else ():
        _open(pages[number], f"{model} version {number}")


def _open(page: Path | None, name: str) -> None:
    if page is None:
        raise BadRepository(
            "has no page", where=name, fix="only what optimize run has proven has one: publish it with that"
        )
    if not webbrowser.open(page.absolute().as_uri()):
        raise MachineError("no browser was found here", fix=f"open it elsewhere: {page}")


def _lines(lineage: dict[str, Any], state: str) -> Iterator[str]:
    from serve.repository import tree as repositories

    since = f", last live since {lineage['lived'][-1]}" if lineage.get("lived") else ""
    yield f"version {lineage['number']}: {state}{since}"
    yield f"  digest: {repositories.total(lineage['digests'])[:12]}"
    yield from _origin(lineage)
    for key, value in lineage.items():
        if isinstance(value, str | bool | int | float) and key not in TOLD:
            yield f"  {key}: {value}"
    for call in lineage.get("calls", []):
        yield f"  calls: {call['model']}, made for version {call['number']} ({call['digest'][:12]})"
    if steps := lineage.get("lineage"):
        done = [f"{step['name']} {step['quality']['value']:.4f}" for step in steps]
        yield f"  done, with {steps[0]['quality']['metric']} after each step: {', '.join(done)}"
    for entry in lineage.get("tried", []):
        yield f"  tried before: the preset {entry['preset']}, refused: {entry['why']}"
    yield from _gained(lineage)
    yield from _gates(lineage)
    if compared := lineage.get("comparison"):
        yield f"  beside version {compared['number']}, which was live:"
        yield from (f"    {line}" for line in compared["told"])


def _origin(lineage: dict[str, Any]) -> Iterator[str]:
    """Tell which code, model and data it was made from, or which file it is."""
    if source := lineage.get("source"):
        yield f"  source: {source['path']} ({source['digest'][:12]})"
    if "workload" in lineage:
        yield f"  workload: {lineage['workload']}" + (f", commit {commit}" if (commit := lineage.get("commit")) else "")
    if made_of := lineage.get("made_of"):
        yield "  made of: " + ", ".join(f"{name} {digest[:12]}" for name, digest in made_of.items())


def _gained(lineage: dict[str, Any]) -> Iterator[str]:
    """Tell what it lost against the trained model, and how much smaller and faster it is."""
    steps, trained, ratios = lineage.get("lineage"), lineage.get("trained"), lineage.get("ratios")
    if steps and trained:
        lost = steps[-1]["quality"]["value"] - trained["value"]
        yield f"  lost: {trained['metric']} {lost:+.4f} against the trained model's {trained['value']:.4f}"
    if ratios:
        smaller = f"{ratios['size']:.2f}× smaller"
        speeds = [
            f"{value:.2f}× the throughput at batch {size}" for size, value in ratios["throughput"].items() if value
        ]
        yield f"  won: {', '.join([smaller, *speeds])}"


def _gates(lineage: dict[str, Any]) -> Iterator[str]:
    gates = lineage.get("gates", [])
    if gates:
        passed = sum(gate["passed"] for gate in gates)
        forced = "; forced: it was published against a refusal" if lineage.get("forced") else ""
        yield f"  gates: {passed} of {len(gates)} passed{forced}"
    for gate in gates:
        if not gate["passed"]:
            yield f"  refused {gate['name']}: {gate['measured']}, wanted {gate['limit']}"
