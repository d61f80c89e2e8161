"""The chain of digests: what makes a bundle anew, and what keeps it."""

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optimize.machine import cpu
from optimize.methods.distill.logits import Logits
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.quantize.mixed import Mixed
from optimize.methods.quantize.qat import Qat
from optimize.methods.quantize.static import Static
from optimize.methods.quantize.weight_only import WeightOnly
from optimize.methods.table import METHODS
from optimize.model.errors import BadBundle
from optimize.runs import advance, baseline, digest, pipeline, recipe
from optimize.runs.recipe import Recipe
from optimize.runs.run import Run
from optimize.source import splits, workload
from optimize.source.batch import Batch
from optimize.source.code import code
from optimize.source.load import load_workload
from optimize.step import bundle
from optimize.step.bundle import Bundle
from optimize.train import fit as train
from serve.config.target import Target

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())
"""
USER = """
import numpy as np
from modelathe.tensors import BATCH, TensorSpec
from optimize.source.batch import Batch
from optimize.source.workload import Workload

X = np.random.default_rng(0).normal(size=(96, 8)).astype("float32")
Y = np.arange(96) % 3

def part(index):
    return [Batch({"x": X[index]}, Y[index])]

def training():
    return part(np.arange(64))

def scores(outputs, targets, reference):
    return {"agreement": (outputs["y"].argmax(1) == reference["y"].argmax(1)).astype(float)}

def workload():
    from nets.net import Net
    return Workload(name="user", model=Net, inputs=(TensorSpec("x", "float32", (BATCH, 8)),), outputs=("y",),
        evaluation=lambda: part(np.arange(64, 96)), training=training, calibration=lambda: part(np.arange(32)),
        scores=scores, bounded=True)
"""
PLAN: dict[str, object] = {
    "budget": {"max_drop": 0.5},
    "target": {"batch": [1], "cores": 1},
    "step": [{"use": "distill.logits", "epochs": 1}, {"use": "quantize.static", "samples": 16}],
}
STEPS = ("distill.logits", "export.onnx", "quantize.static")


class Anew(Exception):
    """Stands for the work of making a bundle."""


def write(place: Path) -> None:
    (place / "nets").mkdir()
    (place / "nets" / "__init__.py").write_text("")
    (place / "nets" / "net.py").write_text(NET)
    (place / "user.py").write_text(USER)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a workload in user.py, whose model stands in a package beside it, and all bundles of `PLAN`."""
    place = tmp_path_factory.mktemp("finished")
    write(place)
    assert make(place)[0] == []
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return shutil.copytree(finished, tmp_path / "copy")


def fresh(place: Path) -> workload.Workload:
    """Load the workload as a new process would."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not (Path(path) / "nets").is_dir()]
    return load_workload(f"{place / 'user.py'}:workload")


def make(
    place: Path, plan: Recipe | None = None, user: workload.Workload | None = None
) -> tuple[list[str], list[str], Bundle | None]:
    """Make every bundle that is not there yet; return the steps that were kept, what was said, and the last bundle."""
    said: list[str] = []
    user, plan = user or fresh(place), plan or recipe.parse(PLAN)
    sets = splits.read(user)
    last = None
    with suppress(Anew):
        trained = baseline.establish(
            user, place / "run" / "0-trained", digest.trained(user, sets), lambda text, _: said.append(text)
        )
        this = Run(plan, trained, sets, place / "run", progress=lambda text, _: said.append(text))
        last = advance.every_step(this).bundle
    return [name for name in STEPS if f"{name}: kept from the last run" in said], said, last


def keep(place: Path, plan: Recipe | None = None, user: workload.Workload | None = None) -> tuple[list[str], str]:
    """Stop where a bundle would have to be made; return the steps that were kept so far, and what was said."""

    def stop(*_: object, **__: object) -> None:
        raise Anew

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advance, "advance", stop)
        patch.setattr(baseline, "export", stop)
        kept, said, _ = make(place, plan, user)
    return kept, "\n".join(said)


def test_everything_is_kept_where_nothing_changed(place: Path) -> None:
    assert keep(place)[0] == [*STEPS]


CHANGES: dict[str, tuple[str, str, str, str]] = {
    "an imported module": ("nets/net.py", "relu", "tanh", "code of nets.net"),
    "the package that it is in": ("nets/__init__.py", "", "ONE = 1", "code of nets"),
    "the file itself": ("user.py", "bounded=True", "bounded=1 > 0", "code of user.py"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_the_users_code_makes_everything_anew(what: str, place: Path) -> None:
    file, old, new, said = CHANGES[what]
    path = place / file
    path.write_text(path.read_text().replace(old, new) if old else new)
    kept, told = keep(place)
    assert kept == []
    assert f"0-trained is made again: changed since it was made: {said}" in told


def test_a_module_that_was_edited_after_it_was_imported_is_what_runs(place: Path) -> None:
    fresh(place)
    (place / "nets" / "net.py").write_text(NET.replace("relu", "tanh"))
    assert keep(place, user=load_workload(f"{place / 'user.py'}:workload"))[0] == [*STEPS], (
        "this process runs the old one"
    )
    assert keep(place)[0] == []


def test_a_single_step_resumes_only_what_the_code_of_today_began(place: Path) -> None:
    source = place / "run" / "1-distill.logits"

    def killed() -> bool:
        """Train for an epoch more, and return whether that went on from where another stopped."""
        said: list[str] = []

        def progress(text: str, _fraction: float) -> None:
            said.append(text)
            if "epoch " in text and "resumes" not in text:
                raise Anew

        loaded, target = bundle.load(source, fresh(place)), Target(batch=(1,), cores=1)
        with pytest.raises(Anew):
            pipeline.apply_one(Recipe((Logits(epochs=9),), target=target), loaded, place / "made", progress=progress)
        return any("resumes" in text for text in said)

    found = [killed(), killed()]
    (place / "user.py").write_text(USER.replace("bounded=True", "bounded=1 > 0"))
    assert [*found, killed()] == [False, True, False]


def test_another_cpu_has_another_range_of_8_bit_numbers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"avx_vnni"} if cpu.reduced_range(None, "cpu") else {"avx2"}
    monkeypatch.setattr(cpu, "flags", lambda: other)
    kept, said = keep(place)
    assert kept == [*STEPS[:2]]
    assert "3-quantize.static is made again: changed since it was made: range of 8-bit numbers on this CPU" in said


@pytest.mark.parametrize(
    ("config", "depends"),
    [
        *((kind(), True) for kind in (Static, Dynamic, Mixed, Qat)),
        *((kind(reduce_range=True), False) for kind in (Static, Dynamic)),
        (WeightOnly(), False),
    ],
)
def test_which_steps_ask_what_the_cpu_can_do(
    config: object, depends: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = fresh(place)
    source, sets = bundle.load(place / "run" / "2-export.onnx", user), splits.read(user)
    keys = []
    for flags in ({"avx2"}, {"avx2", "avx_vnni"}):
        monkeypatch.setattr(cpu, "flags", lambda flags=flags: flags)
        keys.append(digest.step(config, source, Recipe(()), sets).digest)
    assert (keys[0] != keys[1]) is depends
    asking = {METHODS[kind].name for kind in METHODS if "reduce_range" in kind.__dataclass_fields__}
    assert asking == {"quantize.static", "quantize.dynamic", "quantize.nncf"}, (
        "another one has to stand here and in BY_CPU"
    )


def test_code_leaves_out_what_is_not_the_users(place: Path) -> None:
    (place / "user.py").write_text(USER.replace("import numpy as np", "import json, scipy.special, numpy as np", 1))
    assert sorted(code(fresh(place).source)) == ["nets", "nets.net", "user.py"]


def test_code_that_is_imported_by_a_name_of_its_own_counts_too(place: Path) -> None:
    (place / "by_name.py").write_text("WIDTH = 1\n")
    lines = "import importlib\nMODULE = importlib.import_module('by' + '_name')\n"
    (place / "user.py").write_text(lines + USER)
    sys.modules.pop("by_name", None)
    assert "by_name" in code(fresh(place).source)
    assert "by_name" in code(fresh(place).source), "though it is not imported a second time"


CONFIGS: dict[str, tuple[dict[str, object], list[str]]] = {
    "the budget": ({"budget": {"max_drop": 0.9}}, [*STEPS]),
    "the load test": ({"load": {"duration": 9.0}}, [*STEPS]),
    "serving": ({"serve": {"max_batch": 16}}, [*STEPS]),
    "the seed": ({"seed": 1}, []),
    "the last step": ({"step": [PLAN["step"][0], {"use": "quantize.static", "samples": 8}]}, [*STEPS[:2]]),  # type: ignore[index]
    "one step more": ({"step": [*PLAN["step"], {"use": "quantize.half"}]}, [*STEPS[:2]]),  # type: ignore[misc]
}


@pytest.mark.parametrize("what", CONFIGS)
def test_what_a_change_of_the_recipe_keeps(what: str, place: Path) -> None:
    change, kept = CONFIGS[what]
    assert keep(place, recipe.parse({**PLAN, **change}))[0] == kept


SETS: dict[str, tuple[str, str, list[str]]] = {
    "training": ("return part(np.arange(64))", "return part(np.arange(60))", []),
    "calibration": ("part(np.arange(32))", "part(np.arange(16, 48))", [*STEPS[:2]]),
    "evaluation": ("part(np.arange(64, 96))", "part(np.arange(65, 96))", []),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_step_is_made_anew_when_data_changed_that_it_reads(kind: str, place: Path) -> None:
    old, new, kept = SETS[kind]
    assert old in USER
    user = fresh(place)
    # Data that change and code that does not: as if it were read from a file.
    (place / "other.py").write_text(USER.replace(old, new))
    changed = replace(user, **{kind: getattr(load_workload(f"{place / 'other.py'}:workload"), kind)})
    found, said = keep(place, user=changed)
    assert found == kept
    assert f"changed since it was made: {kind} data" in said


def test_an_unseeded_shuffle_resumes(place: Path) -> None:
    def shuffled() -> list[Batch]:
        (batch,) = user.batches("training")
        order = np.random.default_rng().permutation(64)
        return [Batch({"x": batch.inputs["x"][order]}, batch.targets[order])]

    user = fresh(place)
    assert keep(place, user=replace(user, training=shuffled))[0] == [*STEPS]


def test_the_lineage_of_a_kept_step_says_what_is_judged_today(place: Path) -> None:
    folders = [place / "run" / f"{number}-{name}" for number, name in enumerate(STEPS, 1)]

    def lineages() -> list[list[dict[str, object]]]:
        return [bundle.describe(folder)["lineage"] for folder in folders]

    wanted = lineages()
    for folder in folders:
        description = bundle.describe(folder)
        for entry in description["lineage"]:
            entry |= {"quality": {"value": -1.0}, "trained": {"value": -1.0}, "overlap": {"training": 99}}
        (folder / "bundle.json").write_text(json.dumps(description))
    kept, _, last = make(place)
    assert kept == [*STEPS] and last
    assert lineages() == wanted and [*last.lineage] == wanted[-1]
    untouched = [(folder / "bundle.json").stat().st_mtime_ns for folder in folders]
    make(place)
    assert [(folder / "bundle.json").stat().st_mtime_ns for folder in folders] == untouched

    user, plan = fresh(place), recipe.parse(PLAN)
    sets = replace(splits.read(user), overlap={"selection": 3})
    trained = baseline.establish(user, place / "run" / "0-trained", digest.trained(user, sets))
    found = advance.every_step(Run(plan, trained, sets, place / "run"))
    assert found.kept == 3
    assert [entry["overlap"] for entry in found.elements] == [{"selection": 3}] * 3
    assert [[entry["overlap"] for entry in lineage] for lineage in lineages()] == [
        [{"selection": 3}] * number for number in (1, 2, 3)
    ]


def test_what_follows_a_bundle_that_was_made_anew_is_made_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "run" / "1-distill.logits" / "bundle.json").unlink()
    fit = train.fit

    def differently(module: nn.Module, *args: object, **options: object) -> nn.Module:
        result: nn.Module = fit(module, *args, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            result.b.weight.zero_()  # type: ignore[operator, union-attr]
        return result

    monkeypatch.setattr(train, "fit", differently)
    kept, _, last = make(place)
    assert kept == []
    assert last and not last.module.b.weight.any()  # type: ignore[operator, union-attr]


def test_a_run_that_was_killed_between_two_steps_finds_the_old_ones_unfit(place: Path) -> None:
    first = bundle.load(place / "run" / "1-distill.logits")
    with torch.no_grad():
        first.module.b.weight.zero_()  # type: ignore[operator, union-attr]
    bundle.save(first, place / "run" / "1-distill.logits")
    kept, said = keep(place)
    assert kept == ["distill.logits"]
    assert "2-export.onnx is made again: changed since it was made: model before" in said


def test_a_key_stands_in_each_bundle_and_is_checked(place: Path) -> None:
    last = place / "run" / "3-quantize.static"
    description = bundle.describe(last)
    assert description["key"] == bundle.load(last).key.digest
    assert description["made_of"]["step before"] == bundle.load(place / "run" / "2-export.onnx").key.digest
    text = (last / "bundle.json").read_text()
    (last / "bundle.json").write_text(text.replace(description["key"], "0" * 64))
    with pytest.raises(BadBundle, match="damaged"):
        bundle.load(last)


def test_a_bundle_is_refused_when_the_users_code_makes_another_model(place: Path) -> None:
    last = place / "run" / "3-quantize.static"
    (place / "user.py").write_text(USER.replace("bounded=True", "bounded=1 > 0"))
    bundle.load(last, fresh(place))
    (place / "nets" / "net.py").write_text(NET.replace("relu", "tanh"))
    with pytest.raises(BadBundle, match="makes another model of its weights now: 'y' differs"):
        bundle.load(last, fresh(place))
