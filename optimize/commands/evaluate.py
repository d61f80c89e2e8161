"""`optimize evaluate`: the workload's own metric, on the torch model, the ONNX file or the endpoint."""

from typing import TYPE_CHECKING

import click

from modelathe.commandline import document, emit, json_option, quiet_option, reporting

if TYPE_CHECKING:
    from optimize.predict.predictor import Predictor
    from optimize.step.bundle import Bundle


@click.command()
@click.argument("source")
@click.option(
    "--predictor",
    "kind",
    type=click.Choice(["torch", "onnx", "openvino"]),
    help="Which form of a bundle to judge; openvino is its ONNX file in OpenVINO.  [default: its ONNX file in the "
    "runtime that it was made for, torch where there is none]",
)
@click.option("--endpoint", help="Judge a served model: grpc://HOST:PORT/MODEL[/VERSION], or http://…")
@quiet_option
@json_option
def evaluate(source: str, kind: str | None, endpoint: str | None, as_json: bool) -> None:
    """Judge SOURCE, a bundle or a workload, or an endpoint that serves it, with the workload's own scores.

    \b
    Example:
      optimize evaluate build/runs/digits_cnn/4-quantize.static
      optimize evaluate examples/digits_cnn.py:workload --endpoint grpc://127.0.0.1:8001/digits_cnn
    """
    from optimize.judge import evaluate as evaluation
    from optimize.predict.module import TorchPredictor
    from optimize.report import table
    from optimize.runs import open as sources
    from optimize.runs.baseline import counting

    with reporting() as progress:
        bundle = sources.load(source)
        workload = bundle.workload
        progress("evaluating the trained model", 0.0)
        with TorchPredictor(workload.build(), workload.outputs) as trained:
            reference, _ = evaluation.collect(trained, workload)
        with choose(bundle, kind, endpoint) as predictor:
            count = len(next(iter(reference.values())))
            told = counting(progress, f"evaluating {predictor.name}", "samples", count)
            quality = evaluation.evaluate(predictor, workload, reference, told=told)
    result = document(predictor=predictor.name, source=endpoint or source, **quality.document())
    if as_json:
        emit(result)
    else:
        table.quality(result)


def choose(bundle: "Bundle", kind: str | None, endpoint: str | None) -> "Predictor":
    """Return the predictor that the options ask for; without any, what the bundle was made for.

    Raises:
        UsageError: both a form and an endpoint, or the ONNX form of a model that was not exported.
    """
    from modelathe.errors import UsageError
    from optimize.predict.endpoint import EndpointPredictor
    from optimize.predict.module import TorchPredictor
    from optimize.predict.onnxruntime import OnnxPredictor
    from optimize.predict.runtimes import RUNTIMES

    if endpoint and kind:
        raise UsageError("--predictor and --endpoint exclude each other", fix="give one of them")
    if endpoint:
        return EndpointPredictor(endpoint)
    if bundle.graph and kind != "torch":
        return {**RUNTIMES, "onnx": OnnxPredictor}[kind or bundle.runtime](bundle.graph)
    if kind in ("onnx", "openvino"):
        raise UsageError("there is no ONNX file in it", fix="run optimize export first, and evaluate its bundle")
    return TorchPredictor(bundle.module, bundle.workload.outputs)
