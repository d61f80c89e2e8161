"""The code blocks of README.md and docs/, and the command lines in them."""

import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

ROOT = Path(__file__).parents[2]
ROOMS = ("optimize", "serve", "loadtest")
FENCE = re.compile(r'^( *)```(\w+)(?: title="([^"]+)")?$')
MARKER = re.compile(r'Not run here: ([^"*]+?)\.?["*]')


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page: the page, from the project's root.
        line: where it begins.
        language: what stands behind the fence.
        title: the file that it is, if any.
        text: what is in it.
        excuse: why it is not run, as the line above it says; empty where it is.
    """

    page: str
    line: int
    language: str
    title: str
    text: str
    excuse: str


def pages() -> list[str]:
    """Return the pages that are written by hand, in the order in which one reads them; README.md is the last."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return [*(f"docs/{page}" for page in _leaves(nav) if (ROOT / "docs" / page).exists()), "README.md"]


def _leaves(nav: object) -> Iterator[str]:
    for value in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from [value] if isinstance(value, str) else _leaves(value)


def blocks(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page from top to bottom."""
    lines, above, at = (ROOT / page).read_text().split("\n"), "", 0
    while at < len(lines):
        if found := FENCE.match(lines[at]):
            indent, begin = found[1], at + 1
            at = lines.index(f"{indent}```", begin)
            text = "".join(line.removeprefix(indent) + "\n" for line in lines[begin:at])
            excuse = MARKER.search(above)
            yield Block(page, begin, found[2], found[3] or "", text, excuse[1] if excuse else "")
        assert found or "```" not in lines[at], f"{page}:{at + 1}: a fence without a language"
        above, at = lines[at].strip() or above, at + 1


def lines(script: str) -> list[str]:
    """Return the commands of a shell script, each whole where it goes over several lines."""
    joined = re.sub(r"\\\n\s*", " ", script)
    return [line for line in joined.split("\n") if line.strip() and not line.lstrip().startswith("#")]


def calls(line: str) -> Iterator[list[str]]:
    """Yield the words of each call of one of our three commands in a line of shell."""
    splitter = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    splitter.whitespace_split = True
    part: list[str] = []
    for word in [*splitter, ";"]:
        if set(word) & set("|&;<>") and not word.strip("|&;<>"):
            yield from _ours(part)
            part = []
        else:
            part.append(word)


def _ours(words: list[str]) -> Iterator[list[str]]:
    """Yield the call behind what stands before it: variables, `python -m`, `torchrun … -m`."""
    for at, word in enumerate(words):
        before = words[:at]
        if word in ROOMS and (all("=" in other for other in before) or before[-1] == "-m"):
            yield words[at:]
            return


def check(words: list[str]) -> None:
    """Let Click read a call without running it.

    Raises:
        click.ClickException: no such command, or an option or a value that it does not take.
    """
    command: click.Command = importlib.import_module(f"{words[0]}.cli").main
    arguments = words[1:]
    context = None
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        context = click.Context(command, parent=context, info_name=command.name)
        name, inner, arguments = command.resolve_command(context, arguments)
        assert inner is not None, name
        command = inner
    if not isinstance(command, click.Group):
        command.make_context(command.name, list(arguments), parent=context)
