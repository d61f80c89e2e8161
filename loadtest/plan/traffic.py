"""Traffic: which request is sent n-th. Models and shapes are mixed by weight; sequences keep their order."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count

import numpy as np

from loadtest.plan.data.answers import Tolerance
from loadtest.record.results import Script, Turn
from modelathe.errors import BadInput, UsageError
from modelathe.tensors import Array, Arrays, TensorSpec, generated

_BLOCK = 4096
_FIRST_ID, _IDS, _SEEDS = 10**15, 10**12, 1000
"""All ids have the same number of digits, other clients' small ones are not met, and seeds have ids of their own."""


@dataclass(frozen=True)
class Fresh:
    """New random values for every request, in the ranges of the specs."""

    specs: Sequence[TensorSpec]
    batch: int
    seed: int

    def make(self, n: int) -> dict[str, Array]:
        """Return the inputs of request `n`; equal numbers get equal values."""
        return generated(self.specs, self.batch, (self.seed, n, 1))  # none of `payload.generate`, which was sent before


@dataclass(frozen=True)
class Part:
    """One share of the traffic: a model and the requests that it gets.

    Args:
        model: its name on the server.
        payloads: the inputs of one request each; they are cycled through.
        version: of the model; empty lets the server choose.
        weight: how much of the traffic it gets, relative to the other parts.
        tolerance: the largest absolute difference between an output under load and the right one, one for all or by
            output; None leaves the outputs unchecked.
        expected: the right outputs, by payload; one without any is not checked. Empty takes what the idle server
            answers before the run.
        fresh: values for each request instead of the payloads', which then only probe the server; their outputs are
            not checked.
        streams: how many payloads, one after the other, make up each sequence; empty for requests of their own.
        order: recorded traffic: for each payload the number of the request that carried it, among those of all parts.
        drawn: payloads are drawn at random, and again and again, instead of in turn.
    """

    model: str
    payloads: Sequence[Arrays]
    version: str = ""
    weight: float = 1.0
    tolerance: Tolerance | None = None
    expected: Sequence[Arrays] = field(default=())
    fresh: Fresh | None = None
    streams: Sequence[int] = ()
    order: Sequence[int] = ()
    drawn: bool = False

    def __post_init__(self) -> None:
        if not self.payloads:
            raise BadInput("no payload to send", where=self.model, fix="give at least one request")
        if not 0 < self.weight < float("inf"):
            raise UsageError(f"the weight of {self.model} is {self.weight:g}", fix="give a weight above 0")


def firsts(parts: Sequence[Part]) -> list[int]:
    """Return the number of each part's first payload; payloads are numbered through all parts."""
    return [0, *accumulate(len(part.payloads) for part in parts)][:-1]


class Chooser:
    """Says which payload a request carries. Every worker makes the same choice for the same number.

    Args:
        parts: what is sent.
        seed: of the choice among parts.

    Attributes:
        pick: from a request's number to its payload's.
        seed: as given.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        self.parts = parts
        self.pick: Callable[[int], int] = self._by_weight
        self._starts, self._counts = firsts(parts), [len(part.payloads) for part in parts]
        weights = np.array([part.weight for part in parts])
        self._edges, self.seed = np.cumsum(weights / weights.sum()), seed
        self._drawn: tuple[int, list[int], list[float]] = (-1, [], [])
        if any(part.order for part in parts):
            self.pick = self._recorded()
        elif len(parts) == 1 and not parts[0].drawn:
            only = self._counts[0]
            self.pick = lambda n: n % only

    def sequence(self, number: int, length: int | None) -> Script:
        """Return what the sequence of this number is made of.

        All of them go to one model. A part with streams plays the next of them, as often as it takes to fill `length`;
        another one goes through its payloads, each sequence from one further on.
        """
        at = self._part(number)
        part, first, count = self.parts[at], self._starts[at], self._counts[at]
        if not part.streams:
            return Script(first, count, length or 1, shift=number)
        stream = number % len(part.streams)
        count = part.streams[stream]
        return Script(first + sum(part.streams[:stream]), count, length or count)

    def _by_weight(self, n: int) -> int:
        part = self._part(n)
        count = self._counts[part]
        at = int(self._drawn[2][n % _BLOCK] * count) if self.parts[part].drawn else n % count
        return self._starts[part] + at

    def _part(self, n: int) -> int:
        block, place = divmod(n, _BLOCK)
        if self._drawn[0] != block:
            rng = np.random.default_rng([self.seed, block])
            drawn = np.minimum(np.searchsorted(self._edges, rng.random(_BLOCK), side="right"), len(self.parts) - 1)
            self._drawn = block, drawn.tolist(), rng.random(_BLOCK).tolist()
        return self._drawn[1][place]

    def _recorded(self) -> Callable[[int], int]:
        starts = zip(self._starts, self.parts, strict=True)
        pairs = sorted((n, first + at) for first, part in starts for at, n in enumerate(part.order))
        payloads = [payload for _, payload in pairs]
        return lambda n: payloads[n % len(payloads)]


def in_sequences(parts: Sequence[Part], length: int | None) -> bool:
    """Whether the requests belong to sequences: because a length was asked for, or because the data says so."""
    return length is not None or any(part.streams for part in parts)


class Sequences:
    """Hands out turns. A sequence has one request in flight at a time.

    Args:
        chooser: says what each sequence is made of.
        length: requests of a sequence; None takes what the data says.
        worker, workers: processes must not share ids.
    """

    def __init__(self, chooser: Chooser, length: int | None, worker: int = 0, workers: int = 1) -> None:
        self._chooser, self._length = chooser, length
        self._waiting: deque[Turn] = deque()
        self._numbers = count(worker, workers)
        # The same ids in every run: a sequence that the last run left open is begun again and holds no place for long.
        self._first = _FIRST_ID + chooser.seed % _SEEDS * _IDS

    def next(self) -> Turn:
        """Return the next turn of the sequence that has waited longest, or the first one of a new sequence."""
        if self._waiting:
            return self._waiting.popleft()
        number = next(self._numbers)
        return Turn(self._first + number, self._chooser.sequence(number, self._length))

    def finished(self, turn: Turn) -> None:
        """Let a sequence go on whose request was answered; one whose request failed is given up by not calling this."""
        if not turn.end:
            self._waiting.append(Turn(turn.id, turn.script, turn.place + 1))
