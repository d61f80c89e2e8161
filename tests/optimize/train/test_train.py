"""The training loop: checkpoints, and what a killed run finds again."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from modelathe.errors import UsageError
from optimize.methods import apply as step
from optimize.methods.distill.logits import Logits
from optimize.model.errors import BadModel
from optimize.predict.module import forward
from optimize.runs import advance, baseline, pipeline, recipe
from optimize.runs.run import Run
from optimize.source.batch import Batch
from optimize.source.load import load_workload
from optimize.source.splits import Sets
from optimize.source.workload import Workload
from optimize.step import bundle
from optimize.step.contract import Context, fingerprint
from optimize.step.key import Key
from optimize.train import fit as train
from optimize.train.fit import tensors
from serve.config.target import Target
from tests.optimize.conftest import SMALL


class Killed(BaseException):
    """Stands for the end of the process between two epochs."""


def context(workload: Workload, place: Path, checkpoint: Path | None, until: int = 0) -> Context:
    said: list[str] = []

    def progress(text: str, fraction: float) -> None:
        said.append(text)
        if until and f"epoch {until}," in text:
            raise Killed

    made = Context(workload, workload.build(), Target(cores=1), 0, place, progress, checkpoint)
    object.__setattr__(made, "said", said)
    return made


def fit(workload: Workload, at: Context, epochs: int = 4) -> nn.Module:
    module = workload.build()
    module.add_module("dropout", nn.Dropout(0.5))
    module.out.register_forward_pre_hook(lambda _, inputs: (module.dropout(inputs[0]),))

    def objective(module: nn.Module, inputs: train.Tensors, targets: torch.Tensor) -> torch.Tensor:
        return train.label_loss(workload, forward(module, inputs, workload.outputs), targets)

    return train.fit(module, at, objective, name="test", epochs=epochs, learning_rate=1e-3)


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(small: Workload, tmp_path: Path) -> None:
    whole = fit(small, context(small, tmp_path, None))
    for until in (1, 3):
        with pytest.raises(Killed):
            fit(small, context(small, tmp_path, tmp_path / "kept", until))
    last = context(small, tmp_path, tmp_path / "kept")
    assert fingerprint(fit(small, last)) == fingerprint(whole)
    assert last.said[0] == "test: resumes after epoch 3 of 4"  # type: ignore[attr-defined]
    assert len(last.said) == 2  # type: ignore[attr-defined]
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_the_rate_stays_for_an_epoch_and_then_falls_to_zero(small: Workload, tmp_path: Path) -> None:
    rates: list[float] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    fit(small, context(small, tmp_path, None), epochs=3)
    handle.remove()
    batches = len(list(small.batches("training")))
    assert len(rates) == 3 * batches
    assert rates[: batches + 1] == [1e-3] * (batches + 1)
    assert rates[batches:] == sorted(rates[batches:], reverse=True)
    assert rates[2 * batches] == pytest.approx(5e-4)
    assert 0 < rates[-1] < 1e-5


def test_a_damaged_checkpoint_is_as_good_as_none(small: Workload, tmp_path: Path) -> None:
    whole = fit(small, context(small, tmp_path, tmp_path / "kept"), epochs=1)
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    again = context(small, tmp_path, tmp_path / "kept")
    assert fingerprint(fit(small, again, epochs=1)) == fingerprint(whole)
    assert not any("resumes" in text for text in again.said)  # type: ignore[attr-defined]


def test_other_weights_find_no_checkpoint(small: Workload, tmp_path: Path) -> None:
    fit(small, context(small, tmp_path, tmp_path / "kept"), epochs=1)
    torch.manual_seed(5)
    other = replace(small, model=type(small.build()))
    at = context(other, tmp_path, tmp_path / "kept")
    fit(other, at, epochs=1)
    assert not any("resumes" in text for text in at.said)  # type: ignore[attr-defined]


def test_only_the_same_bundle_finds_a_checkpoint(tmp_path: Path) -> None:
    workload, place, plan = load_workload(f"{SMALL}:workload"), tmp_path / "run" / "1-distill.logits", recipe.Recipe(())
    trained = baseline.establish(workload, tmp_path / "run" / "0-trained", Key())

    def killed(key: Key) -> bool:
        """Train for an epoch more, and return whether that went on from where another stopped."""
        said: list[str] = []

        def progress(text: str, _fraction: float) -> None:
            said.append(text)
            if re.search(r"epoch \d,", text):
                raise Killed

        this = Run(plan, trained, Sets({}, {}), place.parent, progress=progress)
        with pytest.raises(Killed):
            advance.advance(Logits(epochs=9), trained.bundle, this, key, place)
        return any("resumes" in text for text in said)

    first, other = Key({"config": "1"}), Key({"config": "2"})
    assert [killed(key) for key in (first, first, other, first)] == [False, True, False, False]
    assert len(list((tmp_path / "run" / ".1-distill.logits.checkpoint").iterdir())) == 1


def test_a_long_epoch_tells_how_far_it_is(small: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    said: list[str] = []

    def progress(text: str, fraction: float) -> None:
        said.append(text)
        fractions.append(fraction)

    fit(small, replace(context(small, tmp_path, None), progress=progress), epochs=2)
    assert [text.partition(", loss")[0] for text in said] == ["test: epoch 1", "test: epoch 2"]
    said.clear()
    fractions.clear()
    monkeypatch.setattr(train, "SILENCE", 0.0)
    fit(small, replace(context(small, tmp_path, None), progress=progress), epochs=2)
    assert "test: epoch 1, batch 1, loss" in said[0]
    assert "test: epoch 2, batch 1, loss" in said[len(said) // 2]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_a_loss_that_is_not_finite_ends_the_training(small: Workload, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="the loss became nan in epoch 1"):
        train.fit(
            small.build(),
            context(small, tmp_path, None),
            lambda module, inputs, targets: forward(module, inputs, small.outputs)["logits"].mean() * float("nan"),
            name="test",
            epochs=2,
            learning_rate=1e-3,
        )


@pytest.mark.slow
def test_a_killed_command_resumes_and_leaves_nothing_behind(tmp_path: Path, user_file: Callable[..., str]) -> None:
    source = user_file()

    def command(output: str) -> list[str]:
        options = ["distill", source, "--output", str(tmp_path / output), "--epochs", "8", "--batch", "1"]
        return [sys.executable, "-m", "tests.optimize.hurried", *options]

    with subprocess.Popen(command("killed"), stderr=subprocess.PIPE, text=True, env=_alone()) as killed:
        assert killed.stderr
        assert any("epoch 3," in line for line in killed.stderr)
        os.kill(killed.pid, signal.SIGKILL)
    assert (tmp_path / ".killed.checkpoint").is_dir()
    assert not (tmp_path / "killed").exists()
    again = subprocess.run(command("killed"), capture_output=True, text=True, env=_alone(), timeout=900)
    assert again.returncode == 0, again.stderr
    resumed = re.search(r"resumes after epoch (\d+) of 8", again.stderr)
    assert resumed and 3 <= int(resumed[1]) < 8
    assert "epoch 2," not in again.stderr
    assert not (tmp_path / ".killed.checkpoint").exists()
    made = step.apply(Logits(epochs=8), load_workload(source).build(), context(load_workload(source), tmp_path, None))
    assert fingerprint(bundle.load(tmp_path / "killed").module) == fingerprint(made)


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_another_recipe_leaves_a_killed_run_its_checkpoints(small: Workload, tmp_path: Path) -> None:
    plan = '[budget]\nmax_drop = 0.5\n[target]\nbatch = [1]\n[[step]]\nuse = "distill.logits"\nepochs = {}\n'
    (tmp_path / "recipe.toml").write_text(plan.format(3))

    def run(until: int = 0) -> list[str]:
        said: list[str] = []

        def progress(text: str, fraction: float) -> None:
            said.append(text)
            if until and f"epoch {until}," in text:
                raise Killed

        pipeline.run(
            recipe.load(tmp_path / "recipe.toml"),
            load_workload(f"{SMALL}:workload"),
            output=tmp_path / "run",
            progress=progress,
        )
        return said

    kept = tmp_path / "run" / ".1-distill.logits.checkpoint"
    with pytest.raises(Killed):
        run(until=2)
    assert kept.is_dir()
    (tmp_path / "recipe.toml").write_text(plan.format(2))
    with pytest.raises(UsageError, match="holds another run, which stays: what differs is recipe"):
        run()
    assert len(list(kept.iterdir())) == 1
    (tmp_path / "recipe.toml").write_text(plan.format(3))
    assert "distill.logits: resumes after epoch 2 of 3" in run()
    assert not kept.exists()


def _alone() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_targets_by_name_are_where_the_training_is(small: Workload) -> None:
    def named() -> Iterator[Batch]:
        for batch in small.batches("training"):
            yield Batch(batch.inputs, {"label": batch.targets, "text": np.array(["a"], object)})

    inputs, targets = next(tensors(replace(small, training=named), device="meta"))
    assert {value.device.type for value in (*inputs.values(), targets["label"])} == {"meta"}
    assert targets["text"].tolist() == ["a"]
