"""A run for a GPU, on one: judged, timed, served and compared there, and published without a reservation."""

import json
from pathlib import Path

import pytest
import tomli_w

from optimize.machine import doctor
from tests.optimize.conftest import SMALL, Optimize

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("step", ["export.onnx", "quantize.half"])
def test_a_run_is_proven_on_the_gpu(optimize: Optimize, gpu_server: Path, tmp_path: Path, step: str) -> None:
    assert doctor.has_gpu()
    made = tmp_path / "recipe.toml"
    target = {"device": "cuda", "batch": [1, 8]}
    load = {"duration": 2.0, "concurrency": 8}
    recipe = {"budget": {"keep": 0.5}, "target": target, "step": [{"use": step}], "load": load}
    made.write_text(tomli_w.dumps(recipe))
    place = tmp_path / "repository"
    ended = optimize(
        "run", f"{SMALL}:workload", "--recipe", made, "--repository", place, "--output", tmp_path / "out", "--json"
    )
    told = json.loads(ended.out)
    assert ended.code == 0, ended.err
    assert told["version"]["number"] == 1
    assert not told["ratios"]["unmeasured"]
    assert not any(step.get("emulated") for step in told["steps"])
    assert [lane["mismatched"] for lane in told["endpoint"]["parity"]["lanes"]] == [0, 0]
