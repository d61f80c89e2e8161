"""The documents name what exists."""

import re
from pathlib import Path

import pytest

from loadtest.cli import main as loadtest
from optimize.cli import main as optimize
from optimize.methods.table import NAMES
from serve.cli import main as serve

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
MADE = ("build/", ".venv")
IMAGINED = ("optimize/methods/prune/mine.py",)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_documents_exist(document: str) -> None:
    named = re.findall(r"[`(\s]((?:[\w.-]+/)+[\w.-]*\w)", (ROOT / document).read_text())
    rooms = {path.name for path in ROOT.iterdir()}
    for path in (path for path in named if path.partition("/")[0] in rooms and path not in IMAGINED):
        assert path.startswith(MADE) or (ROOT / path).exists(), f"{document} names {path}"


def test_every_command_and_method_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Commands") : text.index("## Methods")]
    for group in (optimize, serve, loadtest):
        for command in group.commands:
            assert re.search(rf"`[^`]*\b{command}\b", table), command
    for name in NAMES:
        assert f"`{name}`" in text, name


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        for target in re.findall(r"`?make ([a-z-]+)", (ROOT / document).read_text()):
            assert target in targets or target in ("says",), f"{document}: make {target}"
