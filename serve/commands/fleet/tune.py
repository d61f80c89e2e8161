"""`serve tune`: the best configuration of a model on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loadtest.plan.options import Number
from modelathe.commandline import PATH, document, emit, json_option, quiet_option, reporting
from modelathe.errors import Refused, UsageError
from serve.commands.versions import repository_option

if TYPE_CHECKING:
    from serve.planning.objective import Objective
    from serve.tuning.live import Traffic

FASTEST = 1e6


@click.command()
@click.argument("model")
@click.option("--slo", required=True, metavar="SENTENCES", help='What must hold, as "p99 < 20ms, errors < 0.1%".')
@click.option(
    "--for",
    "goal",
    type=click.Choice(("throughput", "latency", "cores")),
    help="What is best: the highest rate, the least latency or the fewest cores at --rate."
    "  [default: throughput, with a rate latency]",
)
@click.option("--rate", type=Number(0, FASTEST, min_open=True), help="Requests per second that come.")
@click.option("--arrival", help="How they follow each other, as in `loadtest run`.  [default: poisson]")
@click.option("--trace", type=PATH, help="Recorded traffic instead, as `loadtest run --trace` takes it.")
@click.option("--measured", type=PATH, help="The times of MODEL's calls.  [default: build/tune/MODEL/measured.json]")
@click.option("--apply", is_flag=True, help="Publish what was found as MODEL's next version.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn.")
@repository_option
@quiet_option
@json_option
def tune(
    model: str,
    slo: str,
    goal: str | None,
    rate: float | None,
    arrival: str | None,
    trace: Path | None,
    measured: Path | None,
    apply: bool,
    seed: int,
    repository: Path,
    as_json: bool,
) -> None:
    """Find the threads, instances, largest batch and delay that serve MODEL best on this machine.

    Its calls are timed on private copies of it, every configuration is simulated, and the best few are tried live
    beside today's. What was measured is kept, and the next call goes on from it. Ends with 3 where none holds.

    \b
    Example:
      serve tune digits_cnn --slo "p99 < 20ms, errors < 0.1%" --rate 300
    """
    from typing import cast

    from rich.console import Console

    from serve.planning import objective
    from serve.tuning import report, trial
    from serve.tuning.apply import publish
    from serve.tuning.grid import Goal
    from serve.tuning.tune import Wanted
    from serve.tuning.tune import tune as found_by

    asked = objective.parse(slo)
    meant = cast(Goal, goal or ("latency" if rate or trace else "throughput"))
    traffic = _traffic(meant, rate, arrival, trace, seed, asked)
    subject = trial.subject(repository, model)
    wanted = Wanted(meant, asked, traffic, measured or Path("build/tune", model, "measured.json"))
    with reporting(as_json) as tell:
        values = document(**found_by(subject, wanted, tell), applied=None)
        if apply and values["chosen"] and values["diff"]:
            tell("publishing", 0.0)
            values["applied"] = publish(subject, values["chosen"], {"objective": slo, "goal": meant, "rate": rate})
    if as_json:
        emit(values)
    else:
        Console().print(report.text(values))
        if values["applied"]:
            click.echo(f"published as version {values['applied']}: serve promote {model} {values['applied']}")
    if values["chosen"] is None:
        raise Refused(
            "no configuration held live as it was predicted",
            fix="tune again while nothing else runs here, or allow more time",
        )


def _traffic(
    goal: str, rate: float | None, arrival: str | None, trace: Path | None, seed: int, asked: "Objective"
) -> "Traffic":
    """Return when requests come."""
    from loadtest.plan import schedule
    from serve.planning import arrivals
    from serve.tuning.live import Traffic

    if goal == "throughput":
        if rate is not None or trace is not None:
            raise UsageError("--for throughput looks for the rate itself", fix="leave --rate and --trace away")
    elif rate is None and trace is None:
        raise UsageError(f"--for {goal} needs a rate", fix="say --rate, as in --rate 300, or --trace FILE")
    if trace is not None:
        if rate is not None or arrival is not None:
            raise UsageError("--trace says when requests come", fix="leave --rate and --arrival away")
        return Traffic(arrivals.read(trace, asked.requests).rate or 0.0, trace=trace, seed=seed)
    schedule.chosen("arrival", arrival or "poisson")
    return Traffic(rate or FASTEST, arrival or "poisson", seed=seed)
