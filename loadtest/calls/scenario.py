"""A scenario for `loadtest.run` and the command `loadtest run`."""

from pathlib import Path
from typing import Any

from loadtest.calls.results import ScenarioResult
from loadtest.judge.summary import summarize
from loadtest.judge.validity import GONE
from loadtest.load import drive
from loadtest.plan.options import default_output, kept, largest_batch, parts_of, plan_of
from loadtest.report import live
from loadtest.scenario import page
from loadtest.scenario import play as played
from loadtest.scenario.scenario import find, load
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


def refuse(stated: set[str]) -> None:
    """A phase says these; that the user says them too would be one of two truths.

    Raises:
        UsageError: the user says one.
    """
    for key in _OF_PHASES:
        if key in stated:
            raise UsageError(f"--{key} and --scenario are both given", fix=f"write --set {key}=VALUE")


def play(model: str, options: dict[str, Any], folder: Path | None, quiet: bool) -> ScenarioResult:
    """Play the scenario that the options name.

    Args:
        model: its name.
        options: as for `loadtest.calls.run.measure`, and `allow_invalid` and `html`.
        folder: for the results; one in `build/loads` unless given.
        quiet: say nothing while it goes on.
    """
    path = find(options["scenario"])
    found = load(path, options["settings"])
    folder = folder or default_output(f"{path.stem}-{model}")

    tell = live.teller(quiet)

    def send(phase: str, own: dict[str, Any], to: Path) -> dict[str, Any]:
        tell(f"phase {phase}")
        chosen = options | own
        plan = plan_of(chosen)
        with live.shown(plan, quiet=quiet) as show:
            drive.run(plan, parts_of(plan, model, chosen), to, show)
        return summarize(to)

    largest = largest_batch(plan_of(options), model, options)
    with kept(folder):
        values = played.play(found, path.stem, send, folder, largest, str(options["pid"] or options["metrics"] or ""))
    failure = _failure(values, folder, options["allow_invalid"])
    if options["html"]:
        page.write(values, options["html"])
    return ScenarioResult(document=values, failure=failure, valid=values["valid"], results=folder)


def _failure(values: dict[str, Any], folder: Path, allow_invalid: bool) -> Refused | MachineError | None:
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
