"""`serve tune`, `plan` and the simulation beside what they are measured against: `make bench-tune`.

Each part goes on where it was stopped: what was measured stands in build/bench/tune/PART.json, and a part that is to be
measured anew is removed there. Ends with all figures beside what is wanted of them, and writes
benchmarks/results/tune-DATE-cpu.json.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from tuning.ledger import Figures, Ledger, NotMeasured, OutOfTime, Rule, write

PARTS = ("simulation", "best", "default", "analyzer", "cost", "lanes")


def part(name: str) -> ModuleType:
    """Return the module of a part: `run`, `rows`, `figures`, `cells`, COLUMNS and WANTED."""
    return importlib.import_module(f"tuning.{name}")


def table(title: str, columns: Sequence[str], rows: Iterator[tuple[str, ...]]) -> Table:
    """Return a table whose first column is text."""
    made = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left")
    for row in rows:
        made.add_row(*row)
    return made


def verdicts(found: Figures, wanted: Mapping[str, Rule]) -> Iterator[tuple[str, ...]]:
    """Yield each figure, those with a rule first, with what is wanted and whether that is reached."""
    for name, rule in wanted.items():
        value = found.get(name, float("nan"))
        verdict = "not measured" if value != value else "reached" if rule.reached(value) else "MISSED"
        yield (name, "" if value != value else f"{value:.4g}", f"{rule.sign} {rule.limit:g}", verdict)
    for name, value in found.items():
        if name not in wanted:
            yield (name, f"{value:.4g}", "", "")


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Some of the parts.  [default: all]")
@click.option("--minutes", default=9.0, show_default=True, help="Of each part; the next call goes on.")
@click.option("--show", is_flag=True, help="Measure nothing, and print what was measured.")
def main(parts: tuple[str, ...], minutes: float, show: bool) -> None:
    """Measure the parts and print every figure beside what is wanted."""
    console = Console(width=150)
    figures: dict[str, Figures] = {}
    kept: dict[str, list[dict[str, Any]]] = {}
    for name in PARTS:
        module, ledger = part(name), Ledger(name, minutes)
        if not show and name in (parts or PARTS):
            try:
                module.run(ledger)
            except NotMeasured as error:
                console.print(f"{name}: {error}", markup=False)
            except OutOfTime:
                console.print(f"{name}: {minutes:g} minutes are over; call it again")
        kept[name] = list(module.rows(ledger))
        figures[name] = module.figures(kept[name])
        if kept[name] and name in (parts or PARTS):
            console.print(table(name, module.COLUMNS, module.cells(kept[name])))
    for name in parts or PARTS:
        rows = verdicts(figures[name], part(name).WANTED)
        console.print(table(name, ("figure", "measured", "wanted", ""), rows))
    measured = {name: rows for name, rows in kept.items() if rows}
    console.print(f"written: {write({name: figures[name] for name in measured}, measured)}")


if __name__ == "__main__":
    main()
