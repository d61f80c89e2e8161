"""Measure: what a model costs. Bytes and multiplications are counted, speed is measured beside the baseline's."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelathe.tensors import Arrays, TensorSpec, generated
from optimize.judge import ruler
from optimize.judge.ruler import Speeds, Until
from serve.config.target import Target

if TYPE_CHECKING:
    from torch import nn

    from optimize.predict.runtimes import GraphPredictor

BLOCK, FEWEST_CALLS = 0.05, 3
"""Seconds of calls at one batch size, and how many calls at least: a fresh session's first one plans its memory."""
REST = 0.02
"""Seconds of sleep before a session's first call: threads of the one that was open before spin for a while."""


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Args:
        bytes: of the ONNX file, with the weights beside it.
        parameters: of the torch module; quantization leaves their number as it is.
        macs: multiply-accumulate operations for one sample of typical size; None where they cannot be counted.
        latency_ms: milliseconds for one call, by batch size.
        throughput: samples a second, by batch size.
    """

    bytes: int
    parameters: int
    macs: int | None
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


def parameters(module: "nn.Module") -> int:
    """Return the number of the module's parameters; one shared by two layers counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


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
    until: Until = Until(),
) -> Speeds:
    """Time ONNX files against each other in the target's runtime, as `optimize.judge.ruler` says.

    In every round each file is opened alone, called for about the same short time at each batch size, and closed.

    Args:
        files: paths by name.
        inputs: what is fed: random values in range, at the typical sizes.
        target: gives the runtime, the device, the cores and the batch sizes.
        baseline: the name of the file that runs in ONNX Runtime whatever the target says: the trained model, which a
            ratio in another runtime is against too. Without one, the first file is the baseline, in the target's.
        until: when the rounds have said enough.

    Raises:
        BadGraph: the runtime cannot load or run one of the files.
    """
    from optimize.predict.runtimes import open_graph

    plain = replace(target, runtime="onnxruntime")
    arrays = feeds(inputs, target.batch)

    def visit(name: str) -> dict[int, float]:
        with open_graph(files[name], plain if name == baseline else target) as session:
            return timed(session, arrays)

    return ruler.alternate(visit, list(files), baseline=baseline or next(iter(files)), until=until)


def feeds(inputs: Sequence[TensorSpec], batches: Sequence[int]) -> dict[int, Arrays]:
    """Return random values in range, at the typical sizes, for each batch size."""
    rng = np.random.default_rng(0)
    return {batch: generated(inputs, batch, rng) for batch in batches}


def timed(session: "GraphPredictor", arrays: Mapping[int, Arrays]) -> dict[int, float]:
    """Return the seconds of a call of a fresh session at each batch size, after a rest.

    It is the fastest of the calls in a row, the one that other processes disturbed least (as the documentation of
    Python's `timeit` advises). With another program on one of two cores, the median of a block is that program's share.
    """
    time.sleep(REST)
    return {batch: _fastest(session, fed) for batch, fed in arrays.items()}


def _fastest(session: "GraphPredictor", fed: Arrays) -> float:
    taken, end = list[float](), time.perf_counter() + BLOCK
    while len(taken) < FEWEST_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        session.predict(fed)
        taken.append(time.perf_counter() - start)
    return min(taken)
