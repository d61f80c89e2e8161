"""Traffic: which request is sent n-th. Models and shapes are mixed by weight; sequences keep their order."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count

import numpy as np

from loadtest.errors import BadInput, UsageError
from loadtest.results import Turn
from loadtest.tensors import Array, Arrays, TensorSpec

_BLOCK = 4096


@dataclass(frozen=True)
class Fresh:
    """New random values for every request, in the ranges of the specs."""

    specs: Sequence[TensorSpec]
    batch: int
    seed: int

    def make(self, n: int) -> dict[str, Array]:
        """Return the inputs of request `n`; equal numbers get equal values."""
        rng = np.random.default_rng([self.seed, n])
        return {spec.name: spec.generate(rng, self.batch) for spec in self.specs}


@dataclass(frozen=True)
class Part:
    """One share of the traffic: a model and the requests that it gets.

    Args:
        model: its name on the server.
        payloads: the inputs of one request each; they are cycled through.
        version: of the model; empty lets the server choose.
        weight: how much of the traffic it gets, relative to the other parts.
        tolerance: the largest absolute difference between an output under load and the right one; None leaves the
            outputs unchecked.
        expected: the right outputs, by payload; empty takes what the idle server answers before the run.
        fresh: values for each request instead of the payloads', which then only probe the server; their outputs are
            not checked.
        drawn: payloads are drawn at random, and again and again, instead of in turn.
    """

    model: str
    payloads: Sequence[Arrays]
    version: str = ""
    weight: float = 1.0
    tolerance: float | None = None
    expected: Sequence[Arrays] = field(default=())
    fresh: Fresh | None = None
    drawn: bool = False

    def __post_init__(self) -> None:
        if not self.payloads:
            raise BadInput("no payload to send", where=self.model, fix="give at least one request")
        if not 0 < self.weight < float("inf"):
            raise UsageError(f"the weight of {self.model} is {self.weight:g}", fix="give a weight above 0")


def firsts(parts: Sequence[Part]) -> list[int]:
    """Return the number of each part's first payload; payloads are numbered through all parts."""
    return [0, *accumulate(len(part.payloads) for part in parts)][:-1]


def chooser(parts: Sequence[Part], seed: int) -> Callable[[int], int]:
    """Return the function from a request's number to its payload's; every worker gets the same."""
    if len(parts) == 1 and not parts[0].drawn:
        only = len(parts[0].payloads)
        return lambda n: n % only
    weights, starts = np.array([part.weight for part in parts]), np.array(firsts(parts))
    edges, counts = np.cumsum(weights / weights.sum()), np.array([len(part.payloads) for part in parts])
    random = np.array([part.drawn for part in parts])
    known: tuple[int, list[int]] = (-1, [])

    def choose(n: int) -> int:
        nonlocal known
        block, place = divmod(n, _BLOCK)
        if known[0] != block:
            rng = np.random.default_rng([seed, block])
            part = np.minimum(np.searchsorted(edges, rng.random(_BLOCK), side="right"), len(parts) - 1)
            in_turn = (block * _BLOCK + np.arange(_BLOCK)) % counts[part]
            at_random = (rng.random(_BLOCK) * counts[part]).astype(int)
            known = block, (starts[part] + np.where(random[part], at_random, in_turn)).tolist()
        return known[1][place]

    return choose


class Sequences:
    """Hands out turns. A sequence has one request in flight at a time and ends after `length` of them.

    Args:
        length: requests of a sequence.
        worker: processes must not share ids.
    """

    def __init__(self, length: int, worker: int = 0) -> None:
        self.length = length
        self._waiting: deque[Turn] = deque()
        # All ids have the same number of digits, and other clients' small ones are not met.
        self._ids = count(10**12 * (worker + 1))

    def next(self) -> Turn:
        """Return the next turn of the sequence that has waited longest, or the first one of a new sequence."""
        return self._waiting.popleft() if self._waiting else Turn(next(self._ids), True, self.length == 1, 1)

    def finished(self, turn: Turn) -> None:
        """Let a sequence go on whose request was answered; one whose request failed is given up by not calling this."""
        if not turn.end:
            place = turn.place + 1
            self._waiting.append(Turn(turn.id, False, place == self.length, place))
