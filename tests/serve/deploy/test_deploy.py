"""`serve deploy`: what the manifests say agrees with the repository and with itself, and what is wrong is refused."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import yaml
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from modelathe.errors import BadInput
from serve.config import model_config
from serve.config.errors import BadRepository
from serve.deploy import contents, plan, references, write
from serve.deploy.plan import Plan
from serve.deploy.write import Canary, Options, render
from serve.repository import tree
from serve.rollout import promotion
from tests.serve.deploy.conftest import MODEL, stage

PVC = references.source("pvc://models/repository")
PLANNED = Options("kubernetes", source=PVC, plan=Plan(replicas=30, per_pod_rate=812.5, start_seconds=200))
CANARY = Options("kubernetes", source=PVC, plan=Plan(replicas=30), canary=Canary(MODEL, 10, "infra/outer"))
OUT = Path("out")


def serve(*arguments: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def objects(texts: dict[str, str]) -> dict[tuple[str, str], Any]:
    """Return the objects in the files, by kind and name."""
    found = [one for name, text in texts.items() if "adapter" not in name for one in yaml.safe_load_all(text)]
    return {(one["kind"], one.get("metadata", {}).get("name", "")): one for one in found}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return stage(tmp_path / "repository")


def rewritten(repository: Path, old: str, new: str) -> None:
    """Change the model's configuration, and the digest that its lineage has of it."""
    path = repository / MODEL / tree.CONFIG
    text = path.read_text().replace(old, new)
    assert text != path.read_text()
    path.write_text(text)
    lineage = json.loads((repository / MODEL / "1" / tree.LINEAGE).read_text())
    lineage["digests"][tree.CONFIG], lineage["config"] = hashlib.sha256(text.encode()).hexdigest(), text
    (repository / MODEL / "1" / tree.LINEAGE).write_text(json.dumps(lineage))


def test_every_selector_selects_the_pods_that_it_is_for(staged: Path) -> None:
    made = objects(render(OUT, staged, CANARY))
    name = "model-repository"
    pods = {own: made["Deployment", own]["spec"]["template"]["metadata"]["labels"] for own in (name, f"{name}-canary")}

    def selected(match: dict[str, str]) -> set[str]:
        return {own for own, labels in pods.items() if match.items() <= labels.items()}

    for own in pods:
        spec = made["Deployment", own]["spec"]
        assert selected(spec["selector"]["matchLabels"]) == {own}
        for spread in spec["template"]["spec"]["topologySpreadConstraints"]:
            assert selected(spread["labelSelector"]["matchLabels"]) == {own}
        assert selected(made["Service", own]["spec"]["selector"]) == {own}
    assert selected(made["Service", f"{name}-headless"]["spec"]["selector"]) == {name}
    assert selected(made["PodDisruptionBudget", name]["spec"]["selector"]["matchLabels"]) == set(pods)
    assert selected(made["NetworkPolicy", name]["spec"]["podSelector"]["matchLabels"]) == set(pods)
    assert selected(made["PodMonitor", name]["spec"]["selector"]["matchLabels"]) == set(pods)


def test_every_object_that_is_named_is_there(staged: Path) -> None:
    for said in (PLANNED, CANARY, Options("kserve", source=PVC, canary=Canary(MODEL, 5))):
        texts = render(OUT, staged, said)
        made = objects(texts)
        maps = {name for kind, name in made if kind == "ConfigMap"}
        text = json.dumps(list(made.values()))
        assert {part.partition('"')[0] for part in text.split('"configMap": {"name": "')[1:]} == maps
        assert set(made["Kustomization", ""]["resources"]) == {
            name
            for name in texts
            if name.endswith(".yaml") and name not in ("kustomization.yaml", "prometheus-adapter.yaml")
        }
        for (kind, _), one in made.items():
            if kind == "HTTPRoute":
                behind = [ref for rule in one["spec"]["rules"] for ref in rule["backendRefs"]]
                assert all(("Service", ref["name"]) in made and ref["port"] == 8000 for ref in behind)
            if kind == "HorizontalPodAutoscaler":
                assert ("Deployment", one["spec"]["scaleTargetRef"]["name"]) in made


def test_the_digests_are_those_of_the_files(mine: Path, tmp_path: Path) -> None:
    made = objects(render(OUT, mine, CANARY))

    def checked(own: str) -> int:
        sums = tmp_path / "SHA256SUMS"
        sums.write_text(made["ConfigMap", f"{own}-digests"]["data"]["SHA256SUMS"])
        pod = made["Deployment", own]["spec"]["template"]["spec"]
        command = [*pod["initContainers"][0]["command"][:-1], str(sums)]
        return subprocess.run(command, cwd=mine, capture_output=True, timeout=60).returncode

    assert checked("repository") == 0
    assert checked("repository-canary") == 1  # the present configuration names the live version
    (mine / MODEL / tree.CONFIG).write_text(made["ConfigMap", "repository-canary"]["data"]["config.pbtxt"])
    assert checked("repository-canary") == 0
    with (mine / MODEL / "2" / "model.onnx").open("ab") as file:
        file.write(b"x")
    assert checked("repository-canary") == 1


def test_the_digest_changes_with_what_is_served_and_with_nothing_else(mine: Path) -> None:
    first = contents.read(mine).digest
    tree.note(mine / MODEL / "1", lived=["2026-11-28T00:00:00.000+00:00"])
    assert contents.read(mine).digest == first
    rewritten(mine, "max_batch_size: 32", "max_batch_size: 16")
    assert contents.read(mine).digest != first


def test_the_canary_loads_the_candidate(staged: Path) -> None:
    made = objects(render(OUT, staged, CANARY))
    pod = made["Deployment", "model-repository-canary"]["spec"]
    mounts = {mount["mountPath"]: mount for mount in pod["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounts[f"/models/{MODEL}/config.pbtxt"]["subPath"] == "config.pbtxt"
    text = made["ConfigMap", "model-repository-canary"]["data"]["config.pbtxt"]
    assert list(model_config.parse(text).version_policy.specific.versions) == [2]
    assert pod["replicas"] == 3
    weights = [ref.get("weight") for ref in made["HTTPRoute", "model-repository"]["spec"]["rules"][0]["backendRefs"]]
    assert weights == [90, 10]


def test_without_a_plan_nothing_scales_and_the_files_say_so(staged: Path) -> None:
    texts = render(OUT, staged, Options("kubernetes", source=PVC))
    made = objects(texts)
    assert made["Deployment", "model-repository"]["spec"]["replicas"] == 2
    assert not any(kind == "HorizontalPodAutoscaler" for kind, _ in made)
    assert "nobody planned" in texts["deployment.yaml"]
    service = objects(render(OUT, staged, Options("kserve", source=PVC)))["InferenceService", "model-repository"]
    predictor = service["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"], "autoScaling" in predictor) == (2, 2, False)
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "none"


def test_a_plan_says_how_many_and_when(staged: Path) -> None:
    made = objects(render(OUT, staged, PLANNED))
    assert "replicas" not in made["Deployment", "model-repository"]["spec"]
    scaler = made["HorizontalPodAutoscaler", "model-repository"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (30, 60)
    assert [metric["pods"]["target"]["averageValue"] for metric in scaler["metrics"]] == ["812500m", "10000"]
    assert scaler["behavior"]["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert scaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300
    probe = made["Deployment", "model-repository"]["spec"]["template"]["spec"]["containers"][0]["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] == 600


def test_the_adapter_offers_the_metrics_that_the_autoscaler_asks_for(staged: Path) -> None:
    texts = render(OUT, staged, PLANNED)
    scaler = objects(texts)["HorizontalPodAutoscaler", "model-repository"]["spec"]
    rules = yaml.safe_load(texts["prometheus-adapter.yaml"])["rules"]["custom"]
    assert [rule["name"]["as"] for rule in rules] == [one["pods"]["metric"]["name"] for one in scaler["metrics"]]
    assert all(f'model=~"{MODEL}"' in rule["metricsQuery"] for rule in rules)


def test_the_pod_ends_after_the_server_and_holds_whole_cores(staged: Path) -> None:
    pod = objects(render(OUT, staged, PLANNED))["Deployment", "model-repository"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    (told,) = [argument for argument in server["args"] if argument.startswith("--exit-timeout-secs=")]
    drain = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > drain + int(told.partition("=")[2])
    for container in (server, *pod["initContainers"]):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["resources"]["limits"]["cpu"].isdecimal()
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert all(mount["readOnly"] for mount in container["volumeMounts"] if "models" in mount["mountPath"])
    assert {"/tmp", "/dev/shm"} < {mount["mountPath"] for mount in server["volumeMounts"]}
    assert f"--load-model={MODEL}" in server["args"] and "--model-control-mode=explicit" in server["args"]
    restricted = [argument for argument in server["args"] if "restricted" in argument]
    assert len(restricted) == 2 and all(argument.endswith("=$(TRITON_ADMIN_KEY)") for argument in restricted)


def test_a_model_on_a_gpu_asks_for_one(mine: Path) -> None:
    rewritten(mine, "KIND_CPU", "KIND_GPU")
    tree.note(mine / MODEL / "1", target={"device": "cuda", "runtime": "onnxruntime", "cores": 2, "batch": [1, 32]})
    found = contents.read(mine)
    assert found.gpus == 1
    for own, there in (("kubernetes", "Deployment"), ("kserve", "ServingRuntime")):
        made = objects(render(OUT, mine, Options(own, source=PVC)))
        text = json.dumps([one for (kind, _), one in made.items() if kind == there])
        assert text.count('"nvidia.com/gpu": "1"') == 2
    compose = yaml.safe_load(render(OUT, mine, Options("compose"))["compose.yaml"])
    devices = compose["services"]["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    (found.configs[MODEL].instance_group[0]).gpus.append(2)
    assert found.configs[MODEL].instance_group[0].kind == ModelInstanceGroup.KIND_GPU and found.gpus == 3


def test_compose_serves_this_repository_to_this_machine_alone(mine: Path, tmp_path: Path) -> None:
    written = write.write(tmp_path / "a" / "compose", mine, Options("compose"))
    service = yaml.safe_load(written[0].read_text())["services"]["triton"]
    sources = {volume["target"]: written[0].parent / volume["source"] for volume in service["volumes"]}
    assert sources["/models"].resolve() == mine.resolve()
    assert {path.name for path in sources["/probe"].iterdir()} == {"ask.py", "questions.json"}
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "not run by docker by us" in written[0].read_text()
    assert service["read_only"] and service["cap_drop"] == ["ALL"]


def test_what_comes_next_names_what_the_files_name(mine: Path, tmp_path: Path) -> None:
    said = Options("kubernetes", source=PVC)
    secret, label, apply = write.next_steps(tmp_path / "out", mine, said)
    text = json.dumps(list(objects(render(OUT, mine, said)).values()))
    assert f'"secretKeyRef": {{"name": "{secret.split()[4]}", "key": "key"}}' in text
    assert '"triton-client": "allowed"' in text and label.endswith("triton-client=allowed")
    assert apply == f"kubectl apply -k {tmp_path / 'out'}"


def test_an_image_of_a_pinned_digest_needs_no_word(staged: Path) -> None:
    image = f"registry.example:5000/triton:26.07@sha256:{'b' * 64}"
    texts = render(OUT, staged, Options("kubernetes", source=PVC, image=references.image(image)))
    assert "no digest yet" not in texts["deployment.yaml"]
    assert references.UNKNOWN not in texts["deployment.yaml"]
    assert "no digest yet" in render(OUT, staged, Options("compose"))["compose.yaml"]


def test_sources(staged: Path) -> None:
    assert references.source("pvc://models").uri == "pvc://models"
    assert references.source("pvc://models/a/b").uri == "pvc://models/a/b"
    image = f"oci://registry.example/m@sha256:{'a' * 64}"
    assert references.source(image).uri == image.replace("oci://", "oci+native://")
    pod = objects(render(OUT, staged, Options("kubernetes", source=references.source(image))))
    volumes = pod["Deployment", "model-repository"]["spec"]["template"]["spec"]["volumes"]
    assert volumes[0]["image"]["reference"] == image.removeprefix("oci://")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "no replicas"),
        ("[]", "no replicas"),
        ("nonsense", "is no plan"),
        ('{"replicas": 0}', "replicas"),
        ('{"replicas": 2.5}', "replicas"),
        ('{"replicas": 2, "per_pod_rate": NaN}', "per_pod_rate"),
        ('{"replicas": 2, "per_pod_rate": -1}', "per_pod_rate"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(BadInput, match=said):
        plan.read(tmp_path / "plan.json")
    with pytest.raises(BadInput, match="cannot be read"):
        plan.read(tmp_path / "other.json")


def test_more_keys_in_a_plan_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": 1, "replicas": 3, "slo": ["p99 < 20ms"], "max_replicas": 2}')
    read = plan.read(tmp_path / "plan.json")
    assert (read.replicas, read.most, read.planned) == (3, 3, True)


def test_a_plan_is_for_one_model(staged: Path) -> None:
    texts = render(OUT, staged, Options("kubernetes", source=PVC, plan=Plan(per_pod_rate=9, model=MODEL)))
    assert f'model=~"{MODEL}"' in texts["prometheus-adapter.yaml"]
    with pytest.raises(BadInput, match="the plan is for it: other"):
        render(OUT, staged, Options("kubernetes", source=PVC, plan=Plan(per_pod_rate=9, model="other")))


def test_a_folder_with_something_in_it_is_left_alone(mine: Path, tmp_path: Path) -> None:
    place = tmp_path / "cluster"
    place.mkdir()
    done = ("deploy", "kubernetes", place, "--repository", mine, "--model-source", "pvc://models", "--json")
    first = serve(*done)
    assert first.returncode == 0, first.stderr
    assert {Path(file).name for file in json.loads(first.stdout)["files"]} == {path.name for path in place.iterdir()}
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    again = serve(*done)
    assert again.returncode == 4 and "is there already" in again.stderr
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_a_killed_command_leaves_no_folder(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modelathe.files.place", full)
    with pytest.raises(OSError, match="No space"):
        write.write(tmp_path / "new" / "cluster", mine, Options("compose"))
    assert list((tmp_path / "new").iterdir()) == []


def break_half(place: Path) -> None:
    (place / MODEL / "1" / "model.onnx").unlink()


def break_changed(place: Path) -> None:
    with (place / MODEL / "1" / "model.onnx").open("ab") as file:
        file.write(b"x")


def break_not_live(place: Path) -> None:
    path = place / MODEL / tree.CONFIG
    path.write_text(path.read_text().replace("versions: 1", "versions: 7"))


def break_promoting(place: Path) -> None:
    change = {"model": MODEL, "number": 2, "config": (place / MODEL / tree.CONFIG).read_text()}
    journal = {"when": tree.now(), "changes": [change]}
    (place / MODEL / promotion.JOURNAL).write_text(json.dumps(journal))


def break_empty(place: Path) -> None:
    (place / MODEL).rename(place.with_name("away"))


@pytest.mark.parametrize("fault", [break_half, break_changed, break_not_live, break_promoting, break_empty])
def test_a_repository_with_a_fault_is_refused_in_one_line(fault: Any, mine: Path, tmp_path: Path) -> None:
    fault(mine)
    done = serve("deploy", "compose", tmp_path / "out", "--repository", mine, "--json")
    assert done.returncode == 4, done.stderr
    error = json.loads(done.stdout)["error"]
    assert str(mine) in error["where"] and error["fix"] and "\n" not in error["what"]
    assert not (tmp_path / "out").exists()


def test_a_canary_without_a_candidate_is_refused(mine: Path) -> None:
    now = contents.read(mine)
    with pytest.raises(BadRepository, match="holds no model digits"):
        contents.candidate(now, "digits")
    tree.note(mine / MODEL / "2", failed="the server said no")
    with pytest.raises(BadRepository, match="has no candidate"):
        contents.candidate(now, MODEL)


def test_a_failed_version_is_never_deployed(mine: Path, tmp_path: Path) -> None:
    tree.note(mine / MODEL / "2", failed="the server said no")
    place = ("deploy", "kubernetes", tmp_path / "out", "--repository", mine, "--model-source", "pvc://m", "--json")
    refused = serve(*place, "--canary", f"{MODEL}=10", "--gateway", "g")
    error = json.loads(refused.stdout)["error"]
    assert refused.returncode == error["exit"] == 4
    assert error["what"].startswith("has no candidate") and "\n" not in error["what"]
    assert not (tmp_path / "out").exists()
    assert serve(*place).returncode == 0
    assert f"{MODEL}/2/" not in (tmp_path / "out" / "deployment.yaml").read_text()


def test_a_canary_of_a_part_of_a_pipeline_is_refused(mine: Path) -> None:
    now = contents.read(mine)
    shutil.copytree(mine / MODEL, mine / "second")
    tree.note(mine / MODEL / "2", parts={MODEL: 2, "second": 2})
    with pytest.raises(BadRepository, match="together with second"):
        contents.candidate(now, MODEL)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--canary", MODEL), "share of a model"),
        (("--canary", f"{MODEL}=0", "--gateway", "g"), "share of a model"),
        (("--canary", f"{MODEL}=10"), "needs a Gateway"),
        (("--gateway", "g"), "is for a canary"),
    ],
)
def test_half_a_canary_is_refused(options: tuple[str, ...], said: str, mine: Path, tmp_path: Path) -> None:
    place = ("deploy", "kubernetes", tmp_path / "out", "--repository", mine, "--model-source", "pvc://m")
    done = serve(*place, *options)
    assert done.returncode == 2 and said in done.stderr, done.stderr


@hypothesis.given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])))
@hypothesis.example("a\n\n")
@hypothesis.example(" a\n")
@hypothesis.example("a: b # c\n  {d}\n")
@hypothesis.settings(deadline=None)
def test_a_block_keeps_every_letter(text: str) -> None:
    # Neither do YAML's printable characters hold these, nor do the files that stand in blocks.
    hypothesis.assume(not any("\x7f" <= letter <= "\x9f" or letter in "\ufffe\uffff" for letter in text))
    indented = write.block(text).replace("\n", "\n    ")
    assert yaml.safe_load(f"a:\n  b: {indented}\n") == {"a": {"b": text}}


@hypothesis.given(st.floats(1e-3, 1e9))
def test_a_quantity_is_the_number_to_a_thousandth(value: float) -> None:
    said = write.quantity(value)
    read = float(said.removesuffix("m")) / (1000 if said.endswith("m") else 1)
    assert abs(read - value) <= 0.0005 * (1 + 1e-9) + 1e-12 * value
