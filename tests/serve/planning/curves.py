"""Measured times of a call that tests plan with."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from serve.simulate.service import Curve

SIZES = (1, 2, 4, 8, 16, 32)


def drawn(spread: float = 0.1, **more: Any) -> Curve:
    """Return a curve of 1 ms and 0.25 ms for each sample, lognormal around it; with no spread each call is equal."""
    generator = np.random.default_rng(1)
    return Curve({size: (0.001 + 0.00025 * size) * generator.lognormal(0, spread, 200) for size in SIZES}, **more)


def written(path: Path, **more: Any) -> Path:
    """Write a file of measured times and return its path; what is None is left out."""
    values: dict[str, Any] = {
        "format": 1,
        "model": "digits_cnn",
        "cores": 2,
        "machine": "c2",
        "start": 8.0,
        "inside": 0.0002,
        "outside": 0.0005,
        "calls": {size: times.tolist() for size, times in drawn().calls.items()},
        "configuration": {"max_batch": 32, "threads": 2},
    }
    path.write_text(json.dumps({key: value for key, value in {**values, **more}.items() if value is not None}))
    return path
