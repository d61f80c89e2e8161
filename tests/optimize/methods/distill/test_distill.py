"""Distillation: students, unlabeled data, hidden states and relations."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimize.machine import cpu
from optimize.methods import apply as step
from optimize.methods.distill import layers, relations, teacher
from optimize.methods.distill.features import Features
from optimize.methods.distill.logits import Logits
from optimize.methods.distill.relations import Relations
from optimize.model.errors import BadData, BadModel, BadWorkload, NoEffect
from optimize.predict.module import forward
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step import bundle
from optimize.step.contract import Context, fingerprint
from optimize.train.fit import tensors
from serve.config.target import Target
from tests.optimize.conftest import Optimize
from tests.optimize.small import Small, batches

KINDS = pytest.mark.parametrize("kind", [Logits, Features, Relations], ids=lambda kind: kind.__name__)


class Narrow(nn.Module):
    """Half as wide as the trained model, with its layer names and one that it has not."""

    def __init__(self, inputs: str = "image", classes: int = 10) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.hidden, self.wide, self.out = nn.Linear(72, 64), nn.Linear(64, 64), nn.Linear(64, classes)
        self.inputs = inputs

    def forward(self, **named: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.norm(self.conv(named[self.inputs])).relu(), 2)
        return self.out(self.wide(self.hidden(x.flatten(1)).relu()).relu())


def narrow() -> nn.Module:
    torch.manual_seed(1)
    return Narrow()


def unlabeled(size: int = 64) -> Iterator[Batch]:
    return (Batch(batch.inputs) for batch in batches(slice(0, 512), size))


@pytest.fixture
def poor(small: Workload) -> Workload:
    """The small workload with a student, and neither labels nor a loss to train on."""
    students = {
        "narrow": narrow,
        "deaf": lambda: Narrow(inputs="picture"),
        "short": lambda: Narrow(classes=9),
        "frozen": lambda: narrow().requires_grad_(False),
    }
    return replace(small, students=students, training=unlabeled, loss=None)


def context(workload: Workload, scratch: Path) -> Context:
    return Context(workload, workload.build(), Target(cores=1), 0, scratch, lambda text, fraction: None)


def apart(module: nn.Module, workload: Workload, kind: Any = Logits) -> float:
    """How far the outputs are from the trained model's, on the first evaluation batch, as the method sees it."""
    inputs, _ = next(tensors(workload, "evaluation"))
    with torch.no_grad():
        given, wanted = (
            forward(model.eval(), inputs, workload.outputs)["logits"] for model in (module, workload.build())
        )
        if kind is Relations:
            return float(relations.loss(given, wanted))
        return float((given.softmax(1) - wanted.softmax(1)).abs().mean())


@KINDS
def test_a_student_of_the_users_learns_from_unlabeled_batches(kind: Any, poor: Workload, tmp_path: Path) -> None:
    made = step.apply(kind(student="narrow", epochs=8, learning_rate=0.01), poor.build(), context(poor, tmp_path))
    assert isinstance(made, Narrow)
    assert {key: value.shape for key, value in made.state_dict().items()} == {
        key: value.shape for key, value in narrow().state_dict().items()
    }
    assert apart(made, poor, kind) < 0.6 * apart(narrow(), poor, kind)
    assert not made.training


@KINDS
@pytest.mark.parametrize(
    ("student", "refusal", "said"),
    [
        ("other", BadWorkload, "no student 'other'"),
        ("deaf", BadModel, r"students\['deaf'\] cannot learn .*does not take its inputs"),
        ("short", BadModel, r"students\['short'\] returns 'logits' with the shape \(64, 9\)"),
        ("frozen", NoEffect, "every parameter of students"),
    ],
)
def test_a_student_that_does_not_fit_is_refused_before_training(
    kind: Any, student: str, refusal: type[Exception], said: str, poor: Workload, tmp_path: Path
) -> None:
    begun: list[str] = []
    watched = replace(context(poor, tmp_path), progress=lambda text, fraction: begun.append(text))
    with pytest.raises(refusal, match=said):
        step.apply(kind(student=student), poor.build(), watched)
    assert begun == []


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_a_students_bundle_is_rebuilt_from_the_users_code(
    optimize: Optimize, user_file: Callable[..., str], tmp_path: Path
) -> None:
    source = user_file(
        ("        bounded=True,", '        bounded=True,\n        students={"mlp": student},'),
        append="""
class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(64, 10)
    def forward(self, image):
        return self.dense(image.flatten(1))


def student():
    torch.manual_seed(0)
    return Student()
""",
    )
    ended = optimize("distill", source, "--output", tmp_path / "made", "--student", "mlp", "--epochs", 2)
    assert ended.code == 0, ended.err
    made = bundle.load(tmp_path / "made")
    assert type(made.module).__name__ == "Student"
    assert sum(parameter.numel() for parameter in made.module.parameters()) == 650
    ended = optimize("distill", source, "--output", tmp_path / "none", "--student", "mpl")
    assert ended.code == 4
    assert "students of this workload: mlp" in ended.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_hidden_states_come_nearer_and_nothing_is_left_behind(loss: str, poor: Workload, tmp_path: Path) -> None:
    place = context(poor, tmp_path)
    inputs, _ = next(tensors(poor))

    def distance(student: nn.Module) -> float:
        # The same shape in both, so that no projection stands between.
        with layers.Match(student, place.trained, [("out", "out")], inputs, "mse") as match, torch.no_grad():
            student(**inputs)
            place.trained(**inputs)
            return match.distance().item()

    made = step.apply(
        Features(student="narrow", epochs=8, learning_rate=0.01, loss=loss, output_weight=0), poor.build(), place
    )  # type: ignore[arg-type]
    assert distance(made) < 0.6 * distance(narrow().eval())
    assert all(not module._forward_hooks for model in (made, place.trained) for module in model.modules())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("hidden", "matches no module of the teacher"),
        ("nothing*:hidden", "matches no module of the student; *|matches no module of the student"),
        ("*:hidden", "cannot learn from 1 of the teacher"),
    ],
)
def test_layers_that_cannot_be_paired_are_refused_with_names(
    asked: str, said: str, poor: Workload, tmp_path: Path
) -> None:
    with pytest.raises(NoEffect, match=said):
        step.apply(Features(layers=(asked,)), poor.build(), context(poor, tmp_path))


def test_layers_that_differ_in_more_than_their_width_are_refused(poor: Workload, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"'conv' of the student gives \(64, 16, 6, 6\), 'hidden' .* \(64, 768\)"):
        step.apply(Features(layers=("conv:hidden",)), poor.build(), context(poor, tmp_path))


class Attention(nn.Module):
    """Returns its attention map beside its result, as attention modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        scores = (self.dense(x) @ x.transpose(1, 2)).softmax(-1)
        return scores @ x, {"map": scores, "length": torch.tensor(3), "cache": None}


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return x


def test_globs_are_spread_evenly_and_attention_maps_are_matched() -> None:
    torch.manual_seed(0)
    student, trained = Stack(2), Stack(6)
    pairs = layers.paired(["layers.?:layers.?"], student, trained)
    assert pairs == [("layers.0", "layers.2"), ("layers.1", "layers.5")]
    assert layers.paired([], student, trained) == [("layers.0", "layers.0"), ("layers.1", "layers.1")]
    inputs = {"x": torch.randn(3, 5, 4)}
    with layers.Match(student, trained, pairs, inputs, "mse") as match:
        assert len(match.projections) == 4  # the result and the map of each pair
        student(**inputs)
        trained(**inputs)
        match.distance().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_relations_do_not_see_a_rotation_but_see_a_distortion() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(16, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert relations.loss(3 * vectors @ rotation, vectors) == pytest.approx(0, abs=1e-9)
    assert relations.loss(vectors * torch.linspace(0.1, 3, 8), vectors) > 0.1
    assert relations.loss(vectors[:1], vectors[:1]) == 0


def test_relations_need_pairs(poor: Workload, tmp_path: Path) -> None:
    lonely = replace(poor, training=lambda: unlabeled(1))
    with pytest.raises(BadData, match="one sample each"):
        step.apply(Relations(), lonely.build(), context(lonely, tmp_path))


@KINDS
def test_bfloat16_learns_the_same(kind: Any, poor: Workload, tmp_path: Path) -> None:
    made = [
        step.apply(
            kind(student="narrow", epochs=8, learning_rate=0.01, precision=precision),
            poor.build(),
            context(poor, tmp_path),
        )
        for precision in ("float32", "bfloat16")
    ]
    assert fingerprint(made[0]) != fingerprint(made[1])
    assert all(parameter.dtype == torch.float32 for parameter in made[1].parameters())
    # Rounding leads another way down: what counts is that both arrive.
    untrained = apart(poor.build("narrow"), poor, kind)
    assert all(apart(module, poor, kind) < 0.5 * untrained for module in made)


@KINDS
@pytest.mark.parametrize(("found", "told"), [({"avx2"}, True), ({"avx2", "avx512_bf16"}, False), (set(), False)])
def test_bfloat16_in_software_is_said(
    kind: Any, found: set[str], told: bool, poor: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: found)
    said: list[str] = []
    place = replace(context(poor, tmp_path), progress=lambda text, _share: said.append(text))
    step.apply(kind(student="narrow", epochs=1, precision="bfloat16"), poor.build(), place)
    assert any("float32 is several times faster here" in text for text in said) == told


@KINDS
@pytest.mark.parametrize(("found", "chosen"), [({"avx2"}, "float32"), ({"amx_bf16"}, "bfloat16"), (set(), "float32")])
def test_auto_is_the_precision_that_the_cpu_is_fast_in(
    kind: Any, found: set[str], chosen: str, poor: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: found)
    said: list[str] = []
    place = replace(context(poor, tmp_path), progress=lambda text, _share: said.append(text))
    one, other = (
        step.apply(kind(student="narrow", epochs=1, precision=precision), poor.build(), place)
        for precision in ("auto", chosen)
    )
    assert fingerprint(one) == fingerprint(other)
    assert len([text for text in said if text.endswith(f"computes in {chosen}")]) == 1


def test_the_teacher_is_asked_once_about_a_batch_that_comes_again(poor: Workload, tmp_path: Path) -> None:
    place = context(poor, tmp_path)
    calls: list[object] = []
    place.trained.register_forward_hook(lambda *_: calls.append(None))
    asked = teacher.Teacher(place, "float32")
    first, other = (inputs for inputs, _ in list(tensors(poor))[:2])
    once = asked(first)
    assert asked({"image": first["image"].clone()}) is once
    assert len(calls) == 1
    assert not torch.equal(asked(other)["logits"], once["logits"])
    assert len(calls) == 2


@pytest.mark.parametrize("config", [Logits(), Relations()])
def test_an_output_of_whole_numbers_cannot_be_learnt(config: Any, small: Workload, tmp_path: Path) -> None:
    class Label(Small):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image).argmax(1)

    workload = replace(small, model=Label, outputs=("label",))
    with pytest.raises(BadModel, match=r"output 'label' is torch\.int64, which cannot be learnt"):
        step.apply(config, workload.build(), context(workload, tmp_path))
