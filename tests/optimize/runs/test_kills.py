"""`optimize run`, killed at random moments: whatever is left, the same command ends as if nothing had happened.

The variable KILLS says how often; `make kills` kills it 50 times.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimize.step import bundle
from optimize.step.contract import fingerprint

USER = """
import numpy as np
import torch
from torch import nn
from modelathe.tensors import BATCH, TensorSpec
from optimize.source.batch import Batch
from optimize.source.workload import Workload

X = np.random.default_rng(0).normal(size=(96, 8)).astype("float32")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())


def scores(outputs, targets, reference):
    return {"agreement": (outputs["y"].argmax(1) == reference["y"].argmax(1)).astype(float)}


def workload():
    return Workload(name="user", model=Net, inputs=(TensorSpec("x", "float32", (BATCH, 8)),), outputs=("y",),
        evaluation=lambda: [Batch({"x": X[:32]}, np.zeros(32))], training=lambda: [Batch({"x": X[32:]}, np.zeros(64))],
        scores=scores, bounded=True)
"""
RECIPE = """
budget = {max_drop = 1.0}
target = {batch = [1], cores = 1}
step = [{use = "distill.logits", epochs = 3}, {use = "export.onnx"}]
"""
LAST = "2-export.onnx"


def start(place: Path, output: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.optimize.hurried", "run", f"{place}/user.py:workload"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ["--recipe", place / "recipe.toml", "--output", output]
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
    )


def finish(place: Path, output: Path) -> str:
    """Run the command to its end, which must be a good one, and return a digest of what it made."""
    with start(place, output) as process:
        _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    made = bundle.load(output / LAST)
    assert made.graph
    assert (output / "report.html").is_file()
    return fingerprint(made.module) + fingerprint(made.graph)


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    begun = time.monotonic()
    wanted = finish(tmp_path, tmp_path / "whole")
    whole = time.monotonic() - begun
    output, chance = tmp_path / "run", random.Random(0)
    for _ in range(int(os.environ.get("KILLS", "1"))):
        with start(tmp_path, output) as process:
            try:
                process.communicate(timeout=chance.uniform(0, whole))
            except subprocess.TimeoutExpired:
                process.kill()
        for folder in output.glob("[0-9]-*"):
            bundle.describe(folder)
        if process.returncode >= 0:
            assert process.returncode == 0
            assert finish(tmp_path, output) == wanted
            shutil.rmtree(output)
    assert finish(tmp_path, output) == wanted
