"""The two models, served as `optimize run` serves them by default, and what `serve tune` says of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import serving

from loadtest.record import statistics
from serve.planning import objective
from serve.simulate.configuration import Configuration, stated
from serve.tuning import confirm, kept, trial
from serve.tuning.grid import Space
from serve.tuning.live import Model, Seen, Traffic
from serve.tuning.trial import Subject
from tuning.ledger import OUTPUT, Ledger, NotMeasured

DIGITS, TEXTS = serving.MODEL, serving.TEXTS
MODELS = (DIGITS, TEXTS)
LIMIT_MS = 20
SLO = f"p99 < {LIMIT_MS}ms, errors < 0.1%"
REPOSITORY = OUTPUT / "repository"
FASTEST = 2000.0
"""Requests per second beyond which the load generator takes the server's cores on a machine with two."""


def run(*words: str) -> str:
    """Run a command of ours and return what it prints; what it says of its progress goes on to the terminal.

    Raises:
        NotMeasured: it failed.
    """
    done = subprocess.run([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        raise NotMeasured(f"{' '.join(words)} ended with {done.returncode}")
    return done.stdout


@cache
def subject(model: str) -> Subject:
    """Return a model in the benchmark's own repository, put there the first time."""
    if not (REPOSITORY / model).is_dir():
        REPOSITORY.mkdir(parents=True, exist_ok=True)
        if model == TEXTS:
            serving.publish_texts(REPOSITORY)
        else:
            # One thread, as `optimize run` has it for a call that takes less than a millisecond.
            words = ("--name", model, "--repository", str(REPOSITORY), "--set", "threads=1")
            run("serve", "add", str(serving.COMMITTED), *words)
    return trial.subject(REPOSITORY, model)


def default(model: str) -> Configuration:
    """Return the configuration that the model has now."""
    return stated(subject(model).config)


def tuned(ledger: Ledger, model: str, *options: str) -> dict[str, Any]:
    """Return what `serve tune` prints with these options; the times of calls are kept for all parts."""
    subject(model)
    measured = OUTPUT / model / "measured.json"
    words = ("tune", model, "--repository", str(REPOSITORY), "--measured", str(measured), *options, "--json")
    found: dict[str, Any] = ledger.once(f"{model}: serve tune {' '.join(options)}", _json, "serve", *words)
    return found


def _json(*words: str) -> Any:
    return json.loads(run(*words))


def chosen(model: str, found: Mapping[str, Any]) -> Configuration:
    """Return the configuration that `serve tune` chose, today's where it chose none."""
    took = found["chosen"]
    return configured(default(model), **took) if took else default(model)


def configured(
    base: Configuration, *, threads: int, instances: int, max_batch: int, delay_us: float, **_: Any
) -> Configuration:
    """Return a configuration with what is turned, by the names of documents."""
    turned = {"threads": threads, "instances": instances, "max_batch": max_batch, "delay": delay_us / 1e6}
    return replace(base, **turned)


def space(model: str) -> Space:
    """Return what the simulation knows of a model, from the times that `serve tune` has kept."""
    made = subject(model)
    curves = kept.read(OUTPUT / model / "measured.json", made, len(os.sched_getaffinity(0)))
    if not curves:
        raise NotMeasured(f"{model} was not measured yet: run the part `simulation` first")
    return Space(curves, default(model), int(made.config.max_batch_size), Traffic(FASTEST), objective.parse(SLO))


@contextmanager
def served(model: str, configurations: Mapping[str, Configuration]) -> Iterator[Mapping[str, Model]]:
    """Serve copies of a model, each with a configuration of its own, until the block ends."""
    made, folder = subject(model), OUTPUT / model
    configs = {name: trial.edited(made.config, one) for name, one in configurations.items()}
    with trial.served(made, configs, folder / "server.log") as endpoint:
        specs = {name: confirm.inputs(made, endpoint.plain, name) for name in configs}
        yield {name: Model(endpoint, name, specs[name], folder) for name in configs}


def figures(seen: Seen) -> dict[str, float]:
    """Return what a live run saw: answers per second, p50 and p99 in milliseconds."""
    times = statistics.milliseconds(seen.latencies)
    return {"throughput": seen.rate, "p50": times["p50"], "p99": times["p99"]}
