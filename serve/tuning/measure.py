"""Measure: the time of a call by batch size and threads, through the backend's own process."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from loadtest.plan.data import payload
from loadtest.record.counts import Statistics, counted
from modelathe.client import Client, connect
from modelathe.errors import MachineError, ServerNonsense
from modelathe.tensors import Arrays, TensorSpec
from serve.server.endpoint import Endpoint
from serve.simulate.service import Curve, Seconds

ROUNDS, SECONDS, LEAST, PAYLOADS = 2, 0.15, 10, 8
"""Rounds through all sizes; how long each size is asked for, how often at the least, of how many different requests."""
WARM = 0.05
"""Seconds of the same calls before, unmeasured."""
AGAIN = 1.3
"""How many times longer the same calls may take in one round than in the other."""
Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Asked:
    """A model that is measured.

    Args:
        endpoint: where it answers.
        name: its name there; each request is a call of it, without the dynamic batcher.
        inputs: as requests carry them.
        instances: how many it has.
        largest: the most samples of a request; 0 where it takes no batches.
    """

    endpoint: Endpoint
    name: str
    inputs: list[TensorSpec]
    instances: int
    largest: int


def sizes(largest: int) -> list[int]:
    """Return 1, 2, 4, ... and the largest batch."""
    doubled = [2**power for power in range(max(1, largest).bit_length())]
    return sorted({*doubled, max(1, largest)})


def curve(asked: Asked, tell: Tell) -> Curve:
    """Return the times of a call by batch size, and how they grow while several instances run.

    A client sees how long each request takes, the server counts what of it was the call on average; what is between
    the two is taken for equal in all requests of a size.

    Raises:
        MachineError: the same calls took other times in one round than in the other.
    """
    wanted = sizes(asked.largest)
    rounds: list[dict[int, Seconds]] = []
    with connect(asked.endpoint.plain) as client:
        for number in range(ROUNDS):
            rounds.append({})
            for place, size in enumerate(wanted):
                share = (number + place / len(wanted)) / ROUNDS
                tell(f"measuring calls: {asked.name}, {size} samples", share)
                rounds[-1][size] = _calls(client, asked, size)
    _check_calm(*rounds)
    return Curve({size: np.concatenate([one[size] for one in rounds]) for size in wanted}, _together(asked))


def _calls(client: Client, asked: Asked, size: int) -> Seconds:
    """Return the seconds of each call, float64 [n], with one request in flight."""
    requests = payload.generate(asked.inputs, PAYLOADS, size, size)
    _asking(client, asked.name, requests, WARM)
    before = _counted(client, asked.name)
    took = _asking(client, asked.name, requests, SECONDS)
    mean = _mean(_counted(client, asked.name) - before)
    # What is no part of the call may have varied too: no call is shorter than half of the mean.
    found: Seconds = np.maximum(took - (took.mean() - mean), mean / 2)
    return found


def _asking(client: Client, model: str, requests: Sequence[Arrays], seconds: float) -> Seconds:
    """Send one request after the other for so long, and return the seconds of each, float64 [n]."""
    seen: list[float] = []
    end = time.perf_counter() + seconds
    while len(seen) < LEAST or time.perf_counter() < end:
        begin = time.perf_counter()
        client.infer(model, requests[len(seen) % PAYLOADS])
        seen.append(time.perf_counter() - begin)
    return np.array(seen)


def _together(asked: Asked) -> tuple[float, ...]:
    """Return how many times longer a call takes while 1, 2, ... instances run."""
    size = max(1, asked.largest // 2)
    means = [_busy(asked, running, size) for running in range(1, asked.instances + 1)]
    return tuple(max(1.0, mean / means[0]) for mean in means)


def _busy(asked: Asked, running: int, size: int) -> float:
    """Return the mean seconds of a call while so many requests are in flight."""
    with connect(asked.endpoint.plain) as watching:
        before = _counted(watching, asked.name)
        with ThreadPoolExecutor(running) as pool:
            for done in [pool.submit(_ask, asked, size, seed) for seed in range(running)]:
                done.result()
        return _mean(_counted(watching, asked.name) - before)


def _ask(asked: Asked, size: int, seed: int) -> None:
    """Send one request after the other."""
    requests = payload.generate(asked.inputs, PAYLOADS, seed, size)
    with connect(asked.endpoint.plain) as client:
        _asking(client, asked.name, requests, ROUNDS * SECONDS)


def _counted(client: Client, model: str) -> Statistics:
    """Return what the server counted, once it stands still: it counts a request a moment after it has answered it."""
    last = None
    for _ in range(40):
        now = counted(client, model)
        if now is None:
            break
        if now == last:
            return now
        last = now
        time.sleep(0.02)
    raise ServerNonsense("the server does not say how long its calls take", where=client.url, fix="tune again")


def _mean(counts: Statistics) -> float:
    """Return the mean seconds of a call; each request was one."""
    spent = counts.compute_input_ns + counts.compute_infer_ns + counts.compute_output_ns
    return spent / max(1, counts.success) / 1e9


def _check_calm(first: Mapping[int, Seconds], last: Mapping[int, Seconds]) -> None:
    """Compare the rounds, which should differ in nothing: the median of the sizes' ratios of medians.

    Raises:
        MachineError: they do.
    """
    ratio = float(np.median([np.median(last[size]) / np.median(first[size]) for size in first]))
    if not 1 / AGAIN < ratio < AGAIN:
        raise MachineError(
            f"this machine is too busy to measure: the same calls took {ratio:.2f} times as long a moment later",
            fix="end what else runs here, and tune again",
        )
