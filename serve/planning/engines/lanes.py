"""Lanes: many replicas at once, one batch of each in a step of numpy.

A replica without a delay does exactly this: an instance that is free takes what waits, the oldest first, up to the
largest batch. Requests that arrive at the same moment share a batch.

Time goes on in blocks, so that memory does not grow with the number of requests: a batch is formed once every arrival
before its start is known, and what cannot be formed yet waits for the next block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.planning.engines.calls import Calls, Whole
from serve.simulate.service import Seconds


@dataclass
class _Active:
    """Lanes that form batches: which, the next request and the end of each, and when its instances are free."""

    lane: Whole
    now: Whole
    end: Whole
    free: Seconds
    until: Seconds

    def only(self, which: npt.NDArray[np.bool_]) -> "_Active":
        """Return some of them."""
        return _Active(self.lane[which], self.now[which], self.end[which], self.free[which], self.until[which])


class Lanes:
    """Replicas of one model, one lane each.

    Args:
        calls: the times of a call.
        replicas: how many.
        largest: the most requests in a batch.
        instances: of the model on each replica.
    """

    def __init__(self, calls: Calls, replicas: int, largest: int, instances: int) -> None:
        self._calls, self._largest, self._replicas = calls, largest, replicas
        self._free = np.full((replicas, instances), -np.inf)
        self._waiting = (np.empty(0), np.empty(0, _smallest(replicas)))
        self.batches, self.requests, self.busy = 0, 0, 0.0

    def feed(self, at: Seconds, replica: Whole, until: Seconds | float) -> tuple[Seconds, Seconds]:
        """Take arrivals and return those that are answered so far, lane by lane: their times, and their latencies.

        Args:
            at: times of arrival, float64 [n], ascending for each replica and after those of the last call.
            replica: where each goes, int [n].
            until: the time before which no more arrivals come, of all replicas or of each, float64 [replicas].
        """
        lane = np.concatenate([self._waiting[1], replica.astype(self._waiting[1].dtype)])
        order = np.argsort(lane, kind="stable")
        at, lane = np.concatenate([self._waiting[0], at])[order], lane[order]
        end = np.cumsum(np.bincount(lane, minlength=self._replicas))
        first = np.append(0, end[:-1])
        done = np.full(len(at), np.nan)
        last = self._run(at, (first, end), done, np.broadcast_to(until, self._replicas))
        answered = np.arange(len(at)) < np.repeat(last, end - first)
        self._waiting = at[~answered], lane[~answered]
        at, done = at[answered], done[answered]
        batches = np.flatnonzero(~np.isnan(done))
        self.batches, self.requests = self.batches + len(batches), self.requests + len(at)
        return at, np.repeat(done[batches], np.diff(batches, append=len(at))) - at

    def finish(self) -> tuple[Seconds, Seconds]:
        """Answer all that still waits, as `feed`."""
        return self.feed(np.empty(0), np.empty(0, np.int64), np.inf)

    def _run(self, at: Seconds, places: tuple[Whole, Whole], done: Seconds, until: Seconds) -> Whole:
        """Form batches, and return where each lane stopped.

        Args:
            at: times of arrival, lane by lane.
            places: where those of each lane begin and end.
            done: gets the end of each batch where its first request stands.
            until: as for `feed`.
        """
        last = places[0].copy()
        lane = np.flatnonzero(places[0] < places[1])
        active = _Active(lane, last[lane], places[1][lane], self._free[lane], until[lane])
        while len(active.lane):
            start = np.maximum(active.free.min(1), at[active.now])
            active, start = self._stopped(active, start < active.until, last), start[start < active.until]
            behind = self._behind(at, active.now, active.end, start)
            running = (active.free > start[:, None]).sum(1) + 1
            took = self._calls.draw(behind - active.now, running)
            self.busy += float(took.sum())
            done[active.now] = active.free[np.arange(len(start)), active.free.argmin(1)] = start + took
            active.now = behind
            active = self._stopped(active, behind < active.end, last)
        return last

    def _stopped(self, active: "_Active", goes: npt.NDArray[np.bool_], last: Whole) -> "_Active":
        """Return the lanes that go on; of the others, keep what is known."""
        if goes.all():
            return active
        gone = active.only(~goes)
        self._free[gone.lane], last[gone.lane] = gone.free, gone.now
        return active.only(goes)

    def _behind(self, at: Seconds, now: Whole, end: Whole, start: Seconds) -> Whole:
        """Return for each lane where the batch that begins with the request `now` ends; bisected."""
        behind = now + 1
        most = np.minimum(now + self._largest, end)
        more = np.flatnonzero((behind < most) & (at[np.minimum(behind, len(at) - 1)] <= start))
        low, high, limit = behind[more] + 1, most[more], start[more]
        while (open_ := low < high).any():
            middle = np.where(open_, (low + high) // 2, 0)
            waits = open_ & (at[middle] <= limit)
            low = np.where(waits, middle + 1, low)
            high = np.where(open_ & ~waits, middle, high)
        behind[more] = low
        return behind


def _smallest(replicas: int) -> npt.DTypeLike:
    """Return the integers to sort by: numpy sorts those of 16 bits in linear time."""
    return np.uint16 if replicas <= 1 << 16 else np.uint32


def blocks(count: int, size: int) -> Iterator[int]:
    """Yield the lengths of the blocks that make `count`."""
    while count > 0:
        yield min(size, count)
        count -= size
