"""Healing: models of a running server whose backend process died are loaded again, without a gap where that can be.

The carried tritonserver never notices that a backend process has died: the model stays "ready", and the requests that
meet the dead one fail. (Servers from 26.01 on see it by themselves.) One thread looks at the processes, another asks
the models for answers.
"""

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.plan import served
from modelathe.client import Client
from modelathe.errors import ModelatheError
from serve.config.errors import BadRepository
from serve.repository import tree as repositories
from serve.rollout import promotion
from serve.server import control, processes
from serve.server.endpoint import Endpoint
from serve.watch import probe

LOOK = 0.2
"""Seconds between two looks at the processes."""
PERIOD = 1.0
"""Seconds between two questions to a model."""
PATIENCE = 10.0
"""Seconds that an answer may take; a model that takes longer is silent."""
IN_A_ROW = 2
"""How often a model must be found dead before it is healed."""
FIRST_REST, LONGEST_REST = 1.0, 60.0
"""Seconds between two healings of a model: doubled each time, and forgotten after the longest without any."""
LEFT = 30.0
"""Seconds that processes of a healed model get to finish requests; Triton 24.10 may keep them for ever."""

log = logging.getLogger(__name__)


@contextmanager
def watching(endpoint: Endpoint, place: Path) -> Iterator[None]:
    """Watch all models from two threads while the block lasts, those too that come later; healing warns."""
    stop, watch = threading.Event(), Watch(endpoint, place)
    _tried(watch.look)  # what dies from now on was known
    steps = ((watch.look, LOOK), (watch.ask, PERIOD))
    threads = [threading.Thread(target=_forever, args=(*step, stop), name="probe", daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=5)


def _forever(step: Callable[[], None], seconds: float, stop: threading.Event) -> None:
    """Take the step again and again until `stop`; nothing that goes wrong in one ends it."""
    last = ""
    while not stop.wait(seconds):
        last = _tried(step, last)


def _tried(step: Callable[[], None], before: str = "") -> str:
    """Take the step once and return what went wrong, which is a warning unless it is the same as `before`."""
    try:
        step()
        return ""
    except Exception as error:
        if repr(error) != before:
            log.warning("the probe failed and goes on: %r", error)
        return repr(error)


@dataclass
class Rest:
    """When a model may be healed again: `until` a time of `time.monotonic`, after `length` seconds."""

    until: float = 0.0
    length: float = 0.0

    def begin(self, now: float) -> None:
        """Rest from now on, twice as long as the last time unless that was long ago."""
        again = now - self.until < LONGEST_REST
        self.length = min(2 * self.length, LONGEST_REST) if again and self.length else FIRST_REST
        self.until = now + self.length


class Watch:
    """What is known of the models of a server, and what is done about it."""

    def __init__(self, endpoint: Endpoint, place: Path) -> None:
        self._endpoint, self._place = endpoint, place
        self._known: dict[int, str] = {}  # processes that lived, by id, and their models
        self._fallen: dict[int, str] = {}  # those of them that were dead at the last look
        self._replaced: dict[int, float] = {}  # processes that a healing left, and when they are ended
        self._rests: dict[str, Rest] = {}
        self._healing = threading.RLock()
        self._models = list(endpoint.models)
        self._questions: dict[str, probe.Question] = {}
        self._found_dead: Counter[str] = Counter()
        self._answered: Counter[str] = Counter()
        self._rng = np.random.default_rng()

    def look(self) -> None:
        """Heal each model of which a process is dead at a second look, and end what earlier healings left."""
        with self._healing:
            found = processes.scan(self._endpoint.pid)
            fallen = {pid: self._known[pid] for pid in found.dead & self._known.keys()}
            for model in sorted({fallen[pid] for pid in fallen.keys() & self._fallen.keys()}):
                if self._heal(model):
                    fallen = {pid: served for pid, served in fallen.items() if served != model}
            living = {pid: model for pid, model in found.living.items() if pid not in self._replaced}
            self._known, self._fallen = living | fallen, fallen
            self._end_replaced(found.living)

    def ask(self) -> None:
        """Ask every model that was loaded once for an answer, and heal it when it is found dead in a row."""
        self._models = self._served()
        with Client(self._endpoint.plain, timeout=PATIENCE) as client:
            for model in self._models:
                try:
                    state, words = self._state(client, model)
                except ModelatheError as error:
                    state, words = "silent", error.what
                if state == "answers":
                    # A load test counts these out of what the server has answered.
                    self._answered[model] += 1
                    served.tell_probes(os.getpid(), self._answered)
                else:
                    # The version that is live now may take something else.
                    self._questions.pop(model, None)
                    log.info("%s is %s: %s", model, state, words)
                self._found_dead[model] = self._found_dead[model] + 1 if state in ("dead", "not loaded") else 0
                if self._found_dead[model] >= IN_A_ROW:
                    self._heal(model)

    def _state(self, client: Client, model: str) -> tuple[probe.State, str]:
        if model not in self._questions:
            self._questions[model] = probe.question(self._place, model, client)
        return probe.ask(client, self._endpoint, model, self._questions[model], self._rng)

    def _served(self) -> list[str]:
        """Return the models of the repository that were loaded once: what is new there may be on its way in."""
        before = self._models
        try:
            there = repositories.models(self._place)
            found = [model for model in there if model in before or control.is_ready(self._endpoint.http, model)]
            # A pipeline that fails may only miss a model that it calls: those are healed first.
            return sorted(found, key=lambda model: bool(repositories.calls(self._place, model)))
        except BadRepository:
            # Somebody's folder is half copied, or the last model went; whatever else was served still is.
            return [model for model in before if (self._place / model).exists()]

    def _heal(self, model: str) -> bool:
        """Load the model again unless it was just now; return whether its processes are new ones."""
        with self._healing:
            rest, now = self._rests.setdefault(model, Rest()), time.monotonic()
            if now < rest.until or not (self._place / model).exists():
                return False
            before = [pid for pid, served in processes.scan(self._endpoint.pid).living.items() if served == model]
            try:
                # A promotion that is under way would be undone by the configuration that was live before.
                with promotion.alone(self._place, [model], self._endpoint):
                    self._load_again(model, bool(before))
            except ModelatheError as error:
                log.warning("a backend process of %s is dead and loading it again failed: %s", model, error.what)
                return False
            finally:
                rest.begin(time.monotonic())
            self._replaced.update(dict.fromkeys(before, time.monotonic() + LEFT))
            self._known = {pid: served for pid, served in self._known.items() if served != model}
            self._found_dead[model] = 0
            log.warning("a backend process of %s was dead; the model is loaded again", model)
            return True

    def _load_again(self, model: str, some_live: bool) -> None:
        where = self._endpoint.http, self._endpoint.secret, model
        # A server too busy to say whether the model is ready has not said that it is not.
        if some_live and control.readiness(self._endpoint.http, model) is not False:
            control.reload(*where)  # what still answers is not taken away, also if this fails
            return
        control.unload(*where)
        control.load(*where)

    def _end_replaced(self, living: Container[int]) -> None:
        self._replaced = {pid: end for pid, end in self._replaced.items() if pid in living}
        for pid, end in self._replaced.items():
            if time.monotonic() > end:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
