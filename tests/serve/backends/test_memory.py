"""What a server keeps of the requests that it has answered: nothing."""

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from statistics import median

import pytest

from loadtest.judge import summary
from loadtest.load import drive
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from serve.repository import source
from serve.server.tritonserver import running
from serve.watch import metrics

COMMITTED, MODEL = Path("model_repository"), "digits_cnn"
SECONDS, EVERY = 75, 5
"""How long the load lasts, and seconds between two looks at the memory."""


@pytest.mark.timed
@pytest.mark.slow
def test_a_minute_of_load_leaves_the_memory_as_it_was(server_prefix: Path, tmp_path: Path) -> None:
    requests = payload.generate(source.load(COMMITTED / MODEL / "1", {}).inputs, 16, 0)
    seen = []
    with running(COMMITTED, models=[MODEL]) as endpoint, ThreadPoolExecutor(1) as pool:

        def load(**how: float) -> float:
            plan = Plan(endpoint.http, in_flight=256, **how)  # type: ignore[arg-type]
            drive.run(plan, [Part(MODEL, requests)], tmp_path / "load.jsonl")
            return float(summary.summarize(tmp_path / "load.jsonl")["rate"]["achieved"])

        rate = load(duration=5, concurrency=32)
        driving = pool.submit(load, duration=SECONDS, rate=0.7 * rate)
        while wait([driving], EVERY).not_done:
            seen.append(metrics.memory(endpoint.pid) or 0)
        assert driving.result() > 0.3 * rate
    part = SECONDS // EVERY // 3
    warm, late = median(seen[part : 2 * part]), median(seen[-part:])
    assert late < 1.02 * warm, " ".join(f"{bytes_ / 2**20:.1f}" for bytes_ in seen)
