"""Awkward models, data, options and students: every method works with them, or refuses them by name with a way out."""

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from modelathe.errors import ModelatheError
from modelathe.tensors import BATCH, TensorSpec
from optimize.methods import apply as step
from optimize.methods.export.onnx import Onnx
from optimize.methods.table import METHODS, NAMES
from optimize.model import errors
from optimize.model.errors import BadData, BadGraph, BadModel, BadRecipe, BadWorkload, NoEffect
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.runs import recipe
from optimize.source.batch import Batch
from optimize.source.load import load_workload
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.contract import Context, fingerprint
from serve.config.target import Target
from tests.optimize.conftest import SMALL, Optimize

LENGTH, WIDTH, WORDS = 6, 16, 300
TOKENS = TensorSpec("tokens", "int64", (BATCH, LENGTH), values=(0, WORDS - 1))
IMAGE = TensorSpec("image", "float32", (BATCH, 1, 8, 8))
SCALE = TensorSpec("scale", "float32", (BATCH, 1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        with torch.no_grad():
            self.norm.weight[0] = 30.0  # an outlier, for quantize.smooth

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.activate(self.wide(self.norm(x))))


class Plain(nn.Module):
    """What the awkward ones below are variations of."""

    block: type[Block] = Block
    inputs: tuple[TensorSpec, ...] = (TOKENS,)

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([self.block() for _ in range(2)])
        self.out = nn.Linear(WIDTH, 10)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.words(tokens)
        return vectors

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.out(x.mean(1))
        return logits

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.body(self.embed(tokens))


class Tied(Plain):
    """The embedding is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WORDS, bias=False)
        self.out.weight = self.words.weight


class Shared(Plain):
    """One block stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0]] * 2)


class OfImages(Plain):
    inputs = (IMAGE,)

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.body(self.embed(image).flatten(2).transpose(1, 2))


class InPlace(OfImages):
    """As residual networks are written: `nn.ReLU(inplace=True)` and `+=`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(channels, WIDTH, 3, padding=1) for channels in (1, 16, 16))
        self.relu = nn.ReLU(inplace=True)

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.first(image))
        y: torch.Tensor = self.third(self.relu(self.second(x)))
        y += x
        return y


class OverwritingBlock(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.narrow(self.activate(self.wide(self.norm(x))))
        return x


class Overwriting(Plain):
    """`+=` on what gradients need: it runs, and cannot be trained."""

    block = OverwritingBlock


class Branching(Plain):
    """Data-dependent control flow; no input that a check would try takes the other branch."""

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        x = super().embed(tokens)
        if x.sum() > 1e6:
            x = x * 2
        return x


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class SwishBlock(Block):
    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return Swish.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class Custom(Plain):
    """A `torch.autograd.Function` of the user's own."""

    block = SwishBlock


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.words.requires_grad_(False)
        self.blocks[0].requires_grad_(False)


class Double(Plain):
    """A float64 buffer."""

    def __init__(self) -> None:
        super().__init__()
        positions = torch.linspace(0, 1, LENGTH * WIDTH, dtype=torch.float64)
        self.register_buffer("positions", positions.view(LENGTH, WIDTH))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return (super().embed(tokens) + self.get_buffer("positions")).float()


class Swapped(Plain):
    """Takes its inputs in another order than the workload declares them."""

    inputs = (TOKENS, SCALE)

    def forward(self, scale: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.body(self.embed(tokens) * scale[:, None])


class Training(OfImages):
    """Comes in training mode, with dropout and batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Dropout(0.5)
        nn.init.constant_(self.norm.get_buffer("running_var"), 2.0)
        self.train()

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.drop(self.norm(self.conv(image)).relu())
        return x


MODELS: dict[str, Any] = {
    model.__name__.lower(): model
    for model in (Tied, Shared, InPlace, Overwriting, Branching, Custom, Frozen, Double, Swapped, Training)
}
OPTIONS: dict[str, dict[str, Any]] = {
    # There is no attention in these.
    "prune.heads": {"ratio": 0.0, "ffn": 0.5},
    "quantize.mixed": {"keep": 0.5},
}
GRADIENTS = "gradients cannot be taken through the model"
REFUSED = {
    **{("overwriting", name): GRADIENTS for name in ("distill.logits", "distill.features", "distill.relations")},
    ("overwriting", "quantize.qat"): GRADIENTS,
    ("branching", "export.onnx"): f"forward branches on values ({__file__}, line ",
    ("branching", "quantize.qat"): "data-dependent",
    ("shared", "prune.layers"): "found no blocks",
}
"""What no method can do, and what it says of it; all else works."""
ALIKE = {
    "quantize.qat": {"custom", "frozen", "double", "swapped", "training"},
    "quantize.nncf": {"overwriting", "custom", "frozen", "double", "swapped", "training"},
}
"""Models that are like another one to a slow method, which sees a captured graph."""


def build(model: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = MODELS.get(model, Plain)()
    return made


@functools.cache
def data(model: str, seed: int = 0) -> list[Batch]:
    """Three batches of 16 random samples with random labels."""
    rng = np.random.default_rng(seed)
    specs = MODELS.get(model, Plain).inputs
    return [Batch({spec.name: spec.generate(rng, 16) for spec in specs}, rng.integers(0, 10, 16)) for _ in range(3)]


def workload(model: str) -> Workload:
    return Workload(
        name=model,
        model=lambda: build(model),
        inputs=MODELS.get(model, Plain).inputs,
        outputs=("logits",),
        evaluation=lambda: data(model, 1),
        calibration=lambda: data(model),
        training=lambda: data(model),
        loss=lambda outputs, targets: functional.cross_entropy(outputs["logits"], targets),
        scores=lambda outputs, _, reference: {
            "agreement": (outputs["logits"].argmax(1) == reference["logits"].argmax(1)).astype(float)
        },
        bounded=True,
    )


def config(name: str, **values: Any) -> Any:
    kind = NAMES[name]
    short = {"epochs": 1} if "epochs" in {entry.name for entry in fields(kind)} else {}
    return kind(**{**short, **OPTIONS.get(name, {}), **values})


def context(made: Workload, scratch: Path, said: list[str] | None = None) -> Context:
    told = said if said is not None else []
    return Context(made, made.build(), Target(cores=1), 0, scratch, lambda text, fraction: told.append(text))


def explained(error: ModelatheError, *names: str) -> None:
    """One line that says what is wrong and where, and a way out."""
    assert "\n" not in error.what
    assert error.fix
    assert any(name in f"{error.where} {error.what} {error.fix}" for name in names)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path | BadGraph]:
    @functools.cache
    def exported(model: str) -> Path | BadGraph:
        made = workload(model)
        try:
            path: Path = step.apply(Onnx(), made.build(), context(made, tmp_path_factory.mktemp(model)))
        except BadGraph as error:
            return error
        return path

    return exported


def cells() -> Iterator[tuple[str, str]]:
    for model in MODELS:
        for name in NAMES:
            # Where there is no export there is no graph to work on.
            no_graph = METHODS[NAMES[name]].stage == "graph" and (model, "export.onnx") in REFUSED
            if not no_graph and model not in ALIKE.get(name, ()):
                yield model, name


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), list(cells()))
def test_every_method_on_every_awkward_model(
    model: str, name: str, exports: Callable[[str], Path | BadGraph], tmp_path: Path
) -> None:
    made = workload(model)
    result = exports(model)
    if name != "export.onnx":
        subject: Any = result if METHODS[NAMES[name]].stage == "graph" else made.build()
        before = fingerprint(subject)
        try:
            result = step.apply(config(name), subject, context(made, tmp_path))
        except ModelatheError as error:
            result = error
        assert fingerprint(subject) == before
    if isinstance(result, ModelatheError):
        explained(result, name, model, MODELS[model].__name__)
        assert (model, name) in REFUSED, str(result)
        assert REFUSED[model, name] in result.what
        return
    assert (model, name) not in REFUSED
    wanted = TorchPredictor(made.build(), made.outputs)
    with OnnxPredictor(result) if isinstance(result, Path) else TorchPredictor(result, made.outputs) as predictor:
        for size in (1, 5):
            inputs = {key: array[:size] for key, array in made.first().items()}
            answers, right = predictor.predict(inputs), wanted.predict(inputs)
            assert answers.keys() == right.keys()
            assert answers["logits"].shape == right["logits"].shape
            assert answers["logits"].dtype == right["logits"].dtype
            assert np.isfinite(answers["logits"]).all()


CALIBRATED: list[tuple[str, dict[str, Any]]] = [
    ("prune.channels", {"score": "activation"}),
    ("prune.layers", {"score": "similarity"}),
    ("prune.weights", {"score": "wanda"}),
    ("prune.weights", {"score": "sparsegpt"}),
    ("quantize.smooth", {}),
    ("quantize.static", {}),
    ("quantize.mixed", {}),
    ("quantize.nncf", {}),
    ("quantize.fp8", {}),
]


def first(batch: Batch, count: int) -> Batch:
    return Batch({name: array[:count] for name, array in batch.inputs.items()}, batch.targets[:count])


def equal(batch: Batch) -> Batch:
    return Batch({name: np.repeat(array[:1], len(array), 0) for name, array in batch.inputs.items()}, batch.targets)


NAN = np.full((16, 1), np.nan, np.float32)
SPOILED: dict[str, tuple[Callable[[list[Batch]], list[Batch]], str, bool]] = {
    "one class": (lambda made: [replace(batch, targets=batch.targets * 0) for batch in made], "of one class", False),
    "all equal": (lambda made: [equal(made[0])] * 3, "samples are equal", False),
    "one sample": (lambda made: [first(made[0], 1)], "has 1 calibration samples", False),
    "NaN": (lambda made: [replace(made[0], inputs={**made[0].inputs, "scale": NAN})], "NaN or infinite value", True),
    "nothing": (lambda made: [], "returned no batch", True),
}
"""What becomes of the calibration data, what a quantizer says of it, and whether a pruning score refuses it too."""


def test_the_methods_that_calibrate_are_all_tried_on_spoiled_data() -> None:
    calibrating = {name for name, kind in NAMES.items() if "calibration" in METHODS[kind].needs(config(name))}
    assert calibrating <= {name for name, _ in CALIBRATED}


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize(("name", "options"), CALIBRATED)
def test_spoiled_calibration_data(
    name: str,
    options: dict[str, Any],
    spoiled: str,
    exports: Callable[[str], Path | BadGraph],
    tmp_path: Path,
) -> None:
    spoil, said, always = SPOILED[spoiled]
    made = replace(workload("swapped"), calibration=lambda: spoil(data("swapped")))
    in_torch = METHODS[NAMES[name]].stage == "torch"
    subject = made.build() if in_torch else exports("swapped")
    if in_torch and not always:
        # A ranking may rest on few samples; `step.apply` sees to it that the result answers with finite numbers.
        changed = step.apply(config(name, **options), subject, context(made, tmp_path))
        assert fingerprint(changed) != fingerprint(subject)
        return
    with pytest.raises(BadData, match=said) as raised:
        step.apply(config(name, **options), subject, context(made, tmp_path))
    explained(raised.value, "swapped")


GLOBS = [
    (name, entry.name)
    for name, kind in NAMES.items()
    for entry in fields(kind)
    if entry.name in ("exclude", "container", "layers")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option"), GLOBS)
def test_a_glob_that_matches_nothing(
    name: str, option: str, exports: Callable[[str], Path | BadGraph], tmp_path: Path
) -> None:
    made = workload("plain")
    subject: Any = exports("plain") if METHODS[NAMES[name]].stage == "graph" else made.build()
    values = {"exclude": ("none_*",), "container": "none_*", "layers": ("none_*:out",)}
    with pytest.raises(NoEffect, match=r"none_\*") as raised:
        step.apply(config(name, **{option: values[option]}), subject, context(made, tmp_path))
    listed = {"exclude": METHODS[NAMES[name]].matches(subject), "container": ["blocks"], "layers": ["blocks.0.wide"]}
    assert listed[option]
    assert all(known in raised.value.fix for known in listed[option])


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1", "half", "nan"])
@pytest.mark.parametrize("name", [name for name, kind in NAMES.items() if "ratio" in {e.name for e in fields(kind)}])
def test_a_ratio_that_cannot_be(name: str, value: str, optimize: Optimize, tmp_path: Path) -> None:
    family, _, method = name.partition(".")
    made = tmp_path / "made"
    ended = optimize(family, f"{SMALL}:workload", "--method", method, f"--ratio={value}", "--output", made)
    assert ended.code == 2, ended.err
    lines = ended.err.strip().splitlines()
    assert len(lines) == 2
    assert "ratio" in ended.err
    assert lines[1].startswith("  fix: ")
    assert not made.exists()


FRACTIONS = [
    (name, option)
    for name, kind in NAMES.items()
    for option, hint in get_type_hints(kind).items()
    if hint in (float, float | None)
]


@pytest.mark.parametrize(("name", "option"), FRACTIONS)
def test_no_number_may_be_infinite(name: str, option: str) -> None:
    with pytest.raises(BadRecipe) as raised:
        recipe.build(NAMES[name], {option: float("inf")}, name)
    explained(raised.value, f"{option} = inf")


class OtherNames(Plain):
    def forward(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(words * mask)


class OtherShape(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 3)


class OtherType(Plain):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens).double()


class Raising(Plain):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"no {len(tokens)} tokens")


class Pair(Plain):
    def forward(self, tokens: torch.Tensor) -> Any:
        return super().forward(tokens), tokens


STUDENTS: dict[str, tuple[type[Plain], str]] = {
    "names": (OtherNames, "unexpected keyword argument 'tokens'"),
    "shape": (OtherShape, r"with the shape \(16, 3\), the trained model with \(16, 10\)"),
    "type": (OtherType, "'logits' as torch.float64, the trained model as torch.float32"),
    "raising": (Raising, "ValueError: no 16 tokens"),
    "pair": (Pair, "returns 2 unnamed tensors"),
}


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("name", [name for name, kind in NAMES.items() if "student" in {e.name for e in fields(kind)}])
def test_a_student_that_does_not_fit_is_refused_before_training(name: str, student: str, tmp_path: Path) -> None:
    kind, said = STUDENTS[student]
    made = replace(workload("plain"), students={student: kind})
    told: list[str] = []
    with pytest.raises(BadModel, match=said) as raised:
        step.apply(config(name, student=student), made.build(), context(made, tmp_path, told))
    explained(raised.value, f"{name}: students[{student!r}]")
    assert not told


def test_every_error_says_a_way_out() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ModelatheError)}
    calls = 0
    for file in sorted(Path(errors.__file__).parents[1].rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
                calls += 1
                assert "fix" in {keyword.arg for keyword in node.keywords}, f"{file}, line {node.lineno}"
    assert calls > 100


def test_two_exports_and_a_bundle_in_the_place_of_a_workload(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe) as raised:
        recipe.ordered((NAMES["quantize.qat"](), Onnx()))
    assert raised.value.fix == "keep one of quantize.qat, export.onnx: each exports the model"
    (tmp_path / bundles.DESCRIPTION).write_text("{}")
    with pytest.raises(BadWorkload, match="is a bundle, not a workload"):
        load_workload(str(tmp_path))


COMMANDS: list[tuple[int, tuple[object, ...]]] = [
    (0, ("distill", "--epochs", 1)),
    (4, ("distill", "--student", "nobody")),
    (4, ("prune", "--exclude", "none_*")),
    (2, ("export", "--opset", 3)),
    (0, ("quantize",)),
]


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    return {file.name: (bundles.digest(file), file.stat().st_mtime_ns) for file in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_the_bundle_that_is_given_never_changes(
    user_file: Callable[..., str], optimize: Optimize, tmp_path: Path
) -> None:
    source = user_file(("    small.load_state_dict(weights())\n", ""))
    made = load_workload(source)
    given = bundles.save(bundles.Bundle(made, made.build()), tmp_path / "given").folder
    assert given
    before = contents(given)
    for number, (code, command) in enumerate(COMMANDS):
        output = tmp_path / str(number)
        ended = optimize(command[0], given, *command[1:], "--batch", 1, "--output", output)
        assert ended.code == code, ended.err
        assert output.exists() == (code == 0)
        assert contents(given) == before
