"""`serve.tune`, which the command `serve tune` calls too."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from loadtest.calls import keywords
from loadtest.calls.keywords import Place
from loadtest.plan import schedule
from loadtest.record.statistics import number
from modelathe.commandline import document, reporting
from modelathe.errors import Refused, UsageError
from modelathe.notebook import Judged, View, frame
from serve.planning import arrivals, objective
from serve.planning.objective import Objective
from serve.tuning import apply as applying
from serve.tuning import page as pages
from serve.tuning import report, trial
from serve.tuning import tune as tuning
from serve.tuning.grid import GOALS, Goal
from serve.tuning.live import Traffic

FASTEST = 1e6


class TuneOptions(TypedDict, total=False):
    """The options of the command `serve tune`; `goal` is its `--for`."""

    goal: Goal
    rate: float
    arrival: str
    trace: Place
    measured: Place
    page: Place
    apply: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class Tuned(Judged):
    """What was found for a model; `passed` says whether the best that held live is what is proposed.

    Args:
        model: its name.
        chosen: threads, instances, max_batch and delay_us that are proposed, those of today where nothing is better;
            None where nothing held live.
        diff: what of `config.pbtxt` changes; empty where nothing does.
        applied: the version that was published; None without `apply`, or where nothing changes.
    """

    model: str
    chosen: dict[str, Any] | None
    diff: str
    applied: int | None

    def view(self) -> View:
        """Return what follows, and the live runs."""
        runs = {row[0]: f"{row[6]} ms at the median, {row[7]} ms p99, {row[5]}/s" for row in report.rows(self.document)}
        return View(report.headline(self.document), runs, [*report.lines(self.document), *report.end(self.document)])

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame with a row for each live run.

        Raises:
            MachineError: pandas is not installed.
        """
        return frame([dict(zip(("name", *report.COLUMNS[1:]), row, strict=True)) for row in report.rows(self.document)])


def tune(
    model: str,
    slo: str,
    repository: Place = "model_repository",
    *,
    quiet: bool = False,
    **options: Unpack[TuneOptions],
) -> Tuned:
    """Find the threads, instances, largest batch and delay that serve a model best on this machine.

    Where nothing held live as it was predicted, the result is returned with `passed` False; `.check()` raises instead.

    Args:
        model: its name in the repository.
        slo: what must hold, as `p99 < 20ms, errors < 0.1%`.
        repository: where it is.
        quiet: say nothing while it goes on.
        options: those of the command, with underscores; `goal` is `--for`.

    Raises:
        UsageError: a wrong objective or option.
        BadInput: no such model, none of it is live, or it is not one that is tuned.
        Refused: no configuration holds in the simulation; it names the nearest misses.
        MachineError: the machine is too busy to measure, the server died, or another command works on the model.
    """
    keywords.check(options, TuneOptions.__annotations__)
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    asked = objective.parse(slo)
    rated = "rate" in given or "trace" in given
    goal = cast(Goal, given.get("goal", "latency" if rated else "throughput"))
    if goal not in GOALS:
        raise UsageError(f"there is no goal {goal!r}", fix=f"use one of {', '.join(GOALS)}")
    traffic = _traffic(goal, given, asked)
    subject = trial.subject(Path(repository), model)
    apply = given.get("apply", False)
    if apply:
        applying.check(subject)
    measured = Path(given.get("measured", Path("build/tune", model, "measured.json")))
    page = Path(given.get("page", measured.with_name("tune.html")))
    with reporting(quiet) as tell:
        values = document(
            **tuning.tune(subject, tuning.Wanted(goal, asked, traffic, measured), tell), page=str(page), applied=None
        )
        if apply and values["chosen"] and values["diff"]:
            tell("publishing", 0.0)
            told = {"objective": slo, "goal": goal, "rate": values["rate"]}
            values["applied"] = applying.publish(subject, values["chosen"], told)
    pages.write(values, page)
    taken = {key: values[key] for key in ("model", "chosen", "diff", "applied")}
    return Tuned(document=values, failure=_failure(values), **taken)


def _failure(values: dict[str, Any]) -> Refused | None:
    """Return what the command ends with where the best that held live is not what is proposed."""
    chosen, best = values["chosen"], values["best"]
    few = [one["measured"]["requests"] for one in values["confirmed"]]
    if best is None and max(few) < (enough := objective.parse(values["objective"]).requests):
        found = Refused(
            f"no configuration held live: {max(few):,} requests are too few to tell, {enough:,} are needed",
            fix="ask for a lower percentile",
        )
    elif best is None:
        found = Refused("no configuration held live", fix="allow more time, or ask for a lower rate")
    elif best != "today" and (chosen is None or chosen["name"] == "today"):
        row = next(one for one in values["confirmed"] if one["name"] == best)
        found = Refused(
            f"{best} is better live, and its prediction is off by {report.percent(row['off'])}: not applied",
            fix="tune again while nothing else runs here: what was measured is known now",
        )
    else:
        return None
    found.partial = values
    return found


def _traffic(goal: str, given: dict[str, Any], asked: Objective) -> Traffic:
    """Return when requests come.

    Raises:
        UsageError: what was given does not fit together, or no arrivals are called so.
        BadInput: the trace holds too few requests.
    """
    rate, arrival, trace, seed = (given.get(key) for key in ("rate", "arrival", "trace", "seed"))
    if goal == "throughput" and (rate is not None or trace is not None):
        raise UsageError("--for throughput looks for the rate itself", fix="leave --rate and --trace away")
    if goal != "throughput" and rate is None and trace is None:
        raise UsageError(f"--for {goal} needs a rate", fix="say --rate, as in --rate 300, or --trace FILE")
    if trace is not None:
        if rate is not None or arrival is not None:
            raise UsageError("--trace says when requests come", fix="leave --rate and --arrival away")
        path = Path(trace)
        return Traffic(arrivals.read(path, asked.requests).rate or 0.0, trace=path, seed=seed or 0)
    if rate is not None and not 0 < rate <= FASTEST:
        raise UsageError(f"--rate is {number(rate)}", fix=f"give a rate above 0 and of at most {FASTEST:g}")
    schedule.chosen("arrival", arrival or "poisson")
    return Traffic(rate or FASTEST, arrival or "poisson", seed=seed or 0)
