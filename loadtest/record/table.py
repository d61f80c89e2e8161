"""Table: how columns of figures look on a terminal."""

from collections.abc import Collection
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

NONE = slice(0)


class Unbroken(Table):
    """A table whose cells break between words; on a narrow terminal it goes without some columns first.

    Args:
        headings: of the columns, as for rich's own table.
        spare: those of them that may go, the first one first.
        more: what else rich's own table takes.
    """

    def __init__(self, *headings: str, spare: Collection[str] = (), **more: Any) -> None:
        super().__init__(*headings, **more)
        self._spare = list(spare)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Give each column the room of its longest word and share out the rest; the widest gives way if it must."""
        while self._left(options.max_width) < 0 and self._spare:
            gone = self._spare.pop(0)
            self.columns = [column for column in self.columns if column.header != gone]
            for place, column in enumerate(self.columns):
                column._index = place
        widths, whole = ([kind(column) for column in self.columns] for kind in (_longest_word, _longest_line))
        left = self._left(options.max_width)
        widest = widths.index(max(widths))
        widths[widest] = max(widths[widest] + min(left, 0), 1)
        for _ in range(left):
            wanting = [line - width for line, width in zip(whole, widths, strict=True)]
            widths[wanting.index(max(wanting))] += max(wanting) > 0
        for column, width in zip(self.columns, widths, strict=True):
            column.width, column.overflow = width, "fold"
        yield from super().__rich_console__(console, options)

    def _left(self, room: int) -> int:
        """Return how many of the terminal's columns the longest words leave; below 0 they have too few."""
        sides, count = self.padding[1] + self.padding[3], len(self.columns)
        between = sides * (count if self.pad_edge else count - 1) + (count + 1 if self.box else 0)
        return room - sum(map(_longest_word, self.columns)) - between


def _longest_word(column: Column) -> int:
    """Return the columns that the longest word takes, or the longest line where lines do not break."""
    if column.no_wrap:
        return _longest_line(column)
    return max((cell_len(word) for text in _texts(column) for word in text.split()), default=0)


def _longest_line(column: Column) -> int:
    return max((cell_len(line) for text in _texts(column) for line in text.splitlines()), default=0)


def _texts(column: Column) -> list[str]:
    return [_plain(cell) for cell in (column.header, *column.cells)]


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


def table(*headings: str, figures: slice = slice(1, None), **more: Any) -> Table:
    """Return a table without rows and without lines; `figures` are the columns whose texts stand to the right.

    What else `Unbroken` takes may be said in `more`.
    """
    made = Unbroken(*headings, box=None, pad_edge=False, **more)
    for column in made.columns[figures]:
        column.justify = "right"
    return made
