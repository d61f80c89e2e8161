"""What `max_queue_size` does to the dynamic batcher of the carried Triton: `python benchmarks/queue_limit.py`.

Serves the committed model twice, with our config and with a queue limit added, and prints the latency of both.
"""

import shutil
import tempfile
from pathlib import Path

from loadtest.judge import summary
from loadtest.load import drive
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from modelathe.tensors import TensorSpec
from serve.config import model_config
from serve.repository import tree as repository
from serve.server import tritonserver as server

REPOSITORY, MODEL, SECONDS = Path("model_repository"), "digits_cnn", 5.0


def main() -> None:
    """Print both latencies."""
    specs = [TensorSpec.from_document(spec) for spec in repository.read_lineage(REPOSITORY, MODEL)["inputs"]]
    with tempfile.TemporaryDirectory() as scratch:
        for name, limit in (("no limit", 0), ("max_queue_size: 128", 128)):
            place = Path(scratch) / str(limit)
            shutil.copytree(REPOSITORY, place)
            config = repository.config(place, MODEL)
            if limit:
                config.dynamic_batching.default_queue_policy.max_queue_size = limit
            for lineage in place.glob("*/*/lineage.json"):
                lineage.unlink()  # its digests would refuse the changed config
            (place / MODEL / "config.pbtxt").write_text(model_config.text(config))
            with server.running(place) as endpoint:
                plan = Plan(endpoint.http, duration=SECONDS, concurrency=8, seed=0, warmup=0.5)
                results = Path(scratch) / "load.jsonl"
                drive.run(plan, [Part(MODEL, payload.generate(specs, 16, 0))], results)
            latency = summary.summarize(results)["latency_ms"]
            print(f"{name:>20}: " + ", ".join(f"{key} {latency[key]:.1f} ms" for key in ("p50", "p99", "p999", "max")))


if __name__ == "__main__":
    main()
