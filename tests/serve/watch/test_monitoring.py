"""`serve monitoring`: Grafana's schema, Prometheus's own checks, and every query on the metrics of a real server."""

import copy
import http.client
import importlib
import json
import os
import shutil
import socket
import subprocess
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pydantic
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from loadtest.load.metrics import MACHINE_USED
from modelathe.client import connect
from modelathe.errors import ServerFault
from serve.config import settings
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.server.tritonserver import running
from serve.watch import monitoring
from tests.conftest import TINY, TINY_INPUTS, TINY_OUTPUTS, save_tiny
from tests.serve.commands.test_up import serve
from tests.serve.commands.test_watch import load
from tests.serve.server.test_server import eventually

HASTY, GHOST = "hasty", "ghost-1.x"
MODELS = [GHOST, HASTY, TINY]
P99_MS = 50.0
needs_prometheus = pytest.mark.skipif(
    None in map(shutil.which, ("prometheus", "promtool")), reason="prometheus is not installed: apt install prometheus"
)


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """The HTTP API of one that runs."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, path: str, **parameters: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", f"/api/v1/{path}?{urlencode(parameters)}")
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def values(self, expression: str) -> list[float]:
        """Return the values of an expression's series; Prometheus must know its words."""
        return [float(series["value"][1]) for series in self.ask("query", query=expression)["result"]]

    def firing(self) -> list[str]:
        return sorted(alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"])


@contextmanager
def prometheus(folder: Path) -> Iterator[Prometheus]:
    """Run one over the files in `folder`, in a hurry: it looks each half second, and no alert waits."""
    config, alerts = folder / monitoring.CONFIG, folder / monitoring.ALERTS
    config.write_text(config.read_text().replace("15s", "500ms"))
    alerts.write_text("".join(line for line in alerts.read_text().splitlines(True) if "  for: " not in line))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'data'}"], stdout=log, stderr=log)
    try:
        found = Prometheus(port)
        assert eventually(lambda: process.poll() is not None or _looked(found)), (folder / "log").read_text()
        yield found
    finally:
        process.terminate()
        process.wait(30)


def _looked(found: Prometheus) -> bool:
    """Whether it has looked at its target several times, and at its rules after that."""
    with suppress(OSError, ValueError):  # while it starts it says so in words
        return found.values(f'count_over_time(up{{job="{monitoring.JOB}"}}[1m]) > 3') != []
    return False


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, publish_tiny: Callable[..., staging.Version]) -> Path:
    """A repository with a model that answers, one whose queue times out at once, and one that will not be loaded."""
    place = tmp_path_factory.mktemp("watched") / "model_repository"
    publish_tiny(place)
    publish_tiny(place, GHOST)
    onnx = save_tiny(place.parent / "tiny.onnx")
    asked = settings.read({"queue_delay_us": 50_000, "timeout_ms": 1}, HASTY)
    with staging.stage(place, HASTY, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1), asked) as staged:
        staging.publish(staged, {})
    return place


def write(folder: Path, place: Path, url: str = "127.0.0.1:8002") -> Path:
    done = serve("monitoring", str(folder), "--repository", str(place), "--url", url, "--p99-ms", str(P99_MS), "--json")
    assert done.returncode == 0, done.stderr
    names = [monitoring.CONFIG, monitoring.ALERTS, monitoring.DASHBOARD]
    assert json.loads(done.stdout)["files"] == [str(folder / name) for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Path:
    return write(tmp_path_factory.mktemp("files"), place)


def queries(dashboard: dict[str, Any]) -> dict[str, list[str]]:
    """The expressions of a dashboard by the titles of their rows and panels; rates over what the test has seen."""
    found, row = {}, ""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        else:
            asked = [target["expr"].replace("$__rate_interval", "1m") for target in panel["targets"]]
            found[f"{row}: {panel['title']}"] = asked
    return found


@pytest.mark.timed
@needs_prometheus
def test_every_query_on_the_metrics_of_a_real_server(place: Path, server_prefix: Path, tmp_path: Path) -> None:
    with running(place, models=[TINY, HASTY], grace=0) as endpoint:
        folder = write(tmp_path / "files", place, endpoint.metrics)
        asked = queries(json.loads((folder / monitoring.DASHBOARD).read_text()))
        with load(endpoint.grpc), connect(endpoint.grpc) as client, prometheus(folder) as found:
            for _ in range(2):  # after Prometheus has seen the counter at zero
                with pytest.raises(ServerFault, match="timeout"):
                    client.infer(HASTY, {"x": np.ones((1, 4), np.float32)})
            rejected = f'sum(rate(nv_inference_request_failure{{model="{HASTY}",reason="REJECTED"}}[1m])) > 0'
            assert eventually(lambda: found.values(rejected) != [])
            assert eventually(lambda: "RequestsRejected" in found.firing())
            # Triton looks at the machine every two seconds.
            assert eventually(lambda: found.values(f"{MACHINE_USED} > 0") != [])
            said = {title: [found.values(query) for query in of] for title, of in asked.items()}
            firing, groups = found.firing(), found.ask("rules")["groups"]
            measured = {rule.name: found.values(rule.measured) for rule in monitoring.alerts(MODELS, P99_MS)}
            for rule in monitoring.alerts(MODELS, P99_MS):
                found.values(rule.expression)

    assert len(said) == 3 + 3 * 6
    assert {title for title, answers in said.items() if [] in answers} == {
        title
        for title in said
        if title.startswith(f"{GHOST}: ")  # it is not loaded
    }
    one = {title: answers[0][0] for title, answers in said.items() if not title.startswith(GHOST)}
    assert one["Servers: Answers"] == 1
    assert 0 < one["Servers: Memory of the machine"] < said["Servers: Memory of the machine"][1][0]
    assert one[f"{TINY}: Requests answered"] > 0
    assert one[f"{TINY}: Mean batch that was formed"] == 2
    assert len(said[f"{TINY}: Latency"][0]) == 5
    assert len(said[f"{TINY}: Queue and compute of a request"]) == 4
    assert all(values[0] > 0 for values in said[f"{TINY}: Queue and compute of a request"])
    assert sum(said[f"{TINY}: Failures"][0]) == 0
    assert sum(said[f"{HASTY}: Failures"][0]) > 0

    (group,) = groups
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert [rule["name"] for rule in group["rules"]] == [rule.name for rule in monitoring.alerts(MODELS, P99_MS)]
    assert all(measured.values()), measured
    assert {"ModelAbsent", "RequestsFail", "RequestsRejected"} <= set(firing)
    assert firing.count("ModelAbsent") == 1
    assert not {"ServerDown", "PendingGrows"} & set(firing)


@needs_prometheus
def test_a_server_that_is_down(place: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        folder = write(tmp_path / "files", place, f"127.0.0.1:{nobody.getsockname()[1]}")
        with prometheus(folder) as found:
            assert eventually(lambda: found.firing() == ["ServerDown"])


@needs_prometheus
def test_promtool_finds_no_fault(files: Path) -> None:
    promtool("check", "config", "--lint=all", "--lint-fatal", str(files / monitoring.CONFIG))
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(files / monitoring.ALERTS))


BUSY = {
    "up": ("{job='triton',instance='a'}", "1+0x60"),
    "nv_inference_request_success": ("{model='tiny'}", "0+6000x60"),
    "nv_inference_request_failure": ("{model='tiny',reason='REJECTED'}", "0+0x60"),
    "nv_inference_queue_duration_us": ("{model='tiny'}", "0+100x60"),
    "nv_inference_compute_input_duration_us": ("{model='tiny'}", "0+100x60"),
    "nv_inference_compute_infer_duration_us": ("{model='tiny'}", "0+900x60"),
    "nv_inference_compute_output_duration_us": ("{model='tiny'}", "0+100x60"),
    "nv_inference_pending_request_count": ("{model='tiny'}", "0 5 1 7 0 3 2 4 0 5 1 7 0 3 2 4 0 5 1 7 0 3 2 4 0+0x40"),
    "nv_inference_request_summary_us": ("{model='tiny',instance='a',quantile='0.99'}", "50000+0x60"),
}
SICK = {
    "nothing": ({}, set()),
    "down": ({"up": "0+0x60"}, {"ServerDown"}),
    "absent": ({"nv_inference_request_success": "_x60"}, {"ModelAbsent"}),
    "one in a hundred and one": ({"nv_inference_request_failure": "0+60x60"}, {"RequestsRejected"}),
    "one in ninety": ({"nv_inference_request_failure": "0+68x60"}, {"RequestsFail", "RequestsRejected"}),
    "waiting as long as computing": ({"nv_inference_queue_duration_us": "0+1100x60"}, set()),
    "waiting longer": ({"nv_inference_queue_duration_us": "0+1101x60"}, {"QueueDominates"}),
    "a backlog": ({"nv_inference_pending_request_count": "5+0x60"}, set()),
    "a growing backlog": ({"nv_inference_pending_request_count": "5+1x60"}, {"PendingGrows"}),
    "slow": ({"nv_inference_request_summary_us": "50001+0x60"}, {"SlowP99"}),
}


@needs_prometheus
def test_each_alert_fires_when_it_should_and_at_no_other_time(model_repository: Path, tmp_path: Path) -> None:
    """Prometheus's own unit tests of rules, on series that we make up."""
    write(tmp_path, model_repository)
    tests = []
    for name, (series, firing) in SICK.items():
        given = [
            {"series": metric + labels, "values": series.get(metric, values)}
            for metric, (labels, values) in BUSY.items()
        ]
        expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(firing)]
        tests.append(
            {
                "name": name,
                "interval": "1m",
                "input_series": given,
                "promql_expr_test": [
                    {
                        "expr": 'sum by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": "40m",
                        "exp_samples": expected,
                    }
                ],
            }
        )
    (tmp_path / "tests.yml").write_text(json.dumps({"rule_files": [monitoring.ALERTS], "tests": tests}))
    promtool("test", "rules", str(tmp_path / "tests.yml"))


def faults(dashboard: dict[str, Any]) -> list[str]:
    """What Grafana's schema does not know in a dashboard, or knows otherwise."""
    register_default_plugins()
    read = Dashboard.from_json(copy.deepcopy(dashboard))
    again = json.loads(json.dumps(read, cls=JSONEncoder))
    return [*_lost(dashboard, again), *_mistyped(read)]


def _lost(ours: Any, theirs: Any, where: str = "dashboard") -> Iterator[str]:
    """Yield what went missing: the SDK passes over fields that its schema lacks."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from _lost(value, theirs.get(key, "nothing"), f"{where}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _lost(*pair, f"{where}[{index}]")
    elif ours != theirs:
        yield f"{where}: {ours!r} became {theirs!r}"


def _mistyped(read: Any, where: str = "dashboard") -> Iterator[str]:
    """Yield the fields whose values are not of the types that the SDK's classes are annotated with."""
    if isinstance(read, list):
        for index, value in enumerate(read):
            yield from _mistyped(value, f"{where}[{index}]")
    if not type(read).__module__.startswith("grafana_foundation_sdk.models"):
        return
    names = vars(importlib.import_module(type(read).__module__))
    for field, hint in typing.get_type_hints(type(read).__init__, names).items():
        if field != "return":
            value = getattr(read, field)
            try:
                checked = pydantic.TypeAdapter(hint, config={"arbitrary_types_allowed": True}).validate_python(value)
                if checked != value:
                    yield f"{where}.{field}: {value!r} is not of {hint}"
            except pydantic.ValidationError as error:
                yield f"{where}.{field}: {error.errors()[0]['msg']}"
            yield from _mistyped(value, f"{where}.{field}")


def test_the_dashboard_follows_grafanas_schema(files: Path) -> None:
    dashboard = json.loads((files / monitoring.DASHBOARD).read_text())
    assert faults(dashboard) == []
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    taken = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(taken) == len(set(taken))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ((), "schemaversion", 41),
        ((), "refresh", 30),
        (("panels", 1), "titel", "x"),
        (("panels", 1), "title", 7),
        (("panels", 1), "gridPos", {"x": 0, "y": 0, "w": 8, "hight": 8}),
        (("panels", 1, "targets", 0), "expression", "up"),
        (("panels", 1, "targets", 0), "legendFormat", ["x"]),
        (("panels", 1, "fieldConfig", "defaults"), "units", "ms"),
        (("panels", 1, "fieldConfig", "defaults"), "min", "zero"),
        (("panels", 0), "collapse", True),
        (("templating", "list", 0), "type", "data source"),
    ],
)
def test_what_is_against_the_schema_is_found(files: Path, path: tuple[str | int, ...], key: str, value: Any) -> None:
    dashboard = json.loads((files / monitoring.DASHBOARD).read_text())
    spot = dashboard
    for step in path:
        spot = spot[step]
    spot[key] = value
    assert faults(dashboard) != []


def test_without_a_threshold_no_alert_looks_at_the_p99() -> None:
    assert "SlowP99" not in [alert.name for alert in monitoring.alerts([TINY])]


def test_what_was_there_stays_if_writing_fails(files: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in files.iterdir() if path.is_file()}
    fsync = os.fsync

    def full(handle: int) -> None:
        if monitoring.DASHBOARD in Path(f"/proc/self/fd/{handle}").readlink().name:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        monitoring.write(files, place, "127.0.0.1:9999", 1)
    assert {path: path.read_bytes() for path in files.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("--repository", "no/such"), 4), (("--url", "grpc://127.0.0.1:1"), 2), (("--p99-ms", "0"), 2)],
)
def test_wrong_options(arguments: tuple[str, str], code: int, tmp_path: Path) -> None:
    assert serve("monitoring", str(tmp_path / "files"), *arguments).returncode == code
    assert not (tmp_path / "files").exists()
