"""The manifests are what their readers take, and the schemas that say so find a wrong letter in any key."""

import copy
import json
import re
from collections.abc import Callable, Iterator
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
NAMES = ("apiVersion", "kind")
"""Without these nobody knows which schema holds."""
TYPOS = (lambda key: f"{key}s", lambda key: key[:-1], lambda key: key[:1].swapcase() + key[1:], lambda key: f"{key}-")
FREE = {"labels", "annotations", "matchLabels", "data", "limits", "requests"}
"""Maps whose keys are ours to choose, as is what a Service selects by."""


@pytest.fixture(scope="module")
def made(staged: Path) -> dict[str, dict[str, str]]:
    return {name: render(Path("out"), staged, said) for name, said in CASES.items()}


def objects(texts: dict[str, str]) -> list[dict[str, Any]]:
    return [one for name, text in texts.items() if name != VALUES for one in yaml.safe_load_all(text)]


@pytest.mark.parametrize("case", CASES)
def test_every_object_is_one_that_its_api_takes(case: str, made: dict[str, dict[str, str]]) -> None:
    for manifest in objects(made[case]):
        assert schemas.faults(manifest) == [], manifest["kind"]


@pytest.mark.parametrize("case", CASES)
def test_the_oldest_kubernetes_takes_what_is_its_own(case: str, made: dict[str, dict[str, str]]) -> None:
    """Image volumes are younger: an OCI source wants a newer one, as the manifest says."""
    for manifest in objects(made[case]):
        if schemas.of_kubernetes(manifest) and (CASES[case].source is not OCI or manifest["kind"] != "Deployment"):
            assert schemas.faults(manifest, "1.30") == [], manifest["kind"]


def test_every_kind_that_is_promised_is_there(made: dict[str, dict[str, str]]) -> None:
    kinds = {case: {manifest["kind"] for manifest in objects(texts)} for case, texts in made.items()}
    policies = {"PodDisruptionBudget", "NetworkPolicy", "PodMonitor", "Kustomization"}
    usual = {"Deployment", "Service", "ConfigMap", *policies}
    assert kinds["kubernetes, not planned"] == usual
    assert kinds["kubernetes, planned"] == usual | {"HorizontalPodAutoscaler"}
    assert kinds["kubernetes, canary"] == usual | {"HorizontalPodAutoscaler", "HTTPRoute"}
    assert kinds["kserve, planned"] == {"ServingRuntime", "InferenceService", "ConfigMap", *policies}


@pytest.mark.parametrize("kind", ["Deploymint", "InferenceServices", "HTTPRout", "PodMonitors"])
def test_an_unknown_kind_is_a_fault(kind: str, made: dict[str, dict[str, str]]) -> None:
    every = [one for case in ("kubernetes, canary", "kserve, planned") for one in objects(made[case])]
    (meant, *_) = [one for one in every if one["kind"][:6] == kind[:6]]
    assert schemas.faults(meant) == []
    assert schemas.faults({**meant, "kind": kind}) != []


def keys(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key whose name an API has given."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        selects = path == ("spec", "selector") and not isinstance(value, dict)
        if isinstance(node, dict) and not selects and path[-1:] not in [(name,) for name in FREE]:
            yield (*path, key)
        yield from keys(value, (*path, key))


def misspelt(manifest: Any, path: tuple[Any, ...], typo: Callable[[str], str]) -> Any:
    changed = copy.deepcopy(manifest)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[typo(path[-1])] = node.pop(path[-1])
    return changed


class Places(list[tuple[Any, tuple[Any, ...]]]):
    def __repr__(self) -> str:
        return f"{len(self)} keys"


@pytest.fixture(scope="module")
def places(made: dict[str, dict[str, str]]) -> Places:
    """Every key of the objects that a canary has, each with its object."""
    texts = (made["kubernetes, canary"], made["kserve, canary"])
    found = [(one, path) for text in texts for one in objects(text) for path in keys(one) if path[0] not in NAMES]
    assert len(found) > 500
    return Places(found)


@hypothesis.given(st.integers(0, 10**6), st.sampled_from(TYPOS))
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_a_wrong_letter_in_any_key_is_found(places, number: int, typo: Callable[[str], str]) -> None:
    manifest, path = places[number % len(places)]
    assert schemas.faults(misspelt(manifest, path, typo)) != [], (manifest["kind"], path)


def test_a_wrong_letter_in_compose_is_found(staged: Path) -> None:
    told = yaml.safe_load(render(Path("out"), staged, Options("compose"))["compose.yaml"])
    assert schemas.wrong(schemas.compose(), told) == []
    paths = [path for path in keys(told) if path not in [("services", "triton")]]
    assert len(paths) > 30
    for path in paths:
        for typo in TYPOS:
            assert schemas.wrong(schemas.compose(), misspelt(told, path, typo)) != [], path


def test_the_same_repository_gives_the_same_bytes(staged: Path, made: dict[str, dict[str, str]]) -> None:
    for case, said in CASES.items():
        assert render(Path("out"), staged, said) == made[case]


def test_no_manifest_has_a_word_of_this_machine(staged: Path, made: dict[str, dict[str, str]]) -> None:
    for texts in made.values():
        assert str(staged) not in json.dumps(texts)
        for name, text in texts.items():
            assert "not run on a cluster by us" in text, name
            assert not re.search(r"\{\{|\{%", text), name
