"""What the autoscalers ask Prometheus for is what they call it: Prometheus computes it from two pods' counters."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.deploy import references
from serve.deploy.plan import Plan
from serve.deploy.write import Options, render
from tests.serve.deploy.conftest import MODEL

PVC = references.source("pvc://models")
PLAN = Plan(replicas=2, per_pod_rate=100)
RATES = {"a": (100, 500), "b": (50, 4000)}
"""Requests per second of each pod, and microseconds that each of them waited."""
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not here: apt install prometheus")


def counters(name: str, rates: dict[str, tuple[int, int]]) -> list[dict[str, str]]:
    """Return the counters of the pods of an endpoint, at 15 s each, with another model and another endpoint beside."""
    found = []
    for pod, (requests, waited) in rates.items():
        labels = f'model="{MODEL}",namespace="n",pod="{name}{pod}"'
        found.append((f"nv_inference_request_success{{{labels}}}", 15 * requests))
        found.append((f"nv_inference_queue_duration_us{{{labels}}}", 15 * requests * waited))
    for labels in (f'model="inner",namespace="n",pod="{name}a"', f'model="{MODEL}",namespace="n",pod="other"'):
        found.append((f"nv_inference_request_success{{{labels}}}", 15 * 7000))
    return [{"series": series, "values": f"0+{step}x40"} for series, step in found]


def agree(series: list[dict[str, str]], expected: dict[str, list[dict[str, Any]]], place: Path) -> None:
    """Let promtool compute each expression over the series and compare."""
    tests = [{"expr": expr, "eval_time": "5m", "exp_samples": samples} for expr, samples in expected.items()]
    told = {"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": tests}]}
    (place / "tests.yml").write_text(json.dumps(told))
    done = subprocess.run(["promtool", "test", "rules", str(place / "tests.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_adapter_counts_each_pod(staged: Path, tmp_path: Path) -> None:
    text = render(Path("out"), staged, Options("kubernetes", source=PVC, plan=PLAN))["prometheus-adapter.yaml"]
    asked = {
        rule["name"]["as"]: rule["metricsQuery"]
        .replace("<<.LabelMatchers>>", 'namespace="n",pod=~"pod-a|pod-b|pod-c"')
        .replace("<<.GroupBy>>", "pod")
        for rule in yaml.safe_load(text)["rules"]["custom"]
    }
    rates = RATES | {"c": (0, 0)}
    expected = {
        asked["triton_requests_per_second"]: [100, 50, 0],
        asked["triton_queue_microseconds_per_request"]: [500, 4000, 0],  # a pod without requests is no gap
    }
    samples = {
        expr: [{"labels": f'{{pod="pod-{pod}"}}', "value": value} for pod, value in zip(rates, values, strict=True)]
        for expr, values in expected.items()
    }
    agree(counters("pod-", rates), samples, tmp_path)


@needs_promtool
def test_keda_divides_what_all_pods_do(staged: Path, tmp_path: Path) -> None:
    texts = render(Path("out"), staged, Options("kserve", source=PVC, plan=PLAN, name="iris"))
    predictor = yaml.safe_load(texts["inferenceservice.yaml"])["spec"]["predictor"]
    rate, queue = (one["external"]["metric"]["query"] for one in predictor["autoScaling"]["metrics"])
    mean = (100 * 500 + 50 * 4000) / 150
    expected = {
        rate: [{"labels": "{}", "value": 150}],
        f"round({queue}, 0.01)": [{"labels": "{}", "value": round(2 * mean, 2)}],
    }
    agree(counters("iris-predictor-", RATES), expected, tmp_path)
