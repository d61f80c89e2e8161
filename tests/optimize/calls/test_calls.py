"""`optimize.run`, `evaluate` and `compare`, and workloads that no file holds."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import optimize
from modelathe.client import connect
from modelathe.errors import MachineError, UsageError
from optimize.calls.results import RunResult
from optimize.model.errors import BadBundle, BadRecipe, BadWorkload, GateRefused
from optimize.runs import recipe
from optimize.source.workload import Workload
from serve.server import tritonserver as server
from tests.optimize.conftest import SMALL, Optimize
from tests.optimize.small import TEST, batches, model, scores

SOURCE = f"{SMALL}:workload"
RECIPE = {
    "budget": {"max_drop": 0.05},
    "target": {"batch": [8]},
    "load": {"duration": 1.0, "concurrency": 2},
    "step": [{"use": "quantize.weight_only"}],
}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("each_step_faster")]


def made_here() -> Workload:
    """A workload as a cell of a notebook makes it: nobody knows its code's file."""
    images = [(batch.inputs["image"], batch.targets) for batch in batches(TEST)]
    return Workload.of(model, images, "accuracy", name="here")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, server_prefix: Path, each_step_faster: None
) -> Iterator[RunResult]:
    """One run of a workload that was made in Python, published."""
    place = tmp_path_factory.mktemp("calls")
    yield optimize.run(
        made_here(), RECIPE, output=place / "run", repository=place / "repository", force=False, quiet=True
    )


def test_a_result_carries_the_commands_document(finished: RunResult) -> None:
    assert finished.passed
    assert finished.check() is finished
    written = json.loads((finished.bundle.parent / "run.json").read_text())
    assert written == json.loads(json.dumps(finished.document, default=str))
    assert [gate.name for gate in finished.gates] == [gate["name"] for gate in written["gates"]]
    assert finished.quality.value == written["endpoint"]["quality"]["value"]
    assert finished.ratios.size == written["ratios"]["size"]
    assert finished.ratios.throughput == {8: written["ratios"]["throughput"]["8"]}
    assert (finished.version, finished.report) == (1, Path(written["report"]))


def test_a_cell_shows_the_figures_at_the_head_of_the_page(finished: RunResult) -> None:
    page, shown = finished.report.read_text(), finished._repr_html_()
    head = page.partition('<div class="figures">')[2].partition("<h2>")[0]
    figures = [part.partition("</b>")[0] for part in head.split('<div class="figure"><b')[1:]]
    assert len(figures) == 3
    assert all(f">{figure.partition('>')[2]}" in shown for figure in figures)
    assert page.partition("<h1>")[2].partition("</h1>")[0] in shown
    assert "color" not in shown


def test_steps_gates_and_scores_are_tables(finished: RunResult) -> None:
    steps = finished.to_pandas()
    assert isinstance(steps, pd.DataFrame)
    assert list(steps["model"]) == ["trained model", "export.onnx", "quantize.weight_only"]
    assert steps["accuracy"].iloc[-1] == finished.document["result"]["quality"]["value"]
    assert list(finished.to_pandas("gates")["passed"]) == [gate.passed for gate in finished.gates]
    scored = optimize.evaluate(SOURCE, quiet=True)
    assert list(scored.to_pandas()["metric"]) == ["accuracy", "agreement"]
    assert scored.quality.metric in scored._repr_html_()


def test_without_pandas_a_table_says_what_installs_it(finished: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MachineError, match=r"needs pandas.*\n.*pip install"):
        finished.to_pandas()


def test_a_bundle_without_a_file_says_so_and_opens_where_its_workload_is(
    finished: RunResult, optimize: Optimize
) -> None:
    assert json.loads((finished.bundle / "bundle.json").read_text())["workload"]["source"] == ""
    ended = optimize("evaluate", finished.bundle)
    assert ended.code == 4
    assert "its workload was made in Python and has no file" in ended.err
    assert "path/to/file.py:function" in ended.err
    shown = optimize("show", finished.bundle)
    assert shown.code == 0
    assert "workload here, made in Python, without a file" in shown.out


def test_evaluate_and_compare_take_what_is_at_hand(finished: RunResult) -> None:
    workload = made_here()
    values = {
        optimize.evaluate(source, workload=known, quiet=True).quality.value
        for source, known in ((finished, None), (finished.bundle, workload), (str(finished.bundle), workload))
    }
    assert values == {finished.document["result"]["quality"]["value"]}
    with pytest.raises(BadBundle, match="has no file"):
        optimize.evaluate(finished.bundle, quiet=True)
    found = optimize.compare(workload, finished.bundle, quiet=True)
    assert found.verdict == "undecided"
    assert found.low <= found.difference <= found.high
    assert found.document["flipped"] == list(found.flipped)
    assert optimize.compare(finished, finished, quiet=True).difference == 0
    torch_side = optimize.evaluate(finished, predictor="torch", quiet=True)
    assert torch_side.predictor == "torch"
    with pytest.raises(UsageError, match="exclude each other"):
        optimize.evaluate(finished, predictor="torch", endpoint="grpc://127.0.0.1:9/here", quiet=True)


def test_the_version_serves_and_is_evaluated_at_its_endpoint(finished: RunResult) -> None:
    repository = Path(finished.document["version"]["repository"])
    with server.running(repository, grace=0) as endpoint:
        with connect(endpoint.grpc) as client:
            assert client.ready("here")
        served = optimize.evaluate(finished, endpoint=f"{endpoint.grpc}/here", quiet=True)
    assert served.quality.value == finished.quality.value


def test_what_was_made_in_python_is_made_anew_in_each_run(tmp_path: Path) -> None:
    workload, asked = made_here(), {**RECIPE, "step": [{"use": "export.onnx"}]}
    for name in ("one", "two"):
        found = optimize.run(workload, asked, output=tmp_path / name, quiet=True)
        assert found.document["resumed"] is False
    with pytest.raises(UsageError, match="holds another run, which stays: what differs is code made in Python"):
        optimize.run(workload, asked, output=tmp_path / "one", quiet=True)


def test_a_file_or_a_folder_is_named_as_on_the_command_line(tmp_path: Path) -> None:
    plan = tmp_path / "recipe.toml"
    plan.write_text('[budget]\nmax_drop = 0.05\n[target]\nbatch = [8]\n[[step]]\nuse = "export.onnx"\n')
    first = optimize.run(SOURCE, plan, output=str(tmp_path / "run"), quiet=True)
    again = optimize.run(SOURCE, recipe.load(plan), output=tmp_path / "run", quiet=True)
    assert (first.document["resumed"], again.document["resumed"]) == (False, True)
    assert optimize.evaluate(again.bundle, quiet=True).quality == again.quality


def test_a_gate_that_says_no_is_an_answer(tmp_path: Path) -> None:
    asked = {**RECIPE, "budget": {"max_drop": 0.05, "bytes": 10}}
    found = optimize.run(SOURCE, asked, output=tmp_path / "run", repository=tmp_path / "repository", quiet=True)
    assert not found.passed
    assert found.version is None
    assert [gate.name for gate in found.gates if not gate.passed]
    assert "Refused by" in found._repr_html_()
    with pytest.raises(GateRefused) as refused:
        found.check()
    assert refused.value.partial is found.document


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"step": [{"use": "quantize.statik"}]}, "there is no method 'quantize.statik'"),
        ({"steps": []}, "unknown key 'steps'"),
        ({"extends": "no-such.toml", "step": []}, "there is no such recipe"),
        ({"extends": 3}, "extends is 3"),
    ],
)
def test_a_recipe_in_a_dict_is_checked_as_a_file_is(asked: dict[str, object], why: str) -> None:
    with pytest.raises(BadRecipe, match=why):
        optimize.run(SOURCE, asked, quiet=True)


def test_a_recipe_in_a_dict_extends_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.toml").write_text('seed = 7\n[budget]\nmax_drop = 0.5\n[[step]]\nuse = "quantize.dynamic"\n')
    given = {"extends": "base.toml", "budget": {"max_drop": 0.25}}
    found = recipe.load(given)
    assert (found.seed, found.budget.max_drop) == (7, 0.25)
    assert given == {"extends": "base.toml", "budget": {"max_drop": 0.25}}


def test_keywords_that_no_run_knows_are_refused() -> None:
    with pytest.raises(UsageError, match="there is no option 'forse'") as refused:
        optimize.run(SOURCE, RECIPE, forse=True)  # type: ignore[call-arg]
    assert refused.value.fix == "did you mean 'force'?"


def test_what_the_users_code_raises_names_its_line() -> None:
    def broken(outputs: object, targets: object, reference: object) -> dict[str, np.ndarray]:
        return {"accuracy": np.zeros(0) / undefined}  # type: ignore[name-defined]  # noqa: F821

    workload = replace(made_here(), scores=broken)
    with pytest.raises(BadWorkload, match=r"line \d+: scores\(\) raised NameError: .* at `return") as error:
        optimize.evaluate(workload, quiet=True)
    assert "file" not in error.value.fix
    assert scores is not broken


def test_torchrun_wants_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from optimize.train import processes

    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes, "tell", lambda _: None)
    with pytest.raises(BadWorkload, match="under torchrun"):
        optimize.run(made_here(), RECIPE, output=tmp_path / "run", quiet=True)


def test_a_bundle_moves_without_its_workload(
    finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(finished.bundle, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert optimize.evaluate("moved", workload=made_here(), quiet=True).quality.value == pytest.approx(
        finished.document["result"]["quality"]["value"]
    )
    assert moved.exists()
