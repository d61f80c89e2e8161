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
LONGEST_FUNCTION, LONGEST_FILE, LARGEST_FOLDER = 80, 400, 14
FOUNDATION = {
    *("blame", "client", "commandline", "connection", "entry", "errors", "files"),
    *("interpreter", "outputs", "tensors", "translation"),
}
"""All that may stand in `modelathe`, in 1,500 lines at most, blank ones apart: what all three rooms use."""
FLOORS = (
    "modelathe",
    *(
        "loadtest/record",
        "loadtest/plan/data",
        "loadtest/plan",
        "loadtest/send",
    ),
    *(
        "loadtest/load",
        "loadtest/judge",
        "loadtest/report",
        "loadtest/probing",
    ),
    *(
        "loadtest/scenario",
        "loadtest/mlperf",
        "loadtest/selftest/nullserver",
        "loadtest/selftest",
    ),
    *(
        "loadtest/commands",
        "loadtest",
        "serve/backends",
        "serve/config",
    ),
    *(
        "serve/repository",
        "serve/tensorrt",
        "serve/server",
        "serve/rollout",
    ),
    *(
        "serve/watch",
        "serve/clients",
        "serve/clients/standin",
        "serve/pipelines",
    ),
    *(
        "serve/commands",
        "serve",
        "optimize/model",
        "optimize/graph",
    ),
    *(
        "optimize/source",
        "optimize/machine",
        "optimize/predict",
        "optimize/step",
    ),
    *(
        "optimize/train",
        "optimize/judge",
        "optimize/methods/export",
        "optimize/methods/distill",
    ),
    *(
        "optimize/methods/prune/groups",
        "optimize/methods/prune",
        "optimize/methods/quantize",
        "optimize/methods",
        "optimize/tensorrt",
    ),
    *(
        "optimize/report",
        "optimize/runs",
        "optimize/commands",
        "optimize",
    ),
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
    assert sum(files.values()) <= 1500


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
