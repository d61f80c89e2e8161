"""Results: what the Python calls of this room return, read from the same documents that `--json` prints."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from modelathe.errors import ModelatheError
from modelathe.notebook import Judged, Result, View, frame
from optimize.judge.gate import Gate
from optimize.source.workload import Workload


@dataclass(frozen=True)
class Figure:
    """A score over the evaluation set.

    Args:
        metric: its name in the workload.
        value: the figure.
        low, high: its 95 % interval.
        samples: how many samples were judged.
        higher_is_better: whether more of it is better.
    """

    metric: str
    value: float
    low: float
    high: float
    samples: int
    higher_is_better: bool = True

    @staticmethod
    def of(document: Mapping[str, Any]) -> "Figure":
        """Return the score that a document of ours holds."""
        return Figure(**{entry.name: document[entry.name] for entry in fields(Figure) if entry.name in document})

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Ratios:
    """The result against the trained model's FP32 ONNX file: larger is better, throughput and latency by batch size.

    What could not be measured here is left out.
    """

    size: float
    throughput: Mapping[int, float]
    latency: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class RunResult(Judged):
    """What `optimize.run` made and proved; `passed` says whether every gate said yes.

    Args:
        gates: every judgement, in the order in which they were made.
        trained: the gated metric of the trained model.
        quality: that of the result, at the endpoint where it was served, else of its ONNX file.
        ratios: size and speed against the trained model.
        bundle: the folder of the result.
        version: its number in the repository; None where nothing was published.
        report: the proof page.
        workload: what was run.
    """

    gates: tuple[Gate, ...]
    trained: Figure
    quality: Figure
    ratios: Ratios
    bundle: Path
    version: int | None
    report: Path
    workload: Workload = field(repr=False)

    @staticmethod
    def of(document: dict[str, Any], workload: Workload, failure: ModelatheError | None) -> "RunResult":
        """Return the result that a document of `optimize run` describes."""
        ratios, version = document["ratios"], document["version"]
        by_batch = {
            kind: {int(batch): value for batch, value in ratios[kind].items()} for kind in ("throughput", "latency")
        }
        return RunResult(
            document=document,
            failure=failure,
            gates=tuple(Gate(**entry) for entry in document["gates"]),
            trained=Figure.of(document["trained"]["quality"]),
            quality=Figure.of((document["endpoint"] or document["result"])["quality"]),
            ratios=Ratios(ratios["size"], **by_batch),
            bundle=Path(document["bundle"]),
            version=version and version["number"],
            report=Path(document["report"]),
            workload=workload,
        )

    def view(self) -> View:
        """Return the figures at the head of the proof page."""
        from optimize.report import page

        return page.head(self.document)

    def to_pandas(self, what: Literal["steps", "gates"] = "steps") -> Any:
        """Return a pandas.DataFrame: the trained model and each step with scores, cost and ratios, or the gates.

        Raises:
            MachineError: pandas is not installed.
        """
        if what == "gates":
            return frame(self.document["gates"])
        models = [{"name": "trained model", **self.document["trained"]}, *self.document["steps"]]
        return frame([_model(entry) for entry in models])


@dataclass(frozen=True, kw_only=True)
class Evaluation(Result):
    """What `optimize.evaluate` found.

    Args:
        predictor: what answered: torch, onnx, openvino or endpoint.
        quality: the gated metric.
        also: the workload's other scores.
    """

    predictor: str
    quality: Figure
    also: tuple[Figure, ...]

    def view(self) -> View:
        """Return every score with its interval."""
        scores = {score.metric: str(score) for score in (self.quality, *self.also)}
        return View(f"{self.predictor}, {self.quality.samples:,} samples", scores)

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame with a row for each score.

        Raises:
            MachineError: pandas is not installed.
        """
        return frame([self.document["quality"], *self.document["also"]])


@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """What `optimize.compare` found: the second model minus the first, sample by sample.

    Args:
        first, second: the gated metric of both.
        difference: of the two.
        low, high: its paired 95 % interval.
        verdict: of the second: `worse` or `better` where the whole interval says so, else `undecided`.
        flipped: the evaluation samples, from 0, whose score differs.
    """

    first: Figure
    second: Figure
    difference: float
    low: float
    high: float
    verdict: str
    flipped: tuple[int, ...] = field(repr=False)

    def view(self) -> View:
        """Return both scores and their difference."""
        difference = f"{self.difference:+.4f}, paired 95 % interval [{self.low:+.4f}, {self.high:+.4f}]"
        figures = {"first": str(self.first), "second": str(self.second), "difference": difference}
        return View(
            f"{self.first.metric}: {self.verdict}", {**figures, "samples that differ": f"{len(self.flipped):,}"}
        )


def _model(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return one model of a run as a row; times and ratios have a column for each batch size."""
    scores = [entry["quality"], *entry["also"]]
    row: dict[str, Any] = {"model": entry["name"]}
    row |= {score["metric"]: score["value"] for score in scores}
    row |= {f"{scores[0]['metric']} {end}": scores[0][end] for end in ("low", "high")}
    cost, ratios = entry["cost"], entry.get("ratios", {})
    row |= {key: cost[key] for key in ("bytes", "parameters", "macs")}
    row |= {f"{key} at {batch}": value for key in ("latency_ms", "throughput") for batch, value in cost[key].items()}
    row["times smaller"] = ratios.get("size")
    return row | {f"times faster at {batch}": value for batch, value in ratios.get("throughput", {}).items()}
