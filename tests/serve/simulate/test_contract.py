"""The real server and the simulated one do the same with the same requests.

The model sleeps for a known time, so that what is compared is the scheduler. What server and client add is fitted on
one configuration (`fitted`), which is not compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from loadtest.load import drive
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.results import read
from modelathe.tensors import BATCH, TensorSpec
from serve.config import model_config
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from serve.simulate.arrivals import Arrivals, Clients, scheduled
from serve.simulate.configuration import stated
from serve.simulate.fitting import Run, fitted
from serve.simulate.result import Simulated
from serve.simulate.service import Curve
from serve.simulate.simulation import simulate

START, SLOPE = 0.010, 0.0002
MODEL = f"""
import time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        time.sleep({START} + {SLOPE} * len(requests))
        y = np.zeros((1, 1), np.float32)
        return [pb.InferenceResponse([pb.Tensor("y", y)]) for _ in requests]
"""
CURVE = Curve({size: np.array([START + SLOPE * size]) for size in (1, 64)})
X = TensorSpec("x", "float32", (BATCH, 1))
QUEUE = "max_queue_delay_microseconds: %d"
SEED = 5


@dataclass(frozen=True)
class Case:
    """A configuration and its load: requests a second, or clients that wait for their answers."""

    batching: str | None
    rate: float = 0.0
    clients: int = 0
    instances: int = 1
    dims: int = 1

    def text(self, name: str) -> str:
        kinds = {"input": "x", "output": "y"}
        tensors = " ".join(
            f'{kind} {{ name: "{tensor}" data_type: TYPE_FP32 dims: {self.dims} }}' for kind, tensor in kinds.items()
        )
        batching = f"dynamic_batching {{ {self.batching} }}" if self.batching is not None else ""
        group = f"instance_group {{ count: {self.instances} kind: KIND_CPU }}"
        return f'name: "{name}" backend: "python" max_batch_size: 64 {tensors} {group} {batching}'

    def load(self, seconds: float, sent: int) -> Arrivals | Clients:
        if self.clients:
            return Clients(self.clients, sent)
        return scheduled(self.rate, seconds, SEED, "poisson")


FITTED = "one instance"
CASES = {
    FITTED: Case("", 300),
    "delay, fixed dims": Case(QUEUE % 2000, 300),
    "delay, free dims": Case(QUEUE % 2000, 300, dims=-1),
    "long delay": Case(QUEUE % 15000, 300),
    "two instances": Case("", 500, instances=2),
    "preferred": Case(f"preferred_batch_size: 4 {QUEUE % 5000}", 500),
    "default scheduler": Case(None, 40),
    "queue size": Case("default_queue_policy { max_queue_size: 500 }", 500),
    "closed loop": Case("", clients=32),
}
MORE = {
    "two instances, delay": Case(QUEUE % 2000, 500, instances=2),
    "three instances": Case("", 700, instances=3),
    "low rate": Case("", 40),
    "low rate, queue size": Case("default_queue_policy { max_queue_size: 500 }", 40),
    "two instances, default scheduler": Case(None, 120, instances=2),
    "closed loop, two instances": Case("", clients=16, instances=2),
    "preferred without delay": Case("preferred_batch_size: [2, 4]", 200),
    "priorities": Case("priority_levels: 2 default_priority_level: 2", 300),
    "timeout": Case("default_queue_policy { default_timeout_microseconds: 200000 }", 300),
}
EVERY = CASES | MORE


@dataclass(frozen=True)
class Measured:
    """What a live run saw: seconds of each request, and calls by their samples."""

    latencies: np.ndarray
    histogram: dict[int, int]

    @property
    def p50(self) -> float:
        return float(np.quantile(self.latencies, 0.5))

    @property
    def mean_batch(self) -> float:
        return sum(size * count for size, count in self.histogram.items()) / sum(self.histogram.values())


@pytest.fixture(scope="module")
def sleeping(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> Iterator[Endpoint]:
    place = tmp_path_factory.mktemp("sleeping")
    for name, case in EVERY.items():
        home = place / name.replace(" ", "_").replace(",", "")
        (home / "1").mkdir(parents=True)
        (home / "1" / "model.py").write_text(MODEL)
        (home / "config.pbtxt").write_text(case.text(home.name))
    with running(place, grace=0) as endpoint:
        yield endpoint


def measure(endpoint: Endpoint, name: str, seconds: float, path: Path) -> Measured:
    case = EVERY[name]
    load = {"concurrency": case.clients} if case.clients else {"rate": case.rate, "arrival": "poisson"}
    plan = Plan(endpoint.grpc, duration=seconds, seed=SEED, warmup=0.5, **load)
    model = name.replace(" ", "_").replace(",", "")
    drive.run(plan, [Part(model, payload.generate([X], 8, 0))], path)
    results = read(path)
    since = results.sent if case.clients else results.planned
    histogram = {int(size): count for size, count in (results.end or {})["server"]["batches"].items()}
    return Measured((results.done - since)[~np.isnan(results.done)], histogram)


def compared(name: str, measured: Measured, curve: Curve, seconds: float) -> tuple[Simulated, float]:
    """Return the simulated run, and by how many samples the batches of the two runs differ on average."""
    case = EVERY[name]
    configuration = stated(model_config.parse(case.text(name)))
    made = simulate(case.load(seconds, len(measured.latencies)), curve, configuration)
    sizes, others = made.histogram, measured.histogram
    apart = wasserstein_distance(list(sizes), list(others), list(sizes.values()), list(others.values()))
    figures = [("batch", made.mean_batch, measured.mean_batch)]
    for share in (0.5, 0.9, 0.99):
        live = float(np.quantile(measured.latencies, share))
        figures.append((f"p{share * 100:.0f}", made.quantile(share) * 1e3, live * 1e3))
    print(f"{name:34}", *(f"{key} {one:5.2f} {other:5.2f} " for key, one, other in figures), f"apart {apart:.2f}")
    return made, apart


def overheads(endpoint: Endpoint, seconds: float, path: Path) -> Curve:
    measured = measure(endpoint, FITTED, seconds, path)
    case = CASES[FITTED]
    load = case.load(seconds, len(measured.latencies))
    configuration = stated(model_config.parse(case.text(FITTED)))
    run = Run(load, configuration, sum(measured.histogram.values()), measured.latencies)
    curve = fitted(CURVE, [run])
    print(f"\ninside {curve.inside * 1e3:.2f} ms, outside {curve.outside * 1e3:.2f} ms; simulated, then measured")
    return curve


def check(endpoint: Endpoint, name: str, seconds: float, path: Path) -> None:
    curve = overheads(endpoint, seconds, path)
    measured = measure(endpoint, name, seconds, path)
    made, apart = compared(name, measured, curve, seconds)
    assert made.quantile(0.5) == pytest.approx(measured.p50, rel=0.2)
    assert apart < 0.15 * measured.mean_batch


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize("name", [name for name in CASES if name != FITTED])
def test_batches_and_median_are_those_of_the_real_server(name: str, sleeping: Endpoint, tmp_path: Path) -> None:
    check(sleeping, name, 2.0, tmp_path / "run.jsonl")


@pytest.mark.exhaustive
@pytest.mark.timed
@pytest.mark.parametrize("name", [name for name in EVERY if name != FITTED])
def test_so_they_are_in_longer_runs(name: str, sleeping: Endpoint, tmp_path: Path) -> None:
    check(sleeping, name, 12.0, tmp_path / "run.jsonl")


@pytest.mark.exhaustive
@pytest.mark.timed
def test_with_a_queue_policy_some_wait_for_the_next_request(sleeping: Endpoint, tmp_path: Path) -> None:
    def late(name: str) -> tuple[float, float]:
        """Return which share waits longer than two calls and a half, live and simulated."""
        longest, case, seconds = 2.5 * START + 0.01, EVERY[name], 10.0
        measured = measure(sleeping, name, seconds, tmp_path / "run.jsonl")
        made = simulate(case.load(seconds, 0), CURVE, stated(model_config.parse(case.text(name))))
        shares = float((measured.latencies > longest).mean()), float((made.latencies > longest).mean())
        print(f"\n{name:34} waiting long: live {shares[0]:.3f}, simulated {shares[1]:.3f}")
        return shares

    (live, made), (live_queued, made_queued) = late("low rate"), late("low rate, queue size")
    assert live_queued > live + 0.01
    assert made_queued > made + 0.01
