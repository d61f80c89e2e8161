"""Findings of `optimize check`, as a table."""

from collections.abc import Sequence

from rich import box
from rich.markup import escape

from loadtest.record.table import Unbroken
from optimize.checks.finding import Finding
from optimize.report.table import terminal

COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def table(found: Sequence[Finding]) -> None:
    """Print one row for each finding, and how many are errors and warnings."""
    rows = Unbroken(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("", "check", "what was found, where, and what to do"):
        rows.add_column(title, no_wrap=title != "what was found, where, and what to do")
    for finding in found:
        lines = [f"{finding.where}: {finding.what}" if finding.where else finding.what]
        if finding.fix:
            lines.append(f"fix: {finding.fix}")
        colour = COLOURS[finding.level]
        rows.add_row(f"[{colour}]{finding.level}[/]", finding.check, escape("\n".join(lines)))
    console = terminal()
    console.print(rows)
    counts = {level: sum(finding.level == level for finding in found) for level in ("error", "warning")}
    console.print(", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items()))
