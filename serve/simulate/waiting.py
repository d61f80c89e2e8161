"""Waiting: the requests that are in no batch yet, by priority level, as the queue policy keeps them."""

import math
from collections import deque
from collections.abc import Iterator, Sequence

from serve.simulate.configuration import Level


class Queue:
    """The queue of one level: who waits, and behind them who has waited too long and may go on waiting."""

    __slots__ = ("delayed", "level", "waiting")

    def __init__(self, level: Level) -> None:
        self.level = level
        self.waiting: deque[int] = deque()
        self.delayed: deque[int] = deque()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.delayed)


class Waiting:
    """The queues of all levels.

    Args:
        levels: the most urgent first.
        number: of each request, which level it asks for, int [n].
        timeout: of each request, its own timeout in seconds, float [n].
    """

    def __init__(self, levels: Sequence[Level], number: Sequence[int], timeout: Sequence[float]) -> None:
        self.queues = [Queue(level) for level in levels]
        self.number, self.timeout = number, timeout
        self.expires = [math.inf] * len(number)
        self.count = 0
        """How many wait in all."""
        self.expired: list[int] = []
        """Requests that were taken out because they waited too long, since the list was last cleared."""

    def add(self, request: int, now: float) -> bool:
        """Let a request wait, unless its level has no room."""
        queue = self.queues[self.number[request]]
        level = queue.level
        if level.size and len(queue) >= level.size:
            return False
        queue.waiting.append(request)
        self.count += 1
        if level.timeout:
            self.expires[request] = now + level.until(self.timeout[request])
        return True

    def add_all(self, first: int, last: int) -> None:
        """Let the requests from `first` to before `last` wait, where there is one level without a policy."""
        self.queues[0].waiting.extend(range(first, last))
        self.count += last - first

    def heads(self, now: float) -> Iterator[int]:
        """Yield the requests in the order in which they leave, and deal with each expired one that is met.

        A caller that stops leaves those behind as they are: Triton looks at an expired request when its turn comes.
        """
        for queue in self.queues:
            position = 0
            while position < len(queue.waiting):
                request = queue.waiting[position]
                if self.expires[request] > now:
                    position += 1
                    yield request
                    continue
                del queue.waiting[position]
                if queue.level.delayed:
                    queue.delayed.append(request)
                    self.expires[request] = math.inf
                else:
                    self.count -= 1
                    self.expired.append(request)
            yield from list(queue.delayed)

    def take(self, count: int) -> list[int]:
        """Take the first `count` requests out."""
        first = self.queues[0].waiting
        if count == self.count == len(first):
            # As most often: all that wait, in one line.
            self.count, taken = 0, list(first)
            first.clear()
            return taken
        self.count -= count
        taken = []
        for queue in self.queues:
            for line in (queue.waiting, queue.delayed):
                here = min(len(line), count - len(taken))
                taken += [line.popleft() for _ in range(here)]
        return taken

    def refuse_expired(self, now: float) -> None:
        """Take out all that have expired, where their level refuses them."""
        for queue in self.queues:
            if queue.level.timeout and not queue.level.delayed:
                late = [request for request in queue.waiting if self.expires[request] <= now]
                if late:
                    self.expired += late
                    self.count -= len(late)
                    queue.waiting = deque(request for request in queue.waiting if self.expires[request] > now)
