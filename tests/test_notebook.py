"""Notebooks: the example, executed by a kernel of its own, and what a kernel leaves behind."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from serve.repository import staging
from serve.server import state

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits.ipynb"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel starts in another folder."""
    root = str(EXAMPLE.parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))


def execute(notebook: NotebookNode, place: Path) -> list[NotebookNode]:
    """Execute a notebook in the folder `place` and return its code cells; an error in one fails the test.

    In a process of its own: the sockets of a kernel's client are closed when the garbage is collected.
    """
    path = place / "notebook.ipynb"
    nbformat.write(notebook, path)
    asked = ["jupyter-execute", "--inplace", "--timeout=400", "--kernel_name=python3", str(path)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def shown(cell: NotebookNode, kind: str) -> list[str]:
    """Return what a cell shows as `text/html` or `text/plain`."""
    return ["".join(output["data"][kind]) for output in cell.outputs if kind in output.get("data", {})]


def test_the_example_holds_no_outputs() -> None:
    for cell in nbformat.read(EXAMPLE, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.timed
def test_the_example_runs_from_a_workload_to_a_load_report(tmp_path: Path, server_prefix: Path) -> None:
    cells = execute(nbformat.read(EXAMPLE, as_version=4), tmp_path)
    run, steps, load = cells[2], cells[3], cells[4]
    assert "Published as digits version 1" in shown(run, "text/html")[-1]
    (progress,) = shown(run, "text/plain")[:-1]
    stages = [re.sub(r"(: \d of 5 s)?, [\d.]+ s$", "", line) for line in progress.splitlines()]
    load_test = "load test, 5 s"
    behind = ["comparing under the server's batching", load_test, "serving the trained model", load_test, "publishing"]
    assert stages[-5:] == behind
    said = [output["text"] for cell in cells for output in cell.outputs if output.output_type == "stream"]
    assert len(said) == 1 and said[0].startswith("ranges and tolerance from"), "what was assumed, and nothing else"
    assert "quantize.weight_only" in shown(steps, "text/html")[0]
    assert "requests per second" in shown(load, "text/html")[-1]
    assert (tmp_path / "build" / "load.html").read_text().startswith("<!doctype html>")
    assert not [running for running in state.everything() if tmp_path in running.repository.parents]


def test_a_kernel_that_ends_leaves_no_server(
    tmp_path: Path, publish_tiny: Callable[..., staging.Version], server_prefix: Path
) -> None:
    publish_tiny(tmp_path / "repository")
    first = (
        "from contextlib import ExitStack\nimport serve\n"
        "stack = ExitStack()\nserver = stack.enter_context(serve.up('repository'))"
    )
    cells = execute(
        new_notebook(cells=[new_code_cell(first), new_code_cell("print(server.pid, server.log)")]), tmp_path
    )
    pid, log = cells[1].outputs[0]["text"].split()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert not [running for running in state.everything() if tmp_path in running.repository.parents]
    assert log
