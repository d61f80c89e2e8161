"""The real server and the simulated one do the same with the same requests.

The model sleeps for a known time, long beside what a busy machine adds, so that what is compared is the scheduler. All
configurations are asked at the same time. What server and client add is fitted on `FITTED`, which is not compared.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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

START, SLOPE = 0.040, 0.0008
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
SEED, SECONDS = 5, 8.0


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
    FITTED: Case("", 75),
    "delay, fixed dims": Case(QUEUE % 8000, 75),
    "delay, free dims": Case(QUEUE % 8000, 75, dims=-1),
    "long delay": Case(QUEUE % 60000, 75),
    "two instances": Case("", 125, instances=2),
    "preferred": Case(f"preferred_batch_size: 4 {QUEUE % 20000}", 125),
    "default scheduler": Case(None, 10),
    "queue size": Case("default_queue_policy { max_queue_size: 500 }", 125),
    "closed loop": Case("", clients=8),
}
MORE = {
    "two instances, delay": Case(QUEUE % 8000, 125, instances=2),
    "three instances": Case("", 175, instances=3),
    "low rate": Case("", 10),
    "low rate, queue size": Case("default_queue_policy { max_queue_size: 500 }", 10),
    "two instances, default scheduler": Case(None, 30, instances=2),
    "closed loop, two instances": Case("", clients=16, instances=2),
    "preferred without delay": Case("preferred_batch_size: [2, 4]", 50),
    "priorities": Case("priority_levels: 2 default_priority_level: 2", 75),
    "timeout": Case("default_queue_policy { default_timeout_microseconds: 800000 }", 75),
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


def overheads(measured: Measured, seconds: float) -> Curve:
    case = CASES[FITTED]
    load = case.load(seconds, len(measured.latencies))
    configuration = stated(model_config.parse(case.text(FITTED)))
    run = Run(load, configuration, sum(measured.histogram.values()), measured.latencies)
    curve = fitted(CURVE, [run])
    print(f"\ninside {curve.inside * 1e3:.2f} ms, outside {curve.outside * 1e3:.2f} ms; simulated, then measured")
    return curve


def at_once(endpoint: Endpoint, names: Iterable[str], seconds: float, place: Path) -> dict[str, Measured]:
    """Return what was seen of each configuration, all asked at the same time."""
    with ThreadPoolExecutor(len(EVERY)) as pool:
        runs = {
            name: pool.submit(measure, endpoint, name, seconds, place / f"{number}.jsonl")
            for number, name in enumerate(names)
        }
        return {name: run.result() for name, run in runs.items()}


@pytest.fixture(scope="module")
def seen(sleeping: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    return at_once(sleeping, CASES, SECONDS, tmp_path_factory.mktemp("seen"))


def check(name: str, seen: Mapping[str, Measured], seconds: float) -> None:
    made, apart = compared(name, seen[name], overheads(seen[FITTED], seconds), seconds)
    assert made.quantile(0.5) == pytest.approx(seen[name].p50, rel=0.2)
    if EVERY[name].clients:
        # Clients that wait for their answers fall into groups that take turns, as large as chance made them.
        assert made.mean_batch == pytest.approx(seen[name].mean_batch, rel=0.15)
    else:
        assert apart < 0.15 * seen[name].mean_batch


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize("name", [name for name in CASES if name != FITTED])
def test_batches_and_median_are_those_of_the_real_server(name: str, seen: Mapping[str, Measured]) -> None:
    check(name, seen, SECONDS)


@pytest.mark.exhaustive
def test_so_they_are_in_longer_runs(sleeping: Endpoint, tmp_path: Path) -> None:
    seen = at_once(sleeping, EVERY, 6 * SECONDS, tmp_path)
    for name in (name for name in EVERY if name != FITTED):
        check(name, seen, 6 * SECONDS)


@pytest.mark.exhaustive
def test_with_a_queue_policy_some_wait_for_the_next_request(sleeping: Endpoint, tmp_path: Path) -> None:
    names, longest, seconds = ("low rate", "low rate, queue size"), 2.5 * START + 0.01, 40.0
    seen = at_once(sleeping, names, seconds, tmp_path)

    def late(name: str) -> tuple[float, float]:
        """Return which share waits longer than two calls and a half, live and simulated."""
        made = simulate(EVERY[name].load(seconds, 0), CURVE, stated(model_config.parse(EVERY[name].text(name))))
        shares = float((seen[name].latencies > longest).mean()), float((made.latencies > longest).mean())
        print(f"\n{name:34} waiting long: live {shares[0]:.3f}, simulated {shares[1]:.3f}")
        return shares

    (live, made), (live_queued, made_queued) = map(late, names)
    assert live_queued > live + 0.01
    assert made_queued > made + 0.01
