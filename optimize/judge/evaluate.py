"""Quality: scores per sample, compared pairwise, with 95 % confidence intervals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelathe.tensors import Array, Arrays
from optimize.judge import intervals
from optimize.judge.intervals import At
from optimize.model.errors import BadData, BadModel, BadWorkload
from optimize.predict.predictor import Predictor, cut
from optimize.source.batch import concatenate, guarded
from optimize.source.workload import Workload

Told = Callable[[int], None]
"""Takes how many samples of the evaluation set are done."""
ROUNDING = 1e-6
"""How far beyond [0, 1] rounding may bring the figure of a score that lies there."""


def _unheard(_done: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Score:
    """One score over the evaluation set.

    Args:
        metric: its name in the workload.
        samples: float64 [n], one value for each judged sample.
        value: the figure: the workload's aggregate of `samples`.
        low, high: the 95 % interval of `value` over samples.
        higher_is_better: whether more of it is better; False for a loss.
        bounded: whether the workload says that `value` lies in [0, 1].
    """

    metric: str
    samples: Array
    value: float
    low: float
    high: float
    higher_is_better: bool
    bounded: bool

    def document(self) -> dict[str, Any]:
        """Return the JSON form; `samples` becomes their number."""
        return {
            "metric": self.metric,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "samples": len(self.samples),
            "higher_is_better": self.higher_is_better,
        }


@dataclass(frozen=True)
class Quality:
    """The scores of one predictor: the gated one first, the others after it, and the outputs they were taken from."""

    scores: tuple[Score, ...]
    outputs: Arrays

    def document(self) -> dict[str, Any]:
        """Return `{quality, also}` as every JSON document of ours holds it."""
        first, *others = [score.document() for score in self.scores]
        return {"quality": first, "also": others}


@dataclass(frozen=True)
class Difference:
    """A metric of one predictor minus the same metric of another, on the same samples in pairs.

    Args:
        value: the difference of the two figures.
        low, high: its 95 % interval.
        flipped: indices of the samples whose score differs.
        worsened: those of them whose score is worse in the first predictor.
        higher_is_better: as the score says; where it is False, a positive difference is worse.
        at: gives the interval of another number of samples that differ as often and as much as these.
    """

    value: float
    low: float
    high: float
    flipped: tuple[int, ...]
    worsened: tuple[int, ...]
    higher_is_better: bool
    at: At = field(repr=False, compare=False)

    @property
    def loss(self) -> tuple[float, float, float]:
        """How much worse the first predictor is, positive is worse: the value, and the low and high end."""
        return (-self.value if self.higher_is_better else self.value, *self._lost(self.low, self.high))

    def loss_at(self, samples: float) -> tuple[float, float]:
        """Return the interval of the loss that so many samples would have."""
        return self._lost(*self.at(samples))

    def _lost(self, low: float, high: float) -> tuple[float, float]:
        return (-high, -low) if self.higher_is_better else (low, high)

    @property
    def verdict(self) -> str:
        """`worse` or `better` where the whole interval is, else `undecided`."""
        _, low, high = self.loss
        return "worse" if low > 0 else "better" if high < 0 else "undecided"


def collect(
    predictor: Predictor, workload: Workload, largest: int | None = None, told: Told = _unheard
) -> tuple[Arrays, Any]:
    """Run the whole evaluation set through `predictor` and return its outputs and the targets, both concatenated.

    Args:
        predictor: what answers.
        workload: its evaluation batches are sent one after the other.
        largest: cut the batches to this many samples, for a server that takes no more.
        told: how many samples are done.

    Raises:
        BadModel: an output is missing, has the wrong number of rows, or is not finite.
    """
    outputs, targets, done = [], [], 0
    for number, batch in enumerate(workload.batches("evaluation")):
        targets.append(batch.targets)
        for inputs in cut(batch.inputs, largest):
            answer = predictor.predict(inputs)
            size = len(next(iter(inputs.values())))
            _check_outputs(answer, workload, size, f"{predictor.name}, evaluation batch {number}")
            outputs.append({name: answer[name] for name in workload.outputs})
        told(done := done + batch.size)
    return concatenate(outputs, "output"), concatenate(targets, "targets")


def judge(workload: Workload, outputs: Arrays, targets: Any, reference: Arrays) -> Quality:
    """Score `outputs` with the workload's own metric.

    Raises:
        BadWorkload: the scores are not a mapping of finite one-dimensional arrays, or the workload does not say which
            direction of one is better.
    """
    given = {"outputs": outputs, "targets": targets, "reference": reference}
    returned = guarded(lambda: workload.scores(outputs, targets, reference), "scores()", workload.source, given)
    if not isinstance(returned, Mapping) or not returned:
        raise BadWorkload(
            f"scores() must return a mapping of arrays, it returned {type(returned).__name__}",
            where=workload.source or workload.name,
            fix="return one array for each score, the gated metric first",
        )
    scores = guarded(
        lambda: {name: np.asarray(values) for name, values in returned.items()}, "scores()", workload.source
    )
    if unknown := sorted(set(workload.higher_is_better) - set(scores)):
        raise BadWorkload(
            f"higher_is_better names {', '.join(map(repr, unknown))}, scores() returns {', '.join(map(repr, scores))}",
            where=workload.source or workload.name,
            fix="name the scores as scores() does",
        )
    found = [_score(workload, name, samples, not number) for number, (name, samples) in enumerate(scores.items())]
    return Quality(tuple(found), outputs)


def evaluate(
    predictor: Predictor,
    workload: Workload,
    reference: Arrays | None = None,
    largest: int | None = None,
    told: Told = _unheard,
) -> Quality:
    """Return the quality of `predictor`; `reference` is the trained model's outputs, its own when None."""
    outputs, targets = collect(predictor, workload, largest, told)
    return judge(workload, outputs, targets, outputs if reference is None else reference)


def compare(workload: Workload, first: Score, second: Score) -> Difference:
    """Return `first` minus `second`, paired by sample.

    Raises:
        BadData: the two were taken over different numbers of samples.
    """
    if len(first.samples) != len(second.samples):
        raise BadData(
            f"{len(first.samples)} and {len(second.samples)} samples cannot be paired",
            where=first.metric,
            fix="let scores() judge the same samples at every call",
        )
    where = workload.source or workload.name
    at = guarded(
        lambda: intervals.of_difference(first.samples, second.samples, workload.aggregate, first.bounded),
        "aggregate()",
        where,
    )
    low, high = at(len(first.samples))
    worse = first.samples < second.samples if first.higher_is_better else first.samples > second.samples
    return Difference(
        first.value - second.value,
        low,
        high,
        _indices(first.samples != second.samples),
        _indices(worse),
        first.higher_is_better,
        at,
    )


def _indices(mask: Array) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())


def relative_error(got: Array, wanted: Array) -> float:
    """Return the root mean square of the difference over that of `wanted`; the arrays have one shape."""
    difference, size = np.linalg.norm(got - wanted), np.linalg.norm(wanted)
    return float(difference) / max(float(size), 1e-12)


def _score(workload: Workload, name: str, samples: Array, gated: bool) -> Score:
    where = workload.source or workload.name
    if samples.dtype.kind not in "biuf" or samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise BadWorkload(
            f"scores() gave {name!r} the shape {samples.shape} and dtype {samples.dtype}"
            + (", with NaN or nothing in it" if samples.ndim == 1 else ""),
            where=where,
            fix="return one finite number for each sample",
        )
    samples = samples.astype(np.float64)
    stated = workload.higher_is_better.get(name)
    bounded = workload.bounded and (gated or stated is None)
    value, (low, high) = guarded(
        lambda: (float(workload.aggregate(samples)), intervals.of_score(samples, workload.aggregate, bounded)),
        "aggregate()",
        where,
    )
    if not np.isfinite([value, low, high]).all():
        raise BadWorkload(f"aggregate() of {name!r} is not finite", where=where, fix="return one finite number")
    _check_direction(name, value, stated, bounded, where)
    return Score(name, samples, value, low, high, stated is not False, bounded)


def _check_direction(name: str, value: float, stated: bool | None, bounded: bool, where: str) -> None:
    line = f'higher_is_better={{"{name}": …}}'
    if stated is None and not bounded:
        raise BadWorkload(
            f"the workload does not say whether more or less of {name!r} is better",
            where=where,
            fix=f"give the Workload {line}, True for a score such as accuracy, False for a loss",
        )
    if bounded and not -ROUNDING <= value <= 1 + ROUNDING:
        raise BadWorkload(
            f"the workload says bounded=True, but {name!r} is {value:g}, not in [0, 1]",
            where=where,
            fix=f"give the Workload {line}, and leave bounded=True out unless its first score lies in [0, 1]",
        )


def _check_outputs(answer: Arrays, workload: Workload, size: int, where: str) -> None:
    for name in workload.outputs:
        if name not in answer:
            fix = "name the outputs that the workload declares"
            raise BadModel(f"has no output {name!r}; it has {', '.join(answer)}", where=where, fix=fix)
        if answer[name].ndim == 0 or len(answer[name]) != size:
            raise BadModel(
                f"output {name!r} has the shape {answer[name].shape} for {size} samples",
                where=where,
                fix="return one row for each sample",
            )
        if answer[name].dtype.kind == "f" and not np.isfinite(answer[name]).all():
            raise BadModel(
                f"output {name!r} has NaN or infinite values",
                where=where,
                fix="look for NaN in the model's weights, and for a division or a logarithm of 0 in its forward",
            )
