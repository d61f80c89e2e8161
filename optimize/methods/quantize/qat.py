"""Quantization-aware training: the module learns with its weights and activations rounded to INT8.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018
(arXiv 1712.05877): every forward pass rounds, the gradient passes the rounding as if it were not there, and the ranges
are moving averages. Torchao's PT2E inserts the rounding and converts. Batch norms are folded into the layers before
them first: a trained model has no more use for batch statistics, and what is trained is then what is converted.
Torchao rounds Conv2d and Linear; embedding tables, Conv1d and recurrent layers are left to a graph step after this one.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from modelathe.tensors import Array
from optimize.graph import graph
from optimize.machine import cpu
from optimize.methods.quantize import captured
from optimize.model.errors import BadGraph, NoEffect
from optimize.step import options

if TYPE_CHECKING:
    from torch import nn

    from optimize.judge.evaluate import Quality
    from optimize.step.contract import Context
    from optimize.train.fit import Objective, Tensors

NAME = "quantize.qat"
AGREEMENT = 0.998
"""Share of the rows in which the largest value of the first output must be the same one in ONNX Runtime."""
DISTANCE = 0.02
"""Else the largest difference, root mean square over root mean square: an embedding's largest value means nothing."""
LOSS_BATCHES = 16
"""Training batches over which the loss before and after the conversion is taken."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Qat:
    """Train with INT8 rounding, then export as INT8 (Q/DQ)."""

    epochs: int = options.EPOCHS
    learning_rate: float = Field(
        default=1e-4, gt=0, allow_inf_nan=False, description="Peak rate of AdamW; it falls along a cosine."
    )
    activations: Literal["auto", "uint8", "int8"] = options.ACTIVATIONS
    partial: bool = options.PARTIAL


def needs(config: Qat) -> tuple[str, ...]:
    """Return what of the workload is trained on."""
    return ("training",)


def matches(module: "nn.Module") -> list[str]:
    """Return the names of the layers that torchao rounds."""
    from torch import nn

    kinds = (nn.Conv2d, nn.Linear)
    return [name for name, layer in module.named_modules() if isinstance(layer, kinds)]


def apply(config: Qat, module: "nn.Module", context: "Context") -> Path:
    """Train with rounding and return the quantized ONNX file in the step's scratch folder.

    Raises:
        BadModel: torch.export or torchao cannot follow the module, or the loss stopped being finite.
        NoEffect: nothing in the module can be quantized.
        BadGraph: ONNX Runtime answers otherwise than the converted module does.
    """
    from optimize.predict.module import TorchPredictor
    from optimize.predict.onnxruntime import OnnxPredictor

    with graph.quiet():  # it logs which of its GPU libraries cannot be loaded
        from torchao.quantization.pt2e import disable_observer

    from optimize.judge.evaluate import evaluate
    from optimize.source import sample
    from optimize.train import fit as train

    workload, symmetric = context.workload, cpu.signed(config.activations, context.target.device)
    prepared = captured.prepared(module, workload, NAME, symmetric=symmetric)
    if not captured.rounds(prepared):
        raise NoEffect(
            f"{NAME}: nothing in it can be quantized",
            where=type(module).__name__,
            fix=f"it could match: {', '.join(matches(module)) or 'nothing in this model'}",
        )
    objective = train.healing(context)
    train.fit(prepared, context, objective, name=NAME, epochs=config.epochs, learning_rate=config.learning_rate)
    # What is judged from here on may not move the ranges.
    prepared.apply(disable_observer)
    reference = evaluate(TorchPredictor(context.trained, workload.outputs), workload).outputs
    before = evaluate(TorchPredictor(prepared, workload.outputs), workload, reference)
    # Training batches may be drawn anew at every call.
    batches = list(train.as_tensors(sample.batches(workload, "training", LOSS_BATCHES, context.seed)))
    loss_before = _loss(prepared, objective, batches)
    context.progress(f"{NAME}: converting and exporting", 0.0)
    converted = captured.converted(prepared, workload)
    after = evaluate(TorchPredictor(converted, workload.outputs), workload, reference)
    context.progress(
        f"{NAME}: {_score(before)}, loss {loss_before:.4f} with rounding; "
        f"{_score(after)}, loss {_loss(converted, objective, batches):.4f} converted",
        0.0,
    )
    path = captured.to_onnx(converted, workload, context.scratch / "model.onnx")
    # Activations in int8 are for TensorRT: how this CPU would add them is nobody's question.
    with OnnxPredictor(path, integers=not symmetric) as predictor:
        answers = evaluate(predictor, workload, reference).outputs[workload.outputs[0]]
    agreement = _agreement(answers, after.outputs[workload.outputs[0]])
    context.progress(f"{NAME}: ONNX Runtime and the converted module have {agreement}", 1.0)
    return path


def _loss(module: "nn.Module", objective: "Objective", batches: "Sequence[tuple[Tensors, Any]]") -> float:
    """Return the mean of the objective over the batches."""
    import torch

    from optimize.predict.module import call_with

    def answer(**inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            outputs = call_with(module, inputs)
        # A loss is asked for its gradient, which the constants of a converted module do not have.
        return tuple(output.requires_grad_() if output.is_floating_point() else output for output in outputs)

    module.eval()
    return float(np.mean([objective(cast("nn.Module", answer), *batch).item() for batch in batches]))


def _score(quality: "Quality") -> str:
    return f"{quality.scores[0].metric} {quality.scores[0].value:.4f}"


def _agreement(got: Array, wanted: Array) -> str:
    """Say how far ONNX Runtime agrees with the converted module on an output of shape [n, classes] or any other.

    One row may always differ: of fewer than 500, one is more than the share that is allowed.

    Raises:
        BadGraph: neither the largest values of the rows nor the values themselves agree.
    """
    from optimize.judge.evaluate import relative_error

    distance = relative_error(got, wanted)
    said = f"values that differ by {distance:.2%}"
    agrees = distance <= DISTANCE
    # The largest of a row of NaN is its first value.
    if np.isfinite(got).all() and wanted.ndim == 2 and wanted.shape[1] > 1:
        same = got.argmax(1) == wanted.argmax(1)
        said = f"the same largest value in {same.sum()} of {same.size} rows, {said}"
        agrees = agrees or same.size - same.sum() <= max(1, math.floor((1 - AGREEMENT) * same.size))
    if not agrees:
        raise BadGraph(
            f"{NAME}: ONNX Runtime and the converted module have {said}",
            fix="use quantize.static, which quantizes the ONNX file itself",
        )
    return said
