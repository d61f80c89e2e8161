"""The pages are played: every block that does not say why not is run as it stands, one page after another.

So are the examples that `--help` of `optimize` gives. `make exhaustive` plays all; the suite a sample.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from optimize.cli import main
from tests.docs.blocks import ROOT, Block, blocks, calls, lines, pages

PORTS = (8000, 8001, 8002)
"""What the pages call the server's ports; here they are free ones, since others listen at those."""
JUDGING = ("loadtest", "serve canary")
"""Commands whose exit code 3 is a verdict on this machine, not a fault of the page."""
FIRST, JSON = "docs/start.md", "docs/reference/json.md"

TIMES = '{"format": 1, "model": "m", "cores": 1, "calls": {"1": [0.001]}, "configuration": {"max_batch": 8}}'
"""Measured times of a call, as short as can be."""

ASKED = {
    "optimize export": "optimize export digits/digits_cnn.py --output build/asked --batch 1",
    "optimize check": "optimize check digits/digits_cnn.py",
    "optimize evaluate": "optimize evaluate digits/digits_cnn.py",
    "optimize compare": "optimize compare digits/digits_cnn.py digits/digits_cnn.py",
    "optimize inspect": "optimize inspect digits/digits_cnn.py",
    "optimize show": "optimize show build/asked",
    "optimize runs": "optimize runs",
    "optimize methods": "optimize methods",
    "optimize presets": "optimize presets",
    "optimize init": "optimize init --output asked",
    "optimize doctor": "optimize doctor",
    "serve up --detach": "serve up asked_repository --detach",
    "serve status": "serve status",
    "serve list": "serve list --repository asked_repository",
    "serve show": "serve show digits_cnn --repository asked_repository",
    "serve why": "serve why digits_cnn --repository asked_repository",
    "serve check": "serve check --repository asked_repository --no-load",
    "serve plan": f"echo '{TIMES}' > asked.json; serve plan --measured asked.json --rate 900 --slo 'p99 < 9ms' --quiet",
    "serve clients": "serve clients digits_cnn --repository asked_repository",
    "serve monitoring": "serve monitoring build/asked-monitoring --repository asked_repository",
    "serve deploy compose": "serve deploy compose build/asked-compose --repository asked_repository",
    "serve watch": "serve watch --interval 1s",
    "loadtest report": "loadtest run digits_cnn --url grpc://127.0.0.1:8001 --duration 1s --allow-invalid",
    "serve add": "serve add build/asked --name digits_cnn --repository asked_repository --no-check",
    "serve promote": "serve promote digits_cnn --repository asked_repository",
    "serve remove": "serve remove digits_cnn --keep 1 --repository asked_repository",
    "serve down": "serve down",
    "serve doctor": "serve doctor",
    "loadtest scenario list": "loadtest scenario list",
    "loadtest scenario show": "loadtest scenario show spike",
    "loadtest manifest": "loadtest manifest --image i --claim c -- digits_cnn --url grpc://t:8001 --rate 8",
}
"""What each row of the page on JSON documents is held against, in an order that works; `optimize run` keeps a file."""

QUICK = ("init", "methods", "presets", "runs", "schema", "show")
"""Commands of `optimize` whose examples take a second."""
NOT_HERE = ("--endpoint", "optimize tensorrt")
"""What needs a server that goes on, or a compiler that is an extra of its own."""


def examples(command: click.Command) -> list[list[str]]:
    """Return the lines below `Example:` in the help of a command, as its user would type them."""
    _, _, below = (command.help or "").partition("Example:")
    lines = below.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith("optimize ")]


EXAMPLES = [line for _, command in sorted(main.commands.items()) for line in examples(command)]


HERE = [line for line in EXAMPLES if not any(text in shlex.join(line) for text in NOT_HERE)]


class Reader:
    """Somebody with an empty folder who types what the pages say."""

    def __init__(self, place: Path) -> None:
        self.place, self.begun = place, False
        free = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
        self.ports = dict(zip(PORTS, (each.getsockname()[1] for each in free), strict=True))
        for each in free:
            each.close()
        http, grpc, metrics = self.ports.values()
        (place / "run").mkdir(exist_ok=True)
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OPTIMIZE_RUN_PATIENCE": "0",
            "XDG_RUNTIME_DIR": str(place / "run"),
            "SERVE_UP_HTTP_PORT": str(http),
            "SERVE_UP_GRPC_PORT": str(grpc),
            "SERVE_UP_METRICS_PORT": str(metrics),
            "SERVE_CLIENTS_URL": f"http://127.0.0.1:{http}",
            "SERVE_CLIENTS_GRPC_URL": f"grpc://127.0.0.1:{grpc}",
        }

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in the folder."""
        return subprocess.run(
            command, cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=1500
        )

    def type(self, line: str) -> str:
        """Type a line into a shell and return what it says; it must do what it is there for."""
        asked = re.sub(r"(?<=127\.0\.0\.1:)(800[012])", lambda found: str(self.ports[int(found[1])]), line)
        if any(words[:2] == ["optimize", "run"] for words in calls(line)):
            # On a busy machine speed is not decided; the pages go on with what a quiet one would have published.
            asked += " --force"
        done = self.run("bash", "-c", asked)
        verdict = any(" ".join(words).startswith(JUDGING) for words in calls(line))
        assert done.returncode in ((0, 3) if verdict else (0,)), f"$ {line}\n{done.stdout}{done.stderr}"
        return done.stdout

    def play(self, page: str) -> None:
        """Do what a page says from top to bottom; its Python goes on from block to block, as in a notebook."""
        told = ""
        for block in blocks(page):
            if block.excuse:
                continue
            if block.title:
                (self.place / block.title).parent.mkdir(parents=True, exist_ok=True)
                (self.place / block.title).write_text(block.text)
            elif block.language == "python":
                told += block.text
                done = self.run(sys.executable, "-c", told)
                assert done.returncode == 0, f"{page}:{block.line}\n{done.stderr}"
            elif block.language == "sh":
                for line in lines(block.text):
                    self.type(line)

    def begin(self) -> None:
        """Play the first page, unless that was tried before."""
        if not self.begun:
            self.begun = True
            self.play(FIRST)
        assert (self.place / "model_repository").exists(), "the first page did not come to its end"

    def leave(self) -> None:
        """Take down the servers that a page which failed half-way has left."""
        for state in (self.place / "run").rglob("server-*.json"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(state.stem.split("-")[1]), signal.SIGTERM)


@pytest.fixture(scope="module")
def reader(server_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("reader"))
    yield reader
    reader.leave()


@pytest.fixture(autouse=True)
def alone(reader: Reader) -> Iterator[None]:
    yield
    reader.leave()


def played() -> list[str]:
    """Return the pages that have something to run, the first of which makes what the others go on with."""
    found = [page for page in pages() if any(_runs(block) for block in blocks(page))]
    assert found[0] == FIRST
    return found


def _runs(block: Block) -> bool:
    return not block.excuse and (block.language in ("sh", "python") or bool(block.title))


def stated() -> dict[str, set[str]]:
    """Return the keys of each command's document, as the page on them says."""
    rows = re.findall(r"^\| `([a-z -]+)`[^|]*\| ((?:`\w+`(?:, )?)+) \|$", (ROOT / JSON).read_text(), re.MULTILINE)
    return {command: set(re.findall(r"`(\w+)`", keys)) for command, keys in rows}


@pytest.mark.slow
def test_from_an_empty_folder_to_an_answered_request(reader: Reader) -> None:
    reader.begun = True
    reader.play(FIRST)
    kept = reader.place / "build" / "runs" / "digits_cnn" / "latest"
    assert (kept / "report.html").exists()
    assert not stated()["optimize run"] - json.loads((kept / "run.json").read_text()).keys()
    assert (reader.place / "load.html").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", played()[1:])
def test_every_other_page(page: str, reader: Reader) -> None:
    reader.begin()
    reader.play(page)


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_the_keys_of_json_documents(
    reader: Reader, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What imports torch is asked in this process, which has it already."""
    # The keys of `serve tune`, which wants a quiet machine, are held in its own tests.
    assert stated().keys() == {*ASKED, "optimize run", "serve tune"}
    shutil.copytree(ROOT / "model_repository", reader.place / "asked_repository")
    reader.begin()
    monkeypatch.chdir(reader.place)
    for command, line in ASKED.items():
        before, _, behind = line.partition(" -- ")
        asked = f"{before} --json{behind and ' -- '}{behind}"
        if asked.startswith("optimize "):
            with pytest.raises(SystemExit) as ended:
                main.main(shlex.split(asked)[1:])
            assert not ended.value.code, asked
            told = json.loads(capsys.readouterr().out)
        else:
            told = json.loads(reader.type(asked))
        assert not (stated()[command] | {"format", "modelathe"}) - told.keys(), command


def test_each_command_has_an_example_that_is_parsed() -> None:
    assert {line[1] for line in EXAMPLES} == set(main.commands)
    for line in EXAMPLES:
        command = main.commands[line[1]]
        with click.Context(main) as above, command.make_context(line[1], line[2:], parent=above) as context:
            assert context.params


@pytest.fixture(scope="module")
def helped(reader: Reader) -> Path:
    """The folder of somebody who types what `--help` says, with a finished run of the example."""
    reader.begin()
    place = reader.place / "helped"
    shutil.copytree(reader.place / "digits", place)
    # Where the finished run's bundles have their workload.
    shutil.copytree(reader.place / "digits", place / "digits")
    shutil.copytree(reader.place / "build", place / "build", symlinks=True)
    return place


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=pytest.mark.slow if line[1] in QUICK else pytest.mark.exhaustive, id=shlex.join(line))
        for line in HERE
    ],
)
def test_an_example_runs_as_it_stands(line: list[str], helped: Path, reader: Reader) -> None:
    asked = [sys.executable, "-P", "-m", *line]
    done = subprocess.run(asked, cwd=helped, env=reader.environment, capture_output=True, text=True, timeout=1500)
    # A machine that is busy may leave a promise of speed undecided.
    allowed = (0, 3, 5) if line[1] == "run" else (0,)
    assert done.returncode in allowed, done.stderr
    assert not re.search(r"Traceback|a bug in modelathe|there is no such", done.stderr)
