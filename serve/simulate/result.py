"""Simulated: a row for each request, a row for each batch, and what is read from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from serve.simulate.instances import Instances

ANSWERED, REFUSED, EXPIRED = range(3)
"""How a request ended: with an answer, because its queue was full or it was too large, because it waited too long."""
REQUEST = np.dtype(
    [
        *(("arrival", np.float64), ("start", np.float64), ("end", np.float64), ("outside", np.float64)),
        *(("level", np.int32), ("batch", np.int32), ("instance", np.int32), ("outcome", np.int8)),
    ]
)
BATCH = np.dtype(
    [("start", np.float64), ("end", np.float64), ("items", np.int32), ("instance", np.int32), ("requests", np.int32)]
)


@dataclass(frozen=True)
class Simulated:
    """What became of each request.

    Args:
        requests: a row of type `REQUEST` for each, in the order in which they came: seconds at which it reached the
            server, at which its call began and ended, how many it spends outside the server, its level, its row in
            `batches` and its instance, −1 where it got no answer, and the outcome; a request without an answer starts
            and ends when it is refused.
        batches: a row of type `BATCH` for each call, in the order in which they began.
        instances: how many there were.
    """

    requests: NDArray[np.void]
    batches: NDArray[np.void]
    instances: int

    @property
    def answered(self) -> NDArray[np.void]:
        """The rows of the requests that got an answer."""
        answered: NDArray[np.void] = self.requests[self.requests["outcome"] == ANSWERED]
        return answered

    @property
    def latencies(self) -> NDArray[np.float64]:
        """Seconds from request to answer as a client sees them, of each that got one, in the order they came."""
        answered = self.answered
        return np.asarray(answered["end"] - answered["arrival"] + answered["outside"])

    def quantile(self, share: float) -> float:
        """Return the seconds within which this share of the answers came; NaN without an answer."""
        latencies = self.latencies
        return float(np.quantile(latencies, share)) if latencies.size else float("nan")

    @property
    def failed(self) -> float:
        """The share of requests that got no answer; 0 of none."""
        return float((self.requests["outcome"] != ANSWERED).mean()) if self.requests.size else 0.0

    @property
    def histogram(self) -> dict[int, int]:
        """How many calls there were of each number of samples."""
        sizes, counts = np.unique(self.batches["items"], return_counts=True)
        return dict(zip(sizes.tolist(), counts.tolist(), strict=True))

    @property
    def mean_batch(self) -> float:
        """Samples of a call on average; NaN without a call."""
        return float(self.batches["items"].mean()) if self.batches.size else float("nan")

    @property
    def span(self) -> float:
        """Seconds from the first request to the last end."""
        return float(self.requests["end"].max() - self.requests["arrival"].min()) if self.requests.size else 0.0

    @property
    def throughput(self) -> float:
        """Answered requests per second; NaN where all happened at once."""
        return self.answered.size / self.span if self.span else float("nan")

    @property
    def busy(self) -> float:
        """The share of the time in which the instances ran calls; NaN where all happened at once."""
        ran = float((self.batches["end"] - self.batches["start"]).sum())
        return ran / (self.span * self.instances) if self.span else float("nan")

    def since(self, seconds: float) -> "Simulated":
        """Return the same without the requests that came, and the calls that began, in the first `seconds`."""
        first = int(np.searchsorted(self.batches["start"], seconds))
        requests = self.requests[self.requests["arrival"] >= seconds].copy()
        requests["batch"] = np.maximum(requests["batch"] - first, -1)
        return replace(self, requests=requests, batches=self.batches[first:])


def assembled(
    at: Sequence[float],
    level: Sequence[int],
    instances: Instances,
    failed: Sequence[tuple[int, float, int]],
    outside: NDArray[np.float64],
) -> Simulated:
    """Return the rows of a simulation that has ended.

    Args:
        at: when each request came.
        level: of each.
        instances: what they ran.
        failed: requests that got no answer, when they were told, and the outcome.
        outside: seconds that each request spends outside the server, float64 [n].
    """
    calls = np.array(instances.calls, np.float64).reshape(-1, 5)
    batches = np.zeros(len(calls), BATCH)
    for column, name in enumerate(BATCH.names or ()):
        batches[name] = calls[:, column]
    requests = np.zeros(len(at), REQUEST)
    requests["arrival"], requests["level"], requests["outside"] = at, level, outside
    order, batch = np.array(instances.order, np.int64), np.repeat(np.arange(len(batches)), batches["requests"])
    requests["batch"] = requests["instance"] = -1
    requests["batch"][order] = batch
    for name in ("start", "end", "instance"):
        requests[name][order] = batches[name][batch]
    for request, now, outcome in failed:
        for name, value in (("start", now), ("end", now), ("outcome", outcome)):
            requests[name][request] = value
    return Simulated(requests, batches, instances.count)
