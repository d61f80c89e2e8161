"""NVIDIA's Model Analyzer beside `serve tune`: the same models and server, the best that each finds, and minutes."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import perf_analyzer
import serving_peers
import yaml
from google.protobuf import json_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe.tensors import Dim
from serve.config import model_config
from serve.repository import tree
from serve.server import install, tritonserver
from tuning import default, subjects
from tuning.ledger import OUTPUT, Figures, Ledger, Rule

PROGRAM = Path(".venv-tuners/bin/model-analyzer")
MODES = ("quick", "optuna", "brute")
MINUTES = 4.0
"""A search that lasts longer is stopped, and what it has found until then counts."""
WINDOWS = {
    "measurement-mode": "time_windows",
    "measurement-interval": 1000,
    "stability-percentage": 30,
    "max-trials": 4,
}
"""Of perf_analyzer: as it is set, one measurement lasts a quarter of the limit."""
OVER = "rate under p99 < 20ms, serve tune over Model Analyzer"
WANTED = {f"{model}, {OVER}, {mode}": Rule("≥", 1.0) for model in subjects.MODELS for mode in MODES}
COLUMNS = ("model", "mode", "minutes", "configurations", "best found", "its rate", "ours", "our minutes", "stopped by")


def run(ledger: Ledger) -> None:
    """Let it search in every mode, and measure what it finds as ours is measured."""
    for model in subjects.MODELS:
        found = ledger.once(f"{model}: serve tune", tuned, model)
        best = subjects.chosen(model, found)
        ledger.once(f"{model}: rate, ours", default.highest, model, "tuned", best)
        for mode in MODES:
            told = ledger.once(f"{model}: {mode}", search, model, mode)
            if told["config"]:
                ledger.once(f"{model}: rate, {mode}", default.rate_of, model, model_config.parse(told["config"]))


def tuned(model: str) -> dict[str, Any]:
    """Return what `serve tune` finds when nothing was measured before, and how many minutes that takes."""
    subjects.subject(model)
    measured = OUTPUT / model / "anew" / "measured.json"
    shutil.rmtree(measured.parent, ignore_errors=True)
    begun = time.monotonic()
    words = ("tune", model, "--repository", str(subjects.REPOSITORY), "--slo", subjects.SLO)
    said = json.loads(subjects.run("serve", *words, "--measured", str(measured), "--json"))
    return {"chosen": said["chosen"], "minutes": (time.monotonic() - begun) / 60, "tried": said["configurations"]}


def search(model: str, mode: str) -> dict[str, Any]:
    """Let Model Analyzer search, and return what it found, or what stopped it."""
    home = (OUTPUT / "analyzer" / f"{model}-{mode}").resolve()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / "config.yaml").write_text(yaml.safe_dump(settings(model, mode, home)))
    begun = time.monotonic()
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(PROGRAM.absolute()), "profile", "-v", "--config-file", str(home / "config.yaml")],
            stdout=log,
            stderr=log,
            cwd=home,
            env=os.environ | {"LD_LIBRARY_PATH": libraries()},
            start_new_session=True,
        )
        late = _ended(process)
    minutes = (time.monotonic() - begun) / 60
    said = (home / "log").read_text(errors="replace").splitlines()
    found = results(home, model)
    told = {"minutes": minutes, "tried": len(found), "config": "", "name": "", "stopped": ""}
    if late:
        told["stopped"] = f"the limit of {MINUTES:g} minutes"
    elif process.returncode:
        told["stopped"] = next((line for line in reversed(said) if line.strip()), f"exit {process.returncode}")[-300:]
    held = [row for row in found if row["p99"] <= subjects.LIMIT_MS]
    if held:
        best = max(held, key=lambda row: row["throughput"])
        text = model_config.text(json_format.ParseDict(best["config"], ModelConfig()))
        told |= {"config": text, **{key: best[key] for key in ("name", "throughput", "p99")}}
    return told


def _ended(process: "subprocess.Popen[bytes]") -> bool:
    """Wait for the end, and ask for it after the limit; return whether it was late."""
    try:
        process.wait(timeout=60 * MINUTES)
        return False
    except subprocess.TimeoutExpired:
        # Asked once, it ends its search and writes what it has.
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True


def settings(model: str, mode: str, home: Path) -> dict[str, Any]:
    """Return its settings: our server as a local one, our model as it is, and the limit."""
    made, place = subjects.subject(model), install.environment()
    version = home / "repository" / model / str(made.number)
    shutil.copytree(made.folder, version, ignore=shutil.ignore_patterns(tree.LINEAGE, tree.PAGE))
    (version.parent / tree.CONFIG).write_text(model_config.text(default.tritons(made.config)))
    server = home / "tritonserver"
    variables = "".join(
        f"export {name}='{value}'\n"
        for name, value in tritonserver._variables(place).items()
        if name in ("LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "PYTHONNOUSERSITE", "ORT_DISABLE_TELEMETRY")
    )
    server.write_text(f'#!/bin/bash\n{variables}cd {place.prefix}\nexec {place.tritonserver} "$@"\n')
    server.chmod(0o755)
    ports = {kind: serving_peers.free_port() for kind in ("http", "grpc", "metrics")}
    flags = {f"{kind}-port": port for kind, port in ports.items()} | {f"{kind}-address": "127.0.0.1" for kind in ports}
    return {
        "model_repository": str(home / "repository"),
        "output_model_repository_path": str(home / "models"),
        "override_output_model_repository": True,
        "checkpoint_directory": str(home / "checkpoints"),
        "export_path": str(home / "export"),
        "profile_models": {model: {"cpu_only": True, "perf_analyzer_flags": {**WINDOWS, "shape": _shapes(model)}}},
        "triton_launch_mode": "local",
        "triton_server_path": str(server),
        "triton_http_endpoint": f"127.0.0.1:{ports['http']}",
        "triton_grpc_endpoint": f"127.0.0.1:{ports['grpc']}",
        "triton_metrics_url": f"http://127.0.0.1:{ports['metrics']}/metrics",
        "triton_server_flags": {**flags, "backend-directory": str(place.backends), "allow-gpu-metrics": False},
        "perf_analyzer_path": str(next(perf_analyzer.HOME.rglob("bin/perf_analyzer")).resolve()),
        "run_config_search_mode": mode,
        "run_config_search_max_instance_count": 2,
        "run_config_search_max_model_batch_size": 32,
        "run_config_search_max_concurrency": 64,
        "latency_budget": subjects.LIMIT_MS,
        "client_protocol": "grpc",
        "skip_summary_reports": True,
        "skip_detailed_reports": True,
    }


def _shapes(model: str) -> list[str]:
    """Return the sizes of free dims as perf_analyzer wants them."""
    specs = subjects.subject(model).inputs() or []
    return [
        f"{spec.name}:{','.join(map(str, spec.shape()[1:]))}"
        for spec in specs
        if any(isinstance(dim, Dim) for dim in spec.dims[1:])
    ]


def libraries() -> str:
    """Return where perf_analyzer finds the library of CUDA that it is linked against."""
    return str(next(perf_analyzer.HOME.rglob("libcudart.so*")).parent.resolve())


def results(home: Path, model: str) -> list[dict[str, Any]]:
    """Return the throughput and the p99 of each measurement, and its configuration: from its last checkpoint.

    It writes no other file when it is stopped.
    """
    path = max(home.glob("checkpoints/*.ckpt"), key=lambda path: int(path.stem), default=None)
    if path is None:
        return []
    found = []
    for name, (made, measured) in json.loads(path.read_text())["ResultManager.results"]["_results"][model].items():
        config = made["_model_run_configs"][0]["_model_config_variant"]["model_config"]
        for one in measured.values():
            (figures,) = [part["_non_gpu_data_from_tag"] for part in one["_model_config_measurements"]]
            throughput, p99 = (figures[key][1]["_value"] for key in ("perf_throughput", "perf_latency_p99"))
            found.append({"name": name, "config": config, "throughput": throughput, "p99": p99})
    return found


def rows(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yield what each mode found of each model, beside ours."""
    for model in subjects.MODELS:
        ours, rate = ledger.cells.get(f"{model}: serve tune"), ledger.cells.get(f"{model}: rate, ours")
        for mode in MODES:
            if told := ledger.cells.get(f"{model}: {mode}"):
                live = ledger.cells.get(f"{model}: rate, {mode}") or {}
                yield {
                    "model": model,
                    "mode": mode,
                    **{key: told.get(key) for key in ("minutes", "tried", "name", "stopped", "throughput", "p99")},
                    "rate": live.get("rate"),
                    "ours": rate["rate"] if rate else None,
                    "our_minutes": ours["minutes"] if ours else None,
                }


def figures(found: list[Mapping[str, Any]]) -> Figures:
    """Return our rate over that of what it found, and the minutes of both."""
    made = {}
    for row in found:
        named = f"{row['model']}, {{}}, {row['mode']}"
        made[named.format(OVER)] = row["ours"] / row["rate"] if row["rate"] and row["ours"] else float("nan")
        made[named.format("minutes of Model Analyzer")] = row["minutes"]
        made[f"{row['model']}, minutes of serve tune"] = row["our_minutes"] or float("nan")
    return made


def cells(found: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the table."""
    for row in found:
        best = f"{row['name']}: {row['throughput']:.0f}/s, p99 {row['p99']:.1f} ms" if row["name"] else "nothing"
        rates = ("" if row[key] is None else f"{row[key]:.4g}" for key in ("rate", "ours", "our_minutes"))
        yield (row["model"], row["mode"], f"{row['minutes']:.1f}", str(row["tried"]), best, *rates, row["stopped"])
