"""Batcher: one thread that forms payloads of waiting requests, as `dynamic_batch_scheduler.cc` of Triton does.

What it does depends on when it is awake. It sleeps until it is notified or a time has come: half a second where nothing
waits or no payload may be formed, the rest of the delay where a batch waits for more. An end of a call notifies it; a
request does so only where a payload may be formed and, with fixed shapes, enough of them wait.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from serve.simulate.configuration import Configuration
from serve.simulate.instances import EXECUTING, NEW, SCHEDULED, Instances, Payload
from serve.simulate.waiting import Waiting

NAP = 0.5
"""Seconds after which the sleeping batcher looks again whatever happens."""
Scan = tuple[float, int, int]
"""Until when to wait for more, in seconds, or how many requests and samples go into the payload."""


class Found(NamedTuple):
    """What a look through the waiting requests finds.

    Args:
        requests: how many fit the current payload.
        items: their samples.
        mark: how many of them make the best preferred size, or all that stay below the largest one.
        best: their samples; 0 is none.
        send: the next request does not fit.
        oldest: when the first of them came, in seconds.
        closest: when the first of them expires.
    """

    requests: int
    items: int
    mark: int
    best: int
    send: bool
    oldest: float
    closest: float


class Batcher:
    """The dynamic batcher of one model.

    Args:
        configuration: of the model.
        waiting: the queues of its levels.
        instances: those of the model.
        at: when each request comes, in seconds; it may grow.
        items: the samples of each.
        shape: what each shares with others in its free dims.
    """

    def __init__(
        self,
        configuration: Configuration,
        waiting: Waiting,
        instances: Instances,
        at: Sequence[float],
        items: Sequence[int],
        shape: Sequence[float],
    ) -> None:
        self.waiting, self.instances = waiting, instances
        self.at, self.items, self.shape = at, items, shape
        self.max_batch, self.delay, self.fixed = (
            configuration.max_batch,
            configuration.delay,
            configuration.fixed_shapes,
        )
        self.sizes, self.prefetches = configuration.sizes, configuration.prefetches
        self.current, self.full = Payload(), False
        self.queued = self.wanted = 0
        """The samples that wait, as Triton counts them, and how many of them wake the batcher."""
        self.until, self.for_slot = NAP, False
        """When it wakes by itself, and whether it sleeps because no payload may be formed."""
        self.refused: list[int] = []
        """Requests for which there was no room, since the list was last cleared."""
        self.alike = self.prefetches and set(items) <= {1} and (self.fixed or len(set(shape)) < 2)
        self.patient = self.prefetches and not self.delay and self.sizes == (self.max_batch,)

    def slot(self) -> bool:
        """Say whether a payload may be formed: ahead of time two for each instance, else one for each that waits."""
        instances = self.instances
        if self.prefetches:
            return len(instances.scheduled) < 2 * instances.count
        return len(instances.idle) > len(instances.scheduled)

    def arrive(self, first: int, before: float) -> int:
        """Let the next request come, and those behind it that come before a time and wake nobody.

        Args:
            first: the next request.
            before: until when nothing else happens, in seconds.

        Returns:
            The first request that is still to come.
        """
        last = self._unheard(first, before)
        if last > first:
            self._add(first, last)
            return last
        last = first + 1
        self._add(first, last)
        heard = not self.fixed or self.queued >= self.wanted or self.full or self.current.state == EXECUTING
        if heard and not self.refused:
            self.run(self.at[first])
        return last

    def _unheard(self, first: int, before: float) -> int:
        """Return the first request that wakes the batcher, or comes after something else has happened.

        Without a delay, and with no size preferred but the largest, payloads that grow until an instance takes them are
        the batches that it would take from the queue: then the batcher may sleep until an instance is idle.
        """
        if not self.instances.idle if self.patient else not self.slot():
            return max(first + 1, bisect_left(self.at, before, first))
        state = self.current.state
        if self.alike and not self.full and (state == NEW or (self.fixed and state != EXECUTING)):
            most = first + self.wanted - self.queued - 1
            # Who comes at the very moment at which the delay is over is heard.
            return min(most, bisect_left(self.at, before, first))
        return first

    def _add(self, first: int, last: int) -> None:
        """Let requests wait, or refuse them; Triton counts the samples of both."""
        self.queued += last - first if self.alike else sum(self.items[first:last])
        if self.prefetches:
            self.waiting.add_all(first, last)
        else:
            self.refused += [
                request for request in range(first, last) if not self.waiting.add(request, self.at[request])
            ]

    def notify(self, now: float) -> None:
        """Wake the batcher, unless it waits for a slot and there is none."""
        if not self.for_slot or self.slot():
            self.run(now)

    def wake(self, now: float) -> None:
        """Wake the batcher because its time has come."""
        if self.for_slot and not self.slot():
            self.waiting.refuse_expired(now)
            self.until = now + NAP
        else:
            self.run(now)

    def run(self, now: float) -> None:
        """Form payloads until there is nothing to do."""
        self.for_slot = False
        self.until = now + NAP
        while True:
            if self.full or self.current.state == EXECUTING:
                self.current, self.full, self.wanted = Payload(), False, 0
            if not self.waiting.count:
                return
            if not self.slot():
                self.for_slot = True
                return
            expired = len(self.waiting.expired)
            wait, count, items = self._scan(now)
            if count:
                self._move(count, items)
                self.instances.start(now)
            elif wait:
                self.until = wait
                return
            elif not self.full and len(self.waiting.expired) == expired:
                # A request of another shape is next: Triton's batcher spins until the payload is taken.
                return

    def _move(self, count: int, items: int) -> None:
        payload = self.current
        taken = self.waiting.take(count)
        if payload.state == NEW:
            payload.state = SCHEDULED
            payload.shape = self.shape[taken[0]]
            self.instances.scheduled.append(payload)
        if self.delay:
            oldest = self.at[taken[0]] if self.alike else min([self.at[request] for request in taken])
            payload.oldest = min(payload.oldest, oldest)
        payload.requests += taken
        payload.items += items
        self.queued -= items

    def _scan(self, now: float) -> Scan:
        """Look through the waiting requests for what fits the current payload."""
        size = self.current.items
        if self.patient and self.alike:
            count = min(self.waiting.count, self.max_batch - size)
            self.full = size + count == self.max_batch
            return 0.0, count, count
        found = self._count() if self.alike else self._each(now)
        count, items, best = found.requests, found.items, found.best
        over = bool(self.delay) and (not count or now >= found.oldest + self.delay)
        if best and not over:
            if not self.delay:
                self.full = True
            return 0.0, found.mark, best
        if not count:
            return 0.0, 0, 0
        if found.send or size + items >= self.sizes[-1]:
            self.full = True
            return 0.0, count, items
        if over or not self.delay:
            return 0.0, count, items
        self.wanted = self.sizes[bisect_right(self.sizes, size + items)] - size
        if not self.full and size and size not in self.sizes:
            return 0.0, count, items  # what is scheduled grows, preferred or not
        return min(found.oldest + self.delay, found.closest), 0, 0

    def _each(self, now: float) -> Found:
        """Look at each request until one does not fit."""
        payload, largest, waiting = self.current, self.sizes[-1], self.waiting
        size, shape = payload.items, payload.shape
        pending = count = best = mark = 0
        oldest = closest = math.inf
        seen, send = len(waiting.expired), False
        for request in waiting.heads(now):
            items = self.items[request]
            if size + count:
                if size + pending + items > largest and not best:
                    best, mark, self.full = pending, count, True
                if size + pending + items > self.max_batch:
                    send = True
                    break
                if not self.fixed and self.shape[request] != shape:
                    payload.closed = send = True
                    break
            else:
                shape = self.shape[request]
            pending += items
            count += 1
            oldest = min(oldest, self.at[request])
            closest = min(closest, waiting.expires[request])
            if size + pending in self.sizes:
                best, mark = pending, count
        self.queued -= sum(self.items[request] for request in waiting.expired[seen:])
        return Found(count, pending, mark, best, send, oldest, closest)

    def _count(self) -> Found:
        """Find the same where all requests are alike: one sample, one shape, one level without a limit."""
        size, queue = self.current.items, self.waiting.queues[0].waiting
        room = self.max_batch - size
        count = min(len(queue), room)
        reached = bisect_right(self.sizes, size + count)
        best = max(0, self.sizes[reached - 1] - size) if reached else 0
        if size >= self.sizes[-1]:
            # Beyond the largest preferred size Triton takes one more, and all that wait only when the delay is over.
            self.full, best = True, int(min(len(queue) - 1, room) > 0)
        return Found(count, count, best, best, len(queue) > room, self.at[queue[0]], math.inf)


class Direct:
    """The default scheduler: each request is a call of its own, and all that wait stand in one line.

    Args:
        instances: those of the model.
        at: when each request comes, in seconds; it may grow.
        items: the samples of each.
    """

    until = math.inf
    patient = False

    def __init__(self, instances: Instances, at: Sequence[float], items: Sequence[int]) -> None:
        self.instances, self.at, self.items = instances, at, items
        self.refused: list[int] = []

    def arrive(self, first: int, before: float) -> int:
        """Put a request in line, and while no instance is idle those behind it; return the first still to come."""
        last = first + 1 if self.instances.idle else max(first + 1, bisect_left(self.at, before, first))
        for request in range(first, last):
            payload = Payload()
            payload.requests, payload.items = [request], self.items[request]
            self.instances.scheduled.append(payload)
        self.instances.start(self.at[first])
        return last

    def notify(self, now: float) -> None:
        """Do nothing: there is no thread to wake."""

    wake = run = notify
