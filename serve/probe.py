"""The probe: a small request to every model each second, which finds a dead backend process and has it replaced.

The carried tritonserver never notices that a backend process has died: the model stays "ready" and every request to it
fails. Unloading and loading the model starts a new process. (Servers from 26.01 on see it by themselves.)
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loadtest.client import Client
from loadtest.errors import LatheError, ModelMissing, ServerAbsent
from loadtest.tensors import Arrays
from serve import control, interface
from serve import repository as repositories
from serve.errors import BadRepository

if TYPE_CHECKING:
    from serve.server import Endpoint

PERIOD = 1.0  # seconds
DEAD = "is not healthy"
"""What the server's answer says when the model's backend process has died."""

SEQUENCE = 2**63 - 1
"""The id of the sequence that each request of the probe makes up; ids of clients rarely get so far."""

log = logging.getLogger(__name__)


@contextmanager
def watching(endpoint: "Endpoint", place: Path) -> Iterator[None]:
    """Probe all models from a thread while the block lasts, those too that come later; what it heals is a warning."""
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(endpoint, place, stop), name="probe", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def health(endpoint: "Endpoint", place: Path) -> dict[str, str]:
    """Ask every model of the repository once, and return `answers`, or what the server said instead, for each."""
    found = {}
    with Client(endpoint.plain, timeout=10) as client:
        for model in repositories.models(place):
            try:
                client.infer(model, request(client, place, model), sequence=_alone(place, model))
                found[model] = "answers"
            except ModelMissing:
                found[model] = f"not loaded; load it with: serve promote {model}"
            except LatheError as error:
                found[model] = error.what
    return found


def _watch(endpoint: "Endpoint", place: Path, stop: threading.Event) -> None:
    requests: dict[str, tuple[Arrays, int]] = {}
    models = list(endpoint.models)
    with Client(endpoint.plain, timeout=30) as client:
        while not stop.wait(PERIOD):
            models = _served(endpoint, place, models)
            for model in models:
                try:
                    if model not in requests:
                        requests[model] = request(client, place, model), _alone(place, model)
                    inputs, sequence = requests[model]
                    client.infer(model, inputs, sequence=sequence)
                except ServerAbsent as error:
                    log.info("the probe of %s got no answer: %s", model, error.what)
                except LatheError as error:
                    # The version that is live now may take something else.
                    requests.pop(model, None)
                    # Not ready is what an earlier attempt left that failed half-way. Any other answer, a full queue
                    # for one, comes from a process that lives.
                    dead = DEAD in error.what or not control.is_ready(endpoint.http, model)
                    if dead and (place / model).exists():
                        _heal(endpoint, model)


def _served(endpoint: "Endpoint", place: Path, before: Sequence[str]) -> list[str]:
    """Return the models of the repository that the server has loaded once: what is new there may be on its way in."""
    try:
        there = repositories.models(place)
        found = [model for model in there if model in before or control.is_ready(endpoint.http, model)]
        # A pipeline that fails may only miss a model that it calls: those are healed first.
        return sorted(found, key=lambda model: bool(repositories.calls(place, model)))
    except BadRepository:
        # Somebody's folder is half copied, or the last model went; whatever else was served still is.
        return [model for model in before if (place / model).exists()]


def _alone(place: Path, model: str) -> int:
    """Return the id of the probe's own sequence for a model that remembers, else 0."""
    return SEQUENCE if repositories.config(place, model).HasField("sequence_batching") else 0


def request(client: Client, place: Path, model: str) -> Arrays:
    """Return the smallest request of the model, by its interface."""
    rng = np.random.default_rng(0)
    inputs = interface.read(place, model, client=client).inputs
    return {spec.name: spec.generate(rng, size="minimum") for spec in inputs}


def _heal(endpoint: "Endpoint", model: str) -> None:
    try:
        # Loading alone does nothing: to the server the model is loaded.
        control.unload(endpoint.http, endpoint.secret, model)
        control.load(endpoint.http, endpoint.secret, model)
    except LatheError as error:
        log.warning("the backend process of %s is dead and loading it again failed: %s", model, error.what)
    else:
        log.warning("the backend process of %s was dead; the model is loaded again", model)
