"""Every example architecture from its trained model to a proven endpoint: `make zoo`.

Each row is an `optimize run` in a process of its own, so that one that breaks leaves the others alone. Prints a table
and writes build/zoo.json, the list of the runs' documents.
"""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from modelathe import interpreter

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = (
    "mlp",
    "mlp_binary",
    "digits_cnn",
    "resnet",
    "mobilenet",
    "text_cnn",
    "gru",
    "lstm",
    "transformer",
    "vit",
    "gan",
    "vae",
    "sentence_embedding",
    "unet",
)
REFUSED = 3
TITLES = ("model", "metric", "trained", "result, 95 % interval", "smaller", "batch 1", "batch 32", "differ", "verdict")


@dataclass(frozen=True)
class Row:
    """How one architecture fared.

    Args:
        name: of the example.
        verdict: `passed`; `refused` by gates that all say what to do about it; or `failed`.
        why: what the gates or the error said.
        run: the `optimize run` document, None where the run did not get that far.
    """

    name: str
    verdict: str
    why: str
    run: dict[str, Any] | None


def row(name: str, examples: Path, output: Path) -> Row:
    """Run the recipe of one example, in the folder `output`, and judge how it ended."""
    example = examples.resolve() / name
    arguments = ["run", f"{example}.py:workload", "--recipe", f"{example}.toml", "--repository", "zoo_repository"]
    command = interpreter.command("optimize", *arguments, "--json")
    done = subprocess.run(command, cwd=output, env=interpreter.variables(), capture_output=True, text=True)
    told = json.loads(done.stdout or "{}")
    run = told if "gates" in told else None
    # The error is the last thing that a command of ours says: one line, and one with the way out.
    last = " ".join(line.strip() for line in done.stderr.splitlines()[-2:])
    return judged(name, done.returncode, run, last)


def judged(name: str, code: int, run: dict[str, Any] | None, last: str) -> Row:
    """Return the row for an exit code, the run's document and the last lines that it wrote to standard error.

    A refusal counts as explained only when every gate that said no gives advice.
    """
    if code == 0 and run is not None:
        return Row(name, "passed", "", run)
    no = [gate for gate in run["gates"] if not gate["passed"]] if run is not None else []
    if code == REFUSED and no and all(gate["advice"] for gate in no):
        return Row(
            name, "refused", "; ".join(f"{gate['name']}: {gate['measured']}; {gate['advice']}" for gate in no), run
        )
    return Row(name, "failed", f"exit code {code}: {last}", run)


def table(rows: list[Row]) -> Table:
    """Return one line for each row; ratios are against the trained model's own FP32 ONNX, larger is better.

    Ratios of speed have their 95 % intervals.
    """
    made = Table(title="zoo", title_justify="left")
    for title in TITLES:
        made.add_column(title, justify="left" if title in ("model", "metric", "verdict") else "right", no_wrap=True)
    for entry in rows:
        made.add_row(entry.name, *(figures(entry.run) if entry.run else [""] * 7), entry.verdict)
    return made


def figures(run: dict[str, Any]) -> list[str]:
    """Return the cells between the name and the verdict."""
    trained, result, ratios = run["trained"]["quality"], run["result"]["quality"], run["ratios"]
    served, faster = run["endpoint"], ratios["throughput"]
    spread = {batch: "[{:.2f}, {:.2f}]".format(*ends) for batch, ends in ratios["interval"].items()}
    return [
        trained["metric"],
        f"{trained['value']:.4f}",
        f"{result['value']:.4f} [{result['low']:.4f}, {result['high']:.4f}]",
        f"{ratios['size']:.2f}×",
        *(f"{faster[batch]:.2f}× {spread[batch]}" if batch in faster else "" for batch in ("1", "32")),
        f"{served['parity']['mismatched']} of {served['parity']['requests']}" if served else "not served",
    ]


def chosen(_context: click.Context, _parameter: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names to run, all of them when none is given."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise click.BadParameter(f"there is no {', '.join(unknown)}; the zoo has {', '.join(NAMES)}")
    return tuple(dict.fromkeys(names)) or NAMES


@click.command()
@click.argument("names", nargs=-1, callback=chosen)
@click.option("--examples", type=click.Path(path_type=Path), default=EXAMPLES, help="Folder of workloads and recipes.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("build"), help="Takes zoo.json and the runs.")
def main(names: tuple[str, ...], examples: Path, output: Path) -> None:
    """Run the examples NAMES, or all; end with 1 if one failed without a refusal that says why."""
    rows = []
    output.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, 1):
        click.echo(f"{name} ({number} of {len(names)})", err=True)
        rows.append(row(name, examples, output))
        click.echo(f"{name}: {rows[-1].verdict}", err=True)
        runs = [entry.run for entry in rows if entry.run is not None]
        (output / "zoo.json").write_text(json.dumps(runs, indent=2))
    console = Console(width=160, highlight=False)
    console.print(table(rows))
    for entry in rows:
        for warning in entry.run["warnings"] if entry.run else ():
            console.print(f"{entry.name}: {warning}", soft_wrap=True, markup=False)
        if entry.why:
            console.print(f"{entry.name} {entry.verdict}: {entry.why}", soft_wrap=True, markup=False)
    sys.exit(any(entry.verdict == "failed" for entry in rows))


if __name__ == "__main__":
    # Leaves by an exception, so that the run in progress is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
