"""README.md and docs/ name what exists, and every block of theirs is one that its reader takes."""

import collections
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from loadtest.cli import main as loadtest
from modelathe import defaults
from optimize.cli import main as optimize
from optimize.methods.table import NAMES
from optimize.runs import recipe
from serve.cli import main as serve
from tests.docs.blocks import ROOT, Block, blocks, calls, check, lines, pages

DOCUMENTS = (*pages(), "ARCHITECTURE.md", "CONTRIBUTING.md")
MADE = ("build/", ".venv")
IMAGINED = ("optimize/methods/prune/mine.py",)
LANGUAGES = {"sh", "python", "toml", "yaml", "json"}
NOT_RUN = collections.Counter(
    {
        "installs packages": 1,
        "makes two environments": 1,
        "the start page runs a whole recipe": 1,
        "trains for minutes": 1,
        "needs a model's folder of yours": 1,
        "needs a tokenizer of yours": 1,
        "serves until Ctrl-C": 1,
        "needs recordings and models of yours": 1,
        "two runs of one machine to compare": 1,
        "minutes to hours of load": 1,
        "the rules ask for ten minutes": 1,
        "three minutes of load": 1,
        "wants a machine on which nothing else runs": 2,
        "goes on from a tuning": 1,
        "needs a GPU": 1,
        "needs a GPU, and no network": 1,
        "needs the extra tensorrt": 1,
        "needs docker and NVIDIA's image": 1,
        "needs a cluster": 3,
        "needs the extra ray on every machine": 1,
        "needs certificates of yours": 1,
        "needs nginx and certificates of yours": 1,
    }
)
"""Why blocks are not run, as their pages say, and how many there are of each: no other may be left out."""


def every() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


def of(*languages: str) -> list[Block]:
    return [block for block in every() if block.language in languages]


def name(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_documents_exist(document: str) -> None:
    named = re.findall(r"[`(\s]((?:[\w.-]+/)+[\w.-]*\w)", (ROOT / document).read_text())
    rooms = {path.name for path in ROOT.iterdir()}
    for path in (path for path in named if path.partition("/")[0] in rooms and path not in IMAGINED):
        assert path.startswith(MADE) or (ROOT / path).exists(), f"{document} names {path}"


def test_every_command_and_method_is_in_the_reference(made: dict[str, str]) -> None:
    for group in (optimize, serve, loadtest):
        page = made[f"reference/{group.name}.md"]
        for command in group.commands:
            assert re.search(rf"^## {group.name} {command}\b", page, re.MULTILINE), command
    for method in NAMES:
        assert f"## {method} " in made["reference/methods.md"], method


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        for target in re.findall(r"`?make ([a-z-]+)", (ROOT / document).read_text()):
            assert target in targets or target == "says", f"{document}: make {target}"


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert {page for page in re.findall(r"\]\((docs/[^)#]+\.md)", text)} <= set(pages())


def test_every_block_is_run_or_says_why_not() -> None:
    assert {block.language for block in every()} <= LANGUAGES
    assert collections.Counter(block.excuse for block in every() if block.excuse) == NOT_RUN


@pytest.mark.parametrize("block", of("sh"), ids=name)
def test_click_takes_every_command(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # where no server of the reader's runs
    for line in lines(block.text):
        for words in calls(line):
            check(words)


def spoken() -> Iterator[tuple[str, str]]:
    """Yield each call of a command of ours that stands in the running text, with its page."""
    for page in pages():
        prose = re.sub(r"^( *)```.*?^\1```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`((?:optimize|serve|loadtest) [^`]+)`", prose):
            yield page, " ".join(code.split())


@pytest.mark.parametrize(("page", "code"), sorted(set(spoken())))
def test_commands_in_the_text_exist(page: str, code: str) -> None:
    group = {"optimize": optimize, "serve": serve, "loadtest": loadtest}[code.partition(" ")[0]]
    command: click.Command = group
    for word in code.split()[1:]:
        if isinstance(command, click.Group) and word.isidentifier() and word.islower():
            assert word in command.commands, f"{page}: {code}"
            command = command.commands[word]
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    for flag in re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", code):
        assert flag in known | {"--help"}, f"{page}: {code}"


@pytest.mark.parametrize("block", of("toml"), ids=name)
def test_every_toml_block_is_taken(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tomllib.loads(block.text)
    if "phase" in told:
        from loadtest.scenario import scenario

        (tmp_path / "mine.toml").write_text(block.text)
        assert scenario.load(tmp_path / "mine.toml").phase
    elif "machine" in told:
        from serve.planning import prices

        (tmp_path / "mine.toml").write_text(block.text)
        assert prices.read(tmp_path / "mine.toml")
    elif "tool" in told:
        (tmp_path / "pyproject.toml").write_text(block.text)
        monkeypatch.chdir(tmp_path)
        assert any(defaults.read(group) for group in (optimize, serve, loadtest))
    else:
        assert recipe.load({"step": [{"use": "export.onnx"}]} | told).steps


@pytest.mark.parametrize("block", of("yaml"), ids=name)
def test_every_yaml_block_calls_what_exists(block: Block) -> None:
    def commands(node: object, key: str = "") -> Iterator[str]:
        if isinstance(node, dict):
            for inner, value in node.items():
                yield from commands(value, inner)
        elif isinstance(node, list):
            for value in node:
                yield from commands(value)
        elif key in ("run", "entry"):
            yield str(node)

    found = [words for line in commands(yaml.safe_load(block.text)) for words in calls(line)]
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize("block", of("json"), ids=name)
def test_every_json_block_is_json(block: Block) -> None:
    assert json.loads(block.text)


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """The pages that are made when the site is built."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_every_public_name_is_in_the_reference(made: dict[str, str]) -> None:
    import loadtest as third
    import optimize as first
    import serve as second

    for room in (first, second, third):
        for public in getattr(room, "__all__", ()):
            assert f".{public}" in made["reference/python.md"], public
