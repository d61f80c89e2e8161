"""A model behind a server beside the same file in this process: which of the two answers more samples a second.

Each round starts a server of its own and opens the file here anew, one at a time, and serves twice: the A/A control.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from loadtest.plan.data import payload
from modelathe.tensors import TensorSpec
from optimize.judge import ruler
from optimize.judge.ruler import CONTROL, Speeds
from optimize.predict.onnxruntime import OnnxPredictor

SERVED, ALONE = "served", "alone"
SECONDS = 5.0
"""Length of one load, and of one stretch of calls here."""
LONGEST = 900.0
"""After so many seconds there are no more rounds, if there were nine."""
Turn = dict[str, float]


def in_process(onnx: OnnxPredictor, inputs: Sequence[TensorSpec], batch: int, seconds: float = SECONDS) -> float:
    """Return samples a second of back-to-back calls in this process."""
    feeds = payload.generate(inputs, 1, 0, batch=batch)[0]
    onnx.predict(feeds)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        onnx.predict(feeds)
        count += batch
    return count / (time.perf_counter() - start)


def measure(served: Callable[[], Turn], alone: Callable[[int], Turn]) -> dict[str, Any]:
    """Return what rounds of both showed.

    Args:
        served: starts a server, drives it and ends it; returns `rate` (samples a second), `batch` (samples in a mean
            batch) and whatever else is to be kept.
        alone: opens the file, calls it in batches of so many samples and closes it; returns `rate` and more.

    Returns:
        `ratio` of served to alone and `control`, served to served again, as documents; `batch`, which the server
        formed in a first visit that does not count; and `turns`, what each visit returned, by side.
    """
    batch = round(served()["batch"])
    turns: dict[str, list[Turn]] = {SERVED: [], ALONE: []}

    def visit(side: str) -> dict[int, float]:
        turns[side].append(served() if side == SERVED else alone(batch))
        return {batch: batch / turns[side][-1]["rate"]}

    until = ruler.Until(pairs=[(SERVED, ALONE)], seconds=LONGEST)
    speeds = ruler.alternate(visit, [SERVED, ALONE], baseline=SERVED, until=until)
    return {"batch": batch, "turns": turns, **ratios(speeds, batch)}


def ratios(speeds: Speeds, batch: int) -> dict[str, Any]:
    """Return the documents of the ratio of served to alone and of its A/A control."""
    ratio, control = speeds.ratios(SERVED, ALONE)[batch], speeds.ratios(CONTROL, SERVED)[batch]
    return {"ratio": ratio.document(), "control": control.document(), "rounds": speeds.rounds}


def line(name: str, found: dict[str, Any]) -> str:
    """Return the ratio of one model and its control as a sentence."""
    said = {
        key: f"{found[key]['value']:.3f} [{found[key]['low']:.3f}, {found[key]['high']:.3f}]"
        for key in ("ratio", "control")
    }
    return (
        f"{name}: served over in process {said['ratio']} at mean batch {found['batch']}, served over served again "
        f"{said['control']}, {found['rounds']} rounds"
    )
