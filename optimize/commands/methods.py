"""`optimize methods`: what each method does, what it needs, and its options."""

import difflib

import click

from modelathe.commandline import document, emit, json_option
from modelathe.errors import UsageError


@click.command()
@click.argument("name", required=False)
@json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the compression methods, or tell all of the method NAME: its options, what it needs, the paper.

    \b
    Example:
      optimize methods quantize.static
    """
    from optimize.methods.table import NAMES
    from optimize.report import catalogue

    if name is not None and name not in NAMES:
        close = difflib.get_close_matches(name, list(NAMES), 1)
        fix = f"did you mean {close[0]}?" if close else "list them with: optimize methods"
        raise UsageError(f"there is no method {name!r}", fix=fix)
    found = [catalogue.entry(each) for each in ([name] if name else NAMES)]
    if as_json:
        emit(document(methods=found))
    elif name:
        catalogue.tell(found[0])
    else:
        catalogue.list_all(found)
