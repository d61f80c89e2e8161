"""What a student is drawn to: one logit, classes on any axis, and numbers that have no direction."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, TensorSpec
from optimize.methods import apply as step
from optimize.methods.distill import logits
from optimize.methods.distill.features import Features
from optimize.methods.distill.logits import Logits
from optimize.methods.distill.relations import Relations
from optimize.model.errors import BadModel
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target

SPEC = TensorSpec("x", "float32", (BATCH, 12))


class One(nn.Module):
    """Tells two classes apart by one logit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(12, 16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(x).relu())


@pytest.fixture
def workload() -> Workload:
    def batches() -> list[Batch]:
        rng = np.random.default_rng(0)
        return [Batch({"x": SPEC.generate(rng, 32)}) for _ in range(8)]

    return Workload("one", One, (SPEC,), ("y",), batches, lambda *_: {}, None, batches)


def context(workload: Workload, scratch: Path) -> Context:
    return Context(workload, workload.build(), Target(cores=1), 0, scratch, lambda text, fraction: None)


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 5, 1), (8, 1, 4, 4)])
def test_one_logit_is_a_binary_distribution(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    value = logits.loss(student, teacher, 4.0)
    value.backward()
    given, wanted = (torch.distributions.Bernoulli(logits=each / 4) for each in (student, teacher))
    assert value.item() == pytest.approx(16 * torch.distributions.kl_divergence(wanted, given).mean().item(), rel=1e-4)
    assert student.grad is not None
    assert student.grad.abs().min() > 0
    assert logits.loss(teacher, teacher, 4.0).item() == pytest.approx(0, abs=1e-6)


def test_a_student_with_one_logit_learns_it(workload: Workload, tmp_path: Path) -> None:
    place = context(workload, tmp_path)
    with torch.no_grad():
        place.trained.c.weight *= -3
    inputs = torch.from_numpy(next(workload.batches("training")).inputs["x"])

    def apart(module: nn.Module) -> float:
        with torch.no_grad():
            return functional.mse_loss(module(inputs).sigmoid(), place.trained(inputs).sigmoid()).item()

    untrained = workload.build()
    made = step.apply(Logits(epochs=6, learning_rate=1e-2, temperature=1.0), untrained, place)
    assert apart(made) < 0.2 * apart(workload.build())


@pytest.mark.parametrize(
    ("shape", "given", "axis"),
    [
        ((6, 5), 0, 1),
        ((6, 7, 5), 0, 2),
        ((6, 5, 4, 3), 0, 1),
        ((6, 5, 2, 4, 3), 0, 1),
        ((6, 5, 7), 1, 1),
        ((6, 4, 3, 5), -1, 3),
    ],
)
def test_the_softmax_runs_over_the_classes(shape: tuple[int, ...], given: int, axis: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(shape), torch.randn(shape)
    right = functional.kl_div(
        functional.log_softmax(student, axis), functional.log_softmax(teacher, axis), reduction="none", log_target=True
    )
    assert logits.loss(student, teacher, 1.0, given).item() == pytest.approx(right.sum(axis).mean().item(), rel=1e-5)


@pytest.mark.parametrize("axis", [2, -2])
def test_an_axis_that_is_not_there_is_refused(axis: int, workload: Workload, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=f"'y' has the shape .*, so no class axis {axis}"):
        step.apply(Logits(class_axis=axis), workload.build(), context(workload, tmp_path))


@pytest.mark.parametrize("config", [Relations(), Features(layers=("c:c",), loss="cosine")])
def test_the_cosine_of_single_numbers_teaches_nothing_and_is_refused(
    config: Any, workload: Workload, tmp_path: Path
) -> None:
    with pytest.raises(BadModel, match="one number a sample, so that every cosine is 1 or -1"):
        step.apply(config, replace(workload).build(), context(workload, tmp_path))


class Several(nn.Module):
    """Answers three questions about a row, none of which rules another out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(x).relu())


@pytest.mark.parametrize("axis", [1, 2])
def test_labels_that_exclude_nothing_are_as_many_distributions(axis: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    given, wanted = (torch.distributions.Bernoulli(logits=each / 2) for each in (student, teacher))
    right = 4 * torch.distributions.kl_divergence(wanted, given).sum(axis).mean().item()
    assert logits.loss(student, teacher, 2.0, axis, independent=True).item() == pytest.approx(right, rel=1e-4)


def labelled(targets: Any, model: Any = Several) -> Workload:
    def batches() -> list[Batch]:
        rng = np.random.default_rng(0)
        return [Batch({"x": SPEC.generate(rng, 32)}, targets(rng)) for _ in range(8)]

    return Workload("several", model, (SPEC,), ("y",), batches, lambda *_: {}, None, batches)


TARGETS = {
    "several of them": (lambda rng: rng.integers(0, 2, (32, 3)).astype(np.float32), True),
    "one of them": (lambda rng: np.eye(3, dtype=np.float32)[rng.integers(0, 3, 32)], False),
    "a class": (lambda rng: rng.integers(0, 3, 32), False),
    "shares": (lambda rng: rng.dirichlet(np.ones(3), 32).astype(np.float32), False),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", ["auto", "softmax", "sigmoid"])
def test_the_targets_say_whether_labels_exclude_each_other(
    kind: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, independent = TARGETS[kind]
    seen: set[bool] = set()
    usual = logits.loss

    def watched(*args: Any, independent: bool, **named: Any) -> torch.Tensor:
        seen.add(independent)
        return usual(*args, independent=independent, **named)

    monkeypatch.setattr(logits, "loss", watched)
    load = labelled(targets)
    place = context(load, tmp_path)
    with torch.no_grad():
        place.trained.c.weight *= -3
    step.apply(Logits(epochs=1, form=form), load.build(), place)  # type: ignore[arg-type]
    assert seen == {independent if form == "auto" else form == "sigmoid"}


def test_a_student_learns_labels_that_a_softmax_cannot_tell_apart(tmp_path: Path) -> None:
    """All three at once or none: to a softmax, which sees differences alone, both are the same."""
    load = labelled(TARGETS["several of them"][0])
    inputs = torch.from_numpy(next(load.batches("training")).inputs["x"])
    apart = {}
    for form in ("auto", "softmax"):
        place = context(load, tmp_path)
        with torch.no_grad():
            place.trained.c.weight[:] = -3 * place.trained.c.weight[:1]
            place.trained.c.bias[:] = 0.5
        made = step.apply(Logits(epochs=6, learning_rate=1e-2, temperature=1.0, form=form), load.build(), place)  # type: ignore[arg-type]
        with torch.no_grad():
            apart[form] = functional.mse_loss(made(inputs).sigmoid(), place.trained(inputs).sigmoid()).item()
    assert apart["auto"] < 0.2 * apart["softmax"]


@pytest.mark.parametrize(
    ("shape", "targets", "axis"),
    [
        ((6, 5, 7), (6, 7), 1),
        ((6, 5, 7), (6, 5), 0),
        ((6, 5, 5), (6, 5), 0),
        ((6, 5), (6,), 0),
        ((6, 5, 4, 4), (6, 4, 4), 0),
    ],
)
def test_the_targets_of_a_line_say_where_its_classes_are(
    shape: tuple[int, ...], targets: tuple[int, ...], axis: int
) -> None:
    assert logits._axis(torch.zeros(shape), torch.zeros(targets, dtype=torch.int64)) == axis


def test_a_softmax_over_one_class_is_refused_and_the_fix_works(workload: Workload, tmp_path: Path) -> None:
    place = context(workload, tmp_path)
    with pytest.raises(BadModel, match="'y' has one class, of which a softmax is always 1") as refused:
        step.apply(Logits(form="softmax"), workload.build(), place)
    assert 'form = "sigmoid"' in refused.value.fix
    with torch.no_grad():
        place.trained.c.weight *= -3
    step.apply(Logits(form="sigmoid", epochs=1), workload.build(), place)
