"""What is wrong with a workload is said in the first seconds, by `optimize check` and by what begins to work on it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from modelathe.errors import ModelatheError
from modelathe.tensors import BATCH, TensorSpec
from optimize.checks import data, every, noise
from optimize.checks.finding import Check, Finding, all_of
from optimize.checks.subject import Subject
from optimize.judge.budget import Budget
from optimize.methods.prune.heads import Heads
from optimize.methods.quantize.static import Static
from optimize.predict.module import TorchPredictor, by_argument
from optimize.runs import pipeline, recipe
from optimize.runs.run import Terms
from optimize.source import splits
from optimize.source.batch import Batch
from optimize.source.load import load_workload
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from serve.config.target import Target
from tests.optimize.conftest import Optimize

UserFile = Callable[..., str]


EVERY = (*every.FIRST, *every.LATER)
BUT_EXPORT = EVERY[:-1]


def found(
    workload: Workload, *steps: object, checks: Sequence[Check] = BUT_EXPORT, **more: object
) -> tuple[dict[str, str], list[ModelatheError]]:
    """Return the worst level of each check, and the errors."""
    findings, errors = all_of(checks, Subject(workload, steps, **more), lambda *_: None)
    order = ("ok", "warning", "error")
    levels: dict[str, str] = {}
    for finding in findings:
        levels[finding.check] = max(finding.level, levels.get(finding.check, "ok"), key=order.index)
    return levels, errors


def told(findings: list[Finding]) -> str:
    return "\n".join(f"{finding.level} {finding.what}" for finding in findings)


def test_nothing_is_wrong_with_a_workload_that_works(small: Workload) -> None:
    levels, errors = found(small, Static(), checks=EVERY, budget=Budget(keep=0.9))
    assert not errors
    assert levels == dict.fromkeys(
        ("target", "steps", "model", "scores", "loss", "calibration", "data", "noise", "export"), "ok"
    )


BROKEN = {
    "scores": (
        ('right = outputs["logits"]', 'right = outputs["logit"]'),
        "KeyError: 'logit' at `right = outputs[\"logit\"].argmax(1) == targets`; it was given outputs {logits: float32"
        " [397, 10]}, targets int64 [397]",
    ),
    "loss": (
        (
            'functional.cross_entropy(outputs["logits"], targets)',
            'functional.cross_entropy(outputs["logits"], targets[1:])',
        ),
        "it was given outputs {logits: float32 [64, 10]}, targets int64 [64]",
    ),
    "model": (("(x.flatten(1))", "(x.flatten(2))"), "at `return self.out(self.wide(self.hidden(x.flatten(2))"),
    "calibration": (("calibration=lambda: batches(slice(0, 256))", "calibration=lambda: [3]"), "not a Batch"),
}


@pytest.mark.parametrize("check", BROKEN)
def test_the_users_line_and_what_it_was_given_are_told(check: str, user_file: UserFile, optimize: Optimize) -> None:
    change, said = BROKEN[check]
    source = user_file(change)
    done = optimize("check", source, "--preset", "cpu-small", "--json")
    document = json.loads(done.out)
    errors = {finding["check"]: finding for finding in document["findings"] if finding["level"] == "error"}
    assert done.code == 4 and said in errors[check]["what"]
    assert document["error"]["exit"] == 4
    if check != "calibration":
        assert ", line " in errors[check]["where"]


@pytest.mark.parametrize("check", BROKEN)
def test_a_run_and_a_method_begin_with_the_same_checks(
    check: str, user_file: UserFile, optimize: Optimize, tmp_path: Path
) -> None:
    change, said = BROKEN[check]
    source = user_file(change)
    for command in (("run", source, "--preset", "cpu-small"), ("quantize", source)):
        done = optimize(*command, "--output", tmp_path / "made")
        assert done.code == 4 and said in done.err
        assert "reading the evaluation data" not in done.err
        assert not (tmp_path / "made").exists()


def test_scores_that_need_the_whole_set_are_tried_on_it(small: Workload) -> None:
    def whole(outputs: dict[str, np.ndarray], targets: np.ndarray, reference: object) -> dict[str, np.ndarray]:
        assert len(targets) == 397, "part"
        return {"accuracy": (outputs["logits"].argmax(1) == targets).astype(float)}

    levels, errors = found(replace(small, scores=whole), budget=Budget(keep=0.9))
    assert not errors and levels["scores"] == levels["noise"] == "ok"


def test_a_loss_that_is_not_finite_or_has_no_gradient(small: Workload) -> None:
    for loss, said in (
        (lambda outputs, targets: outputs["logits"].sum() * float("inf"), "loss() returned"),
        (lambda outputs, targets: outputs["logits"].detach().sum(), "loss() returned"),
        (lambda outputs, targets: (outputs["logits"] * 0).sum().sqrt(), "the gradient of"),
    ):
        _, errors = found(replace(small, loss=loss), checks=every.FIRST)
        assert [said in error.what for error in errors] == [True]


def test_what_stands_in_two_sets_and_what_steps_lack(small: Workload) -> None:
    levels, errors = found(replace(small, calibration=small.evaluation), Heads(), budget=Budget(max_drop=0.0001))
    assert (levels["data"], levels["methods"]) == ("error", "error")
    assert {error.what.partition(" ")[0] for error in errors} == {"of", "prune.heads"}
    levels, errors = found(replace(small, calibration=None), Static())
    assert levels["steps"] == "error" and "needs the workload's calibration" in errors[0].what
    assert found(small, allow_overlap=True)[1] == []


def test_a_wrong_recipe_is_exit_2(user_file: UserFile, optimize: Optimize, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[[step]]\nuse = "quantize.nope"\n')
    assert optimize("check", user_file(), "--recipe", tmp_path / "recipe.toml").code == 2
    both = optimize("check", user_file(), "--recipe", tmp_path / "recipe.toml", "--preset", "cpu-int8")
    assert both.code == 2 and "are both given" in both.err
    assert "did you mean 'cpu-int8'" in optimize("check", user_file(), "--preset", "cpu-int").err


def test_the_noise_of_the_metric_is_told_beside_the_budget(small: Workload) -> None:
    for drop, level in ((0.5, "ok"), (0.001, "warning")):
        subject = Subject(small, budget=Budget(max_drop=drop), samples=397)
        (finding,) = noise.metric(subject)
        assert finding.level == level and "397 samples tell a loss to ±" in finding.what
    number = int(finding.what.rpartition("allowed; ")[2].split()[0].replace(",", ""))
    for samples, decided in ((number, "ok"), (number - 1, "warning")):
        (finding,) = noise.metric(Subject(small, budget=Budget(max_drop=0.001), samples=samples))
        assert finding.level == decided


def test_calibration_unlike_evaluation(small: Workload) -> None:
    def sorted_by_class() -> list[Batch]:
        one = next(small.batches("training"))
        chosen = one.targets == one.targets[0]
        return [Batch({"image": one.inputs["image"][chosen] * 255}, one.targets[chosen])]

    said = told([*data.calibration(Subject(replace(small, calibration=sorted_by_class)))])
    assert "warning input image is" in said
    assert "warning 9 of the 10 classes in evaluation never stand in calibration" in said


class Two(nn.Module):
    def forward(self, first: torch.Tensor, mask: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return first * mask * scale


class Many(nn.Module):
    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        return parts[0] - parts[1]


def test_inputs_go_to_arguments_by_name_and_then_by_place() -> None:
    assert by_argument(nn.Sequential(), ["image"]) == {"image": "input"}
    assert [*(by_argument(Two(), ["image", "mask"]) or {}).items()] == [("image", "first"), ("mask", "mask")]
    assert [*(by_argument(Two(), ["mask", "image"]) or {}).items()] == [("mask", "mask"), ("image", "first")]
    assert by_argument(Two(), ["a", "b"]) == {"a": "first", "b": "mask"}
    assert by_argument(Two(), ["mask", "first"]) == {"mask": "mask", "first": "first"}
    assert by_argument(Two(), ["a", "b", "c"]) == {"a": "a", "b": "b", "c": "c"}, "one too many: forward says it"
    assert by_argument(Many(), ["a", "b"]) is None
    arrays = {name: np.full((1, 2), value, np.float32) for name, value in (("a", 3), ("b", 1))}
    assert TorchPredictor(Many(), ["y"]).predict(arrays)["y"].tolist() == [[2, 2]]


def sequential(small: Workload) -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    return replace(small, name="sequential", model=model)


@pytest.mark.usefixtures("each_step_faster")
def test_a_sequential_is_pruned_trained_and_quantized(small: Workload, tmp_path: Path) -> None:
    plan = recipe.parse(
        {
            "budget": {"max_drop": 1.0},
            "step": [
                {"use": "prune.channels"},
                {"use": "distill.logits", "epochs": 1},
                {"use": "distill.features", "epochs": 1},
                {"use": "quantize.qat", "epochs": 1},
            ],
        }
    )
    lines: list[str] = []
    terms = Terms(force=True)
    made = pipeline.run(
        plan, sequential(small), output=tmp_path / "run", terms=terms, progress=lambda text, _: lines.append(text)
    )
    assert "arguments: input image goes to forward's argument input, by its place" in lines
    assert made["result"]["cost"]["parameters"] < made["trained"]["cost"]["parameters"]
    assert made["trained"]["cost"]["macs"]


def test_generated_values_are_those_of_the_data(small: Workload, tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(1000, 4)

        def forward(self, category: torch.Tensor) -> torch.Tensor:
            return self.table(category)

    def batches(seed: int) -> list[Batch]:
        rows = np.random.default_rng(seed).integers(5, 998, 400)
        return [Batch({"category": rows}, rows % 4)]

    made = replace(
        small,
        name="table",
        model=Table(),
        inputs=(TensorSpec("category", "int64", (BATCH,)),),
        evaluation=lambda: batches(1),
        calibration=None,
        training=None,
        loss=None,
    )
    read = splits.read(made, allow_overlap=True)
    ranged = splits.stated(made, read)
    low, high = read.ranges["category"]
    assert ranged.inputs[0].values == (low, high) and low < 20 and high > 980
    assert ranged.inferred == (f"generated values of category: {low} to {high}, as in the evaluation data",)
    assert splits.stated(replace(made, inputs=(TensorSpec("category", "int64", (BATCH,), (0, 9)),)), read).inputs[
        0
    ].values == (0, 9)


@pytest.mark.usefixtures("each_step_faster")
def test_a_bundle_remembers_the_range(user_file: UserFile, optimize: Optimize, tmp_path: Path) -> None:
    done = optimize("export", user_file(), "--output", tmp_path / "made", "--json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "made" / "bundle.json").read_text())["inputs"][0]["values"] == [0.0, 1.0]
    assert bundles.load(tmp_path / "made").workload.inputs[0].values == (0.0, 1.0)


@pytest.mark.parametrize(
    ("rename", "append", "name", "said"),
    [
        ("workload", "", "workload", ""),
        ("one", "", "one", ""),
        ("one", "def two() -> 'Workload': ...\n", "", "has several workloads: one, two"),
    ],
)
def test_a_file_is_enough_where_it_has_one_workload(
    rename: str, append: str, name: str, said: str, user_file: UserFile
) -> None:
    place = user_file(("def workload", f"def {rename}"), append=append).rpartition(":")[0]
    if said:
        with pytest.raises(ModelatheError, match=said):
            load_workload(place)
    else:
        assert load_workload(place).source == f"{place}:{name}"


def test_candidates_are_listed(user_file: UserFile) -> None:
    place = user_file(("def workload() -> Workload", "def mine()")).rpartition(":")[0]
    with pytest.raises(ModelatheError, match="no 'workload' in it") as raised:
        load_workload(place)
    assert "mine" in raised.value.fix


def test_target_without_its_machine_is_a_warning(small: Workload) -> None:
    levels, _ = found(small, target=Target(device="cuda"))
    assert levels["target"] in ("ok", "warning")


def test_without_a_recipe_the_default_is_told(small: Workload) -> None:
    lines: list[str] = []
    for workload, names in ((small, ["cpu-int8", "cpu-small"]), (replace(small, calibration=None), ["cpu-small"])):
        plans = recipe.chosen(None, workload, lambda text, _: lines.append(text))
        assert plans == {name: recipe.load(recipe.preset(name)) for name in names}
        assert all(f"the preset {name}" in lines[-1] for name in names)
    assert recipe.chosen({"extends": "preset:cpu-small"}, small, lambda *_: None) == {"": plans["cpu-small"]}


def test_a_name_that_names_no_model_is_a_wrong_option(user_file: UserFile, optimize: Optimize) -> None:
    done = optimize("run", user_file(), "--preset", "cpu-small", "--name", "a/b")
    assert done.code == 2 and "--name: the name 'a/b' cannot name a model" in done.err
