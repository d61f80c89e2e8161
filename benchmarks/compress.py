"""Compression beside the peers, on this machine, timed in the same rounds: `make bench-compress`.

Each subject is a trained model; each row a file made from it, by one of our recipes or by a peer's own recommended one.
All rows of a subject are judged with the same metric. Those of one runtime are timed in the same rounds, one file open
at a time, against the trained model's FP32 ONNX in ONNX Runtime. Writes build/compress/compress.json. Arguments are
names of subjects; all of them without any.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import peers
from rich.console import Console
from rich.table import Table

from optimize.judge import measure, ruler
from optimize.judge.evaluate import Quality, evaluate
from optimize.judge.evaluate import compare as paired
from optimize.model.errors import GateRefused
from optimize.predict.runtimes import RUNTIMES
from optimize.report import page
from optimize.runs import digest, pipeline, recipe
from optimize.source import splits
from optimize.source.load import load_workload
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from serve.config.target import Target
from serve.repository import scratch

OUTPUT = Path("build/compress")
BATCHES = (1, 32)
SECONDS = 300.0
TRAINED = "trained FP32, ONNX Runtime"


@dataclass(frozen=True)
class Row:
    """One file, and what runs it."""

    label: str
    path: Path
    runtime: str = "onnxruntime"


@dataclass(frozen=True)
class Found:
    """What a row showed; ratios are larger-is-better against the trained FP32 ONNX, intervals 95 %.

    `control` is the interval of the trained FP32 ONNX against itself, in the same rounds.
    """

    label: str
    smaller: float
    throughput: dict[int, float]
    interval: dict[int, tuple[float, float]]
    control: dict[int, tuple[float, float]]
    scores: dict[str, float]


def ours(label: str, name: str, made: Workload) -> Row:
    """Run the recipe examples/NAME.toml, which resumes what an earlier call trained."""
    plan = recipe.load(Path(f"examples/{name}.toml"))
    try:
        done = pipeline.run(plan, made, progress=lambda text, _fraction: print(f"  {name}: {text}"))
    except GateRefused as refusal:
        done = refusal.partial
    return Row(f"modelathe: {label}", Path(done["bundle"]) / bundles.GRAPH, plan.target.runtime)


def sentence_embedding(made: Workload, fp32: Path, place: Callable[[str], Path]) -> Iterator[Row]:
    """Yield the rows of MiniLM."""
    yield ours("INT8", "sentence_embedding", made)
    yield ours("INT8, OpenVINO", "sentence_embedding_openvino", made)
    yield ours("distilled, pruned, quantized", "sentence_embedding_small", made)
    yield ours("INT8, table in INT4", "sentence_embedding_medium", made)
    yield Row("onnxruntime.quantization, dynamic", peers.onnxruntime_dynamic(fp32, place("ort")))
    yield Row("Olive, transformer recipe", peers.olive_transformer(fp32, place("olive")))
    nncf = peers.nncf_openvino(fp32, made, place("nncf"), transformer=True)
    yield Row("NNCF + OpenVINO", nncf, "openvino")
    half = peers.torch_pruning(made, place("pruning"), ratio=0.5, epochs=0, keep=_heads)
    yield Row("torch-pruning, half of the heads and FFN", half)


def image(epochs: int, last: str) -> Callable[[Workload, Path, Callable[[str], Path]], Iterator[Row]]:
    """Return what yields the rows of a convolutional net whose last layer is named `last`."""

    def rows(made: Workload, fp32: Path, place: Callable[[str], Path]) -> Iterator[Row]:
        yield ours("pruned, distilled, quantized", made.name, made)
        yield Row("onnxruntime.quantization, static", peers.onnxruntime_static(fp32, made, place("ort")))
        nncf = peers.nncf_openvino(fp32, made, place("nncf"), transformer=False)
        yield Row("NNCF + OpenVINO", nncf, "openvino")

        def keep(model: Any) -> dict[str, Any]:
            return {"ignored_layers": [model.get_submodule(last)]}

        pruned = peers.torch_pruning(made, place("pruning"), ratio=0.5, epochs=epochs, keep=keep)
        yield Row("torch-pruning, half of the channels, tuned", pruned)

    return rows


SUBJECTS = {
    "sentence_embedding": sentence_embedding,
    "digits_cnn": image(40, "dense2"),
    "resnet": image(18, "dense"),
}


def _heads(model: Any) -> dict[str, Any]:
    """Return how torch-pruning is told to prune heads and FFN of a BERT, and nothing else."""
    layers = model.bert.encoder.layer
    attentions = [layer.attention.self for layer in layers]
    return {
        "num_heads": {part: own.num_attention_heads for own in attentions for part in (own.query, own.key, own.value)},
        "prune_num_heads": True,
        "head_pruning_ratio": 0.5,
        "ignored_layers": [model.bert.embeddings, *(layer.output.dense for layer in layers)],
    }


def compare(made: Workload) -> tuple[list[Found], dict[str, Quality]]:
    """Make, judge and time every row of one subject."""
    name = made.name
    trained = pipeline.establish(made, OUTPUT / f"{name}-trained", digest.trained(made, splits.read(made)))
    fp32 = pipeline.graph_of(trained.bundle)

    def place(peer: str) -> Path:
        folder = OUTPUT / f"{name}-{peer}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    rows = [Row(TRAINED, fp32), *SUBJECTS[name](made, fp32, place)]
    target = Target(batch=BATCHES)
    print("  timing")
    timed = {label: found for runtime in RUNTIMES for label, found in _timed(made, rows, runtime, target).items()}
    qualities: dict[str, Quality] = {}
    for row in rows:
        print(f"  judging {row.label}")
        with RUNTIMES[row.runtime](row.path, "cpu", target.cores) as predictor:
            qualities[row.label] = evaluate(predictor, made, trained.reference, max(BATCHES))
    whole = measure.file_bytes(fp32)
    found = []
    for row in rows:
        ratios, control = timed[row.label].ratios(row.label, TRAINED), timed[row.label].control()
        found.append(
            Found(
                row.label,
                whole / _bytes(row.path),
                {batch: ratio.value for batch, ratio in ratios.items()},
                {batch: (ratio.low, ratio.high) for batch, ratio in ratios.items()},
                {batch: (ratio.low, ratio.high) for batch, ratio in control.items()},
                {score.metric: score.value for score in qualities[row.label].scores},
            )
        )
    return found, qualities


def _timed(made: Workload, rows: list[Row], runtime: str, target: Target) -> dict[str, ruler.Speeds]:
    """Return the speeds of the rows that `runtime` runs, timed in the same rounds as the trained model in ONNX Runtime.

    One runtime at a time: with OpenVINO's threads in the process too, ONNX Runtime's small calls take longer.
    """
    chosen = {row.label: row for row in rows if row.runtime == runtime or row.label == TRAINED}
    arrays = measure.feeds(made.inputs, BATCHES)

    def visit(label: str) -> dict[int, float]:
        with RUNTIMES[chosen[label].runtime](chosen[label].path, "cpu", target.cores) as session:
            return measure.timed(session, arrays)

    speeds = ruler.alternate(visit, list(chosen), baseline=TRAINED, until=ruler.Until(seconds=SECONDS))
    return dict.fromkeys((label for label, row in chosen.items() if row.runtime == runtime), speeds)


def _bytes(path: Path) -> int:
    """Return the bytes of a model, OpenVINO's two files together."""
    beside = path.with_suffix(".bin")
    return path.stat().st_size + beside.stat().st_size if path.suffix == ".xml" else measure.file_bytes(path)


def show(name: str, found: list[Found]) -> None:
    """Print a table of one subject."""
    table = Table(title=name, title_justify="left")
    metrics = list(found[0].scores)
    for title in ("", "smaller", *(f"batch {batch}" for batch in BATCHES), *metrics, f"{metrics[0]} kept"):
        table.add_column(title, justify="right" if title else "left")
    for row in found:
        speeds = [f"{row.throughput[b]:.2f}× [{row.interval[b][0]:.2f}, {row.interval[b][1]:.2f}]" for b in BATCHES]
        kept = row.scores[metrics[0]] / found[0].scores[metrics[0]]
        values = [f"{row.scores[metric]:.4f}" for metric in metrics]
        table.add_row(row.label, f"{row.smaller:.2f}×", *speeds, *values, f"{kept:.4f}")
    console = Console(width=150)
    console.print(table)
    controls = ", ".join(f"[{low:.2f}, {high:.2f}] at batch {batch}" for batch, (low, high) in found[0].control.items())
    console.print(f"A/A control, the trained model against itself: {controls}", markup=False)


def verdicts(made: Workload, found: list[Found], qualities: dict[str, Quality]) -> list[tuple[str, bool, str]]:
    """Return each figure that is wanted of one subject: what, whether it was reached, and what was measured."""
    trained = found[0]
    mine = {row.label.removeprefix("modelathe: "): row for row in found if row.label.startswith("modelathe: ")}
    metric = next(iter(trained.scores))

    def kept(row: Found) -> float:
        return row.scores[metric] / trained.scores[metric]

    if made.name != "sentence_embedding":
        row = next(iter(mine.values()))
        lost = trained.scores[metric] - row.scores[metric]
        return [
            ("≥ 10× smaller", row.smaller >= 10, f"{row.smaller:.2f}×"),
            ("≥ 4× throughput at batch 32", row.throughput[32] >= 4, f"{row.throughput[32]:.2f}×"),
            ("≤ 0.005 lost", lost <= 0.005, f"{lost:.4f}"),
        ]
    plain, peer = mine["INT8"], next(row for row in found if row.label == "NNCF + OpenVINO")
    lanes = [plain, mine["INT8, OpenVINO"]]
    best = max(lanes, key=lambda row: row.throughput[32])
    fidelity = paired(made, qualities[best.label].scores[1], qualities[peer.label].scores[1])
    small, medium = mine["distilled, pruned, quantized"], mine["INT8, table in INT4"]
    return [
        ("ORT lane: fidelity ≥ 0.93", plain.scores["fidelity"] >= 0.93, f"{plain.scores['fidelity']:.4f}"),
        ("ORT lane: ≥ 2.2× at batch 32", plain.throughput[32] >= 2.2, f"{plain.throughput[32]:.2f}×"),
        (
            "better lane: not behind NNCF + OpenVINO in throughput at batch 32",
            best.interval[32][1] >= peer.interval[32][0],
            f"{best.throughput[32]:.2f}× beside {peer.throughput[32]:.2f}×",
        ),
        (
            "better lane: not behind NNCF + OpenVINO in fidelity",
            fidelity.high >= 0,
            f"{best.scores['fidelity']:.4f} beside {peer.scores['fidelity']:.4f}",
        ),
        ("small: ≥ 7× smaller", small.smaller >= 7, f"{small.smaller:.2f}×"),
        ("small: ≥ 4× throughput at batch 32", small.throughput[32] >= 4, f"{small.throughput[32]:.2f}×"),
        ("small: ≥ 97 % of hit@10", kept(small) >= 0.97, f"{kept(small):.4f}"),
        ("99 % lane: ≥ 99 % of hit@10", kept(medium) >= 0.99, f"{kept(medium):.4f}"),
    ]


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(SUBJECTS)))
def main(names: tuple[str, ...]) -> None:
    """Compare our recipes with the peers' on some subjects, or on all."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    written = OUTPUT / "compress.json"
    results = json.loads(written.read_text()) if written.exists() else {}
    for name in names or SUBJECTS:
        made = load_workload(f"examples/{name}.py:workload")
        with scratch.locked(OUTPUT):
            found, qualities = compare(made)
        show(name, found)
        judged = verdicts(made, found, qualities)
        for what, reached, measured in judged:
            print(f"  {'reached' if reached else 'MISSED '}  {what}: {measured}")
        rows = [asdict(row) for row in found]
        results[name] = {"rows": rows, "figures": judged, "environment": page.environment("cpu")}
        written.write_text(json.dumps(results, indent=2, default=str))
    print(f"written to {written}")


if __name__ == "__main__":
    main()
