"""A workload in a few lines: what it is given, and what it makes of that."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from modelathe.tensors import BATCH, Dim
from optimize import Batch, Workload
from optimize.judge.evaluate import evaluate
from optimize.model.errors import BadData, BadWorkload
from optimize.predict.module import TorchPredictor

ROWS = np.random.default_rng(0).random((70, 4))
LABELS = (ROWS.sum(1) > 2).astype(np.int64)


class Net(nn.Module):
    """Four numbers to two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        return self.layer(row)


class Mixed(nn.Module):
    """Numbers, a category of 1,000 and a flag to one logit."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(1000, 4), nn.Linear(9, 1)

    def forward(self, numbers: torch.Tensor, category: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        parts = [numbers, self.table(category), member[:, None].float()]
        return self.layer(torch.cat(parts, 1))


class Reader(nn.Module):
    """Tokens and their mask to a dict of logits for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.table(input_ids) * attention_mask[..., None]
        return {"logits": self.head(hidden), "hidden": hidden}


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    return [(ROWS[at : at + 16], LABELS[at : at + 16]) for at in range(0, 70, 16)]


LOADERS: dict[str, Callable[[], Any]] = {
    "a DataLoader": lambda: DataLoader(TensorDataset(torch.tensor(ROWS), torch.tensor(LABELS)), batch_size=16),
    "a list of pairs": pairs,
    "a function": lambda: pairs,
    "whole arrays": lambda: (ROWS, LABELS),
    "a mapping and targets": lambda: [({"row": x}, y) for x, y in pairs()],
    "one mapping": lambda: [{"row": x, "label": y} for x, y in pairs()],
    "nested tuples": lambda: [((x,), y) for x, y in pairs()],
    "Batches": lambda: [Batch({"row": x}, y) for x, y in pairs()],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_of_any_kind(kind: str) -> None:
    made = Workload.of(Net(), LOADERS[kind](), "accuracy")
    read = list(made.batches("evaluation"))
    assert np.array_equal(np.concatenate([batch.inputs["row"] for batch in read]), ROWS.astype(np.float32))
    assert np.array_equal(np.concatenate([batch.targets for batch in read]), LABELS)
    assert made.name == "net" and made.outputs == ("output",)
    assert made.inputs[0].dims == (BATCH, 4) and made.inputs[0].dtype == "float32"
    assert len(list(made.batches("evaluation"))) == len(read), "it is read anew at every call"


def test_a_table_with_three_types() -> None:
    rng = np.random.default_rng(1)
    whole = (rng.random((40, 4)), rng.integers(0, 1000, 40), rng.random(40) > 0.5, rng.integers(0, 2, 40))
    made = Workload.of(Mixed, whole, "f1", name="prices")
    assert [(spec.name, spec.dtype, spec.own) for spec in made.inputs] == [
        ("numbers", "float32", (4,)),
        ("category", "int64", ()),
        ("member", "bool", ()),
    ]
    assert made.inputs[1].values == (whole[1].min(), whole[1].max())
    with TorchPredictor(made.build(), made.outputs) as torch_side:
        assert 0 <= evaluate(torch_side, made).scores[0].value <= 1
    assert any(line.startswith("input category: int64 [batch], ") for line in made.inferred)


def test_texts_of_different_lengths() -> None:
    rng = np.random.default_rng(2)
    items = []
    for length in (5, 9, 9, 7):
        ids = rng.integers(1, 50, (6, length))
        items.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": rng.integers(0, 3, (6, length))})
    made = Workload.of(Reader(), items, lambda outputs, targets: (outputs.argmax(-1) == targets).mean(1), bounded=True)
    tokens = made.inputs[0].dims[1]
    assert isinstance(tokens, Dim) and (tokens.minimum, tokens.typical, tokens.maximum) == (5, 8, 9)
    assert made.inputs[1].dims[1] == tokens, "one dim, for they always had the same sizes"
    assert made.outputs == ("logits", "hidden")
    assert "axis 1 of input_ids is free, 5 to 9; give inputs=(TensorSpec(…),) for more" in made.inferred


def once() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield from pairs()


@pytest.mark.parametrize(
    ("loader", "metric", "fields", "error", "said"),
    [
        (once(), "accuracy", {}, BadData, "evaluation can be read only once"),
        (pairs(), "acuracy", {}, BadWorkload, "there is no metric 'acuracy'"),
        (pairs(), "accuracy", {"trainng": pairs()}, BadWorkload, "a workload has no 'trainng'"),
        (pairs(), "accuracy", {"loss": "hinge"}, BadWorkload, "there is no loss 'hinge'"),
        ([x for x, _ in pairs()], "accuracy", {}, BadWorkload, "accuracy needs targets"),
        ([(x, x, y) for x, y in pairs()], "accuracy", {}, BadData, "batches of 3 parts, forward takes row"),
        ([{"rows": x} for x, _ in pairs()], "accuracy", {}, BadData, "batches of rows, forward takes row"),
        ((ROWS, LABELS[:-1]), "accuracy", {}, BadData, "arrays of 70, 69 samples"),
        ([({"row": x}, {"a": y, "b": y}) for x, y in pairs()], "accuracy", {}, BadWorkload, "one array of targets"),
        (pairs(), "f1", {}, None, ""),
    ],
)
def test_what_does_not_fit_is_said(
    loader: Any, metric: str, fields: dict[str, Any], error: type[Exception] | None, said: str
) -> None:
    if error is None:
        assert Workload.of(Net(), loader, metric, **fields)
        return
    with pytest.raises(error, match=said):
        Workload.of(Net(), loader, metric, **fields)


def test_a_module_whose_arguments_have_no_names() -> None:
    class Whatever(nn.Module):
        def forward(self, *rows: torch.Tensor) -> torch.Tensor:
            return rows[0]

    with pytest.raises(BadWorkload, match=r"the arguments of Whatever\.forward have no names"):
        Workload.of(Whatever(), pairs(), "accuracy")


def test_a_file_of_ten_lines_is_a_workload(tmp_path: Path) -> None:
    from optimize.source.load import load_workload

    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from torch import nn\n"
        "from optimize import Workload\n"
        "def workload():\n"
        "    rows = np.random.default_rng(0).random((60, 4))\n"
        "    return Workload.of(nn.Linear(4, 3), (rows, rows.argmax(1) % 3), 'accuracy', name='mine')\n"
    )
    made = load_workload(f"{tmp_path / 'mine.py'}:workload")
    assert made.inputs[0].name == "input" and made.source.endswith("mine.py:workload")


def test_what_was_read_is_told_and_stands_in_the_lineage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    from optimize.report import table
    from optimize.runs import baseline, digest
    from optimize.source import splits
    from optimize.step import bundle

    (tmp_path / "mine.py").write_text("")
    made = replace(Workload.of(Net(), (ROWS, LABELS), "accuracy"), source=f"{tmp_path / 'mine.py'}:workload")
    said: list[str] = []
    key = digest.trained(made, splits.read(made))
    baseline.establish(made, tmp_path / "0-trained", key, lambda text, _: said.append(text))
    lines = ["input row: float32 [batch, 4]", "outputs: output", "metric accuracy: more is better"]
    assert [text for text in said if text.startswith("read from")] == [f"read from the data: {line}" for line in lines]
    description = bundle.describe(tmp_path / "0-trained")
    assert description["workload"]["inferred"] == lines
    table.lineage(description)
    assert "read from its data: input row: float32 [batch, 4]" in capsys.readouterr().out


def test_labels_that_forward_may_take_are_targets() -> None:
    """A Hugging Face model computes its own loss of them; as an input they would tell it what is right."""

    class Classifier(Net):
        def forward(self, row: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            assert labels is None
            return super().forward(row)

    made = Workload.of(Classifier(), [{"row": x, "labels": y} for x, y in pairs()], "accuracy")
    assert [spec.name for spec in made.inputs] == ["row"]
    assert np.array_equal(next(made.batches("evaluation")).targets, LABELS[:16])


def test_where_a_label_begins_is_told() -> None:
    class Chance(Net):
        def forward(self, row: torch.Tensor) -> torch.Tensor:
            return super().forward(row)[:, 0].sigmoid()

    assert "a label is said to be there above 0.5" in Workload.of(Chance(), (ROWS, LABELS), "accuracy").inferred
