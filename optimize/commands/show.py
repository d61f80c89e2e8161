"""`optimize show`: where a bundle comes from."""

from pathlib import Path

import click

from modelathe.commandline import PATH, document, emit, json_option


@click.command()
@click.argument("bundle", type=PATH)
@json_option
def show(bundle: Path, as_json: bool) -> None:
    """Print the lineage of BUNDLE: every step, its config and its measurements.

    \b
    Example:
      optimize show build/runs/digits_cnn/5-quantize.static
    """
    from optimize.report import table
    from optimize.step.bundle import describe

    description = describe(bundle)
    if as_json:
        emit(document(**{key: value for key, value in description.items() if key not in ("format", "modelathe")}))
    else:
        table.lineage(description)
