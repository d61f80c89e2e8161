"""Every example architecture for TensorRT, in every precision, compiled by NVIDIA's compiler: `make bench-tensorrt`.

Each cell is an `optimize run` for the target TensorRT, on a machine that needs no GPU. Its graph is compiled for fixed
shapes, for any batch, and for any batch and length. No engine runs here: quality is that of the same graph on the CPU.
"""

import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import onnx_ir
import peers
import tomli_w
from zoo import EXAMPLES, NAMES

from modelathe.errors import ModelatheError
from modelathe.tensors import Dim, TensorSpec
from optimize.graph import graph as graphs
from optimize.judge import evaluate, measure
from optimize.predict import runtimes as predict
from optimize.step import bundle as bundles
from optimize.tensorrt import compiler
from serve.config.target import Target

HALF, BFLOAT = {"use": "quantize.half"}, {"use": "quantize.half", "dtype": "bfloat16"}
# `partial`: what stays float shows in the size; a network whose weights are mostly recurrent is no cell without it.
QAT = {"use": "quantize.qat", "epochs": 1, "partial": True}
CELLS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "FP16": [HALF],
    "BF16": [BFLOAT],
    "INT8": [{"use": "quantize.static", "partial": True}],
    "INT8 + FP16": [{"use": "quantize.static", "partial": True}, HALF],
    "INT8 QAT": [QAT],
    "FP8": [{"use": "quantize.fp8", "partial": True}],
    "FP8 + FP16": [{"use": "quantize.fp8", "partial": True}, HALF],
    "INT8 weights": [{"use": "quantize.weight_only", "partial": True}, HALF],
    "INT4 weights": [{"use": "quantize.weight_only", "weights": "int4", "block_size": "64", "partial": True}, HALF],
    "2:4 + FP16": [{"use": "prune.weights", "pattern": "2:4"}, HALF],
}
MODELOPT = {"ModelOpt INT8": "int8", "ModelOpt FP8": "fp8"}
"""NVIDIA's own ONNX quantization, float16 around it, beside ours for the networks `BESIDE`."""
BESIDE = ("digits_cnn", "resnet", "sentence_embedding")
BATCH = [1, 32]
SHAPES = ("fixed", "any batch", "any batch and length")
KEY = """Each cell: the score on a CPU of the graph that was compiled, and how many times smaller its file is than the
trained model's FP32 one. Compiled for fixed shapes, any batch, and any length where there is one, without a GPU; no
engine was run. "—" has its reason below the table."""
RESULTS = Path(__file__).parent / "results"


def made(name: str, steps: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """Return the document of a run of `steps`, or of its error; what it keeps is not judged here, but measured."""
    recipe = folder.with_suffix(".toml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    target = {"device": "cuda", "runtime": "tensorrt", "batch": BATCH}
    recipe.write_text(tomli_w.dumps({"budget": {"max_drop": 1.0}, "target": target, "step": steps}))
    command = [sys.executable, "-m", "optimize", "run", f"{EXAMPLES / name}.py:workload", "--recipe", str(recipe)]
    command += ["--output", str(folder), "--json"]
    with folder.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=False)
    document: dict[str, Any] = json.loads(done.stdout or b'{"error": {"what": "it ended without a word"}}')
    return document


def pinned(inputs: Sequence[TensorSpec], shapes: str) -> list[TensorSpec]:
    """Return the inputs with the typical size in the place of every dim that `shapes` keeps from changing."""

    def size(dim: int | Dim) -> int | Dim:
        changes = shapes != "fixed" and (dim == inputs[0].dims[0] or shapes == SHAPES[-1])
        return dim if isinstance(dim, int) or changes else dim.typical

    return [dataclasses.replace(spec, dims=tuple(map(size, spec.dims))) for spec in inputs]


def compiled(bundle: bundles.Bundle, shapes: str, sparse: bool) -> dict[str, Any]:
    """Return what the compiler makes of a bundle's graph for `shapes`, or why it refuses it."""
    assert bundle.graph is not None
    specs = pinned(bundle.workload.inputs, shapes)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = graphs.load(bundle.graph)
        for value in model.graph.inputs:
            spec = next(spec for spec in specs if spec.name == value.name)
            dims = zip(spec.dims, value.shape or (), strict=True)
            value.shape = onnx_ir.Shape([dim if isinstance(dim, int) else free for dim, free in dims])
        graph = graphs.save(model, folder / "model.onnx")
        try:
            found = compiler.compile(graph, specs, folder / "engine", folder / "log", sparse=sparse)
        except ModelatheError as error:
            return {"refused": error.what}
    return {"bytes": found.bytes, "seconds": round(found.seconds, 2), "layers": dict(found.layers)}


def cell(name: str, scheme: str, output: Path) -> dict[str, Any]:
    """Return a network in one precision: the run's quality and size, and what was compiled for each kind of shapes."""
    folder = output / name / scheme.replace(" ", "").replace(":", "").lower()
    document = made(name, CELLS.get(scheme, [{"use": "export.onnx"}]), folder)
    found: dict[str, Any] = {"network": name, "scheme": scheme}
    if "result" not in document:
        return {**found, "refused": document["error"]["what"]}
    trained, result, smaller = document["trained"]["quality"], document["result"]["quality"], document["ratios"]["size"]
    bundle = bundles.load(Path(document["bundle"]))
    if scheme in MODELOPT:
        try:
            bundle, result, smaller = theirs(bundle, folder, MODELOPT[scheme])
        except subprocess.CalledProcessError as error:
            return {**found, "refused": f"ModelOpt: {error.stderr.strip().splitlines()[-1]}"}
    found |= {"metric": trained["metric"], "trained": trained["value"], "quality": result.get("value")}
    found |= {"low": result.get("low"), "high": result.get("high"), "smaller": smaller}
    longer = any(isinstance(dim, Dim) for spec in bundle.workload.inputs for dim in spec.own)
    kinds = SHAPES if longer else SHAPES[:2]
    return {**found, "compiled": {shapes: compiled(bundle, shapes, "2:4" in scheme) for shapes in kinds}}


def theirs(bundle: bundles.Bundle, folder: Path, mode: str) -> tuple[bundles.Bundle, dict[str, Any], float]:
    """Return ModelOpt's graph in the bundle's place, its quality where a CPU can compute it, how much smaller it is."""
    assert bundle.graph is not None
    graph = peers.modelopt(bundle.graph, bundle.workload, folder, mode)
    try:
        with predict.open_graph(graph, Target(device="cuda", runtime="tensorrt")) as predictor:
            judged = evaluate.evaluate(predictor, bundle.workload).scores[0].document()
    except ModelatheError as error:
        judged = {"unjudged": error.what}
    smaller = measure.file_bytes(bundle.graph) / measure.file_bytes(graph)
    return dataclasses.replace(bundle, graph=graph), judged, smaller


def table(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: a network a row, a precision a column, the quality that is kept in each."""
    schemes = list(dict.fromkeys(one["scheme"] for one in cells))
    yield f"| network | trained | {' | '.join(schemes)} |"
    yield f"|---|---|{'---|' * len(schemes)}"
    for name in dict.fromkeys(one["network"] for one in cells):
        row = {one["scheme"]: one for one in cells if one["network"] == name}
        trained = next((f"{one['metric']} {one['trained']:.4f}" for one in row.values() if "trained" in one), "")
        yield f"| {name} | {trained} | {' | '.join(said(row[one]) if one in row else '' for one in schemes)} |"
    yield ""
    for one in cells:
        for shapes, why in refusals(one).items():
            yield f"- {one['network']}, {one['scheme']}{f', {shapes}' if shapes else ''}: {why}"


def refusals(one: Mapping[str, Any]) -> dict[str, str]:
    """Return why a cell is empty, or which shapes were refused."""
    if "refused" in one:
        return {"": one["refused"]}
    return {shapes: found["refused"] for shapes, found in one["compiled"].items() if "refused" in found}


def said(one: Mapping[str, Any]) -> str:
    """Return one cell of the table."""
    if "refused" in one:
        return "—"
    some = "" if not refusals(one) else " (not for every shape)" if len(refusals(one)) < len(one["compiled"]) else " ✗"
    quality = "not judged" if one["quality"] is None else f"{one['quality']:.4f}"
    return f"{quality}, {one['smaller']:.1f}×{some}"


def chosen(all_of: Sequence[str], given: Sequence[str]) -> Sequence[str]:
    """Return what was asked for, everything without a word."""
    if unknown := set(given) - set(all_of):
        raise click.BadParameter(f"there is no {', '.join(unknown)}; there are {', '.join(all_of)}")
    return given or all_of


@click.command()
@click.argument("names", nargs=-1)
@click.option("--scheme", "schemes", multiple=True, help="A precision of the table; may be repeated.  [default: all]")
@click.option("--output", type=click.Path(path_type=Path), default=Path("build/tensorrt-matrix"))
def main(names: tuple[str, ...], schemes: tuple[str, ...], output: Path) -> None:
    """Compile the networks NAMES, or all; print a Markdown table; of all, write it and JSON to benchmarks/results."""
    cells = []
    for name in chosen(NAMES, names):
        for scheme in chosen([*CELLS, *MODELOPT], schemes):
            if scheme in MODELOPT and name not in BESIDE:
                continue
            cells.append(cell(name, scheme, output))
            click.echo(f"{name} {scheme}: {said(cells[-1])} {refusals(cells[-1]) or ''}", err=True)
    today = datetime.datetime.now(datetime.UTC).date()
    written = (RESULTS if not names and not schemes else output) / f"tensorrt-{today}"
    text = "\n".join([f"# TensorRT for RTX {version('tensorrt-rtx-cu13')}, {today}", "", KEY, "", *table(cells)])
    click.echo(text)
    written.with_suffix(".json").write_text(json.dumps(cells, indent=1) + "\n")
    written.with_suffix(".md").write_text(f"{text}\n")
    click.echo(f"written to {written}.json and .md", err=True)


if __name__ == "__main__":
    main()
