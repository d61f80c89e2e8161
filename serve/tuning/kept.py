"""Kept: the file of what was measured, which the next `serve tune` goes on from and `serve plan` reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelathe import files
from modelathe.commandline import finite
from serve.simulate.configuration import Configuration
from serve.simulate.curve_file import Measured
from serve.simulate.service import Curve
from serve.tuning.known import Known, Tried
from serve.tuning.trial import Subject


def read(path: Path, subject: Subject, cores: int) -> Known:
    """Return what was measured of these very files on as many cores; nothing where that is not so."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (values["digest"], values["cores"], values["model"]) != (subject.digest, cores, subject.model):
            return Known(cores)
        curves = {int(threads): _curve(held) for threads, held in values["threads"].items()}
        first = values["first"] and Tried.of(values["first"])
        return Known(cores, curves, values["request"], first, tuple(map(Tried.of, values["live"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Known(cores)


def write(path: Path, subject: Subject, known: Known, chosen: Configuration) -> None:
    """Write all that is known; `serve plan` reads the times of the chosen configuration."""
    measured = Measured(1, subject.model, known.cores, **_held(known.curve(chosen.threads)), configuration=chosen)
    more = {
        "digest": subject.digest,
        "threads": {threads: _held(one) for threads, one in known.curves.items()},
        "request": known.request,
        "first": known.first and known.first.document(),
        "live": [one.document() for one in known.live],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(finite({**measured.document(), **more})) + "\n")


def _held(curve: Curve) -> dict[str, Any]:
    calls = {size: times.tolist() for size, times in curve.calls.items()}
    return {**vars(curve), "calls": calls, "spread": curve.spread.tolist()}


def _curve(held: Mapping[str, Any]) -> Curve:
    calls = {int(size): np.array(times, np.float64) for size, times in held["calls"].items()}
    return Curve(**{**held, "calls": calls, "together": tuple(held["together"]), "spread": np.array(held["spread"])})
