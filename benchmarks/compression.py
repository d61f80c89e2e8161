"""Print what INT8 alone does to sentence_embedding: size, speed beside ORT FP32, and what is kept of its answers.

Run from the repository's root: python benchmarks/compression.py [--json]. It takes some minutes on two cores.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from loadtest.commandline import document, emit, json_option
from optimize import measure, recipe, step, workload
from optimize.evaluate import compare, evaluate
from optimize.export.onnx import export
from optimize.predict import OnnxPredictor, TorchPredictor

EXAMPLE = Path(__file__).parents[1] / "examples" / "sentence_embedding.py"


def measured(seconds: float) -> dict[str, Any]:
    """Export and quantize the example as its recipe says, judge it on all 1,500 pairs, and time it for `seconds`."""
    made = workload.load(f"{EXAMPLE}:workload")
    read = recipe.load(EXAMPLE.with_suffix(".toml"))
    module = made.build()
    reference = evaluate(TorchPredictor(module, made.outputs), made)
    with tempfile.TemporaryDirectory(prefix="lathe-") as folder:
        trained = export(module, made.inputs, made.outputs, Path(folder, "trained.onnx"))
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        context = step.Context(made, module, read.target, read.seed, scratch, lambda text, fraction: None)
        result = step.apply(read.steps[-1], trained, context)
        with OnnxPredictor(result) as predictor:
            quality = evaluate(predictor, made, reference.outputs)
        target = replace(read.target, batch=(8, 32))
        speeds = measure.speed({"trained": trained, "result": result}, made.inputs, target, seconds=seconds)
        sizes = {"trained": measure.file_bytes(trained), "result": measure.file_bytes(result)}
    hit, fidelity = quality.scores
    difference = compare(made, hit, reference.scores[0])
    ratios = speeds.ratios("result", "trained")
    return document(
        workload=made.name,
        bytes=sizes,
        size=sizes["trained"] / sizes["result"],
        throughput={str(batch): vars(ratio) for batch, ratio in ratios.items()},
        latency_ms={name: {str(b): ms for b, ms in speeds.latency_ms(name).items()} for name in ("trained", "result")},
        quality={
            "trained": reference.scores[0].value,
            "result": hit.value,
            "kept": hit.value / reference.scores[0].value,
        },
        difference={"value": difference.value, "low": difference.low, "high": difference.high},
        fidelity=fidelity.value,
    )


@click.command(help=__doc__)
@click.option("--seconds", default=60.0, show_default=True, help="How long the alternating runs may take.")
@json_option
def main(seconds: float, as_json: bool) -> None:
    """Print the figures as text or as one JSON document."""
    found = measured(seconds)
    if as_json:
        emit(found)
        return
    sizes = found["bytes"]
    click.echo(f"size         {found['size']:.2f}x smaller ({sizes['trained']:,} -> {sizes['result']:,} bytes)")
    for batch, ratio in found["throughput"].items():
        click.echo(
            f"batch {batch:>2} x 32 {ratio['value']:.2f}x the throughput of ORT FP32 "
            f"(95 % interval {ratio['low']:.2f} to {ratio['high']:.2f})"
        )
    quality, difference = found["quality"], found["difference"]
    click.echo(
        f"hit@10       {quality['result']:.4f} of {quality['trained']:.4f}, {quality['kept']:.1%} kept "
        f"(difference {difference['value']:+.4f}, 95 % interval {difference['low']:+.4f} to {difference['high']:+.4f})"
    )
    click.echo(f"fidelity     {found['fidelity']:.3f} of the trained model's top ten")


if __name__ == "__main__":
    main()
