"""Mixed precision: as many layers in INT8 as a budget allows, the sensitive ones in float or with INT8 weights only.

Each layer is quantized alone and judged; in the order of what they lose for what there is to gain, layers leave INT8
until the model keeps the budget (the greedy search of Dong et al., "HAWQ", ICCV 2019, arXiv 1905.03696, with the
workload's own metric in the place of the curvature). The whole assignment is judged at every step of the search, on
samples that do not judge the result: the workload's `selection`, else training samples, else those of calibration.
"""

import bisect
import glob
from collections.abc import Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.graph import graph
from optimize.model.errors import BadGraph, BadRecipe, NoEffect
from optimize.step import options
from serve.repository import scratch

if TYPE_CHECKING:
    from optimize.judge.budget import Budget
    from optimize.judge.effect import Effect, Untreated
    from optimize.judge.evaluate import Quality
    from optimize.step.contract import Context, Method

NAME = "quantize.mixed"
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "LSTM")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Mixed:
    """INT8 for the layers that bear it, chosen by their measured loss."""

    ranges: Literal["static", "dynamic"] = Field(
        default="static", description="Activation ranges of INT8 layers: from calibration data, or from each batch."
    )
    weight_only: bool = Field(
        default=False, description="Give the layers that left INT8 8-bit weights, where the budget still holds."
    )
    max_drop: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="By how much the first score may become worse."
    )
    keep: float | None = Field(
        default=None, gt=0, le=1, description="Share of the first score to keep; 0.99 where neither is given."
    )
    judge_samples: int = Field(
        default=0,
        ge=0,
        description="Samples that the search judges on; 0 for as many as the evaluation set has, 2,048 at most.",
    )
    exclude: tuple[str, ...] = options.EXCLUDED_NODES
    partial: bool = options.PARTIAL


def needs(config: Mixed) -> tuple[str, ...]:
    """Return which data of the workload the ranges are taken from."""
    return ("calibration",) if config.ranges == "static" else ()


def over(config: Mixed) -> tuple[str, ...]:
    """Return the methods that the search applies, by name."""
    return (f"quantize.{config.ranges}", *(("quantize.weight_only",) if config.weight_only else ()))


def matches(subject: Path) -> list[str]:
    """List the nodes with weights that can be quantized."""
    return graph.names_of(graph.quantizable(subject), WEIGHTED)


def apply(config: Mixed, subject: Path, context: "Context") -> Path:
    """Return the cheapest file that keeps the budget, as the greedy search finds it.

    Raises:
        BadRecipe: the budget does not suit the metric.
        NoEffect: the float model breaks the budget by itself, or no quantized one keeps it.
    """
    from optimize.judge import effect as effects
    from optimize.judge import gate
    from optimize.source import splits

    budget = _budget(config, context)
    judging = replace(context, workload=splits.selecting(context.workload, config.judge_samples))
    count = splits.size(judging.workload, "evaluation")
    context.progress(f"{NAME}: judged on {count:,} samples of {splits.source(context.workload)}", 0.0)
    against = effects.untreated(subject, judging)
    gate.check_metric(budget, against.trained.scores[0])
    judge = _Judge(judging, against.trained, budget)
    if not judge.keeps(against.quality, "float"):
        raise NoEffect(
            f"{NAME}: the float model breaks the budget by itself",
            where=context.workload.name,
            fix="allow a larger max_drop, or train the model longer after what was done to it",
        )
    search = _Search(config, subject, judge, against)
    path, floats = search.fewest(_unweighted(config, subject))
    if config.weight_only and floats:
        path, floats = _packed(path, floats, judge, context)
    context.progress(f"{NAME}: stays float: {', '.join(floats) or 'none'}", 1.0)
    return path


@plain
class _Judge:
    """Decides whether a file keeps the budget against the trained model, on the judged samples."""

    context: "Context"
    trained: "Quality"
    budget: "Budget"

    def quality(self, path: Path) -> "Quality":
        from optimize.judge.evaluate import evaluate
        from optimize.predict.runtimes import open_graph

        with open_graph(path, self.context.target) as predictor:
            return evaluate(predictor, self.context.workload, self.trained.outputs)

    def keeps(self, quality: "Quality", what: str) -> bool:
        from optimize.judge import gate
        from optimize.judge.evaluate import compare

        trained, score = self.trained.scores[0], quality.scores[0]
        judged = gate.quality(self.budget, trained, score, compare(self.context.workload, score, trained))
        state = "kept" if judged.passed else "not kept"
        self.context.progress(f"{NAME}: {what}: {score.metric} {score.value:.4f}, wanted {judged.limit}: {state}", 0.0)
        return judged.passed


class _Search:
    """Looks for the fewest layers that have to leave INT8."""

    def __init__(self, config: Mixed, subject: Path, judge: _Judge, against: "Untreated") -> None:
        self._config, self._subject, self._judge, self._against = config, subject, judge, against
        self._files: dict[tuple[str, ...], Path] = {}

    def fewest(self, unweighted: list[str]) -> tuple[Path, list[str]]:
        """Return the file, and the layers that it leaves float.

        What has no weights leaves INT8 only where no layer with weights can stay in it otherwise.
        """
        if self._holds(()):
            return self._files[()], []
        ranking = _ranking(self._config, self._subject, self._against, self._judge.context)
        for others in ([], unweighted) if unweighted else ([],):
            # The loss falls as layers leave INT8, so the fewest are found by halving.
            tried = [(*others, *ranking[:count]) for count in range(0 if others else 1, len(ranking))]
            place = bisect.bisect_left(tried, True, key=self._holds)
            if place < len(tried):
                return self._files[tried[place]], list(tried[place])
        raise NoEffect(
            f"{NAME}: no assignment with a layer in INT8 keeps the budget",
            where=self._judge.context.workload.name,
            fix="allow a larger max_drop, use quantize.weight_only, or train with quantize.qat",
        )

    def _holds(self, floats: tuple[str, ...]) -> bool:
        from optimize.judge import effect as effects

        exclude = (*self._config.exclude, *(glob.escape(name) for name in floats))
        folder = self._judge.context.scratch / f"{len(self._files)}-float"
        folder.mkdir()
        try:
            context = self._judge.context
            path = effects.treat(*_int8(self._config, exclude, context), self._subject, folder, context)
        except BadGraph as failure:
            self._judge.context.progress(f"{NAME}: {failure.what}", 0.0)
            return False
        self._files[floats] = path
        what = f"all but {len(floats)} nodes in INT8" if floats else "every layer in INT8"
        return self._judge.keeps(self._judge.quality(path), what)


def _unweighted(config: Mixed, subject: Path) -> list[str]:
    """Return the nodes without weights, which INT8 with ranges of calibration data takes too."""
    layers = matches(subject)
    names = (str(node.name) for node in graph.load(subject).graph if node.name)
    return [name for name in names if name not in layers] if config.ranges == "static" else []


def _budget(config: Mixed, context: "Context") -> "Budget":
    from optimize.judge import gate
    from optimize.judge.budget import Budget

    if config.keep is not None and config.max_drop is not None:
        raise BadRecipe("keep and max_drop are both given", where=NAME, fix="keep one of them")
    budget = Budget(keep=config.keep, max_drop=config.max_drop)
    gate.check_budget(budget, context.workload)
    return budget


def _int8(config: Mixed, exclude: tuple[str, ...], context: "Context") -> tuple["Method", Any]:
    """Return the method that quantizes and its config, from the context: methods do not know each other."""
    kind, method = context.methods[f"quantize.{config.ranges}"]
    return method, kind(exclude=exclude)


def _packed(path: Path, floats: Sequence[str], judge: _Judge, context: "Context") -> tuple[Path, list[str]]:
    """Give the float layers 8-bit weights, the least sensitive first; return the file and the layers left float."""
    from optimize.judge import effect as effects

    kind, method = context.methods["quantize.weight_only"]
    found, packed = path, list[str]()
    for name in reversed(floats):
        folder = context.scratch / f"{len(packed)}-packed-{floats.index(name)}"
        folder.mkdir()
        weights = kind(exclude=effects.others(path, [*packed, name]))
        try:
            tried = effects.treat(method, weights, path, folder, judge.context)
        except NoEffect:
            continue  # it knows no convolutions
        if judge.keeps(judge.quality(tried), f"{name} with 8-bit weights"):
            found, packed = tried, [*packed, name]
    return found, [name for name in floats if name not in packed]


def _ranking(config: Mixed, subject: Path, against: "Untreated", context: "Context") -> list[str]:
    """Return the layers by what each loses alone in INT8 for what there is to gain there, the worst first.

    Those that cannot be quantized come before all others.
    """
    from optimize.judge import effect as effects

    excluded = graph.excluded(graph.quantizable(subject), config.exclude)
    names = [name for name in matches(subject) if name not in excluded]
    gain = effects.gains(subject, names, context.workload.inputs)
    judged = []
    refused = list[str]()
    for number, name in enumerate(names, 1):
        with scratch.folder() as folder:
            method, only = _int8(config, effects.others(subject, [name]), context)
            try:
                path = effects.treat(method, only, subject, folder, context)
            except NoEffect:
                continue  # it stays float anyway
            except BadGraph:
                refused.append(name)
                continue
            effect = effects.effect(name, NAME, path, against, context)
        judged.append(effect)
        context.progress(
            f"{NAME}: {name} alone in INT8 loses {effect.loss:+.4f} of {effect.metric}, changes outputs by "
            f"{effect.error:.2%}, holds {gain[name] / 2:.1%} of what there is to gain",
            number / len(names),
        )

    def price(effect: "Effect") -> tuple[float, float]:
        # Where a metric of whole samples sees no loss, the change of the outputs decides.
        return max(effect.loss, 0.0) / gain[effect.name], effect.error / gain[effect.name]

    return [*refused, *(effect.name for effect in sorted(judged, key=price, reverse=True))]
