"""Plan: what load to send, as one value that a result file holds whole."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from loadtest.plan import schedule
from loadtest.plan.data import trace
from modelathe.connection import PLAIN, Connection, address, base
from modelathe.errors import UsageError

METRICS = ("", "/metrics")
"""What may stand behind the port of an address of metrics."""


@dataclass(frozen=True)
class Plan:
    """What load to send; which requests is the matter of `loadtest.plan.traffic`.

    Exactly one of `concurrency`, `rate` and `trace` is given: the first makes a closed loop, the others an open one.

    Args:
        url: `grpc://HOST:PORT`, or `http://HOST:PORT` and the path below which the server is, if any; `grpcs` or
            `https` where it encrypts.
        duration: seconds during which requests are sent, at most.
        concurrency: closed loop, requests always in flight.
        rate: open loop, requests per second.
        arrival: with `rate`: a name in `schedule.ARRIVALS` and its settings.
        profile: with `rate`: a name in `schedule.PROFILES` and its settings.
        trace: open loop: a file of send times; `loadtest.plan.data.trace.length` says how long it lasts.
        speed: with `trace`: how many times as fast to replay it.
        requests: stop after so many; None sends for the whole duration.
        think: closed loop: seconds between an answer and the next request of the same user.
        sequence: length of the sequences that the requests belong to, for a model that remembers; None sends requests
            of their own, or the sequences that the data states.
        seed: of the arrival times and of the choice among models.
        timeout: seconds until a request counts as timed out; None waits until the end of the run, and `PATIENCE` more.
        retries: how often a request that failed is sent again; its latency goes on counting.
        warmup: seconds of the same load before the run, not counted.
        in_flight: open loop: the most requests in flight at once, for each worker.
        workers: processes that share the load.
        connection: certificates, headers, compression, streams, shared memory.
        metrics: `http://HOST:PORT` of the server's metrics; None tries 8002 for a server at 8000 or 8001.
        ray: the address of a Ray cluster on whose machines the workers run, `local` for one on this machine; None runs
            them here.
        index: which one of the workers this process is, where the others run elsewhere, as in a Kubernetes Job; None
            starts them all.
        begin: when the run begins, in seconds since 1970; None begins as soon as all is ready.
        thresholds: sentences that the run is judged by; where none speaks of errors, a limit is implied
            (`validity.MOST_FAILED`).
    """

    url: str
    duration: float
    concurrency: int | None = None
    rate: float | None = None
    arrival: str = "constant"
    profile: str = "flat"
    trace: str | None = None
    speed: float = 1.0
    requests: int | None = None
    think: float = 0.0
    sequence: int | None = None
    seed: int = 0
    timeout: float | None = None
    retries: int = 0
    warmup: float = 1.0
    in_flight: int = schedule.MOST_IN_FLIGHT
    workers: int = 1
    connection: Connection = PLAIN
    metrics: str | None = None
    ray: str | None = None
    index: int | None = None
    begin: float | None = None
    thresholds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.connection.check(self.url)
        if self.metrics is not None and (address(self.metrics)[0] != "http" or base(self.metrics) not in METRICS):
            raise UsageError("not the address of metrics", where=self.metrics, fix="write http://HOST:PORT")
        if [self.concurrency, self.rate, self.trace].count(None) != 2:
            raise UsageError("a plan has a concurrency, a rate or a trace", fix="give one of the three")
        most: dict[str, float | None] = {"duration": None, "timeout": None, "requests": None, "speed": None}
        most |= {"sequence": None, "workers": 64, "in_flight": None}
        most |= {"concurrency": schedule.MOST_IN_FLIGHT * self.workers, "rate": schedule.FASTEST * self.workers}
        for name, limit in most.items():
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value:g}", fix=f"give a {name} above 0")
            if value is not None and limit is not None and value > limit:
                raise UsageError(f"{name} is {value:g}", fix=f"give a {name} of at most {limit:g}; split larger loads")
        for name in ("seed", "warmup", "think", "retries"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name} is {getattr(self, name):g}", fix="give 0 or more")
        if self.concurrency is not None and self.workers > self.concurrency:
            raise UsageError("there are more workers than requests in flight", fix="use fewer workers")
        if self.think and self.open:
            raise UsageError("an open loop does not think", fix="use a concurrency, or leave the think time away")
        if self.index is not None and not 0 <= self.index < self.workers:
            raise UsageError(f"there is no worker {self.index} of {self.workers}", fix="count them from 0")
        if self.index is not None and self.ray is not None:
            raise UsageError("one worker alone needs no cluster", fix="leave one of --index and --ray away")
        schedule.chosen("arrival", self.arrival)
        schedule.chosen("profile", self.profile)

    @property
    def open(self) -> bool:
        """Whether requests are due at times of their own, whatever the server does."""
        return self.concurrency is None

    def due(self, duration: float, worker: int = 0) -> Iterator[float]:
        """Yield the send times of one worker's share of an open loop that lasts `duration` seconds."""
        if self.trace is not None:
            found = trace.read(Path(self.trace), self.speed)
            times: Iterator[float] = (at for at in found if at < duration)
        else:
            times = schedule.times(self.rate or 0.0, duration, self.seed, self.arrival, self.profile)
        return islice(times, worker, self.requests, self.workers)

    def mean_rate(self) -> float | None:
        """Return the requests per second that an open loop asks for on average; None where only its times say it."""
        return None if self.rate is None else schedule.mean_rate(self.rate, self.duration, self.profile)

    def share(self, whole: int, worker: int) -> int:
        """Return one worker's part of a number of requests."""
        return len(range(worker, whole, self.workers))

    def document(self) -> dict[str, Any]:
        """Return the JSON form as a result file holds it, without the values of headers."""
        return asdict(replace(self, connection=self.connection.hidden()))

    @staticmethod
    def from_document(document: dict[str, Any]) -> "Plan":
        """Return the plan whose fields `document` holds."""
        connection = Connection(**document.get("connection", {}))
        return Plan(**{**document, "connection": connection, "thresholds": tuple(document.get("thresholds", ()))})
