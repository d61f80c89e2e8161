"""The arrows between the rooms, read from the imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimize.methods.table import METHODS

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "modelathe": {"modelathe"},
    "loadtest": {"modelathe", "loadtest"},
    "serve": {"modelathe", "serve", "loadtest"},
    "optimize": {"modelathe", "optimize", "serve", "loadtest"},
}
LONGEST_FUNCTION, LONGEST_FILE = 80, 400


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_one_way(room: str) -> None:
    for path in sources(room):
        rooms = {name.partition(".")[0] for name in imported(path)} & set(ALLOWED)
        assert rooms <= ALLOWED[room], f"{path} imports {rooms - ALLOWED[room]}"


@pytest.mark.parametrize("room", ["modelathe", "serve", "loadtest"])
def test_no_torch_outside_optimize(room: str) -> None:
    for path in sources(room):
        assert "torch" not in {name.partition(".")[0] for name in imported(path)}, path


def test_methods_do_not_import_each_other() -> None:
    methods = {config.__module__ for config in METHODS}
    for module in methods:
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert not set(imported(path)) & (methods - {module}), path


def test_serve_and_loadtest_never_meet_onnx_at_import() -> None:
    for room in ("modelathe", "serve", "loadtest"):
        for path in (path for path in sources(room) if "backends" not in path.parts):
            top = {
                name.partition(".")[0]
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in (
                    [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                )
            }
            assert not top & {"onnx", "onnxruntime"}, path


def test_rooms_stay_small() -> None:
    for path in (path for room in (*ALLOWED, "examples", "benchmarks") for path in sources(room)):
        text = path.read_text()
        assert text.count("\n") <= LONGEST_FILE, f"{path} is longer than {LONGEST_FILE} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, f"{path}:{node.lineno} {node.name}"
