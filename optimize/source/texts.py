"""Texts: what a language model is judged on when its folder brings none, and how texts become batches of tokens."""

import ast
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelathe.tensors import Array
from optimize.model.errors import BadData
from optimize.source.batch import Batch

BATCH_SIZE = 32
NEAR = 16
"""Batches of a shuffled set among which texts of like lengths are looked for."""
FEWEST = 16
"""Texts below which a split into evaluation, calibration and training says nothing."""
DOCSTRINGS = 2048
LONGEST_DOCSTRING = 400
SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "_bundled", "turtledemo"}
PARTS = {"calibration": (0,), "evaluation": (1, 2, 3), "training": (4, 5, 6, 7)}
"""Which eighths of the shuffled texts each kind of data gets; no text is in two."""


@dataclass(frozen=True)
class Texts:
    """Texts in a fixed order and, where they are known, the number of each one's class; `origin` says what they are."""

    texts: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    origin: str = "texts"

    def part(self, kind: str) -> "Texts":
        """Return the share of `kind`, evaluation, calibration or training: the same one at every call."""
        order = np.random.default_rng(0).permutation(len(self.texts))
        chosen = [int(index) for place, index in enumerate(order) if place % 8 in PARTS[kind]]
        return self._of(chosen)

    def distinct(self, tokens: Sequence[Sequence[int]]) -> "Texts":
        """Return the texts without those whose tokens an earlier one has: to the model they are one, in one part."""
        first: dict[tuple[int, ...], int] = {}
        for index, row in enumerate(tokens):
            first.setdefault(tuple(row), index)
        return self._of(list(first.values()))

    def _of(self, chosen: Sequence[int]) -> "Texts":
        labels = None if self.labels is None else tuple(self.labels[index] for index in chosen)
        return Texts(tuple(self.texts[index] for index in chosen), labels, self.origin)


def split(count: int, origin: str) -> str:
    """Say how many of `count` samples judge, train and calibrate."""
    sizes = {kind: sum(place % 8 in parts for place in range(count)) for kind, parts in PARTS.items()}
    parts = ", ".join(f"{size:,} for {kind} ({len(PARTS[kind])}/8)" for kind, size in sizes.items())
    return f"{count:,} {origin}, drawn with a seed: {parts}"


def read(folder: Path, classes: dict[str, int]) -> Texts:
    """Return the texts in `folder`: `data.jsonl` (`text`, perhaps `label`), or `texts.txt`, one a line, or docstrings.

    Args:
        folder: where the files are looked for.
        classes: the number of each class by its name, for labels that are names.

    Raises:
        BadData: a line that is not as it should be, only some texts have labels, or there are too few texts.
    """
    if (folder / "data.jsonl").is_file():
        found = _read_lines(folder / "data.jsonl", classes)
    elif (folder / "texts.txt").is_file():
        lines = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
        found = Texts(tuple(line.strip() for line in lines if line.strip()), origin="texts in texts.txt")
    else:
        found = Texts(tuple(docstrings()), origin="docstrings of Python's standard library")
    if len(found.texts) < FEWEST:
        raise BadData(f"{len(found.texts)} texts are too few", where=str(folder), fix=f"give {FEWEST} or more")
    return found


def _read_lines(file: Path, classes: dict[str, int]) -> Texts:
    texts, labels = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts.append(str(row["text"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadData(
                "is not a JSON object with a text",
                where=f"{file}, line {number}",
                fix='write {"text": "…", "label": 0}',
            ) from error
        if "label" in row:
            labels.append(_label(row["label"], classes, f"{file}, line {number}"))
    if labels and len(labels) < len(texts):
        raise BadData("only some texts have a label", where=str(file), fix="give every line a label, or none")
    return Texts(tuple(texts), tuple(labels) or None, f"texts in {file.name}")


def _label(label: Any, classes: dict[str, int], where: str) -> int:
    number = classes.get(label) if isinstance(label, str) else label
    if not isinstance(number, int) or number not in classes.values():
        known = f"its classes are: {', '.join(list(classes)[:10])}" if classes else "it has none: leave the labels out"
        raise BadData(f"{label!r} is no class of the model", where=where, fix=known)
    return number


def docstrings() -> list[str]:
    """Return docstrings of Python's standard library without repetition, spread evenly over it; nothing is imported."""
    every: dict[str, None] = {}
    for folder, below, files in os.walk(sysconfig.get_path("stdlib")):
        below[:] = sorted(set(below) - SKIPPED)
        for file in sorted(name for name in files if name.endswith(".py")):
            for docstring in _docstrings_in(Path(folder, file)):
                text = " ".join(docstring.split())[:LONGEST_DOCSTRING]
                if len(text) >= 20:
                    every[text] = None
    texts = list(every)
    count = min(DOCSTRINGS, len(texts))
    return [texts[number * len(texts) // count] for number in range(count)]


def _docstrings_in(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def by_length(tokens: Sequence[Sequence[int]]) -> list[int]:
    """Return the order of length, in which little is padding."""
    return sorted(range(len(tokens)), key=lambda index: (len(tokens[index]), index))


def shuffled(tokens: Sequence[Sequence[int]], order: Sequence[int], batches: Sequence[float]) -> list[int]:
    """Return `order`, a permutation of the texts, changed as little as it takes for batches of like lengths.

    Each run of `NEAR` batches in it is sorted by length, cut into batches again, and these are put in the order of
    `batches`, one number for each.
    """
    cut = []
    for start in range(0, len(order), NEAR * BATCH_SIZE):
        near = sorted(order[start : start + NEAR * BATCH_SIZE], key=lambda index: len(tokens[index]))
        cut += [near[first : first + BATCH_SIZE] for first in range(0, len(near), BATCH_SIZE)]
    # A short one stays last, for only then all others are cut as they are here.
    whole, short = [part for part in cut if len(part) == BATCH_SIZE], [part for part in cut if len(part) < BATCH_SIZE]
    mixed = [part for _, part in sorted(zip(batches, whole, strict=False), key=lambda pair: pair[0])]
    return [index for part in (*mixed, *short) for index in part]


def batches(
    tokens: Sequence[Sequence[int]],
    labels: Sequence[int] | None,
    pad: int,
    order: Sequence[int],
    length: int = 0,
) -> Iterator[Batch]:
    """Yield `input_ids` and `attention_mask`, int64 [n, tokens].

    Args:
        tokens: the token ids of each text.
        labels: the class of each text; they become the targets under `label`.
        pad: the id that fills short rows.
        order: in which the texts come.
        length: how long every row is made; 0 for as long as the longest of its batch. Then the targets have the
            `mask` as well, for a model with an output for each token.
    """
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        inputs = _padded([tokens[index] for index in chosen], pad, length)
        targets: dict[str, Array] = {"mask": inputs["attention_mask"]} if length else {}
        if labels is not None:
            targets["label"] = np.array([labels[index] for index in chosen])
        yield Batch(inputs, targets or None)


def _padded(tokens: Sequence[Sequence[int]], pad: int, length: int) -> dict[str, Array]:
    # Two at least: an axis of one is what exporters take for a fixed one.
    length = max(2, length, *(len(row) for row in tokens))
    ids = np.full((len(tokens), length), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = 1
    return {"input_ids": ids, "attention_mask": mask}
