"""A repository with a live version and a candidate."""

import json
import shutil
from pathlib import Path

import pytest

from serve.repository import tree
from tests.docs.blocks import ROOT

MODEL = "digits_cnn"


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage(tmp_path_factory.mktemp("deploy") / "Model_Repository")


def stage(place: Path) -> Path:
    """Copy the repository that comes along, and publish its version a second time as a candidate."""
    shutil.copytree(ROOT / "model_repository", place)
    one, two = place / MODEL / "1", place / MODEL / "2"
    shutil.copytree(one, two)
    lineage = json.loads((two / tree.LINEAGE).read_text())
    config = lineage["config"].replace("versions: 1", "versions: 2")
    assert config != lineage["config"]
    import hashlib

    lineage |= {"number": 2, "config": config, "lived": []}
    lineage["digests"][tree.CONFIG] = hashlib.sha256(config.encode()).hexdigest()
    (two / tree.LINEAGE).write_text(json.dumps(lineage))
    return place
