"""The page and the table of `optimize sensitivity`: for each layer, what it loses, what it saves, how it speeds up."""

import sys
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup

from loadtest.record.table import Unbroken
from optimize.judge.ruler import Ratio
from optimize.report import figures, page
from optimize.report import table as terminal


def write(document: dict[str, Any], output: Path) -> Path:
    """Write the page of an `optimize sensitivity` document, whole or not at all."""
    methods = list(dict.fromkeys(layer["method"] for layer in document["layers"]))
    text = (
        page.templates()
        .get_template("sensitivity.html")
        .render(
            found=document,
            charts={method: chart(document, method) for method in methods},
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            environment=page.environment(),
            plotly=get_plotlyjs(),
        )
    )
    return page.save(text, output)


def chart(document: dict[str, Any], method: str) -> str:
    """Return the chart of one method: loss with its 95 % interval, kilobytes saved, and speed at each batch size."""
    layers = [layer for layer in document["layers"] if layer["method"] == method]
    names = [escape(layer["name"]) for layer in layers]
    batches = [str(batch) for batch in document["batch"]]
    titles = [f"{escape(layers[0]['metric'])}, worse by", "kB saved", *(f"× at batch {batch}" for batch in batches)]
    figure = figures.panels(titles, columns=len(titles))
    losses = [(layer["loss"], layer["low"], layer["high"]) for layer in layers]
    _points(figure, names, losses, [True] * len(names), 0.0, 1)
    saved = [layer["bytes_saved"] / 1000 for layer in layers]
    figures.bars(figure, names, saved, [figures.TRAINED] * len(names), "kB", row=1, col=2)
    for column, batch in enumerate(batches, 3):
        speeds = [(layer["speedup"][batch], *layer["interval"][batch]) for layer in layers]
        sure = [not Ratio(1.0, *layer["control"][batch]).senseless for layer in layers]
        _points(figure, names, speeds, sure, 1.0, column)
    return figures.html(figure, f"figure-{method.replace('.', '-')}", figures.HEAD + figures.ROW * len(names))


def _points(
    figure: figures.Figure,
    names: list[str],
    values: list[tuple[float, float, float]],
    sure: list[bool],
    neutral: float,
    column: int,
) -> None:
    """Draw values with their intervals, those in colour that are `sure` and whose interval does not reach `neutral`."""
    for name, (value, low, high), known in zip(names, values, sure, strict=True):
        colour = figures.RESULT if known and not low <= neutral <= high else figures.STEP
        figure.add_scatter(
            x=[value],
            y=[name],
            error_x={"array": [high - value], "arrayminus": [value - low], "color": colour},
            mode="markers",
            marker={"color": colour, "size": 9},
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
            row=1,
            col=column,
        )
    figure.add_vline(x=neutral, line={"color": figures.TRAINED, "width": 1.5, "dash": "dot"}, row=1, col=column)


def table(document: dict[str, Any], output: Path) -> None:
    """Print the same on the terminal."""
    # A pipe or a file gets lines as long as they need to be.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    batches = [str(batch) for batch in document["batch"]]
    metric = document["layers"][0]["metric"] if document["layers"] else "score"
    rows = Unbroken(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("method", no_wrap=True)
    rows.add_column("layer", overflow="fold")
    for title in (f"{metric}, worse by", "bytes saved", *(f"× at {batch}" for batch in batches)):
        rows.add_column(title, justify="right", no_wrap=True)
    for layer in document["layers"]:
        interval = f" [{layer['low']:+.3f}, {layer['high']:+.3f}]" if console.width >= terminal.WIDE else ""
        rows.add_row(
            layer["method"],
            escape_markup(layer["name"]),
            escape_markup(f"{layer['loss']:+.4f}{interval}"),
            f"{layer['bytes_saved']:,}",
            *(f"{layer['speedup'][batch]:.2f}" for batch in batches),
        )
    console.print(rows)
    for entry in document["skipped"]:
        console.print(f"{entry['method']} leaves {entry['name']} alone: {entry['why']}", markup=False, soft_wrap=True)
    console.print(f"page: {output}", soft_wrap=True)
