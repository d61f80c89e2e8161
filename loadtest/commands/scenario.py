"""`loadtest scenario`: what scenarios there are; `loadtest run --scenario` plays one."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from loadtest.plan.options import default_output, kept, largest_batch, parts_of, plan_of
from modelathe.commandline import CommandGroup, document, emit, json_option
from modelathe.errors import MachineError, Refused, UsageError

_OF_PHASES = (
    "duration",
    "concurrency",
    "rate",
    "in_flight",
    "arrival",
    "profile",
    "trace",
    "requests",
    "think",
    "warmup",
)


@click.group(cls=CommandGroup)
def scenario() -> None:
    """List and show scenarios: phases of load and what they must show.

    \b
    Example:
      loadtest scenario list
    """


@scenario.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List the scenarios that come with modelathe.

    \b
    Example:
      loadtest scenario list --json
    """
    from loadtest.scenario.scenario import find, load, shipped

    found = {name: load(find(name)).description for name in shipped()}
    if as_json:
        emit(document(scenarios=[{"name": name, "description": text} for name, text in found.items()]))
        return
    for name, text in found.items():
        click.echo(f"{name:12} {text}")


@scenario.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show the file of scenario NAME, to be copied and changed.

    \b
    Example:
      loadtest scenario show soak > mine.toml
    """
    from dataclasses import asdict

    from loadtest.scenario.scenario import find, load

    path = find(name)
    found = load(path)
    if as_json:
        emit(document(name=path.stem, **asdict(found)))
    else:
        click.echo(path.read_text(encoding="utf-8-sig").rstrip())


def play_and_report(model: str, options: dict[str, Any], folder: Path | None, as_json: bool) -> None:
    """Play a scenario for `loadtest run`, print its report, and leave with the exit code that it deserves.

    Args:
        model: the command's.
        options: the command's, by name.
        folder: for the results; one in `build/loads` unless given.
        as_json: whether a document is printed.
    """
    from rich.console import Console

    from loadtest.judge.summary import summarize
    from loadtest.load import drive
    from loadtest.report import live
    from loadtest.scenario import page, play
    from loadtest.scenario.scenario import find, load

    _refuse_load_options()
    path = find(options["scenario"])
    found = load(path, options["settings"])
    folder = folder or default_output(f"{path.stem}-{model}")

    def send(phase: str, own: dict[str, Any], to: Path) -> dict[str, Any]:
        if not as_json:
            click.echo(f"phase {phase}", err=True)
        chosen = options | own
        plan = plan_of(chosen)
        with live.shown(plan, quiet=as_json) as show:
            drive.run(plan, parts_of(plan, model, chosen), to, show)
        return summarize(to)

    largest = largest_batch(plan_of(options), model, options)
    with kept(folder):
        values = play.play(found, path.stem, send, folder, largest, str(options["pid"] or options["metrics"] or ""))
    failure = _failure(values, folder, options["allow_invalid"])
    if options["html"]:
        page.write(values, options["html"])
    if not as_json:
        Console().print(play.text(values))
        click.echo(f"\nresults: {folder}")
    if failure:
        raise failure
    if as_json:
        emit(values)


def _refuse_load_options() -> None:
    """A phase says these; that the command line says them too would be one of two truths."""
    context = click.get_current_context()
    for key in _OF_PHASES:
        if context.get_parameter_source(key) == ParameterSource.COMMANDLINE:
            raise UsageError(f"--{key} and --scenario are both given", fix=f"write --set {key}=VALUE")


def _failure(values: dict[str, Any], folder: Path, allow_invalid: bool) -> Refused | MachineError | None:
    from loadtest.judge.validity import GONE

    failure: Refused | MachineError | None = None
    gone = values["fault"] == GONE
    if not values["valid"] and (gone or not allow_invalid):
        failure = (MachineError if gone else Refused)(values["why"], where=str(folder), fix=values["fix"])
    elif values["verdict"]["passed"] is None:
        open_ = [finding["text"] for finding in values["verdict"]["findings"] if finding["passed"] is None]
        why = f"the scenario was not judged in full: {'; '.join(open_)}"
        failure = Refused(why, where=str(folder), fix="let it run longer, or further")
    elif values["verdict"]["passed"] is False:
        wrong = [finding["text"] for finding in values["verdict"]["findings"] if finding["passed"] is False]
        wrong += [f"{one['phase']}: {one['text']}" for one in values["thresholds"] if not one["passed"]]
        failure = Refused(f"the scenario was not passed: {'; '.join(wrong)}", where=str(folder))
    if failure:
        failure.partial = values
    return failure
