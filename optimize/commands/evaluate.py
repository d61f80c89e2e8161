"""`optimize evaluate`: the workload's own metric, on the torch model, the ONNX file or the endpoint."""

from typing import TYPE_CHECKING

import click

from modelathe.commandline import emit, json_option, quiet_option

if TYPE_CHECKING:
    from optimize.calls.evaluation import Kind


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
def evaluate(source: str, kind: "Kind | None", endpoint: str | None, as_json: bool) -> None:
    """Judge SOURCE, a bundle or a workload, or an endpoint that serves it, with the workload's own scores.

    \b
    Example:
      optimize evaluate build/runs/digits_cnn/latest/5-quantize.static
      optimize evaluate digits_cnn.py --endpoint grpc://127.0.0.1:8001/digits_cnn
    """
    from optimize.calls import evaluation
    from optimize.report import table

    found = evaluation.evaluate(source, predictor=kind, endpoint=endpoint).document
    if as_json:
        emit(found)
    else:
        table.quality(found)
