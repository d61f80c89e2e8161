"""The pages are played: every block that does not say why not is run as it stands, one page after another."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blocks import ROOT, Block, blocks, calls, lines, pages

PORTS = (8000, 8001, 8002)
"""What the pages call the server's ports; here they are free ones, since others listen at those."""
JUDGING = ("loadtest", "serve canary")
"""Commands whose exit code 3 is a verdict on this machine, not a fault of the page."""
FIRST = "docs/start.md"


class Reader:
    """Somebody with an empty folder who types what the pages say."""

    def __init__(self, place: Path) -> None:
        self.place = place
        free = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
        self.ports = dict(zip(PORTS, (each.getsockname()[1] for each in free), strict=True))
        for each in free:
            each.close()
        http, grpc, metrics = self.ports.values()
        (place / "run").mkdir()
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
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

    def type(self, line: str) -> None:
        """Type a line into a shell; it must do what it is there for."""
        asked = re.sub(r"(?<=127\.0\.0\.1:)(800[012])", lambda found: str(self.ports[int(found[1])]), line)
        done = self.run("bash", "-c", asked)
        verdict = any(" ".join(words).startswith(JUDGING) for words in calls(line))
        assert done.returncode in ((0, 3) if verdict else (0,)), f"$ {line}\n{done.stdout}{done.stderr}"

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

    def leave(self) -> None:
        """Take down the servers that a page which failed half-way has left."""
        for state in (self.place / "run").rglob("server-*.json"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(state.stem.partition("-")[2]), signal.SIGTERM)


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


@pytest.mark.slow
@pytest.mark.timed
def test_from_an_empty_folder_to_an_answered_request(reader: Reader) -> None:
    reader.play(FIRST)
    assert (reader.place / "build" / "runs" / "digits_cnn" / "report.html").exists()
    assert (reader.place / "load.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", played()[1:])
def test_every_other_page(page: str, reader: Reader) -> None:
    if not (reader.place / "model_repository").exists():  # run without the first page
        shutil.copytree(ROOT / "model_repository", reader.place / "model_repository")
        reader.type("optimize init --example digits_cnn --output digits")
    reader.play(page)
