"""Metrics: what a Triton server says of itself, and what two of its answers say of the time between them."""

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadtest.load.metrics import page, samples
from loadtest.load.processes import family
from modelathe.errors import ServerAbsent, ServerNonsense, UsageError
from serve.config.address import parse_url

SUCCESS = "nv_inference_request_success"
FAILURE = "nv_inference_request_failure"
INFERENCES = "nv_inference_count"
EXECUTIONS = "nv_inference_exec_count"
QUEUE = "nv_inference_queue_duration_us"
COMPUTE = {part: f"nv_inference_compute_{part}_duration_us" for part in ("input", "infer", "output")}
LATENCY = "nv_inference_request_summary_us"
PENDING = "nv_inference_pending_request_count"
MACHINE_TOTAL = "nv_cpu_memory_total_bytes"

Samples = dict[tuple[str, str], float]
"""Values by metric and reason or quantile; the second is empty where a model has one value of a metric."""


@dataclass(frozen=True)
class Scrape:
    """What a server said at one moment.

    Args:
        at: when, in seconds of a clock that only goes forward.
        models: the values of each model, by its name and version.
        machine: the values that belong to no model, by metric.
    """

    at: float
    models: dict[tuple[str, str], Samples]
    machine: dict[str, float]


@dataclass(frozen=True)
class Rates:
    """What a version of a model did between two scrapes; a mean over nothing is NaN.

    Args:
        model: its name.
        version: its version.
        requests: answered requests per second.
        failures: failed requests per second, by Triton's reason. What a full queue refuses is not among them.
        batch: inferences per execution: the batch that was really formed.
        queue_ms: milliseconds that an answered request waited.
        compute_ms: milliseconds that it was computed, its inputs and outputs included.
        quantiles_ms: milliseconds from Triton's latency summary, by quantile; NaN where it has seen nothing lately.
        pending: requests that wait at the second scrape.
    """

    model: str
    version: str
    requests: float
    failures: dict[str, float]
    batch: float
    queue_ms: float
    compute_ms: float
    quantiles_ms: dict[str, float]
    pending: int


def address(url: str) -> str:
    """Return the `HOST:PORT` of a metrics address, written so or as `http://HOST:PORT`, with `/metrics` or without.

    Raises:
        UsageError: it is something else.
    """
    scheme, place = parse_url((url if "://" in url else f"http://{url}").removesuffix("/metrics"))
    if scheme != "http":
        raise UsageError("not the address of metrics", where=url, fix="write http://HOST:PORT of the metrics port")
    return place


def fetch(place: str, timeout: float = 5) -> Scrape:
    """Ask the server at `place` (`HOST:PORT`) for its metrics, and wait at most `timeout` seconds.

    Raises:
        ServerAbsent: nothing answers.
        ServerNonsense: what answers are not the metrics of a Triton server.
    """
    url = f"http://{place}/metrics"
    try:
        scrape = parse(page(place, timeout), time.monotonic())
    except OSError as error:
        raise ServerAbsent(
            f"nothing answers: {error.strerror or error}", where=url, fix="start a server with: serve up REPOSITORY"
        ) from None
    except ValueError:
        scrape = Scrape(0, {}, {})
    if not any(name.startswith("nv_") for name in scrape.machine) and not scrape.models:
        raise ServerNonsense(
            "not the metrics of a Triton server", where=url, fix="give the metrics port, 8002 unless chosen otherwise"
        )
    return scrape


def parse(text: str, at: float) -> Scrape:
    """Return what a `/metrics` page says that was read at the second `at`.

    Raises:
        ValueError: a value is no number.
    """
    models: dict[tuple[str, str], Samples] = {}
    machine: dict[str, float] = {}
    for name, labels, value in samples(text):
        if "model" in labels:
            which = labels.get("reason") or labels.get("quantile") or ""
            models.setdefault((labels["model"], labels.get("version", "")), {})[name, which] = value
        elif not labels:
            machine[name] = value
    return Scrape(at, models, machine)


def between(before: Scrape, after: Scrape) -> list[Rates]:
    """Return what each version did that is there at the second scrape, by model and number."""
    seconds = after.at - before.at
    # Of a version that was unloaded, Triton 24.10 keeps the failures and nothing else.
    there = [key for key, samples in after.models.items() if (SUCCESS, "") in samples]
    keys = sorted(there, key=lambda key: (key[0], len(key[1]), key[1]))
    return [_rates(*key, before.models.get(key, {}), after.models[key], seconds) for key in keys]


def _rates(model: str, version: str, then: Samples, now: Samples, seconds: float) -> Rates:
    def grown(metric: str, which: str = "") -> float:
        old, new = then.get((metric, which), 0.0), now.get((metric, which), 0.0)
        # A model that was loaded again counts from zero.
        return new - old if new >= old else new

    answered = grown(SUCCESS)
    return Rates(
        model=model,
        version=version,
        requests=answered / seconds,
        failures={reason: grown(FAILURE, reason) / seconds for metric, reason in now if metric == FAILURE},
        batch=_mean(grown(INFERENCES), grown(EXECUTIONS)),
        queue_ms=_mean(grown(QUEUE), answered) / 1000,
        compute_ms=_mean(sum(map(grown, COMPUTE.values())), answered) / 1000,
        quantiles_ms={which: value / 1000 for (metric, which), value in now.items() if metric == LATENCY},
        pending=int(now.get((PENDING, ""), 0)),
    )


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


def memory(pid: int) -> int | None:
    """Return the bytes of `pid` and all processes below it, shared pages counted once; None if it may not be read."""
    total = None
    for process in family(pid):
        # A process may end while it is looked at.
        with suppress(OSError, ValueError, IndexError):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            total = (total or 0) + int(rollup.split("\nPss:")[1].split()[0]) * 1024
    return total
