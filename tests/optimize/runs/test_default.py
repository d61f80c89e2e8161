"""A run that names neither a recipe nor a preset: presets are tried in turn until what a gate passed is published."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from loadtest.judge import validity
from optimize import Workload, run
from optimize.judge import ruler
from optimize.judge.gate import Gate
from optimize.judge.ruler import CONTROL, Speeds
from optimize.model.errors import GateRefused
from optimize.runs import baseline, judging, pipeline, recipe
from optimize.runs.run import Terms
from optimize.source.load import load_workload
from tests.optimize.conftest import Optimize

CNN = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optimize import Workload

x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y)
train, test = (DataLoader(TensorDataset(x[part], y[part]), 64) for part in (slice(1300), slice(1300, None)))


def trained():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for images, labels in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net


def workload():
    return Workload.of(trained, test, "accuracy", calibration=train, name="cnn")
"""
TABLE = """
import numpy as np
import torch
from torch import nn

from optimize import Workload

rng = np.random.default_rng(0)
DATA = {
    "amount": rng.gamma(2, 50, (1200, 4)).astype("float32"),
    "category": rng.integers(0, 50, (1200,)),
    "member": rng.integers(0, 2, (1200, 1)).astype(bool),
}
LABELS = ((DATA["amount"][:, 0] > 80) ^ (DATA["category"] % 3 == 0)).astype("int64")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.layers = nn.Sequential(nn.Linear(69, 256), nn.ReLU(), nn.Linear(256, 2))

    def forward(self, amount, category, member):
        return self.layers(torch.cat([amount.log1p(), self.words(category), member.float()], 1))


def part(at):
    return {name: array[at] for name, array in DATA.items()}, LABELS[at]


def trained():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    inputs, labels = part(slice(800))
    inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(**inputs), torch.from_numpy(labels)).backward()
        optimizer.step()
    return net


def workload():
    return Workload.of(trained, [part(slice(800, None))], "accuracy", calibration=[part(slice(800))], name="table")
"""


@pytest.fixture(scope="module")
def int8_is_slower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the last file of a run take a fifth more time, and the load tests a second, in a folder of its own."""

    def rounds(visit: ruler.Visit, names: Sequence[str], *, baseline: str, **_how: object) -> Speeds:
        seconds = {
            name: {batch: [1e-3 * batch * (1.2 if name == names[-1] else 1)] * 9 for batch in visit(name)}
            for name in names
        }
        return Speeds({**seconds, CONTROL: seconds[baseline]}, baseline, took=1.0)

    presets = tmp_path_factory.mktemp("presets")
    for path in recipe.PRESETS.glob("*.toml"):
        (presets / path.name).write_text(f"{path.read_text()}\n[load]\nduration = 1.0\nconcurrency = 2\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ruler, "alternate", rounds)
        patch.setattr(validity, "LARGEST_LAG_MS", 1e3)
        patch.setattr(recipe, "PRESETS", presets)
        patch.chdir(tmp_path_factory.mktemp("default"))
        yield


def test_what_was_not_decided_is_not_called_slower() -> None:
    told = Gate("promise: faster at batch 1", False, "0.98× [0.90, 1.06]", "interval above 0.97×", undecided=True)
    assert judging.why(told) == "promise: faster at batch 1: undecided, 0.98× [0.90, 1.06]"
    busy = replace(told, machine=True)
    assert judging.why(busy) == "promise: faster at batch 1: undecided: the machine is too busy, 0.98× [0.90, 1.06]"
    assert judging.why(replace(told, undecided=False)) == "promise: faster at batch 1: 0.98× [0.90, 1.06]"


@pytest.mark.slow
@pytest.mark.usefixtures("int8_is_slower", "server_prefix")
def test_a_table_of_three_dtypes_reaches_an_endpoint(optimize: Optimize) -> None:
    Path("table.py").write_text(TABLE)
    done = optimize("run", "table.py", "--repository", "repository", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["version"]["number"], document["version"]["state"]) == (1, "live")
    assert (document["preset"], [step["name"] for step in document["steps"]][-1]) == ("cpu-small", "quantize.half")
    [first] = document["tried"]
    assert first["preset"] == "cpu-int8" and "promise: faster at batch 1: 0.83×" in first["why"]
    said = [line for line in done.err.splitlines() if "the preset cpu-int8 is refused" in line]
    assert len(said) == 1 and "going on with cpu-small" in said[0]

    refused, passed = Path(first["page"]).parent, Path(document["report"]).parent
    assert refused != passed and (refused.parent / "latest").resolve() == passed.resolve()
    assert not all(gate["passed"] for gate in json.loads((refused / "run.json").read_text())["gates"])
    lineage = json.loads(Path("repository/table/1/lineage.json").read_text())
    assert (lineage["preset"], lineage["tried"]) == ("cpu-small", document["tried"])
    for page in (passed / "report.html", Path("repository/table/1/report.html")):
        assert "The preset cpu-int8 was tried before, and refused" in page.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("int8_is_slower")
def test_a_small_cnn_ends_well_and_one_that_was_named_is_not_replaced(
    optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("cnn.py").write_text(CNN)
    judged: list[str] = []
    evaluate = baseline.evaluate
    monkeypatch.setattr(baseline, "evaluate", lambda *given, **how: judged.append("trained") or evaluate(*given, **how))
    done = optimize("run", "cnn.py", "--quiet", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (judged, document["preset"]) == (["trained"], "cpu-small")
    refused = Path(document["tried"][0]["page"]).parent
    first = json.loads((refused / "run.json").read_text())["trained"]
    assert document["trained"]["quality"] == first["quality"]

    named = optimize("run", "cnn.py", "--preset", "cpu-int8", "--json")
    assert named.code == 3 and "quantize.static: kept from the last run" in named.err, named.err
    assert "--preset cpu-small" in json.loads(named.out)["error"]["fix"]
    document = json.loads((refused / "run.json").read_text())
    assert (document["preset"], document["tried"]) == (None, [])

    plans = {
        name: recipe.load({"extends": "preset:cpu-int8", "load": {"rate": len(name)}}) for name in ("one", "three")
    }
    workload = load_workload("cnn.py:workload")
    with pytest.raises(GateRefused, match="promise: faster") as ended:
        pipeline.run(plans, workload)
    assert [entry["preset"] for entry in ended.value.partial["tried"]] == ["one"]
    assert pipeline.run(plans, workload, terms=Terms(force=True))["tried"] == []


@pytest.mark.usefixtures("int8_is_slower")
def test_what_int8_cannot_take_is_left_to_the_next_preset_in_a_folder_inside() -> None:
    data = [(np.random.default_rng(seed).random((32, 5, 8), np.float32), np.arange(32) % 3) for seed in range(2)]

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.out = nn.GRU(8, 64, batch_first=True), nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.cells(x)[0][:, -1])

    torch.manual_seed(0)
    workload = Workload.of(Remembering(), data[:1], "accuracy", calibration=data[1:], name="cells")
    made = run(workload, output="mine", quiet=True)
    [first] = made.document["tried"]
    assert made.passed and "cannot quantize most of this model" in first["why"] and first["page"] is None
    assert made.report == Path("mine/cpu-small/report.html") and Path("mine/recipe.toml").is_file()
    assert "The preset cpu-int8 was tried before" in made.view().text[0]
