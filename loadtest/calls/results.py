"""Results: what the Python calls of this room return, read from the same documents that `--json` prints."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.judge import thresholds
from loadtest.probing import report as probing
from loadtest.record.statistics import number
from loadtest.report import terminal
from loadtest.scenario import play
from modelathe.errors import ModelatheError
from modelathe.notebook import Judged, View, frame


@dataclass(frozen=True, kw_only=True)
class LoadResult(Judged):
    """What a load showed; `passed` says whether the run is valid and every threshold held.

    Args:
        valid: whether the run proves anything; `document["why"]` says why not.
        requests: how many were planned, sent, done, failed, dropped and mismatched.
        rate: requests per second, `offered` and `achieved`.
        latency_ms: percentiles from the planned send time, in milliseconds: p50, p90, p95, p99, p999, mean and max.
        results: the file that holds every request.
    """

    valid: bool
    requests: Mapping[str, int]
    rate: Mapping[str, float]
    latency_ms: Mapping[str, float]
    results: Path

    @staticmethod
    def of(document: dict[str, Any], failure: ModelatheError | None) -> "LoadResult":
        """Return the result that a document of `loadtest run` describes."""
        taken = {key: document[key] for key in ("valid", "requests", "rate", "latency_ms")}
        return LoadResult(document=document, failure=failure, results=Path(document["results"]), **taken)

    def view(self) -> View:
        """Return the figures at the head of the run's page, and every threshold."""
        latency = {f"ms latency, {name}": number(self.latency_ms[key]) for name, key in _PERCENTILES.items()}
        counts = {f"requests {key}": f"{self.requests[key]:,}" for key in ("failed", "dropped")}
        why = f"{self.document['why']}; {self.document['fix']}" if self.document["why"] else ""
        judged = [thresholds.line(one) for one in self.document["thresholds"]]
        text = [terminal.plan_line(self.document), why, *self.document["notes"], *judged]
        figures = {"requests per second": number(self.rate["achieved"]), **latency, **counts}
        return View(terminal.headline(self.document), figures, text)

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame of milliseconds: a row for latency, service, and of a closed loop the corrected.

        Raises:
            MachineError: pandas is not installed.
        """
        return frame([{"ms": name, **found} for name, found in terminal.latencies(self.document)])


@dataclass(frozen=True, kw_only=True)
class ScenarioResult(Judged):
    """What the phases of a scenario showed; `passed` says whether all are valid and what they had to show was shown.

    Args:
        valid: whether the phases prove anything.
        results: the folder that holds every request.
    """

    valid: bool
    results: Path

    def view(self) -> View:
        """Return the verdict and its findings, with a figure for each phase."""
        phases = {
            phase[
                "name"
            ]: f"{number(phase['rate']['achieved'])} requests/s, p99 {number(phase['latency_ms']['p99'])} ms"
            for phase in self.document["phases"]
        }
        findings = [finding["text"] for finding in self.document["verdict"]["findings"]]
        return View(play.headline(self.document), phases, [self.document["why"], *findings])

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame with a row for each phase.

        Raises:
            MachineError: pandas is not installed.
        """
        return frame(
            [
                {"phase": phase["name"], "valid": phase["valid"], **phase["rate"], **phase["latency_ms"]}
                for phase in self.document["phases"]
            ]
        )


@dataclass(frozen=True, kw_only=True)
class Capacity(Judged):
    """The highest rate that holds an objective; `passed` says whether one was found.

    Args:
        slo: the objective.
        rate: requests per second; NaN where none was found to hold it.
        low, high: its 95 % interval; `high` is infinity where no rate that was tried failed.
        binding: what fails first; None where nothing did.
        results: the folder that holds every probe.
    """

    slo: str
    rate: float
    low: float
    high: float
    binding: str | None
    results: Path

    @staticmethod
    def of(document: dict[str, Any], failure: ModelatheError | None) -> "Capacity":
        """Return the result that a document of `loadtest capacity` describes."""
        taken = {key: document[key] for key in ("slo", "rate", "low", "high", "binding")}
        return Capacity(document=document, failure=failure, results=Path(document["results"]), **taken)

    def view(self) -> View:
        """Return the capacity, and what ended the search."""
        spent = f"{self.document['seconds']:.0f} s, {len(self.document['probes'])} probes"
        figures = {"requests per second": number(self.rate)}
        figures |= {"95 % interval": f"{number(self.low)} to {number(self.high)}", "search": spent}
        return View(probing.headline(self.document), figures, [self.document["stopped"], *self.document["notes"]])

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame with a row for each probe.

        Raises:
            MachineError: pandas is not installed.
        """
        keys = ("rate", "verdict", "why", "requests")
        return frame(
            [{**{key: probe[key] for key in keys}, **probe["latency_ms"]} for probe in self.document["probes"]]
        )


_PERCENTILES = {"median": "p50", "p99": "p99", "largest": "max"}
