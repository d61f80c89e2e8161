"""Figures of the pages: rows of marks on one scale, which the style sheet draws; no script is needed for them.

A mark's tone is `good` for what was won or kept, `bad` for what was lost, `open` for what is not decided, and empty
where there is nothing to judge, as of the trained model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.record.statistics import number
from optimize.judge.gate import DEFAULT_KEEP
from optimize.judge.ruler import Ratio
from optimize.report import ratios, table

BUDGETS = 4
"""How many widths of the budget the axis of a score may reach beyond it, so that its width is seen."""


@dataclass(frozen=True)
class Mark:
    """One row of a figure: a point with its interval, or a bar that begins at the left edge.

    Args:
        name: what the row is of.
        text: its figure in words.
        tone: `good`, `bad`, `open`, or empty.
        left, width: of the interval, or of the bar, in per cent of the scale.
        at: of the point, in per cent; None of a bar.
        beyond: `low` or `high` where the point lies beyond that end of the scale.
    """

    name: str
    text: str
    tone: str
    left: float
    width: float
    at: float | None = None
    beyond: str = ""


@dataclass(frozen=True)
class Figure:
    """Rows on one scale.

    Args:
        title: what is drawn.
        caption: what to know about it.
        rows: the marks, from the top.
        line: where a dotted line stands, in per cent; None for none.
        budget: left end and width of what the budget allows, in per cent; empty where there is none.
    """

    title: str
    caption: str
    rows: tuple[Mark, ...]
    line: float | None = None
    budget: tuple[float, float] | tuple[()] = ()


@dataclass(frozen=True)
class Scale:
    """From `low` to `high`, in the unit of what is drawn."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Return the per cent at which a value stands, an end for one that lies beyond it."""
        span = self.high - self.low
        return 100 * min(max((value - self.low) / span, 0.0), 1.0) if span > 0 else 50.0

    def point(self, name: str, values: tuple[float, float, float], tone: str, text: str) -> Mark:
        """Return the mark of a value with the lower and upper end of its interval."""
        value, low, high = values
        beyond = "low" if value < self.low else "high" if value > self.high else ""
        return Mark(name, text, tone, self.at(low), self.at(high) - self.at(low), self.at(value), beyond)


def bars(title: str, caption: str, rows: Sequence[tuple[str, float, str]], unit: str) -> Figure:
    """Return the figure of lengths: a name, a value and a tone each."""
    most = max((value for _, value, _ in rows), default=0.0)
    scale = Scale(0.0, most)
    marks = tuple(
        Mark(name, f"{number(value)} {unit}".rstrip(), tone, 0.0, scale.at(max(value, 0.0)) if most else 0.0)
        for name, value, tone in rows
    )
    return Figure(title, caption, marks)


def score_scale(document: dict[str, Any]) -> Scale:
    """Return the scale that holds the intervals of trained model, result and endpoint, as far as `BUDGETS` allows."""
    trained, worst = document["trained"]["quality"], limit(document)
    ends = [entry["quality"] for entry in (document["trained"], document["result"], document["endpoint"]) if entry]
    low, high = min(entry["low"] for entry in ends), max(entry["high"] for entry in ends)
    inner = sorted((worst, trained["value"]))
    if width := BUDGETS * (inner[1] - inner[0]):
        low, high = max(low, inner[0] - width), min(high, inner[1] + width)
    low, high = min(low, inner[0]), max(high, inner[1])
    margin = (high - low) * 0.05 or 1e-6
    return Scale(low - margin, high + margin)


def score(document: dict[str, Any]) -> Figure:
    """Return the score of each model with its 95 % interval, beside what the budget allows."""
    trained, worst, scale = document["trained"]["quality"], limit(document), score_scale(document)
    rows = []
    for name, entry, tone in _models(document):
        found = entry["quality"]
        three = found["value"], found["low"], found["high"]
        rows.append(scale.point(name, three, tone, f"{found['value']:.4f}"))
    first, last = sorted((scale.at(worst), scale.at(trained["value"])))
    caption = f"{scale.low:.4f} to {scale.high:.4f}, 95 % intervals. Shaded: what the budget allows, to {worst:.4f}."
    return Figure(table.metric(trained), caption, tuple(rows), scale.at(worst), (first, last - first))


def sizes(document: dict[str, Any]) -> Figure:
    """Return the bytes of each model's ONNX file."""
    entries = [(name, entry) for name, entry, _ in _models(document) if name != "endpoint"]
    scale, unit = _unit(max(entry["cost"]["bytes"] for _, entry in entries))
    first = document["trained"]["cost"]["bytes"]
    rows = []
    for name, entry in entries:
        size = entry["cost"]["bytes"]
        rows.append((name, size / scale, "" if name == "trained" else _sign(first - size)))
    return bars("ONNX file", "shorter is better.", rows, unit)


def latencies(document: dict[str, Any]) -> list[Figure]:
    """Return, for each batch size, the milliseconds of one call in ONNX Runtime of each model."""
    found = []
    for batch in document["trained"]["cost"]["latency_ms"]:
        rows = [("trained", document["trained"]["cost"]["latency_ms"][batch], "")]
        for place, step in enumerate(document["steps"], 1):
            tone = speed_tone(step["ratios"]["throughput"][batch], step["ratios"]["interval"][batch])
            rows.append((f"{place} {step['name']}", step["cost"]["latency_ms"].get(batch, 0.0), tone))
        caption = "median; shorter is better. The colour is that of the ratio within rounds."
        found.append(bars(f"Latency of one call at batch {batch}", caption, rows, "ms"))
    return found


def speed_tone(value: float | None, ends: Sequence[float | None]) -> str:
    """Return the tone of a ratio of speeds, larger is better: open where its interval holds 1 or is not known."""
    if value is None or ratios.may_be_one(ends):
        return "open"
    return "bad" if value < 1 else "good"


def sensitivity(layers: Sequence[dict[str, Any]], batches: Sequence[str]) -> list[Figure]:
    """Return the figures of one method: loss with its 95 % interval, kilobytes saved, and speed at each batch size."""
    losses = [(layer["loss"], layer["low"], layer["high"]) for layer in layers]
    tones = ["open" if low <= 0 <= high else _sign(-loss) for loss, low, high in losses]
    found = [_points(f"{layers[0]['metric']}, worse by", "loss", layers, losses, tones)]
    saved = [(layer["name"], layer["bytes_saved"] / 1000, _sign(layer["bytes_saved"])) for layer in layers]
    found.append(bars("Saved", "longer is better.", saved, "kB"))
    for batch in batches:
        speeds = [(layer["speedup"][batch], *_pair(layer["interval"][batch])) for layer in layers]
        sure = [not Ratio(1.0, *layer["control"][batch]).senseless for layer in layers]
        known = [speed_tone(value, ends) if told else "open" for (value, *ends), told in zip(speeds, sure, strict=True)]
        found.append(_points(f"Speed at batch {batch}", "speed", layers, speeds, known))
    return found


def _pair(ends: Sequence[float]) -> tuple[float, float]:
    low, high = ends
    return low, high


def _points(
    title: str,
    kind: str,
    layers: Sequence[dict[str, Any]],
    values: Sequence[tuple[float, float, float]],
    tones: Sequence[str],
) -> Figure:
    """Return the figure of values with intervals: a `loss`, of which 0 is neutral, or a `speed`, of which 1 is."""
    neutral = 0.0 if kind == "loss" else 1.0
    every = [end for three in values for end in three if end == end and abs(end) != float("inf")]
    low, high = min([neutral, *every]), max([neutral, *every])
    margin = (high - low) * 0.04 or 0.01
    scale = Scale(low - margin, high + margin)
    texts = [change(value) if kind == "loss" else f"{value:.2f}×" for value, *_ in values]
    rows = tuple(
        scale.point(layer["name"], three, tone, text)
        for layer, three, tone, text in zip(layers, values, tones, texts, strict=True)
    )
    caption = (
        "95 % intervals; the dotted line is no loss." if kind == "loss" else "95 % intervals; the dotted line is 1×."
    )
    return Figure(title, caption, rows, scale.at(neutral))


def change(value: float) -> str:
    """Return a signed difference with a true minus sign; one that rounds to 0 has none."""
    text = f"{value:+.4f}".replace("-", "−")
    return "0.0000" if text in ("+0.0000", "−0.0000") else text


def _models(document: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """Return each model's name, entry and the tone of its score; names differ, for a recipe may use one method twice.

    A step in the middle is judged by its own interval; the result and the endpoint by their gate, which is paired.
    """
    steps = document["steps"]
    found: list[tuple[str, dict[str, Any], str]] = [("trained", document["trained"], "")]
    for place, step in enumerate(steps, 1):
        tone = _step_tone(document, step) if place < len(steps) else gate_tone(_quality_gates(document)[0])
        found.append((f"{place} {step['name']}", step, tone))
    if document["endpoint"]:
        found.append(("endpoint", document["endpoint"], gate_tone(_quality_gates(document)[-1])))
    return found


def _quality_gates(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [gate for gate in document["gates"] if gate["name"].startswith("quality: ")]


def gate_tone(gate: dict[str, Any]) -> str:
    """Return the tone of a gate: what it could not decide is neither won nor lost."""
    if gate.get("undecided") or gate.get("machine"):
        return "open"
    return "good" if gate["passed"] else "bad"


def _step_tone(document: dict[str, Any], step: dict[str, Any]) -> str:
    worst, quality = limit(document), step["quality"]
    if quality["low"] <= worst <= quality["high"]:
        return "open"
    return "good" if (quality["value"] > worst) == quality["higher_is_better"] else "bad"


def limit(document: dict[str, Any]) -> float:
    """Return the worst score that the budget allows."""
    budget, trained = document["recipe"]["budget"], document["trained"]["quality"]
    if budget.get("max_drop") is not None:
        drop = budget["max_drop"] if trained["higher_is_better"] else -budget["max_drop"]
        return float(trained["value"] - drop)
    return float(trained["value"] * (DEFAULT_KEEP if budget.get("keep") is None else budget["keep"]))


def _sign(gain: float) -> str:
    return "good" if gain > 0 else "bad" if gain < 0 else "open"


def _unit(size: int) -> tuple[int, str]:
    """Return the decimal unit in which `size` bytes are a handy number."""
    return next((unit for unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if size >= 2 * unit[0]), (1, "bytes"))
