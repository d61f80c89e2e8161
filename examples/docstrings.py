"""The text task of the examples: which package of the Python standard library does a docstring come from?

Words are hashed into a fixed vocabulary, so that nothing is fitted and every Python version numbers them alike.
"""

import ast
import functools
import re
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import nn
from torch.nn import functional

from modelathe.tensors import Array, Arrays
from optimize import BATCH, Batch, TensorSpec, Workload

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
WORDS, VOCABULARY, PAD = 32, 4096, 0
SEED, BATCH_SIZE = 0, 64
FEWEST_WORDS, EVALUATED, DROPPED = 4, 1 / 3, 0.15


def classification(name: str, model: Callable[[], nn.Module], logits: str = "logits") -> Workload:
    """Return the workload of a model from `tokens` int64 [n, 32] to logits [n, 8]."""
    held_out, known = docstrings()
    rng = np.random.default_rng(SEED)

    def scores(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
        label = outputs[logits].argmax(1)
        return {
            "accuracy": (label == targets).astype(np.float64),
            "agreement": (label == reference[logits].argmax(1)).astype(np.float64),
        }

    return Workload(
        name=name,
        model=model,
        inputs=(TensorSpec("tokens", "int64", (BATCH, WORDS), values=(1, VOCABULARY - 1)),),
        outputs=(logits,),
        evaluation=lambda: batches(*held_out),
        calibration=lambda: (Batch(batch.inputs) for batch in batches(known[0][:256], known[1][:256])),
        training=lambda: augmented(*known, rng),
        loss=lambda outputs, targets: functional.cross_entropy(outputs[logits], targets),
        scores=scores,
        bounded=True,
    )


def batches(tokens: Array, labels: Array) -> Iterator[Batch]:
    """Yield the samples in order."""
    for start in range(0, len(tokens), BATCH_SIZE):
        yield Batch({"tokens": tokens[start : start + BATCH_SIZE]}, labels[start : start + BATCH_SIZE])


def augmented(tokens: Array, labels: Array, rng: np.random.Generator) -> Iterator[Batch]:
    """Yield one epoch in a new order, with some of the words left out."""
    order = rng.permutation(len(tokens))
    for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
        index = order[start : start + BATCH_SIZE]
        left_out = rng.random(tokens[index].shape) < DROPPED
        yield Batch({"tokens": np.where(left_out, PAD, tokens[index])}, labels[index])


@functools.cache
def docstrings() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return (tokens int64 [n, 32], labels int64 [n]) of the evaluation set, and of the training set.

    Equal texts count once, so that no evaluated text was trained on.
    """
    texts: dict[bytes, int] = {}
    for label, package in enumerate(PACKAGES):
        for text in _texts(Path(sysconfig.get_path("stdlib"), package)):
            tokens = encode(text)
            if (tokens != PAD).sum() >= FEWEST_WORDS:
                texts.setdefault(tokens.tobytes(), label)
    tokens = np.stack([np.frombuffer(text, np.int64) for text in texts])
    labels = np.array(list(texts.values()))
    order = np.random.default_rng(SEED).permutation(len(tokens))
    held_out, known = np.split(order, [int(len(order) * EVALUATED)])
    return (tokens[held_out], labels[held_out]), (tokens[known], labels[known])


def encode(text: str) -> Array:
    """Return the numbers of the first 32 words, int64 [32], zeros in front of a shorter text."""
    words = re.findall(r"[a-z]+|\d+", text.lower())[:WORDS]
    numbers = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words]
    return np.array([PAD] * (WORDS - len(numbers)) + numbers, np.int64)


def _texts(package: Path) -> Iterator[str]:
    """Yield every docstring below `package` in the order of paths; nothing is imported."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(path for path in package.rglob("*.py") if "test" not in path.parts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield ast.get_docstring(node) or ""
