"""The names that a Python program imports from the three rooms."""

import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import loadtest
import optimize
import serve
from loadtest.calls import keywords
from loadtest.calls.capacity import CapacityOptions
from loadtest.calls.run import RunOptions
from loadtest.cli import main as loadtest_main
from optimize.calls.run import Options
from optimize.cli import main as optimize_main
from optimize.runs.run import Terms
from serve.calls.add import AddOptions
from serve.calls.plan import PlanOptions
from serve.calls.tune import TuneOptions
from serve.calls.up import UpOptions
from serve.cli import main as serve_main

PUBLIC = {
    optimize: ["BATCH", "Batch", "Dim", "TensorSpec", "Workload", "compare", "evaluate", "run"],
    serve: ["add", "plan", "tune", "up"],
    loadtest: ["capacity", "run"],
}
CALLS = [(room, name) for room, names in PUBLIC.items() for name in names if name.islower()]
EXTRAS = ("nncf", "openvino", "ray", "gevent", "tensorrt", "tensorrt_rtx")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("room", PUBLIC, ids=lambda room: room.__name__)
def test_the_public_names_are_listed_and_known_to_type_checkers(room: ModuleType) -> None:
    assert room.__all__ == PUBLIC[room]
    assert Path(str(room.__file__)).with_name("py.typed").exists()
    told = [
        alias.name
        for node in ast.walk(ast.parse(Path(str(room.__file__)).read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert set(PUBLIC[room]) <= set(told)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        room.nothing  # noqa: B018


@pytest.mark.parametrize(("room", "name"), CALLS)
def test_a_call_is_typed_and_documented(room: ModuleType, name: str) -> None:
    call = getattr(room, name)
    said = inspect.getdoc(call) or ""
    for parameter in inspect.signature(call).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"\n    {parameter.name}: " in said or f" and so is `{parameter.name}`" in said, parameter.name
    assert "Raises:" in said


def test_no_module_takes_the_place_of_a_name() -> None:
    """A module becomes an attribute of its package once anything imports it."""
    code = (
        "import importlib, json, pkgutil\n"
        f"rooms = {[room.__name__ for room in PUBLIC]}\n"
        "for name in rooms:\n"
        "    room = importlib.import_module(name)\n"
        "    for found in pkgutil.walk_packages(room.__path__, f'{name}.'):\n"
        "        if not found.name.endswith('__main__') and '.templates' not in found.name:\n"
        "            try:\n"
        "                importlib.import_module(found.name)\n"
        "            except ImportError as error:\n"
        f"                assert error.name in {EXTRAS}, error\n"
        "print(json.dumps({name: [type(getattr(importlib.import_module(name), one)).__name__\n"
        "      for one in importlib.import_module(name).__all__] for name in rooms}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    kinds = json.loads(done.stdout.splitlines()[-1])
    assert {kind for found in kinds.values() for kind in found} == {"function", "type", "Dim"}
    for room, names in PUBLIC.items():
        beside = {found.name for found in pkgutil.iter_modules(room.__path__)}
        assert not beside & set(names)


def keywords_of(group: object, command: str) -> set[str]:
    """Return the options of a command by the names that Python gives them."""
    options = group.commands[command].params  # type: ignore[attr-defined]
    found = {option.opts[0].removeprefix("--").replace("-", "_") for option in options if option.opts[0][:2] == "--"}
    return found - {"json", "quiet"}


def test_a_call_takes_what_its_command_takes() -> None:
    """An option of a command that no keyword stands for is named here, with what Python has in its place."""
    assert Options.__annotations__.keys() == {"name", "track", *(field.name for field in dataclasses.fields(Terms))}
    # A preset is a recipe: `preset:NAME`.
    assert keywords_of(optimize_main, "run") == {*Options.__annotations__, "recipe", "preset", "output", "repository"}
    assert keywords.declared().keys() - {"url"} == keywords.LoadOptions.__annotations__.keys()
    assert keywords_of(loadtest_main, "run") == {*RunOptions.__annotations__, "url", "scenario"}
    probes_decide = {"concurrency", "rate", "profile", "trace", "speed", "requests", "think", "in_flight"}
    assert keywords_of(loadtest_main, "capacity") == {*CapacityOptions.__annotations__, "url", "slo"} - probes_decide
    assert keywords_of(serve_main, "add") == {*AddOptions.__annotations__, "name", "repository"}
    assert keywords_of(serve_main, "plan") == {*PlanOptions.__annotations__, "measured", "slo", "repository"}
    # `for` is a word of Python's own.
    assert keywords_of(serve_main, "tune") == {*TuneOptions.__annotations__, "for", "slo", "repository"} - {"goal"}
    # A program needs no other process for what it does, and docker's image is not its child.
    assert keywords_of(serve_main, "up") == {*UpOptions.__annotations__, "detach", "container", "print"}


def test_importing_a_room_imports_nothing_heavy() -> None:
    code = "import optimize, serve, loadtest, sys; print([n for n in ('torch', 'numpy', 'click') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("room", PUBLIC, ids=lambda room: room.__name__)
def test_a_star_import_brings_the_public_names(room: ModuleType) -> None:
    found: dict[str, object] = {}
    exec(f"from {room.__name__} import *", found)  # noqa: S102
    assert set(PUBLIC[room]) <= set(found)
    assert importlib.import_module(room.__name__) is room
