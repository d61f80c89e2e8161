"""Rival: what is to be published beside the version that is live: quality, speed, size and answers.

Both files are judged on the same samples by the same metric and timed in the same rounds, the live one twice. No gate
comes of it: which of the two is to be live is the user's to say, once it is known in what the live one is better.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelathe.commandline import finite
from modelathe.errors import ModelatheError
from modelathe.tensors import Arrays
from optimize.judge import measure, ruler
from optimize.judge.evaluate import Difference, Quality, compare, evaluate
from optimize.judge.ruler import Ratio, Speeds, Until
from optimize.judge.speed import lacking
from optimize.predict.runtimes import open_graph
from optimize.source.workload import Workload
from serve.config.errors import BadRepository
from serve.config.target import Target
from serve.repository import tree as repository
from serve.rollout import likeness

LIVE, NEW = "live", "candidate"


@dataclass(frozen=True)
class Candidate:
    """What is to be published.

    Args:
        workload: whose model it is.
        graph: its ONNX file.
        quality: judged in the target's runtime.
        reference: the trained model's outputs.
        target: what it is made for.
    """

    workload: Workload
    graph: Path
    quality: Quality
    reference: Arrays
    target: Target


@dataclass(frozen=True)
class _Live:
    graph: Path
    target: Target
    digest: str


def find(place: Path, model: str) -> int | None:
    """Return the version of `model` that is live in the repository; None where none is."""
    return max(repository.live(place, model), default=None) if (place / model).is_dir() else None


def against(place: Path, number: int, new: Candidate, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Compare a candidate with a version in the repository `place`.

    Returns:
        `number` and `digest` of that version, `quality` (both values, difference, 95 % interval, verdict), `size`,
        `answers`, `speed` and `control` by batch size, `rounds`; `unmeasured`, why there are no speeds; `unknown`, why
        there is nothing of all this; `told`, the same in sentences; and `better`, in what the live one is better.
    """
    nothing: dict[str, Any] = {"quality": None, "size": None, "answers": None, "speed": {}, "control": {}, "rounds": 0}
    found = {"number": number, "digest": "", **nothing, "unmeasured": "", "unknown": "", "better": []}
    progress(f"comparing with version {number}, which is live", 0.0)
    try:
        return finite({**found, **_compared(_open(place, number, new), new, progress)})  # type: ignore[no-any-return]
    except ModelatheError as error:
        return {**found, "unknown": error.what, "told": [f"it is not compared: {error.what}"]}


def _compared(live: _Live, new: Candidate, progress: Callable[[str, float], None]) -> dict[str, Any]:
    with open_graph(live.graph, live.target) as predictor:
        judged = evaluate(predictor, new.workload, new.reference)
    first, before = new.quality.scores[0], judged.scores[0]
    difference = compare(new.workload, first, before)
    progress("comparing the speed of both", 0.3)
    speeds, unmeasured = _timed(live, new)
    ratios = speeds.ratios(NEW, LIVE)
    found = {
        "digest": live.digest,
        "quality": {
            "metric": first.metric,
            **{"candidate": first.value, "live": before.value, "difference": difference.value},
            **{"low": difference.low, "high": difference.high, "verdict": difference.verdict},
        },
        "size": measure.file_bytes(live.graph) / measure.file_bytes(new.graph),
        "answers": _answers(judged, new.quality),
        "speed": {str(batch): ratio.document() for batch, ratio in ratios.items()},
        "control": {str(batch): ratio.document() for batch, ratio in speeds.control().items()},
        "rounds": speeds.rounds,
        "unmeasured": unmeasured,
    }
    told = _told(found, ratios, speeds.control())
    return {**found, "told": told, "better": _better(found, difference, ratios)}


def _open(place: Path, number: int, new: Candidate) -> _Live:
    """Return what is known of a version, once its files are found to be those that were published.

    Raises:
        BadRepository: they are not, or it is no ONNX file with this workload's inputs.
    """
    model = new.workload.name
    folder = place / model / str(number)
    graph = folder / repository.MODEL_FILE
    if not graph.is_file():
        raise BadRepository(f"version {number} is no ONNX file", where=str(folder))
    if not repository.published(folder):
        return _Live(graph, new.target, "")
    lineage = repository.read_lineage(place, model, number)
    repository.verify_version(place, model, number, lineage)
    wanted = {spec.name for spec in new.workload.inputs}
    try:
        takes, target = {spec["name"] for spec in lineage["inputs"]}, Target(**lineage["target"])
    except (KeyError, TypeError, ValueError):
        raise BadRepository(f"version {number} is of another modelathe", where=str(folder)) from None
    if takes != wanted:
        raise BadRepository(f"version {number} takes {', '.join(sorted(takes))}, not {', '.join(sorted(wanted))}")
    return _Live(graph, target, repository.total(lineage["digests"]))


def _timed(live: _Live, new: Candidate) -> tuple[Speeds, str]:
    """Return the speeds of both, the live one's a second time too, or why there are none that say anything."""
    nothing = Speeds({name: {} for name in (LIVE, NEW, ruler.CONTROL)}, LIVE, 0.0)
    if unmeasured := lacking(new.target) or lacking(live.target):
        return nothing, unmeasured
    arrays = measure.feeds(new.workload.inputs, new.target.batch)
    opened = {LIVE: (live.graph, live.target), NEW: (new.graph, new.target)}

    def visit(name: str) -> Mapping[int, float]:
        with open_graph(*opened[name]) as session:
            return measure.timed(session, arrays)

    speeds = ruler.alternate(visit, list(opened), baseline=LIVE, until=Until(decide=[NEW], patience=0.0))
    if any(ratio.senseless for ratio in speeds.control().values()):
        return nothing, "not measured: the machine is too busy"
    return speeds, ""


def _answers(live: Quality, new: Quality) -> dict[str, Any]:
    rows = likeness.compare([(live.outputs, new.outputs)], batched=True)
    # An output that is a label itself is like another or not at all.
    other = rows.flipped | (rows.likeness <= 0)
    return {"samples": len(other), "labels": int(other.sum()), "max_abs_diff": rows.difference}


def _told(found: dict[str, Any], ratios: Mapping[int, Ratio], control: Mapping[int, Ratio]) -> list[str]:
    quality, answers = found["quality"], found["answers"]
    interval = f"[{quality['low']:+.4f}, {quality['high']:+.4f}]"
    faster = ", ".join(f"{ratio} its throughput at batch {batch}" for batch, ratio in ratios.items())
    itself = ", ".join(map(str, control.values()))
    return [
        f"{quality['metric']} {quality['candidate']:.4f}, live {quality['live']:.4f}: "
        f"{quality['difference']:+.4f} {interval}, {quality['verdict']}",
        f"{faster}; the live one against itself {itself}" if faster else f"speed {found['unmeasured']}",
        f"{found['size']:.2f}× smaller",
        f"of {answers['samples']:,} answers {answers['labels']:,} name another label, "
        f"numbers differ by {answers['max_abs_diff']:.3g} at most",
    ]


def _better(found: dict[str, Any], difference: Difference, ratios: Mapping[int, Ratio]) -> list[str]:
    """Return in what the live version is better, where the whole interval says so."""
    quality = found["quality"]
    lost = f"{quality['live']:.4f}, the candidate's {quality['candidate']:.4f}"
    better = [f"its {quality['metric']} is {lost}"] if difference.verdict == "worse" else []
    slower = [f"{ratio} at batch {batch}" for batch, ratio in ratios.items() if ratio.verdict() == "slower"]
    return better + ([f"it is faster: the candidate has {', '.join(slower)} of its throughput"] if slower else [])
