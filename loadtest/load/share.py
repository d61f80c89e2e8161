"""Share: what one worker does of a load, in the process that was asked for it or in one of several."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loadtest.load.loop import Loop, Progress
from loadtest.plan.load import Load
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Chooser
from loadtest.record.results import Flight
from loadtest.send.sender import Sender

_FIRST_CONNECTIONS = 16


@dataclass
class Ending:
    """What was seen of a run as a whole, by one worker or by all.

    Args:
        end: seconds after the start at which the last request ended.
        gone: whether the server stopped answering.
        succeeded: requests answered right.
        errors: how often each verdict and text occurred.
        cpu: seconds of processor time that the sending took.
        sending: seconds that it lasted; waiting for the last answers is no part of it.
        lag: how late the event loop was meanwhile, milliseconds by percentile; of several workers the latest one's.
        checked: answers that were compared with the right ones.
        mismatches: the first wrong ones of each worker (see `answers.Answers`).
        most: open loop: the most requests in flight that all together allowed.
        full: seconds during which one of them had no room for a request that was due; the longest of any.
    """

    end: float = 0.0
    gone: bool = False
    succeeded: int = 0
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    cpu: float = 0.0
    checked: int = 0
    mismatches: list[dict[str, Any]] = field(default_factory=list)
    sending: float = 0.0
    lag: dict[str, float | None] = field(default_factory=dict)
    most: int = 0
    full: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return it as JSON, for `add` in another process."""
        errors = [[verdict, text, count] for (verdict, text), count in self.errors.most_common()]
        return vars(self) | {"errors": errors}

    def add(self, said: dict[str, Any]) -> None:
        """Take what another worker said at its end."""
        self.end, self.gone = max(self.end, said["end"]), self.gone or said["gone"]
        self.succeeded, self.cpu = self.succeeded + said["succeeded"], self.cpu + said["cpu"]
        for verdict, text, count in said["errors"]:
            self.errors[verdict, text] += count
        self.sending, self.lag = max(self.sending, said["sending"]), latest(self.lag, said["lag"])
        self.checked += said["checked"]
        self.most, self.full = self.most + said["most"], max(self.full, said["full"])
        self.mismatches = sorted(self.mismatches + said["mismatches"], key=lambda one: int(one["n"]))


def latest(one: dict[str, float | None], other: dict[str, float | None]) -> dict[str, float | None]:
    """Return the larger lag of two workers at each percentile; None where neither knows it."""
    pairs = {key: [lag for lag in (one.get(key), other.get(key)) if lag is not None] for key in {**one, **other}}
    return {key: max(lags, default=None) for key, lags in pairs.items()}


class Share:
    """What one worker sends.

    Args:
        load: all of it.
        sender: how to send it.
        worker: which one of `plan.workers` this is.
    """

    def __init__(self, load: Load, sender: Sender, worker: int) -> None:
        self.load, self.sender, self.worker = load, sender, worker
        self._choose = Chooser(load.parts, load.plan.seed)
        self._loop: Loop | None = None

    async def warm(self, tick: Callable[[Progress], None]) -> bool:
        """Connect and warm up; return whether the server stopped answering meanwhile."""
        plan = self.load.plan
        await self.sender.open(connections(plan, self.worker))
        if not plan.warmup:
            return False
        loop = Loop(plan, self.sender, self._choose, plan.warmup, lambda flight: None, self.worker)
        await loop.run(tick)
        return loop.gone

    async def send(self, zero: float, record: Callable[[Flight], None], tick: Callable[[Progress], None]) -> None:
        """Send what is counted.

        Args:
            zero: the start of the run on the event loop's clock.
            record: called with every request that ended.
            tick: called about ten times a second.
        """
        if self.load.answers:
            self.load.answers.reset()
        plan = self.load.plan
        self._loop = Loop(plan, self.sender, self._choose, plan.duration, record, self.worker)
        await self._loop.run(tick, zero)

    def ending(self) -> Ending:
        """Return what was seen of it until now; nothing before it was sent."""
        loop, answers = self._loop, self.load.answers
        if loop is None:
            return Ending()
        checked, mismatches = (answers.checked, answers.samples) if answers else (0, [])
        return Ending(
            end=loop.end,
            gone=loop.gone,
            succeeded=loop.succeeded,
            errors=loop.errors,
            cpu=loop.cpu,
            checked=checked,
            mismatches=mismatches,
            sending=loop.stopped,
            lag=loop.lag(),
            most=loop.most,
            full=loop.full,
        )


def connections(plan: Plan, worker: int = 0) -> int:
    """Return how many connections one worker opens before its first request."""
    return plan.share(plan.concurrency or 0, worker) or _FIRST_CONNECTIONS
