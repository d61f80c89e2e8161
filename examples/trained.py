"""Weights of the example models: trained once on first use, then kept under build/examples."""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from optimize import Workload
from optimize.judge import evaluate
from optimize.predict.module import TorchPredictor
from optimize.source import splits
from optimize.source.code import code
from optimize.step.contract import Context
from optimize.train import fit as train
from serve.config.target import Target

CACHE = Path(__file__).parent.parent / "build" / "examples"
SEED = 0

Training = Callable[[nn.Module, Workload], None]
"""Trains a freshly initialized module of the workload in place."""


def by_loss(epochs: int, learning_rate: float = 2e-3) -> Training:
    """Return the training that makes the workload's own loss small on its training batches."""

    def fit(module: nn.Module, workload: Workload) -> None:
        context = Context(workload, module, Target(), SEED, Path(), lambda text, fraction: None)
        objective = train.healing(context)
        train.fit(module, context, objective, name=workload.name, epochs=epochs, learning_rate=learning_rate)

    return fit


def learned(untrained: Callable[[], Workload], file: str, training: Training) -> Workload:
    """Return the workload with a model function that loads the trained weights, and trains them where there are none.

    Weights that were made from another version of `file` or of the data are trained again.

    Args:
        untrained: makes the workload, its random generators in their first state; its model has any weights.
        file: the example's file, `__file__`.
        training: how the weights come about.
    """
    workload = untrained()

    @functools.cache
    def model() -> nn.Module:
        fresh = replace(untrained(), source=f"{file}:workload")
        # Not of the training data: reading it would advance its random generator.
        path = CACHE / f"{workload.name}.safetensors"
        wanted = code(fresh.source) | dict(splits.read(replace(fresh, training=None)).digests)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            module = fresh.build()
            if _made_from(path) != wanted:
                print(f"training the weights of {workload.name}, once, into {path}", file=sys.stderr, flush=True)
                training(module, fresh)
                _save(module, path, wanted)
        module.load_state_dict(load_file(path))
        return module

    return replace(workload, model=model)


def again(workload: Workload) -> None:
    """Train the weights anew and print the scores on the evaluation set."""
    (CACHE / f"{workload.name}.safetensors").unlink(missing_ok=True)
    quality = evaluate.evaluate(TorchPredictor(workload.build(), workload.outputs), workload)
    print(", ".join(f"{score.metric} {score.value:.4f}" for score in quality.scores))


def _made_from(path: Path) -> dict[str, str] | None:
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, str] | None = file.metadata()
            return found
    except (FileNotFoundError, SafetensorError):
        return None


def _save(module: nn.Module, path: Path, made_from: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}")
    save_file(module.state_dict(), written, made_from)
    written.replace(path)
