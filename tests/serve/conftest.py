"""Models of many kinds behind a real server and behind the stub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.clients.standin.answers import load
from serve.clients.standin.running import Place
from serve.clients.standin.running import running as stand_in
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.serve.kinds import publish_kinds


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("kinds")
    return publish_kinds(here / "repository", here / "model.onnx")


@pytest.fixture(scope="module")
def served(kinds: Path, server_prefix: Path) -> Iterator[Endpoint]:
    with running(kinds, grace=0) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def stub(kinds: Path) -> Iterator[Place]:
    with stand_in(load(kinds)) as place:
        yield place
