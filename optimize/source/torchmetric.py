"""Torchmetrics: a metric of that package as a number for each sample, whatever it makes of all of them.

The numbers are the jackknife's (`metrics.samples_of`), so that two models are compared sample by sample. They tell
little of a figure that jumps when a sample goes, as a median does.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from modelathe.tensors import Array
from optimize.model.errors import BadWorkload
from optimize.source.metrics import Metric, samples_of

CLOSE = 1e-4
"""How far, relative to it, a figure put together from its samples may lie from the figure of all of them."""
MOST = 5000
"""Samples for which a metric that cannot be put together is computed anew without each."""


class TorchMetric(Protocol):
    """A torchmetrics `Metric`, as far as it is asked for anything here."""

    higher_is_better: bool | None
    plot_lower_bound: float | None
    plot_upper_bound: float | None
    metric_state: dict[str, Any]

    def update(self, *data: Any) -> None:
        """Take samples."""

    def compute(self) -> Any:
        """Return the figure of all samples since the last reset."""

    def reset(self) -> None:
        """Forget all samples."""


def is_one(metric: Any) -> bool:
    """Say whether it is a torchmetrics metric; that package need not be installed."""
    return all(hasattr(metric, name) for name in ("update", "compute", "reset", "metric_state"))


def read(metric: TorchMetric) -> tuple[str, Metric]:
    """Return the name of a torchmetrics metric, and what it stands for; it is copied and never changed."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower()
    if not hasattr(metric, "higher_is_better"):
        raise BadWorkload(f"{type(metric).__name__} is several metrics", fix="give one of them")

    def judge(outputs: Array, targets: Array) -> Array:
        own = copy.deepcopy(metric)
        pair = torch.from_numpy(np.ascontiguousarray(outputs)), torch.from_numpy(np.ascontiguousarray(targets))
        figure = _figure(own, pair)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of too few samples is of one that it was given alone
            without = np.fromiter(_without_each(own, pair, figure), np.float64, len(outputs))
        return samples_of(figure, without)

    bounded = (metric.plot_lower_bound, metric.plot_upper_bound) == (0.0, 1.0)
    return name, Metric(judge, metric.higher_is_better, bounded)


def _figure(metric: TorchMetric, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    metric.reset()
    metric.update(*pair)
    return _computed(metric)


def _computed(metric: TorchMetric) -> float:
    found = metric.compute()
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        raise BadWorkload(
            f"{type(metric).__name__} computes no single figure",
            fix='let it compute one, as with average="macro", or give a function with one number a sample',
        )
    return float(found)


def _without_each(metric: TorchMetric, pair: tuple[torch.Tensor, torch.Tensor], figure: float) -> Iterator[float]:
    """Yield the figure of all samples but one, for each.

    What most metrics keep of their samples is a sum, or a list to which each adds. One that takes a sample that comes
    alone for something else, as logits for probabilities, is given all others anew.
    """
    own = []
    for place in range(len(pair[0])):
        metric.reset()
        metric.update(*(each[place : place + 1] for each in pair))
        own.append({name: copy.copy(state) for name, state in metric.metric_state.items()})
    joined: dict[str, Callable[[int | None], Any]] = {name: _join([each[name] for each in own]) for name in own[0]}

    def put_together(left_out: int | None) -> float:
        metric.reset()
        metric.update(*(each[:1] for each in pair))  # so that it knows that it has been updated
        for name, join in joined.items():
            setattr(metric, name, join(left_out))
        return _computed(metric)

    if np.isclose(put_together(None), figure, rtol=CLOSE, atol=CLOSE, equal_nan=True):
        yield from map(put_together, range(len(own)))
        return
    if len(own) > MOST:
        raise BadWorkload(
            f"{type(metric).__name__} cannot be told sample by sample of {len(own):,}",
            fix=f"evaluate on at most {MOST:,}, or give a function with one number a sample in its place",
        )
    everything = torch.arange(len(own))
    for place in range(len(own)):
        yield _figure(metric, (pair[0][everything != place], pair[1][everything != place]))


def _join(states: list[Any]) -> Callable[[int | None], Any]:
    """Return what makes one state of those of all samples, but one of them."""
    if isinstance(states[0], list):
        return lambda left_out: [part for place, state in enumerate(states) if place != left_out for part in state]
    whole = torch.stack(states).sum(0)
    return lambda left_out: whole if left_out is None else whole - states[left_out]
