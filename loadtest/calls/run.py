"""`loadtest.run`, which the command `loadtest run` calls too."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, overload

from loadtest.calls import keywords
from loadtest.calls import scenario as scenarios
from loadtest.calls.keywords import LoadOptions, Place, gather, several
from loadtest.calls.results import LoadResult, ScenarioResult
from loadtest.judge import baseline, compare, thresholds, validity
from loadtest.judge.summary import load_file
from loadtest.load import drive
from loadtest.plan.options import Share, default_output, kept, parts_of, plan_of
from loadtest.report import live, page
from modelathe.errors import BadInput, MachineError, ModelatheError, Refused, UsageError


@dataclass(frozen=True)
class Asked:
    """What a run is judged by, and where its results go, beside the load that it sends.

    Args:
        output: the result file; a scenario's folder. In `build/loads` unless given.
        html: where a page is written.
        threshold: sentences that must hold.
        baseline: what the run is compared with.
        allow: the share by which it may be worse than the baseline.
        save_baseline: where a run that passes is kept for later comparisons.
        allow_invalid: a run that proves nothing is no failure.
    """

    output: Path | None = None
    html: Path | None = None
    threshold: tuple[str, ...] = ()
    baseline: Path | None = None
    allow: float | None = None
    save_baseline: Path | None = None
    allow_invalid: bool = False


class RunOptions(LoadOptions, total=False):
    """The options of the command `loadtest run`."""

    output: Place
    html: Place
    threshold: str | Sequence[str]
    baseline: Place
    allow: float | str
    save_baseline: Place
    allow_invalid: bool
    set: Sequence[str]
    pid: int


@overload
def run(
    model: str, url: str, *, scenario: None = None, quiet: bool = False, **options: Unpack[RunOptions]
) -> LoadResult: ...
@overload
def run(
    model: str, url: str, *, scenario: Place, quiet: bool = False, **options: Unpack[RunOptions]
) -> ScenarioResult: ...
def run(
    model: str, url: str, *, scenario: Place | None = None, quiet: bool = False, **options: Unpack[RunOptions]
) -> LoadResult | ScenarioResult:
    """Send load to a model and judge it.

    A threshold that does not hold and a run that proves nothing are answers: the result is returned, with `passed`
    False. `loadtest.run(…).check()` raises instead, as the command ends with exit code 3.

    Args:
        model: its name at the server.
        url: the server, as `grpc://HOST:PORT` or `http://HOST:PORT`.
        scenario: play these phases; a name that `loadtest scenario list` prints, or a file.
        quiet: say nothing while it goes on.
        options: those of the command, with underscores: `duration="10s"`, `rate=200`, `threshold="p99 < 20ms"`.

    Raises:
        UsageError: options that contradict each other, or a value that cannot be.
        ServerAbsent: the server was not there; MachineError: it went away during the run, which is the `partial`.
        ModelMissing, RequestRejected, BadInput: what is asked for cannot be sent.
    """
    keywords.check(options, RunOptions.__annotations__)
    given: dict[str, Any] = dict(options)
    own = {key: given.pop(key) for key in list(given) if key in RunOptions.__annotations__.keys() - _LOAD}
    phases, pid = several(own.pop("set", ())), own.pop("pid", None)
    asked = _asked(own)
    chosen = gather(url, given) | {"scenario": scenario and str(scenario), "settings": phases, "pid": pid}
    result = measure(model, chosen, asked, stated={*given}, quiet=quiet)
    if isinstance(result.failure, MachineError):
        raise result.failure
    return result


_LOAD = LoadOptions.__annotations__.keys()


def _asked(own: dict[str, Any]) -> Asked:
    """Return what the keywords ask for; one that is None counts as not given."""
    found = {key: value for key, value in own.items() if value is not None}
    for key in ("output", "html", "baseline", "save_baseline"):
        if key in found:
            found[key] = Path(found[key])
    if "allow" in found:
        found["allow"] = keywords.converted("allow", found["allow"], lambda value: Share().convert(value, None, None))
    return Asked(**found | {"threshold": several(found.get("threshold", ()))})


def measure(
    model: str, options: dict[str, Any], asked: Asked, *, stated: set[str], quiet: bool
) -> LoadResult | ScenarioResult:
    """Send the load that the options describe, or play their scenario.

    Args:
        model: its name.
        options: by the names that `plan_of` and `parts_of` read, and `scenario`, `settings` and `pid`.
        asked: what it is judged by.
        stated: the names of the options that the user gave.
        quiet: say nothing while it goes on.

    Raises:
        As `run`.
    """
    if options["scenario"]:
        _check_scenario(options, asked)
        scenarios.refuse(stated)
        own = {"allow_invalid": asked.allow_invalid, "html": asked.html}
        return scenarios.play(model, options | own, asked.output, quiet)
    for key, name in (("settings", "set"), ("pid", "pid")):
        if options[key]:
            raise UsageError(f"--{name} needs --scenario", fix="name a scenario")
    thresholds.parse(asked.threshold)  # a wrong one is found before any load is sent
    if asked.allow is not None and not asked.baseline:
        raise UsageError("--allow needs --baseline", fix="say what the run is compared with")
    return _once(model, options, asked, quiet)


def _check_scenario(options: dict[str, Any], asked: Asked) -> None:
    if asked.threshold:
        raise UsageError("a scenario states its own thresholds", fix="write them into its file")
    if asked.baseline or asked.save_baseline or asked.allow is not None:
        raise UsageError("a baseline is of one run", fix="use `loadtest compare` on the phase you want")
    _check_files(Asked(html=asked.html))
    if options["pid"] and options["metrics"]:
        raise UsageError("--pid and --metrics are both given", fix="--pid is the better one where you can")


def _once(model: str, options: dict[str, Any], asked: Asked, quiet: bool) -> LoadResult:
    before = compare.read_side(asked.baseline) if asked.baseline else []
    plan = plan_of(options | {"thresholds": asked.threshold})
    if before:
        compare.check_plan(before, plan)
    _check_files(asked)
    parts = parts_of(plan, model, options)
    path = asked.output or default_output(model, ".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with kept(path), live.shown(plan, quiet=quiet) as show:
        drive.run(plan, parts, path, show)
    results, values = load_file(path)
    if before:
        values["comparison"] = compare.with_run(before, path, asked.allow)
    failure = failed(values, path, asked.allow_invalid)
    if asked.save_baseline:
        failure = save(values, path, asked.save_baseline, failure)
    if asked.html:
        page.write_loaded(results, values, asked.html)
    values["results"] = str(path)
    if failure:
        failure.partial = values
    return LoadResult.of(values, failure)


def _check_files(asked: Asked) -> None:
    for wanted in filter(None, (asked.output, asked.html, asked.save_baseline)):
        if not wanted.parent.is_dir():
            raise BadInput("there is no such folder", where=str(wanted.parent), fix="create it, or write elsewhere")
        if wanted.is_dir():
            raise BadInput("is a folder", where=str(wanted), fix="name a file in it")
    if asked.output and asked.html and asked.output.resolve() == asked.html.resolve():
        raise UsageError("--output and --html are the same file", fix="give two names")


def failed(values: dict[str, Any], path: Path, allow_invalid: bool) -> ModelatheError | None:
    """Return the failure that a run deserves; None where it passed."""
    gone = values["fault"] == validity.GONE
    if not values["valid"] and (gone or not allow_invalid):
        return (MachineError if gone else Refused)(values["why"], where=str(path), fix=values["fix"])
    failure: ModelatheError | None = thresholds.refusal(values["thresholds"], str(path))
    return failure or (compare.refusal(values["comparison"]) if "comparison" in values else None)


def save(
    values: dict[str, Any], path: Path, destination: Path, failure: ModelatheError | None
) -> ModelatheError | None:
    """Save a run that passed as a baseline; of another, note why not, and return its failure."""
    failure = failure or failed(values, path, allow_invalid=False)
    if failure:
        way = "leave away the --threshold or --baseline that failed" if values["valid"] else values["fix"]
        values["notes"].append(f"{destination} was not written, only a run that passes becomes a baseline: {way}")
    else:
        baseline.write(baseline.read(path), destination)
    return failure
