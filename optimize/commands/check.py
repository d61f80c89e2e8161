"""`optimize check`: everything that would fail later, in seconds."""

from pathlib import Path

import click

from modelathe.commandline import document, emit, json_option, quiet_option, reporting
from optimize.commands.options import overlap_option, preset_option, recipe_option


@click.command()
@click.argument("source")
@recipe_option
@preset_option
@overlap_option
@quiet_option
@json_option
def check(source: str, recipe_path: Path | None, preset: str | None, allow_overlap: bool, as_json: bool) -> None:
    """Try a workload on one batch: model, scores, loss, data, export, and what the steps need.

    Says too how small a loss so many evaluation samples can tell. Ends with 4 if there is an error.

    \b
    Example:
      optimize check digits_cnn.py --recipe digits_cnn.toml
    """
    from optimize.checks import every
    from optimize.checks.subject import Subject
    from optimize.report import findings as tables
    from optimize.runs import recipe
    from optimize.source.load import load_workload

    with reporting() as progress:
        workload = load_workload(source)
        # Of presets that a run tries in turn the last is the one that must not fail.
        *_, plan = recipe.chosen(recipe.asked(recipe_path, preset), workload, progress).values()
        subject = Subject(workload, plan.steps, plan.target, plan.budget, allow_overlap)
        found, errors = every.every(subject, progress)
    findings = [finding.document() for finding in found]
    result = {"workload": workload.name, "inferred": [*workload.inferred], "findings": findings}
    if not as_json:
        tables.table(found)
    if errors:
        errors[0].partial = result
        raise errors[0]
    if as_json:
        emit(document(**result))
