"""Table: how columns of figures look on a terminal."""

from typing import Any

from rich.table import Table

NONE = slice(0)


def table(*headings: str, figures: slice = slice(1, None), **more: Any) -> Table:
    """Return a table without rows and without lines; `figures` are the columns whose texts stand to the right.

    What else rich's own `Table` takes may be said in `more`.
    """
    made = Table(*headings, box=None, pad_edge=False, **more)
    for column in made.columns[figures]:
        column.justify = "right"
    return made
