"""Instances: what runs calls, the payloads that are scheduled for them, and a row for each call that began."""

import heapq
from collections import deque
from collections.abc import Callable

from serve.simulate.configuration import Configuration

NEW, SCHEDULED, EXECUTING = range(3)


class Payload:
    """Requests that go to an instance together; it grows until an instance takes it.

    Args:
        shape: what its requests share in their free dims.
    """

    __slots__ = ("closed", "items", "oldest", "requests", "shape", "state")

    def __init__(self, shape: float = 0.0) -> None:
        self.requests: list[int] = []
        self.items = 0
        self.oldest = float("inf")
        """When the first of its requests came, in seconds; kept where there is a delay."""
        self.shape = shape
        self.closed = False
        """Whether a request of another shape ended it; it is not merged with others then."""
        self.state = NEW


class Instances:
    """The instances of a model.

    Args:
        configuration: how many they are, and by which limits they merge payloads.
        seconds: from (samples, instances running) to the seconds of a call.
    """

    def __init__(self, configuration: Configuration, seconds: Callable[[int, int], float]) -> None:
        self.count = configuration.instances
        self.seconds = seconds
        self.max_batch, self.fixed_shapes = configuration.max_batch, configuration.fixed_shapes
        self.delay = configuration.delay if configuration.dynamic and configuration.max_batch > 1 else 0.0
        self.idle = deque(range(self.count))
        self.scheduled: deque[Payload] = deque()
        self.running: list[tuple[float, int, int, Payload]] = []
        """A heap of (end, number of the call, instance, payload)."""
        self.order: list[int] = []
        """The requests of all calls, one call behind the other."""
        self.calls: list[tuple[float, float, int, int, int]] = []
        """Of each call the start, the end, the samples, the instance and the number of requests."""

    def start(self, now: float) -> bool:
        """Give scheduled payloads to idle instances; say whether one was taken."""
        taken = False
        while self.idle and self.scheduled:
            payload = self.scheduled.popleft()
            payload.state = EXECUTING
            if self.delay and self.scheduled and not payload.closed:
                self._merge(payload, now)
            instance = self.idle.popleft()
            end = now + self.seconds(payload.items, self.count - len(self.idle))
            heapq.heappush(self.running, (end, len(self.calls), instance, payload))
            self.calls.append((now, end, payload.items, instance, len(payload.requests)))
            self.order += payload.requests
            taken = True
        return taken

    def _merge(self, payload: Payload, now: float) -> None:
        """Add those behind it that have waited for longer than the delay, as far as they fit.

        The first that does not fit is frozen all the same: it takes no more requests, however small it is.
        """
        while self.scheduled:
            behind = self.scheduled[0]
            if behind.closed or not now - behind.oldest > self.delay:
                return
            behind.state = EXECUTING
            fits = payload.items + behind.items <= self.max_batch
            if not fits or not (self.fixed_shapes or payload.shape == behind.shape):
                return
            self.scheduled.popleft()
            payload.requests += behind.requests
            payload.items += behind.items

    def end(self) -> tuple[int, Payload]:
        """Take out the call that ends next; return its instance, which is not idle yet, and its payload."""
        _, _, instance, payload = heapq.heappop(self.running)
        return instance, payload
