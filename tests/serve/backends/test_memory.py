"""What a server keeps of the requests that it has answered: nothing."""

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
LOOKS, BETWEEN = 15, 9_000
"""How often the memory is looked at, and how many requests are answered before each look."""


@pytest.mark.slow
def test_a_hundred_thousand_requests_leave_the_memory_as_it_was(server_prefix: Path, tmp_path: Path) -> None:
    requests, results = payload.generate(source.load(COMMITTED / MODEL / "1", {}).inputs, 16, 0), tmp_path / "r.jsonl"
    seen = []
    with running(COMMITTED, models=[MODEL], grace=0) as endpoint:
        for _ in range(LOOKS):
            plan = Plan(endpoint.http, duration=300, concurrency=32, requests=BETWEEN, warmup=0)
            drive.run(plan, [Part(MODEL, requests)], results)
            assert summary.summarize(results)["requests"]["done"] == BETWEEN
            seen.append(metrics.memory(endpoint.pid) or 0)
    part = LOOKS // 3
    warm, late = median(seen[part : 2 * part]), median(seen[-part:])
    assert late < 1.02 * warm, " ".join(f"{bytes_ / 2**20:.1f}" for bytes_ in seen)
