"""Splits: the sets of a workload, told apart by their samples, so that nothing is judged on what it was made from.

A sample is known by the bytes of its inputs. Padding at the end of a free dimension does not count: it depends on the
other samples of a batch.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from modelathe.tensors import Array, Arrays, Dim, TensorSpec
from optimize.model.errors import BadData, BadWorkload
from optimize.model.randomness import Stream
from optimize.source import sample
from optimize.source.batch import DATA, Batch, concatenate
from optimize.source.workload import Workload

SELECTED = 2048
"""Samples that a search judges on at most, unless it is told otherwise; they are held in memory."""
ENOUGH = 100
"""Fewer samples than these judge nothing: then those that calibrate are taken too, or nothing is judged."""
SELECTION = "give Workload a selection function: batches like evaluation's, of other samples"
TOGETHER = 32
"""Samples in a batch of these."""
OTHERS = tuple(kind for kind in DATA if kind != "evaluation")


@dataclass(frozen=True)
class Sets:
    """What one reading of a workload's sets has shown.

    Args:
        digests: of each set that the workload has: of its samples and their targets, whatever their order.
        overlap: how many evaluation samples stand in another set too, by that set; empty where none does.
        samples: how many each set has.
        ranges: the least and the largest value of each input in the evaluation set.
    """

    digests: Mapping[str, str]
    overlap: Mapping[str, int]
    samples: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def judging(self) -> int:
        """How many evaluation samples there are; 0 where nobody has counted."""
        return self.samples.get("evaluation", 0)


def read(
    workload: Workload, progress: Callable[[str, float], None] = lambda *_: None, *, allow_overlap: bool = False
) -> Sets:
    """Read every set once, the evaluation set twice, and compare their samples.

    Args:
        workload: each of its sets is read up to its first million samples.
        progress: told which set is read.
        allow_overlap: return an overlap instead of refusing it.

    Raises:
        BadData: an evaluation sample stands in another set, or `evaluation()` changes from call to call.
    """
    digests: dict[str, str] = {}
    overlap: dict[str, int] = {}
    samples: dict[str, int] = {}
    ranges: dict[str, tuple[float, float]] = {}
    progress("reading the evaluation data", 0.0)
    judging, whole = _read(workload, "evaluation", seed=0, ranges=ranges)
    if _read(workload, "evaluation", seed=1)[1] != whole:
        raise BadData(
            "evaluation() returns other samples, or another order, at the second call",
            where=workload.source or workload.name,
            fix="leave its shuffling out or seed it anew in every call: scores are compared sample by sample",
        )
    digests["evaluation"], samples["evaluation"] = _together(whole), len(whole)
    for kind in OTHERS:
        if getattr(workload, kind) is not None:
            progress(f"reading the {kind} data", 0.0)
            known, whole = _read(workload, kind, seed=0)
            digests[kind], samples[kind] = _together(sorted(whole)), len(whole)
            if both := len(known & judging):
                overlap[kind] = both
    if overlap and not allow_overlap:
        found = ", ".join(f"{count} also stand in {kind}" for kind, count in overlap.items())
        raise BadData(
            f"of {len(judging)} different evaluation samples {found}",
            where=workload.source or workload.name,
            fix="judge on samples that nothing else has seen; or pass --allow-overlap, which the result's lineage and "
            "page will say",
        )
    return Sets(digests, overlap, samples, ranges)


def stated(workload: Workload, sets: Sets) -> Workload:
    """Return the workload whose inputs state a range for generated values: their own, else that of the evaluation data.

    A category of a thousand is else asked for by 0 and 1 alone, in load tests, warm-up and checks.
    """
    told = list(workload.inferred)
    inputs = []
    for spec in workload.inputs:
        found = sets.ranges.get(spec.name)
        if spec.values is None and found is not None:
            spec = replace(spec, values=found)
            told.append(f"generated values of {spec.name}: {found[0]:g} to {found[1]:g}, as in the evaluation data")
        inputs.append(spec)
    return replace(workload, inputs=tuple(inputs), inferred=tuple(told))


def source(workload: Workload) -> str | None:
    """Return the set that a search inside a step judges on: the first of these whose targets the scores can take.

    `selection` where the workload has it, else `training`, else `calibration`; None when none is like the evaluation
    set.
    """
    kinds = [kind for kind in ("selection", "training", "calibration") if getattr(workload, kind) is not None]
    with Stream(0).drawn():
        wanted = _kind(next(workload.batches("evaluation")))
        return next((kind for kind in kinds if _kind(next(workload.batches(kind))) == wanted), None)


def selecting(workload: Workload, samples: int = 0) -> Workload:
    """Return the workload with the samples of its `source` as its evaluation set: for a search inside a step.

    They are the same ones in every call, however the set is shuffled. What calibrates is left out while enough others
    remain: as many as are asked for, or 100.

    Args:
        workload: has a `source`.
        samples: how many; 0 for as many as the evaluation set has, 2,048 at most.

    Raises:
        BadWorkload: there is no source, or it has fewer different samples than are asked for, and fewer than 100.
    """
    kind = source(workload)
    if kind is None:
        raise BadWorkload(
            "there are no samples to choose on: neither training nor calibration has targets as evaluation has",
            where=workload.source or workload.name,
            fix=SELECTION,
        )
    count = samples or min(SELECTED, size(workload, "evaluation"))
    known: set[bytes] = set()
    if kind == "training" and workload.calibration is not None:
        known = _read(workload, "calibration", seed=0)[0]
    rows = _chosen(workload, kind, count, known)
    enough = min(count, ENOUGH)
    if known and len(rows) < enough:
        rows = _chosen(workload, kind, count, set())
    if len(rows) < enough:
        raise BadWorkload(
            f"{kind} has {len(rows)} different samples to choose on, at least {enough} are needed",
            where=workload.source or workload.name,
            fix=SELECTION,
        )
    batches = list(_batches(rows))
    return replace(workload, evaluation=lambda: batches)


def size(workload: Workload, kind: str) -> int:
    """Return how many samples a set has."""
    return sum(batch.size for batch in workload.batches(kind))


def digests(batch: Batch, inputs: Sequence[TensorSpec]) -> list[bytes]:
    """Return the digest of each sample's inputs."""
    return [_digest(one) for one in _samples(batch, inputs)]


def _samples(batch: Batch, inputs: Sequence[TensorSpec]) -> Iterator[Arrays]:
    """Yield the inputs of each sample without the padding of its batch."""
    free = _free(inputs)
    for row in range(batch.size):
        one = {name: array[row] for name, array in batch.inputs.items()}
        yield _without_padding(one, free) if free else one


def _read(
    workload: Workload, kind: str, seed: int, ranges: dict[str, tuple[float, float]] | None = None
) -> tuple[set[bytes], list[bytes]]:
    """Return the digests of a set: of the inputs, each once and without blank ones; of each sample with its targets.

    A blank sample says nothing, so that another one of its kind in another set is no overlap. The least and the largest
    value of each input are put into `ranges`.
    """
    samples: set[bytes] = set()
    whole: list[bytes] = []
    with Stream(seed).drawn():
        for batch in sample.reached(workload, kind):
            if ranges is not None:
                _widen(ranges, batch)
            for row, one in enumerate(_samples(batch, workload.inputs)):
                digest = _digest(one)
                whole.append(_with_targets(digest, batch, row))
                if not _blank(one):
                    samples.add(digest)
    return samples, whole


def _widen(ranges: dict[str, tuple[float, float]], batch: Batch) -> None:
    for name, array in batch.inputs.items():
        if array.dtype.kind in "iuf" and array.size:
            low, high = ranges.get(name, (np.inf, -np.inf))
            kind = float if array.dtype.kind == "f" else int
            ranges[name] = min(low, kind(array.min())), max(high, kind(array.max()))


def _together(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _free(inputs: Sequence[TensorSpec]) -> dict[str, list[tuple[str, int]]]:
    """Return the inputs that have each free dimension, and at which axis of one sample."""
    found: dict[str, list[tuple[str, int]]] = {}
    for spec in inputs:
        for axis, dim in enumerate(spec.own):
            if isinstance(dim, Dim):
                found.setdefault(dim.name, []).append((spec.name, axis))
    return found


def _blank(one: Arrays) -> bool:
    """Return whether a sample is all padding, or each input of it the same number everywhere."""
    return all(not array.size or (array.size > 1 and bool((array == array.flat[0]).all())) for array in one.values())


def _digest(one: Arrays) -> bytes:
    data = hashlib.blake2b(digest_size=16)
    for name in sorted(one):
        data.update(name.encode())
        _update(data, one[name])
    return data.digest()


def _update(data: "hashlib.blake2b", value: Any) -> None:
    array = np.ascontiguousarray(value)
    data.update(str((array.dtype, array.shape)).encode())
    data.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())


def _without_padding(one: Arrays, free: Mapping[str, list[tuple[str, int]]]) -> Arrays:
    """Return the sample without what a mask of its leaves out, or without the zeros at the end of all its inputs."""
    cut = dict(one)
    for found in free.values():
        masks = [(name, axis) for name, axis in found if name.endswith("mask")]
        used = np.stack([_used(one[name], axis) for name, axis in masks or found]).any(axis=0)
        kept = np.flatnonzero(used) if masks else np.arange(max(np.flatnonzero(used), default=-1) + 1)
        for name, axis in found:
            cut[name] = np.take(cut[name], kept, axis)
    return cut


def _used(array: Array, axis: int) -> Array:
    """Return at which places of the axis anything is not zero."""
    return np.asarray(array.astype(bool).any(axis=tuple(other for other in range(array.ndim) if other != axis)))


def _with_targets(digest: bytes, batch: Batch, row: int) -> bytes:
    data = hashlib.blake2b(digest, digest_size=16)
    for name, value in sorted(_named(batch.targets).items()):
        data.update(name.encode())
        rows = isinstance(value, np.ndarray) and value.ndim and len(value) == batch.size
        _update(data, value[row] if rows else value)
    return data.digest()


def _named(targets: Any) -> dict[str, Any]:
    if targets is None:
        return {}
    return {str(name): value for name, value in targets.items()} if isinstance(targets, Mapping) else {"": targets}


def _kind(batch: Batch) -> Any:
    """Return what the targets of a batch look like, so that two sets can be compared."""
    return {
        name: (value.dtype.kind, value.ndim) if isinstance(value, np.ndarray) and len(value) == batch.size else None
        for name, value in _named(batch.targets).items()
    }


@dataclass(frozen=True)
class _Row:
    digest: bytes
    batch: Batch

    @property
    def order(self) -> tuple[Any, bytes]:
        """By shape, so that neighbours fit into one batch, and then by digest, which no shuffling changes."""
        return sorted((name, array.shape) for name, array in self.batch.inputs.items()), self.digest


def _chosen(workload: Workload, kind: str, count: int, without: set[bytes]) -> list[_Row]:
    """Return the `count` samples with the smallest digests: chosen as if by lot, and the same ones every time."""
    found: dict[bytes, _Row] = {}
    with Stream(0).drawn():
        for batch in sample.reached(workload, kind):
            for row, digest in enumerate(digests(batch, workload.inputs)):
                if digest not in without and digest not in found:
                    found[digest] = _Row(digest, sample.taken(batch, [row]))
            if len(found) > 4 * count:
                found = {digest: found[digest] for digest in sorted(found)[:count]}
    return sorted((found[digest] for digest in sorted(found)[:count]), key=lambda row: row.order)


def _batches(rows: list[_Row]) -> Iterator[Batch]:
    for _, group in itertools.groupby(rows, key=lambda row: row.order[0]):
        alike = list(group)
        for start in range(0, len(alike), TOGETHER):
            part = alike[start : start + TOGETHER]
            inputs = concatenate([row.batch.inputs for row in part], "inputs")
            yield Batch(inputs, concatenate([row.batch.targets for row in part], "targets"))
