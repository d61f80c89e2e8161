"""Contract: what every compression method gets, gives and says of itself."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optimize.source.workload import Workload
from serve.config.target import Target

if TYPE_CHECKING:
    from torch import nn

Subject = Any
"""An `nn.Module` before export, the `Path` of an ONNX file after."""


@dataclass(frozen=True)
class Context:
    """What a method may use beside its subject.

    Args:
        workload: the user's model, data and metric.
        trained: the trained model as the user brought it: the teacher. Not to be changed.
        target: where the result will run.
        seed: seeds every random choice.
        scratch: an empty folder of this step's own, gone when the step ends.
        checkpoint: a folder that outlives a killed run and is found again by the next one that makes the same bundle;
            None where nothing is kept.
        progress: called with a line of text, or with a text and a fraction in [0, 1].
        methods: the configs and methods by name, for a method that searches over others.
        exported: what `export.onnx` with its defaults made of this very module, None where that was not made yet.
    """

    workload: Workload
    trained: "nn.Module"
    target: Target
    seed: int
    scratch: Path
    progress: Callable[[str, float], None]
    checkpoint: Path | None = None
    methods: "Mapping[str, tuple[type, Method]]" = field(default_factory=dict)
    exported: Path | None = None


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        name: `family.method`, as recipes spell it.
        stage: what the method works on: the torch model, the ONNX graph, or the way from one to the other.
        promises: what the recipe's result owes because of this method: `smaller`, `faster`, both or neither.
        needs: `needs(config)` names the fields of the workload that must be there.
        apply: `apply(config, subject, context)`; gets a private copy and returns the new subject.
        matches: `matches(subject)` lists what the method could change, for the message when it changed nothing.
        selects: whether it chooses between models by their scores, on samples that do not judge the result.
        suited: `suited(config, target)` returns the config with what it leaves to the target; raises BadRecipe where
            the target's runtime lacks what the method writes.
    """

    name: str
    stage: Literal["torch", "export", "graph"]
    promises: frozenset[str]
    needs: Callable[[Any], Iterable[str]]
    apply: Callable[[Any, Subject, Context], Subject]
    matches: Callable[[Subject], list[str]]
    selects: bool = False
    suited: Callable[[Any, Target], Any] = lambda config, target: config


def fingerprint(subject: Subject) -> str:
    """Return a digest of a module's state, or of an ONNX file's bytes."""
    if not isinstance(subject, Path):
        from optimize.model import state

        return state.fingerprint(subject)
    data = hashlib.sha256()
    for file in sorted(subject.parent.glob(f"{subject.name}*")):
        data.update(file.read_bytes())
    return data.hexdigest()
