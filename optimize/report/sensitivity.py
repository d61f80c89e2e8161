"""The page and the table of `optimize sensitivity`: for each layer, what it loses, what it saves, how it speeds up."""

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup

from loadtest.record.table import Unbroken
from optimize.report import figures, page
from optimize.report import table as terminal


def write(document: dict[str, Any], output: Path) -> Path:
    """Write the page of an `optimize sensitivity` document, whole or not at all."""
    methods = list(dict.fromkeys(layer["method"] for layer in document["layers"]))
    batches = [str(batch) for batch in document["batch"]]
    steps = {step["use"]: step for step in document["steps"]}
    found = {method: ranked(document, method) for method in methods}
    text = (
        page.templates()
        .get_template("sensitivity.html")
        .render(
            found=document,
            methods=[
                (method, figures.sensitivity(layers, batches), layers, recipe(steps[method], layers))
                for method, layers in found.items()
            ],
            layers=[layer for layers in found.values() for layer in layers],
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            environment=page.environment(),
            plotly="",
        )
    )
    return page.save(text, output)


def ranked(document: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """Return one method's layers, those that lose most first."""
    layers = [layer for layer in document["layers"] if layer["method"] == method]
    return sorted(layers, key=lambda layer: (-layer["loss"], layer["name"]))


def recipe(step: Mapping[str, Any], layers: Sequence[dict[str, Any]]) -> str:
    """Return the lines of a recipe that leave out the layers whose loss is shown, its interval above 0; empty if none.

    Args:
        step: the method as it was tried, as recipes spell it.
        layers: its own, in the order in which they are to be named.
    """
    lost = [name for layer in layers if layer["low"] > 0 for name in layer["members"]]
    if not lost:
        return ""
    return f"[[step]]\n{tomli_w.dumps({**step, 'exclude': [*step.get('exclude', ()), *lost]})}"


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
