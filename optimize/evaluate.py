"""Quality: scores per sample, compared pairwise, with 95 % confidence intervals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.tensors import Array, Arrays
from optimize.errors import BadData, BadModel, BadWorkload
from optimize.predict import Predictor, cut
from optimize.workload import Workload, concatenate, guarded

RESAMPLES = 2000
LEVEL = 95.0


@dataclass(frozen=True)
class Score:
    """One score over the evaluation set.

    Args:
        metric: its name in the workload.
        samples: float64 [n], one value for each judged sample.
        value: the figure: the workload's aggregate of `samples`.
        low, high: the bootstrap percentile interval of `value` over samples, 95 %.
    """

    metric: str
    samples: Array
    value: float
    low: float
    high: float

    def document(self) -> dict[str, Any]:
        """Return the JSON form; `samples` becomes their number."""
        return {
            "metric": self.metric,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "samples": len(self.samples),
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
        value: the difference of the two figures; negative where the first is worse (for scores where more is better).
        low, high: paired bootstrap interval, 95 %.
        flipped: indices of the samples whose score differs.
    """

    value: float
    low: float
    high: float
    flipped: tuple[int, ...]


def collect(predictor: Predictor, workload: Workload, largest: int | None = None) -> tuple[Arrays, Any]:
    """Run the whole evaluation set through `predictor` and return its outputs and the targets, both concatenated.

    Args:
        predictor: what answers.
        workload: its evaluation batches are sent one after the other.
        largest: cut the batches to this many samples, for a server that takes no more.

    Raises:
        BadModel: an output is missing, has the wrong number of rows, or is not finite.
    """
    outputs, targets = [], []
    for number, batch in enumerate(workload.batches("evaluation")):
        targets.append(batch.targets)
        for inputs in cut(batch.inputs, largest):
            answer = predictor.predict(inputs)
            size = len(next(iter(inputs.values())))
            _check_outputs(answer, workload, size, f"{predictor.name}, evaluation batch {number}")
            outputs.append({name: answer[name] for name in workload.outputs})
    return concatenate(outputs, "output"), concatenate(targets, "targets")


def judge(workload: Workload, outputs: Arrays, targets: Any, reference: Arrays) -> Quality:
    """Score `outputs` with the workload's own metric.

    Raises:
        BadWorkload: the scores are not a mapping of finite one-dimensional arrays.
    """
    returned = guarded(lambda: workload.scores(outputs, targets, reference), "scores()", workload.source)
    if not isinstance(returned, Mapping) or not returned:
        raise BadWorkload(
            f"scores() must return a mapping of arrays, it returned {type(returned).__name__}",
            where=workload.source or workload.name,
            fix="return one array for each score, the gated metric first",
        )
    scores = guarded(
        lambda: {name: np.asarray(values) for name, values in returned.items()}, "scores()", workload.source
    )
    return Quality(tuple(_score(workload, name, samples) for name, samples in scores.items()), outputs)


def evaluate(
    predictor: Predictor, workload: Workload, reference: Arrays | None = None, largest: int | None = None
) -> Quality:
    """Return the quality of `predictor`; `reference` is the trained model's outputs, its own when None."""
    outputs, targets = collect(predictor, workload, largest)
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
    pairs = np.stack([first.samples, second.samples])
    differences = bootstrap(pairs, lambda sample: workload.aggregate(sample[0]) - workload.aggregate(sample[1]))
    low, high = np.percentile(differences, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    flipped = np.flatnonzero(first.samples != second.samples)
    return Difference(first.value - second.value, float(low), float(high), tuple(int(index) for index in flipped))


def relative_error(got: Array, wanted: Array) -> float:
    """Return the root mean square of the difference over that of `wanted`; the arrays have one shape."""
    difference, size = np.linalg.norm(got - wanted), np.linalg.norm(wanted)
    return float(difference) / max(float(size), 1e-12)


def bootstrap(pairs: Array, statistic: Callable[[Array], float], seed: int = 0) -> Array:
    """Return `statistic` over resamples of the last axis of `pairs` (Efron, "Bootstrap Methods", 1979)."""
    rng = np.random.default_rng(seed)
    size = pairs.shape[-1]
    return np.array([statistic(pairs[..., rng.integers(0, size, size)]) for _ in range(RESAMPLES)])


def _score(workload: Workload, name: str, samples: Array) -> Score:
    where = workload.source or workload.name
    if samples.dtype.kind not in "biuf" or samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise BadWorkload(
            f"scores() gave {name!r} the shape {samples.shape} and dtype {samples.dtype}"
            + (", with NaN or nothing in it" if samples.ndim == 1 else ""),
            where=where,
            fix="return one finite number for each sample",
        )
    samples = samples.astype(np.float64)
    value, resampled = guarded(
        lambda: (float(workload.aggregate(samples)), bootstrap(samples, workload.aggregate)), "aggregate()", where
    )
    if not np.isfinite([value, *resampled]).all():
        raise BadWorkload(f"aggregate() of {name!r} is not finite", where=where, fix="return one finite number")
    low, high = np.percentile(resampled, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Score(name, samples, value, float(low), float(high))


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
