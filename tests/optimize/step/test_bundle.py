import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optimize.methods.apply import apply
from optimize.methods.prune.channels import Channels
from optimize.model.errors import BadBundle, BadWorkload
from optimize.predict.module import TorchPredictor
from optimize.source.load import load_workload
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle
from optimize.step.contract import Context
from serve.config.target import Target


@pytest.fixture
def pruned(small: Workload, tmp_path: Path) -> Bundle:
    trained = small.build()
    context = Context(small, trained, Target(), 0, tmp_path, lambda text, fraction: None)
    return Bundle(small, apply(Channels(ratio=0.5), trained, context), lineage=({"name": "prune.channels"},))


def answer(bundle: Bundle) -> np.ndarray:
    batch = next(bundle.workload.batches("evaluation"))
    return TorchPredictor(bundle.module, bundle.workload.outputs).predict(batch.inputs)["logits"]


def test_a_pruned_model_comes_back_from_the_users_own_code(pruned: Bundle, tmp_path: Path) -> None:
    saved = bundles.save(pruned, tmp_path / "bundle")
    assert saved.folder
    loaded = bundles.load(saved.folder)
    assert np.array_equal(answer(loaded), answer(pruned))
    assert loaded.module.conv.out_channels == 8  # type: ignore[union-attr]
    assert loaded.lineage == pruned.lineage
    assert {file.name for file in saved.folder.iterdir()} == {"bundle.json", "weights.safetensors"}


def test_a_changed_missing_or_foreign_file_is_found(pruned: Bundle, tmp_path: Path) -> None:
    def broken(change: Callable[[Path], object]) -> str:
        folder = bundles.save(pruned, tmp_path / "bundle").folder
        assert folder
        change(folder)
        with pytest.raises(BadBundle) as error:
            bundles.load(folder)
        (folder / bundles.DESCRIPTION).write_text("{}")
        return error.value.what

    weights = bundles.WEIGHTS
    assert "was changed" in broken(
        lambda folder: (folder / weights).write_bytes((folder / weights).read_bytes() + b"x")
    )
    assert "is missing" in broken(lambda folder: (folder / weights).unlink())
    assert "damaged" in broken(lambda folder: (folder / bundles.DESCRIPTION).write_text("{"))
    assert "another format" in broken(lambda folder: (folder / bundles.DESCRIPTION).write_text("{}"))


def test_not_a_bundle(tmp_path: Path, pruned: Bundle) -> None:
    with pytest.raises(BadBundle, match="not a bundle"):
        bundles.load(tmp_path / "absent")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(BadBundle, match="not a bundle"):
        bundles.save(pruned, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_the_workload_behind_it_changed(small: Workload, user_file: Callable[..., str], tmp_path: Path) -> None:

    made = load_workload(user_file())
    folder = bundles.save(Bundle(made, made.build()), tmp_path / "bundle").folder
    assert folder
    user_file(("nn.Linear(768, 10)", "nn.Linear(768, 10, bias=False)"))
    with pytest.raises(BadBundle, match="do not fit"):
        bundles.load(folder)
    (tmp_path / "user.py").unlink()
    with pytest.raises(BadWorkload, match="no such file"):
        bundles.load(folder)


def test_an_interrupted_save_leaves_the_old_bundle(
    pruned: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundles.save(pruned, tmp_path / "bundle").folder
    assert folder
    before = json.loads((folder / bundles.DESCRIPTION).read_text())

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        bundles.save(pruned, folder)
    assert json.loads((folder / bundles.DESCRIPTION).read_text()) == before
    bundles.load(folder)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_model_that_the_user_holds_is_not_changed(small: Workload, pruned: Bundle, tmp_path: Path) -> None:
    held = small.build()
    for model in (held, lambda: held):
        loaded = bundles.load(bundles.save(pruned, tmp_path / "bundle").folder or tmp_path, replace(small, model=model))
        assert loaded.module.conv.out_channels == 8  # type: ignore[union-attr]
        assert held.conv.out_channels == 16  # type: ignore[union-attr]
