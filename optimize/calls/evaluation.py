"""`optimize.evaluate` and `optimize.compare`, which the commands of these names call too."""

import os
from typing import Literal

from modelathe.commandline import document, reporting
from modelathe.errors import UsageError
from modelathe.tensors import Arrays
from optimize.calls.results import Comparison, Evaluation, Figure, RunResult
from optimize.judge import evaluate as evaluation
from optimize.judge.evaluate import Quality
from optimize.predict.endpoint import EndpointPredictor
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.predict.predictor import Predictor
from optimize.predict.runtimes import RUNTIMES
from optimize.runs import open as sources
from optimize.runs.baseline import counting
from optimize.source.workload import Workload
from optimize.step.bundle import Bundle

Kind = Literal["torch", "onnx", "openvino"]
Source = RunResult | Workload | str | os.PathLike[str]


def evaluate(
    source: Source,
    *,
    workload: Workload | None = None,
    predictor: Kind | None = None,
    endpoint: str | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Judge a model with its workload's own scores.

    Args:
        source: a bundle's folder, a workload as for `optimize.run`, or a result of `optimize.run`.
        workload: of a bundle whose workload has no file, the Workload that it was made from.
        predictor: which form of a bundle to judge; openvino is its ONNX file in OpenVINO. Its ONNX file in the runtime
            that it was made for unless given, torch where there is none.
        endpoint: judge a served model: `grpc://HOST:PORT/MODEL[/VERSION]`, or `http://…`.
        quiet: say nothing while it goes on.

    Raises:
        UsageError: both a form and an endpoint, or the ONNX form of a model that was not exported.
        BadInput: what is wrong with bundle, workload, model or data.
    """
    with reporting(quiet) as progress:
        bundle = _opened(source, workload)
        progress("evaluating the trained model", 0.0)
        reference = _reference(bundle.workload)
        with _choose(bundle, predictor, endpoint) as chosen:
            told = counting(progress, f"evaluating {chosen.name}", "samples", _count(reference))
            quality = evaluation.evaluate(chosen, bundle.workload, reference, told=told)
    found = document(predictor=chosen.name, source=endpoint or _name(source), **quality.document())
    first, *others = map(Figure.of, (found["quality"], *found["also"]))
    return Evaluation(document=found, predictor=chosen.name, quality=first, also=tuple(others))


def compare(first: Source, second: Source, *, workload: Workload | None = None, quiet: bool = False) -> Comparison:
    """Compare the second model with the first, sample by sample, with the first one's workload.

    Args:
        first: as `source` of `optimize.evaluate`, and so is `second`.
        second: the one that may be worse or better.
        workload: the bundles' own; of one whose workload has no file, that of the other model unless given.
        quiet: say nothing while it goes on.

    Raises:
        BadInput: what is wrong with bundle, workload, model or data.
    """
    known = next(filter(None, map(_known, (first, second))), None)
    with reporting(quiet) as progress:
        bundles = [_opened(source, workload, known) for source in (first, second)]
        judged = bundles[0].workload
        progress("evaluating the trained model", 0.0)
        reference = _reference(judged)
        qualities: list[Quality] = []
        for source, bundle in zip((first, second), bundles, strict=True):
            told = counting(progress, f"evaluating {_name(source)}", "samples", _count(reference))
            with _choose(bundle, None, None) as predictor:
                qualities.append(evaluation.evaluate(predictor, judged, reference, told=told))
    one, other = (quality.scores[0] for quality in qualities)
    difference = evaluation.compare(judged, other, one)
    found = document(
        first=one.document(),
        second=other.document(),
        difference=difference.value,
        low=difference.low,
        high=difference.high,
        verdict=difference.verdict,
        flipped=list(difference.flipped),
        worsened=list(difference.worsened),
    )
    return Comparison(
        document=found,
        first=Figure.of(found["first"]),
        second=Figure.of(found["second"]),
        difference=difference.value,
        low=difference.low,
        high=difference.high,
        verdict=difference.verdict,
        flipped=difference.flipped,
    )


def _known(source: Source) -> Workload | None:
    """Return the workload that a source brings as an object."""
    if isinstance(source, RunResult):
        return source.workload
    return source if isinstance(source, Workload) else None


def _opened(source: Source, workload: Workload | None, unnamed: Workload | None = None) -> Bundle:
    if isinstance(source, RunResult):
        return sources.load(source.bundle, workload or source.workload)
    return sources.load(source, workload, unnamed=unnamed)


def _name(source: Source) -> str:
    if isinstance(source, Workload):
        return source.source or source.name
    return str(source.bundle) if isinstance(source, RunResult) else os.fspath(source)


def _reference(workload: Workload) -> Arrays:
    """Return the trained model's outputs for the evaluation set."""
    with TorchPredictor(workload.build(), workload.outputs) as trained:
        return evaluation.collect(trained, workload)[0]


def _count(reference: Arrays) -> int:
    return len(next(iter(reference.values())))


def _choose(bundle: Bundle, kind: Kind | None, endpoint: str | None) -> Predictor:
    """Return the predictor that is asked for; else what the bundle was made for."""
    if endpoint and kind:
        raise UsageError("--predictor and --endpoint exclude each other", fix="give one of them")
    if endpoint:
        return EndpointPredictor(endpoint)
    if bundle.graph and kind != "torch":
        return {**RUNTIMES, "onnx": OnnxPredictor}[kind or bundle.runtime](bundle.graph)
    if kind in ("onnx", "openvino"):
        raise UsageError("there is no ONNX file in it", fix="run optimize export first, and evaluate its bundle")
    return TorchPredictor(bundle.module, bundle.workload.outputs)
