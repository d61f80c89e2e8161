"""Which repository, server and model a command means that was not told, or told with a slip of the pen."""

import json
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from loadtest.cli import main as loadtest
from serve.cli import main
from serve.server import state
from serve.server.endpoint import Endpoint
from tests.conftest import TINY
from tests.serve.commands.test_up import up

NOBODY = Endpoint("http://127.0.0.1:9", "grpc://127.0.0.1:19", "", 1, Path("/dev/null"), (TINY,), "secret")


@pytest.fixture
def here(tmp_path: Path, model_repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a repository below, which is not called as the default is."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_repository, tmp_path / "build" / "models")
    return tmp_path


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(main.commands[str(arguments[0])], [str(one) for one in arguments[1:]])


def test_the_running_server_says_which_repository(here: Path) -> None:
    assert "there is no model_repository here" in serve("list").stderr
    with state.claimed(here / "build" / "models") as ready:
        ready(NOBODY)
        found = serve("list")
        assert found.exit_code == 0, found.exception
        assert f"{TINY} 1  live" in found.stdout
        assert found.stderr == "repository: build/models, served at http://127.0.0.1:9\n"
        assert json.loads(serve("list", "--json").stdout)["models"][0]["name"] == TINY


NOWHERE = {
    **{"list": (), "promote": ("m",), "rollback": ("m",), "remove": ("m", "--all"), "show": ("m",), "why": ("m",)},
    **{"clients": ("m",), "check": (), "canary": ("m", "1", "2"), "monitoring": ("folder",), "pipeline image": ("m",)},
}


@pytest.mark.parametrize("verb", NOWHERE)
def test_where_nothing_was_published_no_repository_is_blamed(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.chdir(tmp_path)
    found = serve(*verb.split(), *NOWHERE[verb])
    assert found.exit_code == 4
    assert "error: no repository is named, no `serve up` of yours runs" in " ".join(found.stderr.split())
    assert "optimize run WORKLOAD --repository model_repository" in found.stderr
    assert not [path for path in tmp_path.iterdir() if path.name != "runtime"]


def test_of_several_one_must_be_named(here: Path) -> None:
    shutil.copytree(here / "build" / "models", here / "other")
    with ExitStack() as stack:
        stack.enter_context(state.claimed(here / "build" / "models"))(NOBODY)
        shutil.copytree(here / "other", here / "model_repository")
        for found in (serve("list"), serve("promote", TINY)):
            assert found.exit_code == 2
            assert "build/models (served at http://127.0.0.1:9), model_repository (not served)" in found.stderr
        # One that is named needs no server.
        assert serve("list", "--repository", "other").exit_code == 0


def test_clients_have_the_address_of_the_server(here: Path) -> None:
    place = here / "build" / "models"
    with state.claimed(place) as ready:
        ready(NOBODY)
        made = json.loads(serve("clients", TINY, "--json").stdout)["files"]
        assert "'127.0.0.1:9'" in made["client.py"]
        assert "http://127.0.0.1:9/" in made["request.sh"]
        assert "'127.0.0.1:19'" in made["grpc_client.py"]
        other = json.loads(serve("clients", TINY, "--url", "http://10.0.0.1:80", "--json").stdout)["files"]
        assert "'10.0.0.1:80'" in other["client.py"]
    alone = json.loads(serve("clients", TINY, "--repository", place, "--json").stdout)["files"]
    assert "'127.0.0.1:8000'" in alone["client.py"]


@pytest.mark.parametrize(
    "verb",
    [("promote", "tniy"), ("show", "tniy"), ("why", "tniy"), ("clients", "tniy"), ("check", "tniy", "--no-load")],
)
def test_a_misspelt_model_is_met_with_those_there_are(verb: tuple[str, ...], here: Path) -> None:
    found = serve(*verb, "--repository", here / "build" / "models")
    assert "did you mean 'tiny'? it holds tiny" in found.stderr


@pytest.mark.slow
@pytest.mark.timed
def test_a_load_test_knows_the_repository_and_counts_the_probe_out(here: Path, server_prefix: Path) -> None:
    place = here / "build" / "models"
    with up(place, here / "runtime") as (process, ready):
        wrong = CliRunner().invoke(loadtest.commands["run"], ["tniy", "--url", ready["http"]])
        assert "did you mean 'tiny'? it has: tiny" in wrong.stderr
        arguments = ["tiny", "--url", ready["grpc"], "--rate", "20", "--duration", "5s", "--json", "--allow-invalid"]
        done = CliRunner().invoke(loadtest.commands["run"], [*arguments, "--output", "a.jsonl"])
        assert done.exception is None, done.exception
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    document = json.loads(done.stdout)  # a busy machine may make the run invalid; it is the counts that matter
    server = document["server"]
    assert server["probes"] >= 3
    assert server["success"] == document["requests"]["done"] + server["probes"]
    assert server["reconciled"]
    assert f"ranges and tolerance from {place}" in done.stderr
