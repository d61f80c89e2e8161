"""kustomize builds the folders and their overlays; kubectl brings it, and needs no cluster for that."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.deploy import references, write
from serve.deploy.plan import Plan
from serve.deploy.write import Canary, Options
from tests.serve.deploy import schemas
from tests.serve.deploy.conftest import MODEL

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
PVC = references.source("pvc://models/repository")
PLAN = Plan(replicas=4, per_pod_rate=812.5, start_seconds=22)
DIGEST = "sha256:" + "c" * 64
OVERLAY = {
    "apiVersion": "kustomize.config.k8s.io/v1beta1",
    "kind": "Kustomization",
    "namespace": "models",
    "resources": ["../base"],
    "images": [{"name": references.STANDARD.partition(":")[0], "digest": DIGEST}],
    "labels": [{"pairs": {"team": "vision"}}],
}


def built(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def images(node: Any) -> list[str]:
    """Return the images of all containers in an object."""
    if isinstance(node, list):
        return [found for one in node for found in images(one)]
    if not isinstance(node, dict):
        return []
    here = [node["image"]] if isinstance(node.get("image"), str) else []
    return here + [found for value in node.values() for found in images(value)]


@pytest.mark.parametrize("canary", [None, Canary(MODEL, 10, "infra/outer")])
@pytest.mark.parametrize("kind", ["kubernetes", "kserve"])
def test_kustomize_builds_what_was_written_and_an_overlay(
    kind: write.Kind, canary: Canary | None, staged: Path, tmp_path: Path
) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    files = write.write(base, staged, Options(kind, source=PVC, plan=PLAN, canary=canary))
    apart = ("kustomization.yaml", "prometheus-adapter.yaml")
    wanted = [one for file in files if file.name not in apart for one in yaml.safe_load_all(file.read_text())]

    def names(objects: list[dict[str, Any]]) -> list[tuple[str, str]]:
        return sorted((one["kind"], one["metadata"]["name"]) for one in objects)

    made = built(base)
    assert names(made) == names(wanted)
    for one in wanted:
        assert one in made
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(OVERLAY))
    changed = built(overlay)
    assert names(changed) == names(wanted)
    assert {one["metadata"]["namespace"] for one in changed} == {"models"}
    assert {one["metadata"]["labels"]["team"] for one in changed} == {"vision"}
    assert {image.partition("@")[2] for image in images(changed)} == {DIGEST}
    for one in changed:
        assert schemas.faults(one) == [], one["kind"]
