"""`optimize compare`: two models on the same samples, in pairs."""

import click

from modelathe.commandline import emit, json_option, quiet_option


@click.command()
@click.argument("first")
@click.argument("second")
@quiet_option
@json_option
def compare(first: str, second: str, as_json: bool) -> None:
    """Compare SECOND with FIRST, each a bundle or a workload, sample by sample.

    SECOND is worse, or better, where the whole interval of the difference says so.

    \b
    Example:
      optimize compare digits_cnn.py build/runs/digits_cnn/latest/5-quantize.static
    """
    from optimize.calls import evaluation
    from optimize.report import table

    found = evaluation.compare(first, second).document
    if as_json:
        emit(found)
    else:
        table.difference(found, first, second)
