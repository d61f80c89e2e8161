"""Least loaded: each request goes to one of the replicas with the fewest requests in them, drawn at random.

That couples the replicas, so this is a loop over events, exact and slow, for fleets of a few hundred.
"""

import heapq
from collections import deque

import numpy as np

from serve.planning.engines.calls import Calls
from serve.simulate.configuration import Configuration
from serve.simulate.service import Seconds

_AHEAD = 1024


class _Drawn:
    """Times of a call one by one, drawn many at a time."""

    def __init__(self, calls: Calls) -> None:
        self._calls, self._ahead = calls, dict[int, list[float]]()
        self._together: list[float] = calls.together.tolist()

    def seconds(self, batch: int, running: int) -> float:
        ahead = self._ahead.setdefault(batch, [])
        if not ahead:
            ahead.extend(self._calls.alone(np.full(_AHEAD, batch)).tolist())
        return ahead.pop() * self._together[min(running, len(self._together)) - 1] + self._calls.inside


class _Levels:
    """The replicas by how many requests are in each of them."""

    def __init__(self, replicas: int, generator: np.random.Generator) -> None:
        self._at = [0] * replicas
        self._place = list(range(replicas))
        self._levels, self._lowest = [list(range(replicas))], 0
        self._generator, self._random = generator, list[float]()

    def least(self) -> int:
        """Return one of those with the fewest."""
        if not self._random:
            self._random = self._generator.random(_AHEAD).tolist()
        while not self._levels[self._lowest]:
            self._lowest += 1
        level = self._levels[self._lowest]
        return level[int(self._random.pop() * len(level))]

    def move(self, replica: int, by: int) -> None:
        """Say that a replica has more requests, or fewer."""
        level, place = self._levels[self._at[replica]], self._place[replica]
        level[place] = level[-1]
        self._place[level[-1]] = place
        level.pop()
        self._at[replica] += by
        self._lowest = min(self._lowest, self._at[replica])
        while len(self._levels) <= self._at[replica]:
            self._levels.append([])
        self._place[replica] = len(self._levels[self._at[replica]])
        self._levels[self._at[replica]].append(replica)


class Loop:
    """Replicas behind one balancer that knows how many requests each has.

    Args:
        calls: the times of a call.
        replicas: how many.
        largest: the most requests in a batch.
        configuration: its instances are used.
        generator: of the choices.
    """

    def __init__(
        self, calls: Calls, replicas: int, largest: int, configuration: Configuration, generator: np.random.Generator
    ) -> None:
        self._drawn, self._largest = _Drawn(calls), largest
        self._levels = _Levels(replicas, generator)
        self._queues = [deque[int]() for _ in range(replicas)]
        self._idle = [configuration.instances] * replicas
        self._instances = configuration.instances
        self._ends: list[tuple[float, int, int]] = []
        self.batches, self.busy = 0, 0.0

    def run(self, at: Seconds) -> Seconds:
        """Return the latency of each request, float64 [n], by their times of arrival, ascending."""
        self._at = at.tolist()
        self._done = np.empty(len(at))
        for request, now in enumerate(self._at):
            while self._ends and self._ends[0][0] <= now:
                self._end()
            replica = self._levels.least()
            self._levels.move(replica, 1)
            self._queues[replica].append(request)
            if self._idle[replica]:
                self._begin(replica, now)
        while self._ends:
            self._end()
        return self._done - at

    def _begin(self, replica: int, now: float) -> None:
        queue = self._queues[replica]
        batch = [queue.popleft() for _ in range(min(len(queue), self._largest))]
        self._idle[replica] -= 1
        took = self._drawn.seconds(len(batch), self._instances - self._idle[replica])
        self._done[batch] = now + took
        self.batches, self.busy = self.batches + 1, self.busy + took
        heapq.heappush(self._ends, (now + took, replica, len(batch)))

    def _end(self) -> None:
        now, replica, count = heapq.heappop(self._ends)
        self._levels.move(replica, -count)
        self._idle[replica] += 1
        if self._queues[replica]:
            self._begin(replica, now)
