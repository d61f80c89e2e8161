"""Notebook: what Python calls return, as a cell shows it and as a table, and a text that a cell redraws."""

import html
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from modelathe.errors import MachineError, ModelatheError


@dataclass(frozen=True)
class View:
    """What a cell shows of a result: a title, figures by name, and paragraphs."""

    title: str
    figures: Mapping[str, str]
    text: Sequence[str] = ()

    def html(self) -> str:
        """Return it as HTML without colours of its own, so that it is readable on a light and on a dark page."""
        told = "".join(f"<p>{html.escape(line)}</p>" for line in self.text if line)
        row = '<tr><th style="text-align:left">{}</th><td style="text-align:left">{}</td></tr>'
        rows = "".join(row.format(html.escape(name), html.escape(value)) for name, value in self.figures.items())
        return f"<div><p><b>{html.escape(self.title)}</b></p>{told}<table>{rows}</table></div>"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a Python call returns.

    Args:
        document: what the command of the same name prints with `--json`.
    """

    document: dict[str, Any] = field(repr=False)

    def view(self) -> View:
        """Return what a notebook's cell shows of it."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return self.view().html()


@dataclass(frozen=True, kw_only=True)
class Judged(Result):
    """A result with a verdict. A call returns it whether it passed or not.

    Args:
        failure: the error with which the command would have ended; None where everything passed.
    """

    failure: ModelatheError | None = None

    @property
    def passed(self) -> bool:
        """Whether everything passed."""
        return self.failure is None

    def check(self) -> Self:
        """Return the result itself if it passed.

        Raises:
            ModelatheError: it did not; what the command would have ended with. The document is its `partial`.
        """
        if self.failure is not None:
            raise self.failure
        return self


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return rows as a pandas.DataFrame.

    Raises:
        MachineError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise MachineError("a table needs pandas, which is not installed", fix="pip install pandas") from error
    return pandas.DataFrame(list(rows))


def redrawn() -> Callable[[str], None] | None:
    """Return what shows a text in place of the one before in the output of a cell; None outside a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)


class Stages:
    """Work as a cell shows it: a line with its seconds for each stage that is done, and the current one below."""

    def __init__(self, redraw: Callable[[str], None]) -> None:
        self._redraw, self._done, self._text, self._begun = redraw, list[str](), "", 0.0

    def report(self, text: str, fraction: float) -> None:
        """Take what goes on; the part of the text before its first colon names the stage."""
        if text.partition(":")[0] != self._text.partition(":")[0]:
            self._end()
        self._text = text
        share = f" {fraction:.0%}" if 0 < fraction < 1 else ""
        self._redraw("\n".join([*self._done, f"{text}{share} …"]))

    def finish(self) -> None:
        """Show the last stage as done."""
        self._end()
        self._redraw("\n".join(self._done))

    def _end(self) -> None:
        if self._text:
            self._done.append(f"{self._text}, {time.monotonic() - self._begun:.1f} s")
        self._begun = time.monotonic()
