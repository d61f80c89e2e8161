"""Monitoring: what Prometheus and Grafana are told about the models of one repository.

Triton's latency summaries cannot be added up over servers: where several are scraped, each shows its own quantiles.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.load.metrics import MACHINE_USED
from modelathe import files
from serve.repository import tree as repositories
from serve.watch.metrics import (
    COMPUTE,
    EXECUTIONS,
    FAILURE,
    INFERENCES,
    LATENCY,
    MACHINE_TOTAL,
    PENDING,
    QUEUE,
    SUCCESS,
    address,
)

CONFIG, ALERTS, DASHBOARD = "prometheus.yml", "alerts.yml", "dashboard.json"
JOB = "triton"
MAX_FAILING = 0.01
"""Share of failed requests above which an alert fires."""
UNCOUNTED = "A request that a full queue refuses is counted nowhere by Triton 24.10; one that waited too long is."
_UP = f'up{{job="{JOB}"}}'
_CONFIG = """\
# Written by `serve monitoring`; several servers of the same repository are further targets.
global:
  scrape_interval: 15s
  evaluation_interval: 15s
rule_files:
  - {alerts}
scrape_configs:
  - job_name: {job}
    static_configs:
      - targets: [{target}]
"""
_GROUP = """\
# Written by `serve monitoring`.
groups:
  - name: modelathe
    rules:
"""
_RULE = """\
      - alert: {name}
        expr: |-
          {expression}
        for: {wait}
        labels:
          severity: {severity}
        annotations:
          summary: {summary}
          description: {description}
"""


@dataclass(frozen=True)
class Alert:
    """A rule of Prometheus.

    Args:
        name: how it is called.
        measured: the PromQL expression that it looks at.
        fires: what must hold of it, a comparison or a condition; the two in a row are an expression.
        wait: for how long, in Prometheus's notation.
        summary: one line; may use Prometheus's templates.
        description: what to do about it.
        severity: `critical` where nothing is answered.
    """

    name: str
    measured: str
    fires: str
    wait: str
    summary: str
    description: str
    severity: str = "warning"

    @property
    def expression(self) -> str:
        """The whole expression; an alert fires for each series that it returns."""
        return f"{self.measured} {self.fires}"

    def rule(self) -> str:
        """Return it as YAML."""
        return _RULE.format(
            name=self.name,
            expression=self.expression,
            wait=self.wait,
            severity=self.severity,
            # A JSON string is a YAML string, whatever it holds.
            summary=json.dumps(self.summary),
            description=json.dumps(self.description),
        )


def write(folder: Path, repository: Path, url: str, p99_ms: float | None = None) -> list[Path]:
    """Write the three files for a repository; each replaces an older one at once or not at all.

    Args:
        folder: where; made if it is not there.
        repository: whose models are watched.
        url: `HOST:PORT` of the server's metrics, as Prometheus reaches it.
        p99_ms: milliseconds of a model's p99 above which an alert fires; without it none does.

    Raises:
        BadRepository: the repository holds no models.
        UsageError: `url` is no address.
    """
    models = repositories.models(repository)
    texts = {
        CONFIG: _CONFIG.format(alerts=ALERTS, job=JOB, target=json.dumps(address(url))),
        ALERTS: _GROUP + "".join(alert.rule() for alert in alerts(models, p99_ms)),
        DASHBOARD: json.dumps(dashboard(repository.absolute().name, models), indent=2) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as together:
        for name, text in texts.items():
            together.enter_context(files.writing(folder / name)).write(text.encode())
    return [folder / name for name in texts]


def alerts(models: Sequence[str], p99_ms: float | None = None) -> list[Alert]:
    """Return the rules for these models; see `write` for `p99_ms`."""
    ours = "model=~" + json.dumps("|".join(map(re.escape, models)))

    def rate(metric: str, more: str = "") -> str:
        return f"sum by (model) (rate({metric}{{{ours}{more}}}[5m]))"

    compute = " + ".join(map(rate, COMPUTE.values()))
    found = [
        Alert(
            "ServerDown",
            _UP,
            "== 0",
            "1m",
            "{{ $labels.instance }} does not answer",
            "Look at the server's log, and start it again.",
            "critical",
        ),
        Alert(
            "ModelAbsent",
            "(" + " or ".join(f"absent({SUCCESS}{{model={json.dumps(model)}}})" for model in models) + ")",
            f"and on () count({_UP} == 1) > 0",  # where no server answers, ServerDown says so
            "1m",
            "no server has {{ $labels.model }}",
            "Its last load failed or it was unloaded: look at the server's log.",
            "critical",
        ),
        Alert(
            "RequestsFail",
            f"{rate(FAILURE)} / ({rate(FAILURE)} + {rate(SUCCESS)})",
            f"> {MAX_FAILING}",
            "5m",
            "{{ $value | humanizePercentage }} of the requests to {{ $labels.model }} fail",
            f"The label reason of {FAILURE} says which way; the server's log says why. {UNCOUNTED}",
        ),
        Alert(
            "RequestsRejected",
            rate(FAILURE, ',reason="REJECTED"'),
            "> 0",
            "1m",
            "requests to {{ $labels.model }} wait longer than its queue allows",
            f"It gets more than it can do: add instances or servers, or send less. {UNCOUNTED}",
        ),
        Alert(
            "QueueDominates",
            f"{rate(QUEUE)} / ({compute})",
            "> 1",
            "10m",
            "requests to {{ $labels.model }} wait longer than they are computed",
            "It gets more than it can do, or its queue_delay_us is longer than its work.",
        ),
        Alert(
            "PendingGrows",
            f"deriv({PENDING}{{{ours}}}[10m])",
            f"> 0 and min_over_time({PENDING}{{{ours}}}[10m]) > 0",
            "1m",
            "the queue of {{ $labels.model }} grows and is never empty",
            f"It gets more than it can do. {UNCOUNTED}",
        ),
    ]
    if p99_ms is not None:
        found.append(
            Alert(
                "SlowP99",
                f'{LATENCY}{{{ours},quantile="0.99"}} / 1000',
                f"> {p99_ms:g}",
                "5m",
                "the p99 of {{ $labels.model }} on {{ $labels.instance }} is {{ $value | humanize }} ms",
                "Triton's own quantile over a sliding window; it has none for a model with a response cache.",
            )
        )
    return found


def dashboard(name: str, models: Sequence[str]) -> dict[str, Any]:
    """Return Grafana's dashboard of the repository `name`: a row for the servers and one for each of `models`."""
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    rows = [("Servers", list(_server_panels()))] + [(model, list(_model_panels(model))) for model in models]
    return {
        "title": f"modelathe: {name}",
        "tags": ["modelathe", "triton"],
        "schemaVersion": 41,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": list(_placed(rows)),
    }


def _placed(rows: Sequence[tuple[str, list[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    """Yield the rows and their panels, three beside each other, with their places and numbers."""
    number, top = 0, 0
    for title, panels in rows:
        head = {"type": "row", "title": title, "collapsed": False, "panels": []}
        yield {**head, "id": (number := number + 1), "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}}
        top += 1
        for index, panel in enumerate(panels):
            place = {"x": index % 3 * 8, "y": top + index // 3 * 8, "w": 8, "h": 8}
            yield {**panel, "id": (number := number + 1), "gridPos": place}
        top += -(-len(panels) // 3) * 8


def _server_panels() -> Iterator[dict[str, Any]]:
    yield _panel("Answers", "short", {"{{instance}}": _UP})
    job = f'{{job="{JOB}"}}'
    memory = {"{{instance}} used": f"{MACHINE_USED}{job}", "{{instance}} there is": f"{MACHINE_TOTAL}{job}"}
    yield _panel(
        "Memory of the machine", "bytes", memory, "Of all programs on it; `serve watch` shows the server's own."
    )
    yield _panel("CPU of the machine", "percentunit", {"{{instance}}": f"nv_cpu_utilization{job}"})


def _model_panels(model: str) -> Iterator[dict[str, Any]]:
    ours = f"model={json.dumps(model)}"

    def rate(metric: str, by: str = "version") -> str:
        return f"sum by ({by}) (rate({metric}{{{ours}}}[$__rate_interval]))"

    yield _panel("Requests answered", "reqps", {"version {{version}}": rate(SUCCESS)})
    yield _panel(
        "Latency",
        "ms",
        {"{{quantile}}, version {{version}}, {{instance}}": f"{LATENCY}{{{ours}}} / 1000"},
        "Triton's own quantiles over a sliding window, of each server alone: they cannot be added up. "
        "There are none for a model with a response cache.",
    )
    batch = {"version {{version}}": f"{rate(INFERENCES)} / {rate(EXECUTIONS)}"}
    yield _panel("Mean batch that was formed", "short", batch)
    times = {"queue": QUEUE, **COMPUTE}
    yield _panel(
        "Queue and compute of a request",
        "ms",
        {
            f"{part}, version {{{{version}}}}": f"{rate(metric)} / {rate(SUCCESS)} / 1000"
            for part, metric in times.items()
        },
    )
    failures = {"{{reason}}, version {{version}}": rate(FAILURE, "version, reason")}
    yield _panel("Failures", "reqps", failures, f"REJECTED waited too long. {UNCOUNTED}")
    yield _panel("Requests pending", "short", {"version {{version}}, {{instance}}": f"{PENDING}{{{ours}}}"})


def _panel(title: str, unit: str, queries: dict[str, str], description: str = "") -> dict[str, Any]:
    """Return a graph of queries by their legends."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(queries.items())
        ],
    }
