"""What the ruler says of a file against itself, idle and beside busy programs: `make bench-ruler`.

Three networks are measured again and again under three names, as a promise of speed is. Prints for each batch size how
many 95 % intervals held 1, the mean ratio and its spread, and whether both are within what is wanted; writes
build/bench/ruler.json. Ends with 1 where one is not.
"""

import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from modelathe.tensors import BATCH, TensorSpec
from optimize.judge import measure
from optimize.judge.ruler import Until
from optimize.methods.export.onnx import export
from optimize.report import page
from optimize.source.load import load_workload
from serve.config.target import Target

OUTPUT = Path("build/bench")
BATCHES = (1, 16, 32)
NAMES = ("a", "b", "c")
COVERED, OFF = 0.90, 0.02
"""The least share of intervals that hold 1, and how far the mean ratio may lie from 1."""


class Last(nn.Module):
    """A recurrent network that answers with its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """Return one row of ten for each series."""
        return self.head(self.recurrent(series)[0][:, -1])


def networks(folder: Path) -> dict[str, tuple[Path, Sequence[TensorSpec]]]:
    """Export a convolutional, a recurrent and an attention network; weights make no difference to the time."""
    digits = load_workload("examples/digits_cnn.py:workload")
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    series = (TensorSpec("series", "float32", (BATCH, 24, 32)),)
    tokens = (TensorSpec("src", "float32", (BATCH, 24, 64)),)
    made = {
        "digits_cnn": (digits.build(), digits.inputs),
        "gru": (Last(), series),
        "encoder": (nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), tokens),
    }
    return {
        name: (export(module.eval(), inputs, ["y"], folder / f"{name}.onnx"), inputs)
        for name, (module, inputs) in made.items()
    }


def spin() -> None:
    """Keep a core busy until the process is ended."""
    while True:
        pass


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Run so many programs that do nothing but take a core."""
    programs = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(loops)]
    for program in programs:
        program.start()
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.join()


def measured(path: Path, inputs: Sequence[TensorSpec], folder: Path) -> dict[int, list[tuple[float, float, float]]]:
    """Return the ratios of two copies and of the control to the first copy, by batch size."""
    files = {name: Path(shutil.copy(path, folder / f"{name}.onnx")) for name in NAMES}
    speeds = measure.speed(files, inputs, Target(batch=BATCHES), baseline=NAMES[0], until=Until(decide=NAMES[1:]))
    found = [speeds.ratios(NAMES[1], NAMES[0]), speeds.ratios(NAMES[2], NAMES[0]), speeds.control()]
    return {batch: [(of[batch].value, of[batch].low, of[batch].high) for of in found] for batch in BATCHES}


def judged(ratios: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Return the share of intervals that held 1, the mean ratio and its spread, and whether they are as wanted."""
    values = np.array([value for value, _, _ in ratios])
    covered = float(np.mean([low <= 1 <= high for _, low, high in ratios]))
    mean = float(values.mean())
    return {
        "intervals": len(ratios),
        "covered": covered,
        "mean": mean,
        "spread": float(values.std()),
        "reached": covered >= COVERED and abs(mean - 1) <= OFF,
    }


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(["digits_cnn", "gru", "encoder"]))
@click.option("--runs", default=10, show_default=True, help="Measurements of each network; each gives 3 intervals.")
@click.option("--loops", default="0,2", show_default=True, help="Busy programs beside them; several with commas.")
def main(names: tuple[str, ...], runs: int, loops: str) -> None:
    """Measure the networks NAMES, or all three, against themselves and print what the ruler says of them."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    table = Table(title="the same file under three names", title_justify="left")
    for title in ("network", "busy loops", "batch", "intervals that hold 1", "mean ratio", "spread", ""):
        table.add_column(title, justify="left" if title in ("network", "") else "right")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        made = networks(Path(scratch))
        for name in names or made:
            path, inputs = made[name]
            for count in map(int, loops.split(",")):
                with busy(count):
                    found = [measured(path, inputs, Path(scratch)) for _ in range(runs)]
                for batch in BATCHES:
                    row = judged([ratio for one in found for ratio in one[batch]])
                    rows.append({"network": name, "loops": count, "batch": batch, **row})
                    held = f"{row['covered']:.2f} of {row['intervals']}"
                    word = "reached" if row["reached"] else "MISSED"
                    cells = (name, count, batch, held, f"{row['mean']:.3f}", f"{row['spread']:.3f}", word)
                    table.add_row(*map(str, cells))
                    click.echo("  ".join(map(str, cells)))
    document = {"date": time.strftime("%F"), "machine": page.environment(), "rows": rows}
    (OUTPUT / "ruler.json").write_text(json.dumps(document, indent=2))
    Console(width=110).print(table)
    sys.exit(not all(row["reached"] for row in rows))


if __name__ == "__main__":
    main()
