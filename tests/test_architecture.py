"""The arrows between the rooms, read from the imports."""

import ast
import graphlib
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
LONGEST_FUNCTION, LONGEST_FILE, LARGEST_FOLDER, MOST_PARAMETERS = 80, 400, 14, 6
NOT_OURS = {"optimize/model/attention.py forward", "optimize/commands/method.py call"}
"""Functions whose parameters are torch's or Click's."""
FOUNDATION = {
    *("blame", "client", "commandline", "connection", "defaults", "entry", "errors", "files"),
    *("interpreter", "notebook", "outputs", "tensors", "translation"),
}
"""All that may stand in `modelathe`, in 1,600 lines at most, blank ones apart: what all three rooms use."""
ROOMS = {
    "loadtest": "record plan/data plan send load judge report probing scenario mlperf"
    " selftest/nullserver selftest calls commands",
    "serve": "backends config simulate repository tensorrt server rollout watch clients clients/standin pipelines"
    " planning/engines planning tuning deploy calls commands commands/fleet",
    "optimize": "model graph source machine predict step train judge"
    " methods/export methods/distill methods/prune/groups methods/prune methods/quantize methods checks"
    " tensorrt report runs/folder runs calls commands",
}
FLOORS = (
    "modelathe",
    *(f"{room}/{name}".rstrip("/") for room, names in ROOMS.items() for name in (*names.split(), "")),
)
"""The folders from the ground up: each imports those before it and none behind it."""


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


def modules() -> dict[str, Path]:
    """Every module of ours by the name that imports use, pipelines' and backends' own files apart."""
    found = {}
    for room in ALLOWED:
        for path in sources(room):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows() -> Iterator[tuple[Path, Path]]:
    """Yield who imports whom, by file; imports inside functions and for types count."""
    known = modules()
    for path in known.values():
        for name in imported(path):
            there = known.get(name)
            if there and there != path and there.name != "__init__.py":
                yield path, there


def folder(path: Path) -> str:
    return path.parent.relative_to(ROOT).as_posix()


def test_a_folder_imports_only_what_it_stands_on() -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {there.relative_to(ROOT)}"
        for path, there in arrows()
        if FLOORS.index(folder(there)) > FLOORS.index(folder(path))
    }
    assert not wrong


def test_no_file_imports_itself_by_a_way_round() -> None:
    graph: dict[Path, set[Path]] = {}
    for path, there in arrows():
        graph.setdefault(path, set()).add(there)
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_foundation_is_small() -> None:
    files = {path.stem: sum(map(bool, path.read_text().split("\n"))) for path in sources("modelathe")}
    assert set(files) - {"__init__"} == FOUNDATION
    assert sum(files.values()) <= 1600


def test_every_folder_is_in_the_picture() -> None:
    picture = (ROOT / "ARCHITECTURE.md").read_text()
    for name in FLOORS:
        if (init := ROOT / name / "__init__.py").exists():
            said = (ast.get_docstring(ast.parse(init.read_text())) or "").splitlines()[0]
            assert f"| `{name}` | {said.partition(': ')[2]} |" in picture, name
        files = [path for path in (ROOT / name).glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= LARGEST_FOLDER, name


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


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many there are, without `self` and `cls`; 0 where Click's decorators name them."""
    if any("option" in text or "argument" in text for text in map(ast.unparse, function.decorator_list)):
        return 0
    asked = function.args
    named = [parameter.arg for parameter in (*asked.posonlyargs, *asked.args, *asked.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")]) + bool(asked.vararg) + bool(asked.kwarg)


def test_no_function_asks_for_much() -> None:
    for path in (path for room in (*ALLOWED, "examples", "benchmarks") for path in sources(room)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(ROOT)} {node.name}"
                assert name in NOT_OURS or parameters(node) <= MOST_PARAMETERS, name
