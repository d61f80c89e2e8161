"""The probe: a small request to a model, and what its answer says: the model answers, is silent, or is dead.

*Dead* means that a backend process is gone, *not loaded* what it says. *Silent* is everything else that is no answer: a
full queue, a request that was refused, a server too busy even to say whether the model is ready. A silent model may be
a healthy one with too much to do, and nothing is done to it (`serve.watch.healing`).
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe.client import Client
from modelathe.errors import ModelatheError, ModelMissing
from modelathe.tensors import Arrays, TensorSpec
from serve.repository import interface
from serve.repository import tree as repositories
from serve.server import control, processes
from serve.server.endpoint import Endpoint

State = Literal["answers", "silent", "dead", "not loaded"]
DEAD = "is not healthy"
"""What the server's answer says when the model's backend process has died."""

SEQUENCE = 2**63 - 1
"""The id of the sequence that each request of the probe makes up; ids of clients rarely get so far."""
UNIQUE_BITS = 64
"""With so many random bits in a request, no two are alike."""


@dataclass(frozen=True)
class Question:
    """What the probe asks a model.

    Args:
        inputs: the specs of the model's inputs.
        batch: samples of a request; None for the smallest size of every dim.
        sequence: the id of the probe's own sequence for a model that remembers, else 0.
    """

    inputs: tuple[TensorSpec, ...]
    batch: int | None
    sequence: int

    def draw(self, rng: np.random.Generator) -> Arrays:
        """Return the arrays of one request; no two are alike, as far as the values that the inputs take allow it."""
        size = "minimum" if self.batch is None else "typical"
        return {spec.name: spec.generate(rng, self.batch, size) for spec in self.inputs}


def question(place: Path, model: str, client: Client) -> Question:
    """Return the smallest question for the model, by its interface.

    Raises:
        BadRepository: its configuration or lineage cannot be read.
    """
    found = interface.read(place, model, client=client)
    sequence = SEQUENCE if found.config.HasField("sequence_batching") else 0
    return Question(found.inputs, _samples(found.config, found.inputs), sequence)


def _samples(config: ModelConfig, inputs: tuple[TensorSpec, ...]) -> int | None:
    """Return how many samples make a request unique: a response cache answers what is alike in the model's place."""
    if not config.response_cache.enable:
        return None
    bits = sum(_bits(spec) for spec in inputs)
    return min(max(1, math.ceil(UNIQUE_BITS / max(bits, 1))), max(1, int(config.max_batch_size)))


def _bits(spec: TensorSpec) -> float:
    """Return how many random bits a sample of generated values has, roughly."""
    low, high = spec.values or (0, 1)
    if spec.dtype == "object":
        one = math.log2(len(spec.examples) or 10**6)
    elif spec.dtype.startswith("float"):
        one = (10 if spec.dtype == "float16" else 24) * (low < high)
    else:
        one = math.log2(max(1, int(high) - int(low) + 1))
    return one * math.prod(spec.shape(1))


def ask(client: Client, endpoint: Endpoint, model: str, asked: Question, rng: np.random.Generator) -> tuple[State, str]:
    """Ask the model once, and return its state and, unless it answers, what was said instead."""
    try:
        client.infer(model, asked.draw(rng), sequence=asked.sequence)
        return "answers", ""
    except ModelMissing:
        return "not loaded", f"load it with: serve promote {model}"
    except ModelatheError as error:
        # A server that does not even say whether the model is ready has said nothing about it.
        dead = DEAD in error.what or control.readiness(endpoint.http, model) is False
        return "dead" if dead else "silent", error.what


def health(endpoint: Endpoint, place: Path) -> dict[str, str]:
    """Ask every model of the repository once; return `answers`, or another state and why, for each."""
    living = Counter(processes.scan(endpoint.pid).living.values())
    found, rng = {}, np.random.default_rng()
    with Client(endpoint.plain, timeout=10) as client:
        for model in repositories.models(place):
            try:
                state, words = ask(client, endpoint, model, question(place, model, client), rng)
            except ModelatheError as error:
                state, words = "silent", error.what
            wanted = processes.wanted(repositories.config(place, model), len(repositories.live(place, model)))
            if state in ("answers", "silent") and living and living[model] < wanted:
                state, words = "dead", f"{wanted - living[model]} of its {wanted} backend processes are gone"
            found[model] = {"answers": state, "not loaded": f"{state}; {words}"}.get(state, f"{state}: {words}")
    return found
