"""`optimize inspect`: what each layer costs, and what each method could do to it."""

from typing import TYPE_CHECKING

import click

from modelathe.commandline import document, emit, json_option, quiet_option, reporting

if TYPE_CHECKING:
    from optimize.runs.inspect import Inspection


@click.command()
@click.argument("source")
@click.option("--batch", type=click.IntRange(1, 65536), default=1, show_default=True, help="Samples in the timed call.")
@quiet_option
@json_option
def inspect(source: str, batch: int, as_json: bool) -> None:
    """Show the layers of SOURCE, a workload or a bundle: parameters, MACs, share of the latency, output shape.

    The latency is that of the ONNX file in ONNX Runtime on this machine; what it computes as one operator is one row,
    and what it fuses beyond recognition stands under `other`. The JSON document names for each layer the methods that
    could change it.

    \b
    Example:
      optimize inspect digits_cnn.py
    """
    from optimize.runs import inspect as layers
    from optimize.runs import open as sources

    with reporting() as progress:
        bundle = sources.load(source)
        progress("exporting and timing", 0.0)
        found = layers.inspect(bundle, batch)
    if as_json:
        emit(document(source=source, batch=batch, **found.document()))
    else:
        _print(found)


def _print(found: "Inspection") -> None:
    from collections import Counter

    from rich import box
    from rich.console import Console

    from loadtest.record.table import Unbroken
    from optimize.report.table import WIDE, number

    console = Console(highlight=False)
    wide = console.width >= WIDE
    table = Unbroken(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold", ratio=1)
    table.add_column("type", overflow="ellipsis", no_wrap=True, max_width=16)
    for column in ("params", "share", "MACs", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    if wide:
        table.add_column("output", no_wrap=True)
    for layer in found.layers:
        table.add_row(
            " + ".join((layer.name or "(itself)", *layer.fused)),
            layer.kind,
            _short(layer.parameters),
            f"{layer.share:.1%}",
            _short(layer.macs),
            "-" if layer.latency is None else f"{layer.latency:.1%}",
            *(["x".join(map(str, layer.output or ()))] if wide else []),
        )
    console.print(table)
    console.print(
        f"{found.parameters:,} parameters, {number(found.macs)} MACs a sample, "
        f"{found.milliseconds:.2f} ms in its operators"
    )
    could = Counter(method for layer in found.layers for method in layer.methods)
    console.print("could be changed: " + (", ".join(f"{name} {n} layers" for name, n in could.items()) or "nothing"))
    for warning in found.warnings:
        console.print(f"note: {warning}")


def _short(number: int) -> str:
    """Return 1234567 as 1.2M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number) if number else ""
