"""Kept: the file of what was measured, which the next `serve tune` goes on from and `serve plan` reads."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modelathe import files
from modelathe.commandline import finite
from serve.simulate.configuration import Configuration
from serve.simulate.curve_file import Measured
from serve.simulate.service import Curve
from serve.tuning.trial import Subject


def read(path: Path, subject: Subject, cores: int) -> dict[int, Curve]:
    """Return the times of a call by number of threads that were measured of these very files on as many cores."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (values["digest"], values["cores"], values["model"]) != (subject.digest, cores, subject.model):
            return {}
        return {int(threads): _curve(held) for threads, held in values["threads"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(path: Path, subject: Subject, cores: int, curves: Mapping[int, Curve], chosen: Configuration) -> None:
    """Write the times of all numbers of threads; `serve plan` reads those of the chosen configuration."""
    curve = curves.get(chosen.threads) or curves[min(curves)]
    measured = Measured(1, subject.model, cores, **_held(curve), configuration=chosen)
    more = {"digest": subject.digest, "threads": {threads: _held(one) for threads, one in curves.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(finite({**measured.document(), **more})) + "\n")


def _held(curve: Curve) -> dict[str, Any]:
    calls = {size: times.tolist() for size, times in curve.calls.items()}
    return {"calls": calls, "together": curve.together, "inside": curve.inside, "outside": curve.outside}


def _curve(held: dict[str, Any]) -> Curve:
    calls = {int(size): np.array(times, np.float64) for size, times in held["calls"].items()}
    return replace(Curve(calls, tuple(held["together"])), inside=held["inside"], outside=held["outside"])
