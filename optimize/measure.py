"""Measure: what a model costs. Bytes and multiplications are counted, speed is measured beside the baseline's."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtest.tensors import Arrays, TensorSpec
from serve.target import Target

if TYPE_CHECKING:
    from torch import nn

    from optimize.predict import GraphPredictor

BLOCK = 0.03
"""Seconds that one timed block aims at."""
REST = 0.02
"""Seconds of sleep before a block: the threads of the session before spin for a while after their last call."""
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Args:
        bytes: of the ONNX file, with the weights beside it.
        parameters: of the torch module; quantization leaves their number as it is.
        macs: multiply-accumulate operations for one sample of typical size.
        latency_ms: milliseconds for one call, by batch size.
        throughput: samples a second, by batch size.
    """

    bytes: int
    parameters: int
    macs: int
    latency_ms: Mapping[int, float]
    throughput: Mapping[int, float]

    def document(self) -> dict[str, Any]:
        """Return the JSON form; batch sizes are string keys."""
        return {
            "bytes": self.bytes,
            "parameters": self.parameters,
            "macs": self.macs,
            "latency_ms": {str(batch): value for batch, value in self.latency_ms.items()},
            "throughput": {str(batch): value for batch, value in self.throughput.items()},
        }


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline, with its 95 % interval; larger is better."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Speeds:
    """What alternating runs gave.

    Args:
        seconds: for one call, by file and batch size: one median for each round, files of one round side by side.
    """

    seconds: Mapping[str, Mapping[int, Sequence[float]]]

    def latency_ms(self, name: str) -> dict[int, float]:
        """Return the median milliseconds for one call, by batch size."""
        return {batch: float(np.median(rounds)) * 1000 for batch, rounds in self.seconds[name].items()}

    def throughput(self, name: str) -> dict[int, float]:
        """Return samples a second, by batch size."""
        return {batch: batch / float(np.median(rounds)) for batch, rounds in self.seconds[name].items()}

    def ratios(self, name: str, baseline: str, seed: int = 0) -> dict[int, Ratio]:
        """Return how many times faster than `baseline` the file `name` is, by batch size.

        The ratio is taken within each round, where both ran under the same conditions; the value is the median over
        rounds, the interval a percentile bootstrap of that median.
        """
        rng = np.random.default_rng(seed)
        found = {}
        for batch, rounds in self.seconds[name].items():
            ratios = np.asarray(self.seconds[baseline][batch]) / np.asarray(rounds)
            draws = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
            low, high = np.quantile(draws, (0.025, 0.975))
            found[batch] = Ratio(float(np.median(ratios)), float(low), float(high))
        return found


def parameters(module: "nn.Module") -> int:
    """Return the number of the module's parameters; one shared by two layers counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def macs(module: "nn.Module", inputs: Sequence[TensorSpec]) -> int:
    """Return the multiply-accumulate operations of matrix products and convolutions for one sample of typical size."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from optimize.attention import without_fast_path

    rng = np.random.default_rng(0)
    arrays = {spec.name: torch.from_numpy(spec.generate(rng, batch=1)) for spec in inputs}
    # An LSTM is one operator on the CPU, which the counter does not know; the other recurrent layers are unrolled.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _recurrent_operations})
    with torch.inference_mode(), without_fast_path(), counter:
        module.eval()(**arrays)
    return int(counter.get_total_flops()) // 2


def _recurrent_operations(
    inputs: Sequence[int], from_input: Sequence[int], from_hidden: Sequence[int], *_rest: object, **_named: object
) -> int:
    """Count one layer in one direction from the shapes of its input (time, batch, width) and of its two weights."""
    return 2 * inputs[0] * inputs[1] * (math.prod(from_input) + math.prod(from_hidden))


def file_bytes(path: Path) -> int:
    """Return the bytes of an ONNX file and of the weights beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def speed(
    files: Mapping[str, Path],
    inputs: Sequence[TensorSpec],
    target: Target,
    *,
    baseline: str = "",
    rounds: int = 25,
    seconds: float = 15.0,
) -> Speeds:
    """Time ONNX files against each other, alternating in this process, in the target's runtime.

    In every round each file is called for about the same short time at each batch size, and the order is reversed
    from round to round, so that a slow phase of the machine meets all of them.

    Args:
        files: paths by name.
        inputs: what is fed: random values in range, at the typical sizes.
        target: gives the runtime, the device, the cores and the batch sizes.
        baseline: the name of the file that runs in ONNX Runtime whatever the target says: the trained model, which a
            ratio in another runtime is against too.
        rounds: how often to alternate, at most.
        seconds: after how long to stop, once a few rounds are done.

    Raises:
        BadGraph: the runtime cannot load or run one of the files.
    """
    from optimize.predict import open_graph

    plain = replace(target, runtime="onnxruntime")
    sessions = {
        name: open_graph(path, plain if name == baseline else target, target.device) for name, path in files.items()
    }
    return alternate(sessions, inputs, target.batch, rounds=rounds, seconds=seconds)


def alternate(
    sessions: "Mapping[str, GraphPredictor]",
    inputs: Sequence[TensorSpec],
    batches: Sequence[int],
    *,
    rounds: int,
    seconds: float,
) -> Speeds:
    """Time open files against each other, as `speed` says; they may run in different runtimes.

    Args:
        sessions: what is called, by name.
        inputs: what is fed: random values in range, at the typical sizes.
        batches: the batch sizes.
        rounds: how often to alternate, at most.
        seconds: after how long to stop, once a few rounds are done.
    """
    rng = np.random.default_rng(0)
    arrays = {batch: {spec.name: spec.generate(rng, batch) for spec in inputs} for batch in batches}
    blocks = list(itertools.product(batches, sessions))
    calls = {block: _calls(sessions[block[1]], arrays[block[0]]) for block in blocks}
    taken: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in batches} for name in sessions}
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for batch, name in blocks if number % 2 == 0 else reversed(blocks):
            taken[name][batch].append(_time(sessions[name], arrays[batch], calls[batch, name]))
    return Speeds(taken)


def _calls(session: "GraphPredictor", arrays: Arrays) -> int:
    """Return how many calls fill a block, after warming the session up."""
    for _ in range(2):
        session.predict(arrays)
    once = _time(session, arrays, 1)
    return max(1, min(200, round(BLOCK / once)))


def _time(session: "GraphPredictor", arrays: Arrays, calls: int) -> float:
    """Return the median seconds of `calls` calls in a row, after a rest and a warm call."""
    time.sleep(REST)
    session.predict(arrays)
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        session.predict(arrays)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))
