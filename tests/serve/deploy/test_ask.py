"""The probe inside the container: what it asks is answered, and it tells a busy server from a broken one."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from serve.clients.standin.running import Place
from serve.deploy import ask, contents
from serve.deploy.write import PROBE_TIMEOUT
from serve.repository import tree
from serve.watch import probe

QUESTION = {"model": "m", "inputs": [], "parameters": {}}


@contextmanager
def saying(replies: dict[str, tuple[int, str]]) -> Iterator[str]:
    """Answer each path as told, from 127.0.0.1; yield `HOST:PORT`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, words = replies[self.path]
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(words)))
            self.end_headers()
            self.wfile.write(words.encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


READY, LIVES, ASKED = "/v2/health/ready", "/v2/models/m/ready", "/v2/models/m/infer"


@pytest.mark.parametrize(
    ("replies", "started", "ready"),
    [
        ({ASKED: (200, "{}")}, True, True),
        ({ASKED: (503, "Exceeds maximum queue size"), LIVES: (200, "")}, False, True),
        ({ASKED: (500, "Stub process 'm_0' is not healthy."), LIVES: (200, "")}, False, False),
        ({ASKED: (400, "unknown model"), LIVES: (400, "")}, False, False),
        ({READY: (400, "")}, False, False),
    ],
)
def test_busy_is_borne_and_broken_is_not(
    replies: dict[str, tuple[int, str]], started: bool, ready: bool, tmp_path: Path
) -> None:
    (tmp_path / "questions.json").write_text(json.dumps([QUESTION]))
    with saying({READY: (200, ""), **replies}) as host:
        said = {mode: ask.main(mode, str(tmp_path / "questions.json"), host) for mode in ("started", "ready")}
    assert (not said["started"], not said["ready"]) == (started, ready), said


def test_nothing_that_listens_is_a_fault(tmp_path: Path) -> None:
    assert "not ready" in ask.main("ready", str(tmp_path / "none.json"), "127.0.0.1:1")


def test_models_of_many_kinds_answer_its_questions(kinds: Path, stub: Place, tmp_path: Path) -> None:
    names = [name for name in tree.models(kinds) if name in stub.models]
    assert len(names) > 5
    questions = [contents.question(kinds, name) for name in names]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    assert ask.main("started", str(tmp_path / "questions.json"), stub.http.removeprefix("http://")) == ""


def test_it_runs_by_itself_and_ends_within_its_time(tmp_path: Path) -> None:
    (tmp_path / "questions.json").write_text(json.dumps([QUESTION]))
    (tmp_path / "ask.py").write_text(Path(ask.__file__).read_text())
    with saying({READY: (200, ""), ASKED: (200, "")}) as host:
        for mode, replies in (("started", 0), ("ready", 0)):
            command = [sys.executable, "-I", "-S", "ask.py", mode, "questions.json", host]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stderr) == (replies, "")
    done = subprocess.run([*command[:-1], "127.0.0.1:1"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "not ready" in done.stderr
    assert ask.DEAD == probe.DEAD
    assert ask.SECONDS < PROBE_TIMEOUT
