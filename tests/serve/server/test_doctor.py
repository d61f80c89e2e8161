"""`serve doctor`: what is missing, and the holes of the carried server."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve.config import releases
from serve.server import doctor
from tests.serve.commands.test_up import serve


def test_it_lists_what_is_there_and_every_known_hole(server_prefix: Path) -> None:
    done = serve("doctor", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    found = {check["name"]: check for check in document["checks"]}
    assert found["server"]["found"].startswith("tritonserver 2.51.0 (24.10) in ")
    holes = document["cves"]
    assert len(holes) == sum(map(len, releases.OPEN_CVES.values()))
    assert set(releases.GRAVEST) <= {name.removeprefix("CVE-") for name in holes}
    assert holes["CVE-2025-23310"]["closed_in"] == "25.07"
    said = serve("doctor").stdout
    assert "serve up --container" in said
    assert "serve proxy" in said
    assert said.count("CVE-") == len(holes)


def test_without_a_server_it_says_how_to_get_one(tmp_path: Path) -> None:
    done = serve("doctor", env={"MODELATHE_SERVER": str(tmp_path / "none")})
    assert done.returncode == 5
    assert "BROKEN  server" in done.stdout
    assert "serve install" in done.stderr


def test_little_shared_memory_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    broken = {check.name: check for check in doctor.broken(doctor.checks())}
    assert "--shm-size" in broken["shared memory"].fix
