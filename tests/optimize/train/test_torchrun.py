"""Training with two processes under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimize.step import bundle

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow

TINY = """
import sys
import numpy as np
import torch
from torch import nn
from modelathe.tensors import BATCH, TensorSpec
from optimize.source.batch import Batch
from optimize.source.workload import Workload

DATA = np.random.default_rng(0).normal(size=(108, 4)).astype(np.float32)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out, self.idle = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.hidden(x).relu())


def training(size):
    known = DATA[:54]
    return [Batch({"x": known[start : start + size]}, known[start : start + size].argmax(1) % 3)
            for start in range(0, 54, size)]


def evaluation():
    return [Batch({"x": DATA[54:]}, DATA[54:].argmax(1) % 3)]


def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs["y"], targets)


def scores(outputs, targets, reference):
    return {"accuracy": (outputs["y"].argmax(1) == targets).astype(float)}


def workload(size=8):
    return Workload(
        name="tiny", model=Tiny, inputs=(TensorSpec("x", "float32", (BATCH, 4)),), outputs=("y",),
        evaluation=evaluation, training=lambda: training(size), loss=loss, scores=scores, bounded=True,
    )


if __name__ == "__main__":
    from pathlib import Path
    from safetensors.torch import save_file
    from optimize.train import fit, processes
    from optimize.step.contract import Context
    from serve.config.target import Target

    made = workload(int(sys.argv[2]))
    module = made.build()
    if processes.rank():
        module.hidden.weight.data.zero_()  # the first process's weights are everyone's
    context = Context(made, made.build(), Target(cores=1), 0, Path(), lambda *_: None)
    fit.fit(module, context, fit.healing(context), name="test", epochs=3, learning_rate=0.01)
    save_file(module.state_dict(), f"{sys.argv[1]}-{processes.rank()}")
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def torchrun(*args: object) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments twice; a free port is found by torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env=env, timeout=900, check=False
    )


def test_two_processes_with_half_the_batch_are_one_with_the_whole(tiny: Path, tmp_path: Path) -> None:
    one = subprocess.run([sys.executable, tiny, tmp_path / "one", "8"], cwd=ROOT, check=False, timeout=900)
    two = torchrun(tiny, tmp_path / "two", 4)
    assert one.returncode == two.returncode == 0, two.stderr
    single, first, second = (load_file(tmp_path / name) for name in ("one-0", "two-0", "two-1"))
    for name, weights in single.items():
        # 54 samples: the last batch is a short one in both cases, and shorter for one process of the two.
        torch.testing.assert_close(first[name], weights, rtol=1e-4, atol=1e-6)
        assert torch.equal(first[name], second[name])


def test_a_whole_run(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[budget]\nmax_drop = 1.0\n[target]\nbatch = [1]\n[[step]]\nuse = "distill.logits"\nepochs = 2\n'
        '[[step]]\nuse = "distill.relations"\nepochs = 2\n'
    )
    ended = torchrun(
        *("-m", "optimize", "run", f"{tiny}:workload"),
        *("--recipe", tmp_path / "recipe.toml", "--output", tmp_path / "run"),
    )
    assert ended.returncode == 0, ended.stderr
    for text in ("distill.logits: epoch 2,", "distill.relations: epoch 2,", "exporting the trained model"):
        assert ended.stderr.count(text) == 1, ended.stderr
    assert ended.stdout.count("report.html") == 1
    made = bundle.load(tmp_path / "run" / "3-export.onnx")
    assert [entry["name"] for entry in made.lineage] == ["distill.logits", "distill.relations", "export.onnx"]


def test_an_error_of_one_process_ends_all_and_is_told_once(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(
        TINY.replace(
            "def loss(outputs, targets):",
            "def loss(outputs, targets):\n    import os\n    assert os.environ['RANK'] == '0', 'only there'",
        )
    )
    ended = torchrun(
        *("-m", "optimize", "distill", f"{tiny}:workload", "--label-weight", 0.5, "--output", tmp_path / "made")
    )
    assert ended.returncode == 1  # torchrun's own, whatever its processes end with
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert "loss() raised AssertionError: only there" in ended.stderr
    assert "exitcode  : 4" in ended.stderr
    assert not (tmp_path / "made").exists()


def test_a_wrong_option_ends_all(tiny: Path, tmp_path: Path) -> None:
    ended = torchrun(*("-m", "optimize", "distill", f"{tiny}:nothing", "--output", tmp_path / "made"))
    assert ended.returncode == 1
    assert ended.stderr.count("there is no 'nothing' in it") == 1, ended.stderr
    assert "exitcode  : 4" in ended.stderr


def test_a_process_that_cannot_begin_ends_all(tiny: Path, tmp_path: Path) -> None:
    """The first process is in the midst of exchanging weights when the other one has already failed."""
    tiny.write_text(f"import os\nif os.environ.get('RANK') == '1':\n    raise OSError('no data here')\n{TINY}")
    ended = torchrun(*("-m", "optimize", "distill", f"{tiny}:workload", "--output", tmp_path / "made"))
    assert ended.returncode == 1
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert "raised OSError: no data here" in ended.stderr
    assert "exitcode  : 4" in ended.stderr


def test_two_processes_share_one_shuffled_epoch(tiny: Path, tmp_path: Path) -> None:
    """Both by torch's global numbers and by a generator of the workload's own, which only the first has drawn from."""
    seen = (
        "def training(size, rng=np.random.default_rng(0)):\n"
        "    from torch.utils.data import DataLoader\n"
        "    order = [int(n) for n in DataLoader(rng.permutation(54), shuffle=True)]\n"
        "    for start in range(0, 54, size):\n"
        "        index = order[start : start + size]\n"
        "        yield Batch({'x': DATA[index]}, np.array(index))\n"
    )
    start = TINY.index("def training(size):")
    text = TINY[:start] + seen + TINY[TINY.index("\n\ndef evaluation") :]
    text = text.replace(
        "    return nn.functional.cross_entropy(outputs",
        f"    import os\n    with open(f'{tmp_path}/seen-' + os.environ['RANK'], 'a') as file:\n"
        "        file.write(' '.join(map(str, targets.tolist())) + ' ')\n    targets = targets % 3\n"
        "    return nn.functional.cross_entropy(outputs",
    )
    tiny.write_text(text.replace("== targets)", "== targets % 3)"))
    arguments = ("--label-weight", 0.5, "--epochs", 1, "--batch", 1, "--output", tmp_path / "made")
    ended = torchrun(*("-m", "optimize", "distill", f"{tiny}:workload"), *arguments)
    assert ended.returncode == 0, ended.stderr
    shares = [[int(word) for word in (tmp_path / f"seen-{rank}").read_text().split()] for rank in range(2)]
    tried = len(shares[0]) + len(shares[1]) - 54  # by the first one, before anything is trained
    assert 0 <= tried <= 8 and len(set(shares[0][:tried])) == tried, "a few, each once"
    assert sorted(shares[0][tried:] + shares[1]) == list(range(54))
