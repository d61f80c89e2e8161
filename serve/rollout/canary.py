"""Canary: the same requests to two versions of a model, before one replaces the other.

Both are loaded by a throw-away server, side by side, so that what serves meanwhile is left alone.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats
from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe.client import Client, connect
from modelathe.errors import ModelatheError
from modelathe.tensors import Array, Arrays
from serve.config import model_config
from serve.repository import scratch
from serve.repository import tree as repository
from serve.rollout import likeness
from serve.server.tritonserver import running

SIDES = ("old", "new")
WARM = 3
"""Requests to each version before time is taken."""
FEWEST, DRAWS = 100, 2000
"""Of fewer pairs no interval is drawn; how often pairs are drawn again."""
Interval = tuple[float, float, float]
"""A value and the ends of its 95 % interval."""
Verdict = Literal["passed", "undecided", "broken"]


@dataclass(frozen=True)
class Thresholds:
    """What the new version must hold; each is passed only when the whole 95 % interval is within it.

    Args:
        agreement: least likeness of a row with the old version's (`serve.rollout.likeness`), from -1 to 1.
        unlike: share of the rows that may be less like than that; above 0, which no number of requests shows.
        flips: likewise, share of the rows whose largest value may stand in another place.
        difference: largest absolute difference of a float output; not judged when None.
        slowdown: how many times as long a request may take, in the median and in the sum of all.
    """

    agreement: float = 0.99
    unlike: float = 0.01
    flips: float = 0.01
    difference: float | None = None
    slowdown: float = 1.1


@dataclass(frozen=True)
class Judgement:
    """One threshold: what was measured, what was wanted. Undecided is not passed.

    So many `requests` would pass it if what they measure is the same; None where that would not pass.
    """

    name: str
    verdict: Verdict
    measured: str
    limit: str
    requests: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the new version is known to hold it."""
        return self.verdict == "passed"

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Comparison:
    """What both versions did with the same requests.

    Args:
        requests: how many were sent to each.
        failed: how many the new version refused that the old one answered.
        rows: the rows of the answers that both gave.
        latency_ms: median of each version, alternating, one request at a time.
        slowdown: median of new over old, request by request, and its 95 % interval.
        total: time of all requests, new over old, and its 95 % interval.
        refused: what the new version said first, if it failed, or if nothing could be compared.
    """

    requests: int
    failed: int
    rows: likeness.Rows
    latency_ms: dict[str, float]
    slowdown: Interval
    total: Interval
    refused: str = ""

    def document(self) -> dict[str, Any]:
        """Return the JSON form: of the likeness the mean, the lowest hundredth and the worst."""
        alike = self.rows.likeness
        return {
            "requests": self.requests,
            "failed": self.failed,
            "rows": len(alike),
            "agreement": float(alike.mean()) if len(alike) else None,
            "lowest": float(np.quantile(alike, 0.01)) if len(alike) else None,
            "worst": float(alike.min()) if len(alike) else None,
            "flipped": int(self.rows.flipped.sum()),
            "difference": self.rows.difference,
            "latency_ms": self.latency_ms,
            "slowdown": self.slowdown,
            "total": self.total,
            "refused": self.refused,
        }

    def judge(self, wanted: Thresholds) -> list[Judgement]:
        """Return a judgement for each threshold."""
        alike, count = self.rows.likeness, len(self.rows.likeness)
        answered: Verdict = "broken" if self.failed else "passed" if count else "undecided"
        unlike = int((~(alike >= wanted.agreement)).sum())
        worst = f", the worst {alike.min():.4f}" if count else ""
        found = [
            Judgement("answered", answered, f"{self.failed} of {self.requests} failed", "none"),
            self._share("agreement", unlike, f"rows below {wanted.agreement:g}{worst}", wanted.unlike),
            self._share("labels", int(self.rows.flipped.sum()), "rows with another label", wanted.flips),
            self._time("not slower", self.slowdown, wanted.slowdown),
            self._time("not slower in all", self.total, wanted.slowdown),
        ]
        if wanted.difference is not None:
            within = self.rows.difference <= wanted.difference
            verdict: Verdict = "broken" if not within else "passed" if count else "undecided"
            found.append(Judgement("difference", verdict, f"{self.rows.difference:.3g}", f"≤ {wanted.difference:g}"))
        return found

    def _share(self, name: str, bad: int, what: str, limit: float) -> Judgement:
        count = len(self.rows.likeness)
        low, high = _proportion(bad, count)
        needed, requests = count, None
        if bad < limit * count:
            while not _proportion(bad * needed // count, needed)[1] <= limit:
                needed *= 2
            requests = math.ceil(needed * self.requests / count)
        measured = f"{bad} of {count} {what} [{low:.2%}, {high:.2%}]"
        return Judgement(name, _verdict(low, high, limit), measured, f"interval within {limit:.2%}", requests)

    def _time(self, name: str, found: Interval, limit: float) -> Judgement:
        value, low, high = found
        needed = None
        if value < limit:
            width = (high - value) / (limit - value)
            needed = math.ceil(self.requests * width**2) if math.isfinite(width) else max(FEWEST, 2 * self.requests)
        return Judgement(
            name,
            _verdict(low, high, limit),
            f"{value:.2f}× the time [{low:.2f}, {high:.2f}]",
            f"interval within {limit:g}×",
            needed,
        )


def _verdict(low: float, high: float, limit: float) -> Verdict:
    """Return the verdict on an interval; with NaN at either end it is undecided."""
    return "passed" if high <= limit else "broken" if low > limit else "undecided"


def _proportion(bad: int, count: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share (Clopper and Pearson, 1934)."""
    if not count:
        return 0.0, 1.0
    interval = stats.binomtest(bad, count).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


def compare(place: Path, model: str, old: int, new: int, requests: Sequence[Arrays]) -> Comparison:
    """Send every request to both versions and compare the answers and the times.

    Raises:
        BadRepository: a version is not there, or its files changed after it was published.
        ModelRefused: the server does not load one of them.
    """
    with (
        _side_by_side(place, model, (old, new)) as root,
        running(root, grace=0) as endpoint,
        connect(endpoint.grpc) as client,
    ):
        sequence = int(repository.config(root, SIDES[0]).HasField("sequence_batching"))
        for side in SIDES:
            for request in requests[:WARM]:
                _ask(client, side, request, sequence)
        pairs = [_pair(client, request, number, sequence) for number, request in enumerate(requests)]
        batched = bool(repository.config(root, SIDES[0]).max_batch_size)
    return _summary(pairs, batched)


@contextmanager
def _side_by_side(place: Path, model: str, numbers: Sequence[int]) -> Iterator[Path]:
    """Yield a repository with a model `old` and a model `new`, whose files are links to those of the two versions.

    Of a pipeline each side has the parts that were published with it; what else is called is the live version.
    """
    with scratch.folder() as root:
        called: set[str] = set()
        for side, number in zip(SIDES, numbers, strict=True):
            called |= _lay_out(root, side, place, model, number)
        repository.verify(place, sorted(called))
        for name in called:
            _link(root, name, repository.config(place, name), place / name, repository.live(place, name))
        yield root


def _lay_out(root: Path, name: str, place: Path, model: str, number: int) -> set[str]:
    """Lay out a version under `name`, and its own parts under `name.PART`; return the other models that it calls."""
    lineage = repository.read_lineage(place, model, number)
    repository.verify_version(place, model, number, lineage)
    config = model_config.parse(lineage["config"])
    config.version_policy.specific.versions[:] = [number]
    steps = config.ensemble_scheduling.step
    called = {step.model_name for step in steps} | {call["model"] for call in lineage.get("calls", ())}
    parts = {part: one for part, one in lineage.get("parts", {}).items() if part in called}
    for step in steps:
        if step.model_name in parts:
            step.model_name = f"{name}.{step.model_name}"
    _link(root, name, config, place / model, [number])
    others = called - parts.keys()
    for part, one in parts.items():
        others |= _lay_out(root, f"{name}.{part}", place, part, one)
    return others


def _link(root: Path, name: str, config: ModelConfig, home: Path, numbers: Sequence[int]) -> None:
    """Lay out versions of a model under `name`, by links; without a cache, which would answer in their place."""
    config.name = name
    config.response_cache.Clear()
    for number in numbers:
        source = (home / str(number)).absolute()
        (root / name / str(number)).mkdir(parents=True)  # an ensemble has no file in it
        for file in source.rglob("*"):
            if file.is_file() and file.name not in (repository.LINEAGE, repository.PAGE):
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
    except ModelatheError as error:
        return error.what, time.perf_counter() - begun


def _pair(client: Client, request: Arrays, number: int, sequence: int) -> dict[str, Answer]:
    """Ask both, the one first now, the other first next time."""
    order = SIDES if number % 2 else SIDES[::-1]
    return {side: _ask(client, side, request, sequence) for side in order}


def _summary(pairs: Sequence[dict[str, Answer]], batched: bool = True) -> Comparison:
    refused = [pair["new"][0] for pair in pairs if isinstance(pair["new"][0], str)]
    failed = [pair for pair in pairs if isinstance(pair["new"][0], str) and not isinstance(pair["old"][0], str)]
    answers, taken = [], []
    for pair in pairs:
        (old, before), (new, after) = pair["old"], pair["new"]
        if not isinstance(old, str) and not isinstance(new, str):
            answers.append((old, new))
            taken.append((before, after))
    times = dict(zip(SIDES, np.array(taken).reshape(-1, 2).T, strict=True))
    medians = {side: float(np.median(seconds)) * 1e3 if len(seconds) else math.nan for side, seconds in times.items()}
    return Comparison(
        len(pairs),
        len(failed),
        likeness.compare(answers, batched),
        medians,
        _median(times["new"] / times["old"]),
        _total(times["old"], times["new"]),
        str(refused[0]) if refused and (failed or not answers) else "",
    )


def _median(values: Array) -> Interval:
    """Return the median and its 95 % interval from the order of the values, which assumes nothing of them.

    Of fewer than six values not even the smallest and the largest make such an interval.
    """
    if not len(values):
        return (float("nan"),) * 3
    ordered = np.sort(values)
    below = int(stats.binom.ppf(0.025, len(ordered), 0.5))
    low, high = (ordered[below - 1], ordered[len(ordered) - below]) if below else (0.0, float("inf"))
    return float(np.median(ordered)), float(low), float(high)


def _total(old: Array, new: Array) -> Interval:
    """Return the ratio of the sums and its 95 % interval: pairs are drawn again, the longest twentieth cut short.

    The median does not see that a third of the requests takes three times as long.
    """
    count = len(old)
    if not count:
        return (float("nan"),) * 3
    longest = np.quantile(np.concatenate([old, new]), 0.95)
    old, new = np.minimum(old, longest), np.minimum(new, longest)
    value = float(new.sum() / old.sum())
    if count < FEWEST:
        return value, 0.0, float("inf")
    drawn = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    low, high = np.quantile(new[drawn].sum(1) / old[drawn].sum(1), [0.025, 0.975])
    return value, float(low), float(high)
