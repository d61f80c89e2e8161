"""The manifests are what their readers take, and the schemas that say so find a wrong letter in any key."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import yaml

from serve.deploy import references
from serve.deploy.plan import Plan
from serve.deploy.write import Canary, Options, render
from tests.serve.deploy import schemas
from tests.serve.deploy.conftest import MODEL

PLAN = Plan(replicas=4, per_pod_rate=812.5, max_replicas=12, start_seconds=22.4, machine="c7i.xlarge")
OCI = references.source("oci://registry.example/models@sha256:" + "a" * 64)
PVC = references.source("pvc://models/repository")
CANARY = Canary(MODEL, 10, "infra/outer")
CASES = {
    "kubernetes, not planned": Options("kubernetes", source=PVC),
    "kubernetes, planned": Options("kubernetes", source=OCI, plan=PLAN),
    "kubernetes, canary": Options("kubernetes", source=PVC, plan=PLAN, canary=CANARY),
    "kserve, not planned": Options("kserve", source=PVC),
    "kserve, planned": Options("kserve", source=OCI, plan=PLAN),
    "kserve, canary": Options("kserve", source=PVC, plan=PLAN, canary=CANARY),
}
VALUES = "prometheus-adapter.yaml"
"""Values of a Helm chart, which have no schema."""
FREE = {"labels", "annotations", "matchLabels", "data", "limits", "requests", "metadata"}
"""Maps whose keys are the user's, and metadata, which some SDKs leave open."""


@pytest.fixture(scope="module")
def made(staged: Path) -> dict[str, dict[str, str]]:
    return {name: render(Path("out"), staged, said) for name, said in CASES.items()}


def objects(texts: dict[str, str]) -> list[dict[str, Any]]:
    return [one for name, text in texts.items() if name != VALUES for one in yaml.safe_load_all(text)]


@pytest.mark.parametrize("case", CASES)
def test_every_object_is_one_that_its_api_takes(case: str, made: dict[str, dict[str, str]]) -> None:
    for manifest in objects(made[case]):
        assert schemas.faults(manifest) == [], manifest["kind"]


def test_every_kind_that_is_promised_is_there(made: dict[str, dict[str, str]]) -> None:
    kinds = {case: {manifest["kind"] for manifest in objects(texts)} for case, texts in made.items()}
    usual = {"Deployment", "Service", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor", "Kustomization"}
    assert kinds["kubernetes, not planned"] == usual
    assert kinds["kubernetes, planned"] == usual | {"HorizontalPodAutoscaler"}
    assert kinds["kubernetes, canary"] == usual | {"HorizontalPodAutoscaler", "HTTPRoute"}
    own = {"ServingRuntime", "InferenceService", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"}
    assert kinds["kserve, planned"] == own | {"Kustomization"}


@pytest.mark.parametrize("kind", ["Deploymint", "InferenceServices", "HTTPRout", "PodMonitors"])
def test_an_unknown_kind_is_a_fault(kind: str, made: dict[str, dict[str, str]]) -> None:
    for texts in (made["kubernetes, canary"], made["kserve, planned"]):
        for manifest in objects(texts):
            if manifest["kind"][:6] == kind[:6]:
                assert schemas.faults({**manifest, "kind": kind}) != []


def keys(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key whose name an API has given."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(node, dict) and path[-1:] not in [(name,) for name in FREE]:
            yield (*path, key)
        yield from keys(value, (*path, key))


def misspelt(manifest: Any, path: tuple[Any, ...], letter: str) -> Any:
    changed = copy.deepcopy(manifest)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[f"{path[-1]}{letter}"] = node.pop(path[-1])
    return changed


@hypothesis.given(st.data())
@hypothesis.settings(
    max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_a_wrong_letter_in_any_key_is_found(made: dict[str, dict[str, str]], data: st.DataObject) -> None:
    case = data.draw(st.sampled_from([name for name in CASES if "canary" in name]))
    manifest = data.draw(st.sampled_from([one for one in objects(made[case]) if one["kind"] != "Kustomization"]))
    path = data.draw(st.sampled_from([path for path in keys(manifest) if path[0] not in ("apiVersion", "kind")]))
    assert schemas.faults(misspelt(manifest, path, data.draw(st.sampled_from("sxE_")))) != [], path


def test_a_wrong_letter_in_compose_is_found(staged: Path) -> None:
    told = yaml.safe_load(render(Path("out"), staged, Options("compose"))["compose.yaml"])
    assert schemas.wrong(schemas.compose(), told) == []
    paths = [path for path in keys(told) if path not in [("services", "triton")]]
    assert len(paths) > 40
    for path in paths:
        assert schemas.wrong(schemas.compose(), misspelt(told, path, "s")) != [], path


def test_the_same_repository_gives_the_same_bytes(staged: Path, made: dict[str, dict[str, str]]) -> None:
    for case, said in CASES.items():
        assert render(Path("out"), staged, said) == made[case]


def test_no_manifest_has_a_word_of_this_machine(staged: Path, made: dict[str, dict[str, str]]) -> None:
    for texts in made.values():
        assert str(staged) not in json.dumps(texts)
        for name, text in texts.items():
            assert "not run on a cluster by us" in text, name
            assert not re.search(r"\{\{|\}\}|\{%", text), name
