"""Randomness: random numbers that only the reading of data draws from.

A `DataLoader(shuffle=True)` and most augmentations draw from the global generators of torch, numpy and Python. Given a
stream of their own they yield the same samples in the same order in every run, and in every process of one run,
whatever else draws random numbers meanwhile (dropout, say).
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class Stream:
    """States of the global generators, seeded once, that stand in for the real ones inside `drawn`."""

    def __init__(self, seed: int) -> None:
        import torch

        before = _states()
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self._states = _states()
        _set(before)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Let the code in this block draw from the stream, and go on where the last block left off."""
        before = _states()
        _set(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _set(before)


def _states() -> tuple[Any, Any, Any]:
    import torch

    return torch.default_generator.get_state(), np.random.get_state(), random.getstate()


def _set(states: tuple[Any, Any, Any]) -> None:
    import torch

    torch.default_generator.set_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
