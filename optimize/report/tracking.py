"""Tracking: a run in an experiment tracker, so that it stands beside all others of its model.

The tracker is asked before the work starts, so that one which is away costs no training. One that fails at the end
costs no result: the run ends as it would have ended without it, with a warning.
"""

import logging
import os
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from modelathe.errors import MachineError, UsageError
from optimize.machine import extra
from optimize.model.errors import first_line
from optimize.report import page

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRACKER = "mlflow"
LONGEST_VALUE, LONGEST_TAG, LONGEST_NAME = 6000, 5000, 250
"""Characters that MLflow keeps of a parameter, of a tag and of a name."""
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""What holds unless the user says otherwise: MLflow would go on asking an absent server for minutes."""
PAGES = ("report.html", "run.json", "recipe.toml")


def parse(text: str) -> str:
    """Return the URI of `mlflow[:URI]`; empty where MLflow's own settings name it.

    Raises:
        UsageError: it is another tracker, or none.
    """
    name, _, uri = text.partition(":")
    if name != TRACKER:
        raise UsageError(
            f"--track {text}: not a tracker", fix="say mlflow, mlflow:http://HOST:PORT or mlflow:sqlite:///FILE.db"
        )
    return uri


@contextmanager
def tracked(uri: str | None, name: str, source: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Track the run in this block, and yield what takes its document; with no URI nothing is tracked.

    The document, also that of a run that a gate refused, gets `tracking{uri, experiment, run, error}`.

    Args:
        uri: from `parse`; None tracks nothing.
        name: of the experiment, unless MLFLOW_EXPERIMENT_NAME names one: the workload's.
        source: where the workload comes from.

    Raises:
        MissingExtra: MLflow is not installed.
        MachineError: the tracker is away or refuses; nothing has been done then.
    """
    if uri is None:
        yield lambda _: None
        return
    run = _Run(uri, name, source)
    documents: list[dict[str, Any]] = []
    try:
        yield documents.append
    except BaseException as error:
        run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", getattr(error, "partial", {}))
        raise
    run.end("FINISHED", documents[-1])


class _Run:
    """A run that the tracker knows of."""

    def __init__(self, uri: str, name: str, source: str) -> None:
        extra.require(TRACKER)
        self.uri, self.name, self.source = uri, os.environ.get("MLFLOW_EXPERIMENT_NAME") or name, source
        self.id = ""
        try:
            with _quiet():
                self.client = _client(uri)
                self.uri = self.client.tracking_uri
                self.id = self._created()
        except Exception as error:
            raise MachineError(
                f"the tracker cannot be used: {self._told(error)}",
                where=f"--track {TRACKER}:{_shown(self.uri)}",
                fix="start it, name another, or run without --track",
            ) from error

    def _created(self) -> str:
        found = self.client.get_experiment_by_name(self.name)
        experiment = found.experiment_id if found else self.client.create_experiment(self.name)
        tags = {
            "mlflow.source.name": self.source,
            "mlflow.source.type": "LOCAL",
            "mlflow.user": psutil.Process().username(),
        }
        if commit := _commit(self.source):
            tags["mlflow.source.git.commit"] = commit
        return str(self.client.create_run(experiment, tags=tags).info.run_id)

    def end(self, status: str, document: dict[str, Any]) -> None:
        """Log what a run left, which may be nothing, and end it; a tracker that fails now is a warning."""
        tracking = {"uri": _shown(self.uri), "experiment": self.name, "run": self.id, "error": ""}
        try:
            with _quiet():
                if document.get("bundle"):
                    self._log(document)
                self.client.set_terminated(self.id, status)
        except Exception as error:
            tracking["error"] = self._told(error)
        if document:
            document["tracking"] = tracking

    def _log(self, document: dict[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        bundle = Path(document["bundle"])
        folder = bundle.parent
        params = [Param(_name(key), value[:LONGEST_VALUE]) for key, value in parameters(document).items()]
        now = round(time.time() * 1000)
        points = [Metric(_name(key), value, now, step) for key, value, step in metrics(document)]
        tags = [RunTag(_name(key), value[:LONGEST_TAG]) for key, value in described(document, folder).items()]
        for at in range(0, max(len(params), len(points), len(tags)), 100):  # so many are taken at once
            part = slice(at, at + 100)
            self.client.log_batch(self.id, points[part], params[part], tags[part])
        self.client.log_artifacts(self.id, str(bundle), "bundle")
        for file in (folder / name for name in PAGES):
            if file.is_file():
                self.client.log_artifact(self.id, str(file))

    def _told(self, error: Exception) -> str:
        password = urlsplit(self.uri).password
        text = first_line(error) or type(error).__name__
        return text.replace(password, "***") if password else text


def parameters(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the recipe, one value for each of its keys, the workload and the versions; steps are counted from 1."""
    found = {"workload": document["workload"], "modelathe": document["modelathe"]}
    found |= {key: value for key, value in document["environment"].items()}
    return {key: str(value) for key, value in (*found.items(), *_flat(document["recipe"]))}


def metrics(document: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """Return name, value and step of every figure: 0 is the trained model, the endpoint stands beside the last step."""
    rows = [document["trained"], *document["steps"]]
    found = [(key, value, step) for step, entry in enumerate(rows) for key, value in _figures(entry)]
    last = len(document["steps"])
    if document["endpoint"]:
        found += [(f"endpoint.{key}", value, last) for key, value in _scores(document["endpoint"])]
    if load := document["load"]:
        told = {"load.rate": load["rate"]["achieved"], "load.p50_ms": load["latency_ms"]["p50"]}
        found += [(key, value, last) for key, value in {**told, "load.p99_ms": load["latency_ms"]["p99"]}.items()]
    found += [(f"gate: {gate['name']}", float(gate["passed"]), last) for gate in document.get("gates", ())]
    return [(key, float(value), step) for key, value, step in found if value is not None]


def described(document: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the tags: the run's folder, what was published, what each gate said, and all digests."""
    tags = {"folder": str(folder.resolve())}
    if version := document["version"]:
        tags["published"] = f"{version['model']} version {version['number']}"
        tags["repository"] = version["repository"]
    for gate in document.get("gates", ()):
        word = "passed" if gate["passed"] else "refused"
        tags[f"gate: {gate['name']}"] = f"{word}: {gate['measured']}, wanted {gate['limit']}"
    if preset := document.get("preset"):
        tags["preset"] = preset
    tags |= {f"preset: {entry['preset']}": f"refused: {entry['why']}" for entry in document.get("tried", ())}
    return tags | {f"digest: {name}": digest for name, digest in page.digests(dict(document), folder).items()}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    inner: Sequence[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        inner = list(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        inner = [(str(number), one) for number, one in enumerate(value, 1)]
    else:
        yield name, value
    for key, one in inner:
        yield from _flat(one, f"{name}.{key}" if name else key)


def _figures(entry: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yield what one row of a document says: scores, cost, and ratios with their intervals."""
    yield from _scores(entry)
    for key, value in entry["cost"].items():
        yield from _by_batch(key, value)
    ratios = entry.get("ratios") or {"throughput": {}, "latency": {}, "interval": {}}
    if "size" in ratios:
        yield "ratio.size", ratios["size"]
    for kind in ("throughput", "latency"):
        yield from _by_batch(f"ratio.{kind}", ratios[kind])
    for batch, (low, high) in ratios["interval"].items():
        yield f"ratio.throughput.batch_{batch}.low", low
        yield f"ratio.throughput.batch_{batch}.high", high


def _by_batch(name: str, value: Any) -> Iterator[tuple[str, float | None]]:
    if isinstance(value, Mapping):
        yield from ((f"{name}.batch_{batch}", one) for batch, one in value.items())
    else:
        yield name, value


def _scores(entry: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    ends = {"value": "", "low": ".low", "high": ".high"}
    for score in (entry["quality"], *entry["also"]):
        yield from ((f"{score['metric']}{end}", score[key]) for key, end in ends.items())


def _name(text: str) -> str:
    """Return a name as MLflow allows it; one with `/` would be taken for a path."""
    return re.sub(r"[^\w\-. :]", "_", text, flags=re.ASCII)[:LONGEST_NAME]


def _commit(source: str) -> str:
    """Return the git commit that the workload's file is in; empty where there is none."""
    place = Path(source.rpartition(":")[0])
    asked = ["git", "-C", str(place.parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _shown(uri: str) -> str:
    """Return a URI without the password in it."""
    password = urlsplit(uri).password
    return uri.replace(f":{password}@", ":***@") if password else uri


def _client(uri: str) -> "MlflowClient":
    # MLflow tells its makers of its use unless this is set before it is imported.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name, value in IMPATIENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(uri or None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what MLflow and its database library say to their own developers from the terminal."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    before = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
