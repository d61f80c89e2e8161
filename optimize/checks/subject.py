"""Subject: the workload that is checked with what is to be done to it, and what was found out about it so far."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from modelathe.tensors import Arrays
from optimize.judge.budget import Budget
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from serve.config.target import Target

if TYPE_CHECKING:
    from torch import nn

LOOKED_AT = 16
"""Batches of a set that are looked at; a set may be endless."""


@dataclass
class Subject:
    """What is checked.

    Args:
        workload: the user's.
        steps: configs of the steps that are to be applied, in their order.
        target: where the result will run.
        budget: what it must keep; None where nothing is said of it.
        allow_overlap: judge on samples that other sets hold too.
        whole: whether the scores can be taken of the whole evaluation set only; found out by a check.
        samples: how many evaluation has; found out by a check.
    """

    workload: Workload
    steps: tuple[Any, ...] = ()
    target: Target = field(default_factory=Target)
    budget: Budget | None = None
    allow_overlap: bool = False
    whole: bool = False
    samples: int = 0

    @cached_property
    def where(self) -> str:
        """What the user calls it."""
        return self.workload.source or self.workload.name

    @cached_property
    def batch(self) -> Batch:
        """The first evaluation batch."""
        return next(self.workload.batches("evaluation"))

    @cached_property
    def module(self) -> "nn.Module":
        """The trained model, not to be changed."""
        return self.workload.build()

    @cached_property
    def outputs(self) -> Arrays:
        """What the trained model answers to the first evaluation batch, by the names of the workload's outputs."""
        from optimize.judge.evaluate import collect
        from optimize.predict.module import TorchPredictor

        return collect(TorchPredictor(self.module, self.workload.outputs), self.part(self.batch))[0]

    def part(self, *batches: Batch) -> Workload:
        """Return the workload with these as its evaluation set."""
        return replace(self.workload, evaluation=lambda: batches)

    def some(self, kind: str) -> Iterator[Batch]:
        """Yield the first batches of a set."""
        return islice(self.workload.batches(kind), LOOKED_AT)
