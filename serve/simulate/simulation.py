"""Simulation: from arrivals, measured times and a configuration to one row per request and one per batch.

Not simulated: the rate limiter, sequences, `preserve_ordering`, the response cache, and the waiting instances that
Triton before 26.08 loses count of when a queue policy meets a delay (`serve check` names that).
"""

import random
from math import inf

import numpy as np

from serve.simulate.arrivals import Arrivals, Clients
from serve.simulate.batcher import Batcher, Direct
from serve.simulate.configuration import Configuration
from serve.simulate.instances import Instances
from serve.simulate.result import EXPIRED, REFUSED, Simulated, assembled
from serve.simulate.service import Curve
from serve.simulate.waiting import Waiting

OUTSIDE = 1
"""Beside the seed, of what client and server add."""


def simulate(arrivals: Arrivals | Clients, curve: Curve, configuration: Configuration, *, seed: int = 0) -> Simulated:
    """Return what becomes of each request.

    Args:
        arrivals: an open or a closed loop.
        curve: the seconds of calls, and what server and client add.
        configuration: of the model.
        seed: of the times of calls; equal seeds give equal results, and other configurations the same luck.

    Raises:
        ValueError: arrivals out of order, or their arrays do not fit.
    """
    return _Simulation(arrivals, curve, configuration, seed).run()


class _Simulation:
    def __init__(self, arrivals: Arrivals | Clients, curve: Curve, configuration: Configuration, seed: int) -> None:
        self.total, kinds = len(arrivals), arrivals.kinds
        self.at = arrivals.times()
        self.items = [int(items) for items in kinds.column("items", self.total, 1)]
        self.level = [int(level) for level in kinds.column("level", self.total, len(configuration.levels) - 1)]
        if self.total and not 0 <= min(self.level) <= max(self.level) < len(configuration.levels):
            raise ValueError(f"levels are counted from 0 to {len(configuration.levels) - 1}")
        if self.total and min(self.items) < 1:
            raise ValueError("a request has at least one sample")
        self.pause = arrivals.think + curve.outside if isinstance(arrivals, Clients) else None
        self.curve, self.configuration, self.seed = curve, configuration, seed
        extra = 0.0 if configuration.prefetches or not configuration.dynamic else curve.handover
        seconds = curve.sampler(np.random.default_rng(seed))
        self.instances = Instances(
            configuration, (lambda batch, running: seconds(batch, running) + extra) if extra else seconds
        )
        self.waiting = Waiting(configuration.levels, self.level, kinds.column("timeout", self.total, 0.0))
        self.scheduler: Batcher | Direct = (
            Batcher(
                *(configuration, self.waiting, self.instances),
                *(self.at, self.items, kinds.column("shape", self.total, 0.0)),
            )
            if configuration.dynamic
            else Direct(self.instances, self.at, self.items)
        )
        self.limit = configuration.max_batch
        self.oversized = max(self.items, default=0) > self.limit
        self.chance = random.Random(seed).random
        self.failed: list[tuple[int, float, int]] = []
        """Requests that got no answer, when, and how that ended."""

    def run(self) -> Simulated:
        at, instances, scheduler, total = self.at, self.instances, self.scheduler, self.total
        running, order, failed, expired = instances.running, instances.order, self.failed, self.waiting.expired
        come = 0  # how many requests have come
        while len(order) + len(failed) < total:
            now = end = running[0][0] if running else inf
            if scheduler.until < now:
                now = scheduler.until
            if come < len(at) and at[come] <= now and at[come] < end:
                now, come = at[come], self._arrive(come, now)
            elif now == end:
                self._end(now)
            else:
                scheduler.wake(now)
            if expired:
                self._fail(expired, now, EXPIRED)
        # Not the generator of the calls: however many requests there are, the calls have the same luck.
        outside = self.curve.beside(len(at), np.random.default_rng((self.seed, OUTSIDE)))
        return assembled(at, self.level, instances, failed, outside)

    def _arrive(self, first: int, before: float) -> int:
        """Let the next request come, and with it those before a time if nobody hears them; return who is next."""
        if self.items[first] > self.limit:
            self._fail([first], self.at[first], REFUSED)
            return first + 1
        scheduler = self.scheduler
        last = scheduler.arrive(first, self.at[first] if self.oversized else before)
        for request in scheduler.refused:
            self._fail([request], self.at[request], REFUSED)
        scheduler.refused.clear()
        return last

    def _fail(self, requests: list[int], now: float, outcome: int) -> None:
        """Note that requests get no answer, and clear their list."""
        self.failed += [(request, now, outcome) for request in requests]
        self._answered(len(requests), now)
        requests.clear()

    def _answered(self, count: int, now: float) -> None:
        """Let the clients that have an answer send their next requests."""
        if self.pause is not None:
            self.at += [now + self.pause] * min(count, self.total - len(self.at))

    def _end(self, now: float) -> None:
        instances, scheduler = self.instances, self.scheduler
        instance, payload = instances.end()
        self._answered(len(payload.requests), now)
        early = scheduler.patient or self.chance() < self.curve.race
        if early:
            scheduler.notify(now)
        instances.idle.append(instance)
        if instances.start(now) or not early:
            scheduler.notify(now)
