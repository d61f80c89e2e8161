"""Sample: some batches or rows of a workload's data, drawn at random from all of it.

The first ones need not be like the others: texts often come in the order of their length, images in that of their
class. Data is read twice, once to be counted, so that no more is held in memory than one batch.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from optimize.source.batch import Batch
from optimize.source.workload import Workload

MOST = 1_000_000
"""Samples of a set that are looked at; a set may be endless."""
REACH = 100
"""Of a set without an end so many times as many batches as are asked for are looked at."""


def reached(workload: Workload, kind: str) -> Iterator[Batch]:
    """Yield the batches of `kind` until they hold `MOST` samples."""
    seen = 0
    for batch in workload.batches(kind):
        yield batch
        seen += batch.size
        if seen >= MOST:
            return


def batches(workload: Workload, kind: str, count: int, seed: int = 0) -> Iterator[Batch]:
    """Yield `count` whole batches of `kind` in their order, or all where there are no more."""
    reach = count * REACH
    present = sum(1 for _ in islice(workload.batches(kind), reach))
    chosen = set(_drawn(present, count, seed))
    yield from (batch for number, batch in enumerate(islice(workload.batches(kind), reach)) if number in chosen)


def rows(workload: Workload, kind: str, count: int, seed: int = 0) -> Iterator[Batch]:
    """Yield `count` samples of `kind` in their order, or all where there are no more, in what is left of each batch.

    They are drawn from the first `MOST` samples.
    """
    present = sum(batch.size for batch in reached(workload, kind))
    chosen, start = np.array(_drawn(present, count, seed), np.int64), 0
    for batch in reached(workload, kind):
        own = chosen[(chosen >= start) & (chosen < start + batch.size)] - start
        start += batch.size
        if len(own):
            yield taken(batch, own)


def taken(batch: Batch, rows: Any) -> Batch:
    """Return some rows of a batch, by their indices."""
    return Batch({name: array[rows] for name, array in batch.inputs.items()}, _taken(batch.targets, rows))


def _drawn(present: int, count: int, seed: int) -> list[int]:
    if present <= count:
        return list(range(present))
    return sorted(np.random.default_rng(seed).choice(present, count, replace=False).tolist())


def _taken(targets: Any, rows: Any) -> Any:
    if isinstance(targets, Mapping):
        return {key: _taken(value, rows) for key, value in targets.items()}
    return None if targets is None else np.asarray(targets)[rows]
