"""MLCommons' own LoadGen driving a V2 endpoint over gRPC: what `loadtest mlperf` is compared with.

`python benchmarks/loadgen.py JSON` runs one scenario and prints one JSON document: the lines of LoadGen's summary, the
latency of every sample in nanoseconds and the moment in microseconds that it was scheduled for. A process of its own,
because LoadGen keeps its state in the process.
"""

import json
import re
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg
import numpy as np

from loadtest.mlperf.rules import SEED
from modelathe.client import connect
from modelathe.tensors import TRITON_DTYPES

SCENARIOS = {"single-stream": "SingleStream", "multi-stream": "MultiStream", "server": "Server", "offline": "Offline"}
IN_FLIGHT = 16
SAMPLES = 16


class Endpoint:
    """The system under test: every sample is a request, but for MultiStream's eight, which are one."""

    def __init__(self, url: str, model: str) -> None:
        import tritonclient.grpc as library

        with connect(url) as client:
            self.specs, _ = client.metadata(model)
        self.model, self.library = model, library
        self.client = library.InferenceServerClient(url.partition("://")[2])
        self.room = threading.Semaphore(IN_FLIGHT)
        self.ready = {batch: self._inputs(batch) for batch in (1, 8)}

    def _inputs(self, batch: int) -> list[Any]:
        made = []
        for spec in self.specs:
            array = spec.generate(np.random.default_rng(0), batch)
            tensor = self.library.InferInput(spec.name, list(array.shape), TRITON_DTYPES[spec.dtype])
            made.append(tensor.set_data_from_numpy(array))
        return made

    def send(self, samples: list[Any], *, bounded: bool) -> None:
        """Send samples as one request; `bounded` waits for room first."""
        ids = [sample.id for sample in samples]
        if bounded:
            self.room.acquire()

        def answered(result: Any, error: Any) -> None:
            assert error is None, error
            lg.QuerySamplesComplete([lg.QuerySampleResponse(number, 0, 0) for number in ids])
            if bounded:
                self.room.release()

        self.client.async_infer(self.model, self.ready[len(ids)], answered)


def settings(asked: dict[str, Any]) -> Any:
    """Return LoadGen's settings for what was asked."""
    found = lg.TestSettings()
    found.scenario = getattr(lg.TestScenario, SCENARIOS[asked["scenario"]])
    found.mode = lg.TestMode.PerformanceOnly
    found.min_duration_ms = int(asked["duration"] * 1e3)
    found.min_query_count = asked["queries"]
    found.single_stream_expected_latency_ns = found.multi_stream_expected_latency_ns = int(asked["expected"] * 1e9)
    found.server_target_qps = found.offline_expected_qps = asked["target_qps"] or 1.0
    found.server_target_latency_ns = int(asked["target_latency"] * 1e9)
    found.schedule_rng_seed = SEED
    return found


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """Run one scenario.

    Args:
        asked: `scenario`, `url`, `model`, `duration`, `queries`, `target_qps` (0 where there is none), `target_latency`
            and `expected`, the seconds that a query is expected to take.
    """
    endpoint = Endpoint(asked["url"], asked["model"])

    def issue(samples: list[Any]) -> None:
        if asked["scenario"] == "offline":
            for sample in samples:
                endpoint.send([sample], bounded=True)
        else:
            endpoint.send(samples, bounded=False)

    with tempfile.TemporaryDirectory() as folder:
        output, log = lg.LogOutputSettings(), lg.LogSettings()
        output.outdir, log.log_output, log.enable_trace = folder, output, True
        sut = lg.ConstructSUT(issue, lambda: None)
        qsl = lg.ConstructQSL(SAMPLES, SAMPLES, lambda samples: None, lambda samples: None)
        lg.StartTestWithLogSettings(sut, qsl, settings(asked), log, "")
        lg.DestroyQSL(qsl)
        lg.DestroySUT(sut)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text()
        trace = (Path(folder) / "mlperf_log_trace.json").read_text()
    found = re.findall(r'"name":\s*"Sample".*?"ts":\s*([\d.]+).*?"complete_ns":\s*(\d+)', trace)
    return {
        "summary": summary.splitlines(),
        "latencies_ns": [int(latency) for _, latency in found],
        "scheduled_us": [float(at) for at, _ in found],
    }


if __name__ == "__main__":
    json.dump(run(json.loads(sys.argv[1])), sys.stdout)
