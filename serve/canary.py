"""Canary: the same requests to two versions of a model, before one replaces the other.

Both are loaded by a throw-away server, side by side, so that what serves meanwhile is left alone.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tritonclient.grpc.model_config_pb2 import ModelConfig

from loadtest.client import Client, connect
from loadtest.errors import LatheError
from loadtest.tensors import Array, Arrays
from serve import model_config, repository, scratch
from serve.server import running

SIDES = ("old", "new")
WARM = 3
"""Requests to each version before time is taken."""


@dataclass(frozen=True)
class Thresholds:
    """What the new version must hold.

    Args:
        agreement: mean likeness of its answers with the old ones, from 0 to 1: the cosine of float outputs, row by row,
            the share of equal rows of others.
        difference: largest absolute difference of a float output; not judged when None.
        slowdown: how many times as long a request may take; broken when the whole interval is above.
    """

    agreement: float = 0.99
    difference: float | None = None
    slowdown: float = 1.1


@dataclass(frozen=True)
class Judgement:
    """One threshold: what was measured, what was wanted."""

    name: str
    passed: bool
    measured: str
    limit: str


@dataclass(frozen=True)
class Comparison:
    """What both versions did with the same requests.

    Args:
        requests: how many were sent to each.
        failed: how many the new version refused that the old one answered.
        agreement: as in `Thresholds`; NaN if nothing could be compared.
        difference: largest absolute difference of a float output; infinite where only one has a value.
        latency_ms: median of each version, alternating, one request at a time.
        slowdown: median of new over old, request by request, and its 95 % interval.
        refused: what the new version said first, if it failed, or if nothing could be compared.
    """

    requests: int
    failed: int
    agreement: float
    difference: float
    latency_ms: dict[str, float]
    slowdown: tuple[float, float, float]
    refused: str = ""

    def judge(self, wanted: Thresholds) -> list[Judgement]:
        """Return a judgement for each threshold."""
        value, low, high = self.slowdown
        found = [
            Judgement("answered", self.failed == 0, f"{self.failed} of {self.requests} failed", "none"),
            Judgement(
                "agreement", self.agreement >= wanted.agreement, f"{self.agreement:.4f}", f"≥ {wanted.agreement:g}"
            ),
            Judgement(
                "not slower",
                not low > wanted.slowdown,
                f"{value:.2f}× the time [{low:.2f}, {high:.2f}]",
                f"interval not wholly above {wanted.slowdown:g}×",
            ),
        ]
        if wanted.difference is not None:
            found.append(
                Judgement(
                    "difference",
                    self.difference <= wanted.difference,
                    f"{self.difference:.3g}",
                    f"≤ {wanted.difference:g}",
                )
            )
        return found


def compare(place: Path, model: str, old: int, new: int, requests: Sequence[Arrays]) -> Comparison:
    """Send every request to both versions and compare the answers and the times.

    Raises:
        BadRepository: a version is not there, or its files changed after it was published.
        ServerFailed: the server does not load one of them.
    """
    with (
        _side_by_side(place, model, (old, new)) as root,
        running(root, grace=0) as endpoint,
        connect(endpoint.grpc) as client,
    ):
        alone = int(repository.config(root, SIDES[0]).HasField("sequence_batching"))
        for side in SIDES:
            for request in requests[:WARM]:
                _ask(client, side, request, alone)
        pairs = [_pair(client, request, number, alone) for number, request in enumerate(requests)]
    return _summary(pairs)


@contextmanager
def _side_by_side(place: Path, model: str, numbers: Sequence[int]) -> Iterator[Path]:
    """Yield a repository with a model `old` and a model `new`, whose files are links to those of the two versions."""
    with scratch.folder() as root:
        called = repository.calls(place, model)
        repository.verify(place, called)
        for name in called:
            _link(root, name, repository.config(place, name), place / name, repository.live(place, name))
        for side, number in zip(SIDES, numbers, strict=True):
            lineage = repository.read_lineage(place, model, number)
            repository.verify_version(place, model, number, lineage)
            config = model_config.parse(lineage["config"])
            config.version_policy.specific.versions[:] = [number]
            _link(root, side, config, place / model, [number])
        yield root


def _link(root: Path, name: str, config: ModelConfig, home: Path, numbers: Sequence[int]) -> None:
    """Lay out versions of a model under `name`, by links; without a cache, which would answer in their place."""
    config.name = name
    config.response_cache.Clear()
    for number in numbers:
        source = (home / str(number)).absolute()
        for file in source.rglob("*"):
            if file.is_file() and file.name != repository.LINEAGE:
                link = root / name / str(number) / file.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)
    (root / name / repository.CONFIG).write_text(model_config.text(config))


Answer = tuple[dict[str, Array] | str, float]
"""The outputs, or what the server said instead; and seconds."""


def _ask(client: Client, side: str, request: Arrays, sequence: int) -> Answer:
    begun = time.perf_counter()
    try:
        return client.infer(side, request, sequence=sequence), time.perf_counter() - begun
    except LatheError as error:
        return error.what, time.perf_counter() - begun


def _pair(client: Client, request: Arrays, number: int, sequence: int) -> dict[str, Answer]:
    """Ask both, the one first now, the other first next time."""
    order = SIDES if number % 2 else SIDES[::-1]
    return {side: _ask(client, side, request, sequence) for side in order}


def _summary(pairs: Sequence[dict[str, Answer]]) -> Comparison:
    likeness: list[float] = []
    differences = [0.0]
    refused = [pair["new"][0] for pair in pairs if isinstance(pair["new"][0], str)]
    failed = [pair for pair in pairs if isinstance(pair["new"][0], str) and not isinstance(pair["old"][0], str)]
    answered = [pair for pair in pairs if not any(isinstance(pair[side][0], str) for side in SIDES)]
    for pair in answered:
        old, new = pair["old"][0], pair["new"][0]
        if not isinstance(old, str) and not isinstance(new, str):
            likeness.append(min((_likeness(old[name], new.get(name)) for name in old), default=0.0))
            differences += [_difference(old[name], new.get(name)) for name in old]
    times = {side: np.array([pair[side][1] for pair in answered]) for side in SIDES}
    return Comparison(
        len(pairs),
        len(failed),
        float(np.mean(likeness)) if likeness else float("nan"),
        max(differences),
        {side: float(np.median(seconds)) * 1e3 if len(seconds) else float("nan") for side, seconds in times.items()},
        _median(times["new"] / times["old"]),
        str(refused[0]) if refused and (failed or not answered) else "",
    )


def _likeness(old: Array, new: Array | None) -> float:
    """Return the mean cosine of the rows of a float output, the share of equal rows of another one."""
    if new is None or new.shape != old.shape or new.dtype != old.dtype:
        return 0.0
    if not old.size:
        return 1.0
    one, two = old.reshape(len(old), -1), new.reshape(len(new), -1)
    if old.dtype.kind != "f":
        return float((one == two).all(1).mean())
    one, two = one.astype(np.float64), two.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (one * two).sum(1) / lengths
    # Two rows of zeros, or with NaN in the same places, are the same answer.
    same = ((one == two) | (np.isnan(one) & np.isnan(two))).all(1)
    return float(np.where(same, 1.0, np.nan_to_num(cosine)).mean())


def _difference(old: Array, new: Array | None) -> float:
    if old.dtype.kind != "f":
        return 0.0
    if new is None or new.shape != old.shape:
        return float("inf")
    if not old.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        apart = np.abs(old.astype(np.float64) - new)
    # NaN beside NaN is the same answer, also infinity beside the same infinity; beside anything else it is none.
    same = (old == new) | (np.isnan(old) & np.isnan(new))
    return float(np.where(same, 0.0, np.nan_to_num(apart, nan=np.inf, posinf=np.inf)).max())


def _median(values: Any) -> tuple[float, float, float]:
    """Return the median and its 95 % interval from the order of the values, which assumes nothing of them."""
    if not len(values):
        return (float("nan"),) * 3
    ordered = np.sort(values)
    below = int(stats.binom.ppf(0.025, len(ordered), 0.5))
    low, high = ordered[max(0, below - 1)], ordered[min(len(ordered) - 1, len(ordered) - below)]
    return float(np.median(ordered)), float(low), float(high)
