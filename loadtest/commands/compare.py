"""`loadtest compare`: whether one run was faster than another."""

from pathlib import Path

import click
from rich.console import Console

from loadtest.plan.options import allow_option
from modelathe.commandline import PATH, emit, json_option


@click.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@allow_option
@click.option("--anyway", is_flag=True, help="Compare runs of different loads or models.")
@json_option
def compare(a: Path, b: Path, allow: float | None, anyway: bool, as_json: bool) -> None:
    """Compare the runs B with the runs A: result files, baselines, or folders of several.

    An effect is shown with its 95 % interval. Some verdicts are chance: of equal runs, one figure in twenty is called
    different. "undecided" means that the runs are too short, as half a minute of a busy queue is, or that one or two
    moments make the difference. With --allow a figure fails that is shown to be worse by more, and one that is
    undecided and was measured to be; errors fail when more of them are shown at all, however much is allowed. An
    invalid run, and one without a figure to compare, ends with exit code 3.

    \b
    Examples:
      loadtest compare before.jsonl after.jsonl --allow 5%
      loadtest compare runs/before runs/after
    """
    from loadtest.judge import compare as comparison

    sides = comparison.read_side(a), comparison.read_side(b)
    if not anyway:
        comparison.check(*sides)
    values = comparison.compare(*sides, allow)
    if not as_json:
        Console().print(comparison.text(values))
    failure = comparison.refusal(values)
    if failure:
        failure.partial = values
        raise failure
    if as_json:
        emit(values)
