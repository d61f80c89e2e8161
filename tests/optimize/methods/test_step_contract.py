"""What every row of the table of methods owes. A new method is enrolled by being in the table."""

import functools
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from modelathe.errors import ModelatheError
from optimize.methods import apply as step
from optimize.methods.export.onnx import Onnx, export
from optimize.methods.table import METHODS, NAMES
from optimize.model.errors import BadWorkload, NoEffect
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.source.workload import Workload
from optimize.step.contract import Context, fingerprint
from serve.config.target import Target
from tests.optimize import architectures

TRANSFORMERS = ("prune.heads", "prune.layers", "export.fuse")
"""Methods that find nothing to do in a CNN."""

CONFIGS = pytest.mark.parametrize("kind", list(METHODS), ids=[method.name for method in METHODS.values()])


def config(kind: type) -> Any:
    """The defaults, but no longer training than it must be."""
    names = {entry.name for entry in fields(kind)}
    return kind(epochs=1) if "epochs" in names else kind()


def context(workload: Workload, scratch: Path) -> Context:
    return Context(workload, workload.build(), Target(cores=2), 0, scratch, lambda text, fraction: None)


@pytest.fixture(scope="module")
def exported(small: Workload, encoder: Workload, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {
        made.name: export(made.build(), made.inputs, made.outputs, folder / f"{made.name}.onnx")
        for made in (small, encoder)
    }


@pytest.fixture
def workload(kind: type, small: Workload, encoder: Workload) -> Workload:
    """A workload that suits the method."""
    return encoder if METHODS[kind].name in TRANSFORMERS else small


@pytest.fixture
def subjects(workload: Workload, exported: dict[str, Path]) -> dict[str, Any]:
    return {"torch": workload.build(), "export": workload.build(), "graph": exported[workload.name]}


@CONFIGS
def test_changes_a_copy_and_the_same_seed_gives_the_same_result(
    kind: type, workload: Workload, subjects: dict[str, Any], tmp_path: Path
) -> None:
    subject = subjects[METHODS[kind].stage]
    before = fingerprint(subject)
    made = []
    for number in range(2):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        torch.manual_seed(0)
        result = step.apply(config(kind), subject, context(workload, scratch))
        assert fingerprint(subject) == before
        if isinstance(result, Path):
            assert result.is_relative_to(scratch)
        made.append(fingerprint(result))
    assert made[0] == made[1] != before


ARCHITECTURES = ("cnn", "encoder", "lstm", "inputs", "shared")
NOT_TRANSFORMERS = ("cnn", "lstm", "inputs", "shared")
REFUSED = {
    **{("prune.heads", name): "prune.heads found no attention that it may prune" for name in NOT_TRANSFORMERS},
    **{("prune.layers", name): "prune.layers found no blocks" for name in NOT_TRANSFORMERS},
    **{("export.fuse", name): "export.fuse found no attention" for name in NOT_TRANSFORMERS},
    ("prune.channels", "shared"): "prune.channels found no layer that it may prune",
    ("quantize.smooth", "lstm"): "quantize.smooth: no activation before a dense layer has outliers",
    ("quantize.qat", "lstm"): "quantize.qat cannot follow it",
}
"""What a method says to an architecture that it cannot treat; it treats all others."""
SLOWEST = "quantize.qat"


@pytest.fixture(scope="module")
def graph_of(encoder: Workload, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Workload, Path]]:
    """A function that returns the workload of an architecture and its ONNX file, exported once."""

    @functools.cache
    def made(name: str) -> tuple[Workload, Path]:
        workload = encoder if name == "encoder" else architectures.workload(name)
        folder = tmp_path_factory.mktemp(name)
        return workload, step.apply(Onnx(), workload.build(), context(workload, folder))

    return made


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(
            kind,
            name,
            id=f"{method.name}-{name}",
            marks=[pytest.mark.slow] if method.name == SLOWEST and name != "cnn" else [],
        )
        for kind, method in METHODS.items()
        for name in ARCHITECTURES
    ],
)
def test_every_method_treats_every_architecture_or_refuses_it_by_name(
    kind: type, name: str, graph_of: Callable[[str], tuple[Workload, Path]], tmp_path: Path
) -> None:
    """What it treats takes any batch, and keeps the names, the shapes and the types of the outputs."""
    method = METHODS[kind]
    workload, exported = graph_of(name)
    made = kind(max_drop=1.0) if method.name == "quantize.mixed" else config(kind)
    subject = exported if method.stage == "graph" else workload.build()
    if said := REFUSED.get((method.name, name)):
        with pytest.raises(ModelatheError, match=re.escape(said)) as raised:
            step.apply(made, subject, context(workload, tmp_path))
        assert raised.value.fix
        return
    result = exported if kind is Onnx else step.apply(made, subject, context(workload, tmp_path))
    predictor = OnnxPredictor(result) if isinstance(result, Path) else TorchPredictor(result, workload.outputs)
    batch = workload.first()
    wanted = TorchPredictor(workload.build(), workload.outputs).predict(batch)["logits"]
    with predictor:
        for size in (1, 3, 7, len(wanted)):
            outputs = predictor.predict({key: array[:size] for key, array in batch.items()})
            found = {key: (array.shape, array.dtype) for key, array in outputs.items()}
            assert found == {"logits": ((size, wanted.shape[1]), wanted.dtype)}


def test_the_table_of_refusals_names_what_there_is() -> None:
    assert {method for method, _ in REFUSED} <= set(NAMES)
    assert {name for _, name in REFUSED} <= set(ARCHITECTURES)


@CONFIGS
def test_a_missing_need_is_said_before_anything_starts(
    kind: type, workload: Workload, subjects: dict[str, Any], tmp_path: Path
) -> None:
    for need in METHODS[kind].needs(config(kind)):
        poor = replace(workload, **{need: None})
        with pytest.raises(BadWorkload, match=need):
            step.apply(config(kind), subjects[METHODS[kind].stage], context(poor, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [kind for kind in METHODS if "exclude" in {entry.name for entry in fields(kind)}])
def test_a_glob_that_excludes_everything_is_loud_and_lists_what_could_match(
    kind: type, workload: Workload, subjects: dict[str, Any], tmp_path: Path
) -> None:
    subject = subjects[METHODS[kind].stage]
    names = METHODS[kind].matches(subject)
    assert names
    with pytest.raises(NoEffect) as raised:
        step.apply(kind(exclude=("*",)), subject, context(workload, tmp_path))
    assert all(name in raised.value.fix for name in names)


@CONFIGS
def test_the_config_is_frozen_strict_and_explained(kind: type) -> None:
    made = config(kind)
    for entry in fields(kind):
        assert getattr(entry.default, "description", None), f"{entry.name} has no description"
        with pytest.raises(FrozenInstanceError):
            setattr(made, entry.name, None)
    with pytest.raises(ValidationError):
        kind(no_such_option=1)


@CONFIGS
def test_promises_are_words_that_the_gates_know(kind: type) -> None:
    assert METHODS[kind].promises <= {"smaller", "faster"}
    assert METHODS[kind].name.count(".") == 1
