"""One module is exported once in a run, and what is used again is what would have been made anew."""

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from optimize.methods.export import onnx as export_onnx
from optimize.runs import advance, baseline, pipeline, recipe
from optimize.source.load import load_workload
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from tests.optimize.conftest import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("each_step_faster")]
TORCH = {"use": "prune.channels", "ratio": 0.25}


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where every export of a module was written to."""
    seen: list[Path] = []
    made = export_onnx.export

    def counted(*arguments: Any, **options: Any) -> Path:
        seen.append(arguments[3])
        return made(*arguments, **options)

    for place in (export_onnx, advance, baseline):
        monkeypatch.setattr(place, "export", counted)
    return seen


def ran(place: Path, workload: Workload, *steps: dict[str, Any]) -> dict[str, Any]:
    plan = recipe.parse({"budget": {"max_drop": 1}, "target": {"batch": [1]}, "step": [*steps]})
    return pipeline.run(plan, workload, output=place)


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ([{"use": "export.onnx"}], 1),
        ([TORCH, {"use": "export.onnx"}], 2),  # of the trained module and of the pruned one
        ([{"use": "export.onnx", "opset": 18}], 2),
    ],
    ids=["trained", "pruned", "another opset"],
)
def test_a_module_is_exported_once(
    steps: list[dict[str, Any]], count: int, exports: list[Path], tmp_path: Path, small: Workload
) -> None:
    ran(tmp_path / "run", small, *steps)
    assert len(exports) == count
    last = bundles.load(sorted((tmp_path / "run").glob("[0-9]-*"))[-1])
    assert last.graph
    opset = onnx.load(last.graph).opset_import[0].version
    assert opset == steps[-1].get("opset", 20)
    anew = export_onnx.export(
        last.module, small.inputs, small.outputs, tmp_path / "model.onnx", opset, real=small.first()
    )
    assert anew.read_bytes() == last.graph.read_bytes()


def test_a_run_that_resumes_uses_its_own(exports: list[Path], tmp_path: Path, small: Workload) -> None:
    place = tmp_path / "run"
    steps = TORCH, {"use": "export.onnx"}, {"use": "quantize.dynamic"}
    ran(place, small, *steps)
    exports.clear()
    for number in (2, 3):  # as if it had been killed before
        shutil.rmtree(next(place.glob(f"{number}-*")))
    document = ran(place, small, *steps)
    assert exports == []
    assert document["steps"][1]["quality"]["samples"] == document["trained"]["quality"]["samples"]


def test_a_bundle_of_another_run_is_exported_anew(exports: list[Path], tmp_path: Path) -> None:
    """Who knows which version of modelathe, or of torch, has made its file."""
    workload = load_workload(f"{SMALL}:workload")
    ran(tmp_path / "run", workload, TORCH)
    exports.clear()
    one = recipe.parse({"step": [{"use": "export.onnx"}]})
    source = bundles.load(tmp_path / "run" / "1-prune.channels")
    pipeline.apply_one(one, source, tmp_path / "exported")
    assert len(exports) == 2  # the trained module's, and the pruned one's
