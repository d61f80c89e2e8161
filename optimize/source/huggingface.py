"""A Hugging Face folder as a workload: config.json, model.safetensors and, for a language model, its tokenizer.

Nothing is fetched, no code of the folder is run, and no pickled weights are read.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modelathe.commandline import install_line
from modelathe.errors import MachineError
from modelathe.tensors import BATCH, Array, Arrays, Dim, TensorSpec
from optimize.graph.graph import quiet
from optimize.model.errors import BadData, BadWorkload, first_line
from optimize.source import texts
from optimize.source.batch import Batch
from optimize.source.workload import Workload

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForImageClassification", "Model")
"""What a class name ends with whose outputs we know; each gives one tensor for one pass over its inputs."""
TYPICAL, UNSTATED = 32, 512
"""Tokens of a typical text, and the most that a model takes that does not say."""
NEIGHBOURS = 10
IMAGES = "data.npz"


class Head(nn.Module):
    """A model of transformers that takes what the workload declares and returns one tensor.

    Args:
        model: called with its inputs by name.
        pooling: `mean` or `cls`, which makes one vector of the token vectors; empty for a model that returns logits.
        normalized: whether that vector is scaled to length one.
    """

    def __init__(self, model: nn.Module, pooling: str, normalized: bool) -> None:
        super().__init__()
        self.model, self.pooling, self.normalized = model, pooling, normalized

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits, or one vector for each sample: float32 [n, classes], [n, tokens, classes] or [n, size]."""
        returned = self.model(**inputs)
        if not self.pooling:
            logits: torch.Tensor = returned.logits
            return logits
        hidden = returned.last_hidden_state
        vector = self._pooled(hidden, inputs.get("attention_mask"))
        return nn.functional.normalize(vector, dim=1) if self.normalized else vector

    def _pooled(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.pooling == "cls":
            return hidden[:, 0]
        if hidden.ndim == 4:
            return hidden.mean((2, 3))
        if mask is None:
            return hidden.mean(1)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def weights(folder: Path) -> Path:
    """Return the file by whose digest the folder's model is known: its weights, or the list of their parts."""
    whole = folder / "model.safetensors"
    return whole if whole.is_file() else folder / "model.safetensors.index.json"


def workload(folder: Path) -> Workload:
    """Return the workload of the model in `folder`, with the data that lies beside it.

    A language model is judged on `data.jsonl` or `texts.txt`, else on docstrings of the standard library; a vision
    model on `data.npz` with `pixel_values`, float32 [n, channels, height, width], and perhaps `labels`.

    Raises:
        BadWorkload: no safetensors, an architecture that transformers or we do not know, or weights that do not fit it.
        BadData: the data beside it cannot be used.
        MachineError: transformers is not installed.
    """
    try:
        with quiet():
            import transformers
    except ImportError as error:
        raise MachineError(
            "a Hugging Face folder needs the package transformers", fix=install_line("optimize,huggingface")
        ) from error
    architecture = _architecture(folder)
    with quiet():  # only now its modules are imported, and what they import talks
        kind = getattr(transformers, architecture, None)
    if kind is None:
        raise BadWorkload(
            f"transformers {transformers.__version__} has no {architecture}",
            where=str(folder),
            fix="write a workload file for a model with code of its own; no code in the folder is run",
        )
    head = Head(_loaded(kind, folder), *_pooling(folder, architecture)).eval()
    takes = getattr(kind, "main_input_name", "")
    if takes == "input_ids":
        return _language(folder, head, architecture)
    if takes == "pixel_values":
        return _vision(folder, head)
    raise BadWorkload(
        f"{architecture} takes {takes or 'unknown inputs'}, neither input_ids nor pixel_values",
        where=str(folder),
        fix="write a workload file that says what it takes",
    )


def _architecture(folder: Path) -> str:
    names = _json(folder / "config.json").get("architectures") or [""]
    name = str(names[0])
    if not name.endswith(HEADS):
        raise BadWorkload(
            f"its architecture is {name or 'not stated'}; known are names that end with {', '.join(HEADS)}",
            where=str(folder / "config.json"),
            fix="write a workload file for it",
        )
    return name


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadWorkload("is not JSON", where=str(file), fix="save the model again") from error


def _loaded(kind: Any, folder: Path) -> nn.Module:
    if not weights(folder).is_file():
        raise BadWorkload(
            "has no model.safetensors", where=str(folder), fix="save it with model.save_pretrained(folder)"
        )
    try:
        with quiet():
            # Eager attention is the same mathematics without guards against fully masked rows, which cost time in ONNX.
            model, found = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation="eager",
                dtype=torch.float32,
            )
    except Exception as error:
        raise BadWorkload(
            f"cannot be loaded: {type(error).__name__}: {first_line(error)}",
            where=str(folder),
            fix="save the model again",
        ) from error
    if kind.__name__.endswith("Model") and getattr(model, "pooler", None) is not None:
        # The vector is made of the token vectors: a pooler would be weights that no output depends on.
        model.pooler = None
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise BadWorkload(
            f"{len(missing)} weights of {kind.__name__} are not in it, such as {missing[0]}",
            where=str(weights(folder)),
            fix="let config.json name the architecture that was trained",
        )
    module: nn.Module = model
    return module


def _pooling(folder: Path, architecture: str) -> tuple[str, bool]:
    """Return how one vector is made of the token vectors, as sentence-transformers wrote it down, else their mean."""
    if not architecture.endswith("Model"):
        return "", False
    file, modules = folder / "1_Pooling" / "config.json", folder / "modules.json"
    said = _json(file) if file.is_file() else {"pooling_mode_mean_tokens": True}
    modes = sorted(name for name, chosen in said.items() if name.startswith("pooling_mode_") and chosen is True)
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise BadWorkload(
            f"pools with {', '.join(modes) or 'nothing'}; known are {', '.join(known)}",
            where=str(file),
            fix="write a workload file for it",
        )
    normalized = modules.is_file() and any(module["type"].endswith("Normalize") for module in _json(modules))
    return known[modes[0]], normalized


def _language(folder: Path, head: Head, architecture: str) -> Workload:
    config: Any = head.model.config
    tokenizer = _tokenizer(folder)
    longest = _longest(head.model, tokenizer)
    whole = architecture.endswith(("ForTokenClassification", "ForMaskedLM"))
    given = texts.read(folder, {} if whole else _classes(config))
    given = given.distinct(tokenizer(list(given.texts), truncation=True, max_length=longest)["input_ids"])
    pad = next((number for number in (config.pad_token_id, tokenizer.pad_token_id) if number is not None), 0)

    @functools.cache
    def tokens(kind: str) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(given.part(kind).texts), truncation=True, max_length=longest)["input_ids"]
        return ids

    def batches(kind: str) -> Iterator[Batch]:
        rows = tokens(kind)
        order = texts.by_length(rows)
        if kind == "training":
            # Torch's random numbers, which training seeds anew for each epoch.
            drawn = torch.rand(len(rows)).tolist()
            order = texts.shuffled(rows, torch.randperm(len(rows)).tolist(), drawn)
        return texts.batches(rows, given.part(kind).labels, pad, order, max(map(len, rows)) if whole else 0)

    special = [number for number in tokenizer.all_special_ids if number < config.vocab_size // 2]
    size = Dim("tokens", 2, min(TYPICAL, longest), longest)
    inputs = (
        TensorSpec("input_ids", "int64", (BATCH, size), values=(max(special, default=-1) + 1, config.vocab_size - 1)),
        TensorSpec("attention_mask", "int64", (BATCH, size), values=(1, 1)),
    )
    told = texts.split(len(given.texts), given.origin)
    return _made(folder, head, inputs, batches, given.labels is not None, told)


def _classes(config: Any) -> dict[str, int]:
    """Return the number of each class by its name; transformers may write only the names by the numbers."""
    if config.label2id:
        return dict(config.label2id)
    return {str(name): int(number) for number, name in (config.id2label or {}).items()}


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    fix = "save it with tokenizer.save_pretrained(folder)"
    # Without this file transformers makes a tokenizer that knows no word.
    if not (folder / "tokenizer.json").is_file():
        raise BadWorkload("has no tokenizer.json", where=str(folder), fix=fix)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise BadWorkload("its tokenizer cannot be read", where=str(folder), fix=fix) from error


def _longest(model: nn.Module, tokenizer: Any) -> int:
    """Return the most tokens that the model takes."""
    config: Any = model.config
    limit: int = getattr(config, "max_position_embeddings", None) or UNSTATED
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # RoBERTa and its kin count positions from behind the padding id.
            limit = module.num_embeddings - module.padding_idx - 1
    return min(limit, int(tokenizer.model_max_length))


def _vision(folder: Path, head: Head) -> Workload:
    images, labels = _images(folder / IMAGES)
    order = np.random.default_rng(0).permutation(len(images))

    def batches(kind: str) -> Iterator[Batch]:
        chosen = [index for place, index in enumerate(order) if place % 8 in texts.PARTS[kind]]
        if kind == "training":
            chosen = [chosen[place] for place in torch.randperm(len(chosen)).tolist()]
        for start in range(0, len(chosen), texts.BATCH_SIZE):
            rows = chosen[start : start + texts.BATCH_SIZE]
            targets = None if labels is None else {"label": labels[rows]}
            yield Batch({"pixel_values": np.ascontiguousarray(images[rows])}, targets)

    values = (float(images.min()), float(images.max()))
    spec = TensorSpec("pixel_values", "float32", (BATCH, *images.shape[1:]), values=values)
    told = texts.split(len(images), f"images in {IMAGES}")
    return _made(folder, head, (spec,), batches, labels is not None, told)


def _images(file: Path) -> tuple[Array, Array | None]:
    fix = "save it with numpy.savez(file, pixel_values=float32 [n, channels, height, width], labels=int64 [n])"
    if not file.is_file():
        raise BadData("a vision model is judged on images, and there are none", where=str(file), fix=fix)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["pixel_values"], arrays.get("labels")
    except Exception as error:
        raise BadData("cannot be read", where=str(file), fix=fix) from error
    if images.ndim != 4 or images.dtype != np.float32 or len(images) < texts.FEWEST:
        raise BadData(
            f"pixel_values is {images.dtype} {images.shape}, {texts.FEWEST} images or more are needed",
            where=str(file),
            fix=fix,
        )
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise BadData(f"labels is {labels.dtype} {labels.shape}", where=str(file), fix=fix)
    return images, labels


def _made(
    folder: Path, head: Head, inputs: tuple[TensorSpec, ...], batches: Any, labelled: bool, told: str
) -> Workload:
    name = re.sub(r"[^A-Za-z0-9_-]", "_", folder.resolve().name)[:100] or "model"
    output = ("sentence_embedding" if len(inputs) == 2 else "image_embedding") if head.pooling else "logits"

    def scores(outputs: Arrays, targets: Any, reference: Arrays) -> dict[str, Array]:
        given, wanted = outputs[output], reference[output]
        found = closeness(given, wanted) if head.pooling else agreement(given, wanted, (targets or {}).get("mask"))
        return {"accuracy": (given.argmax(-1) == targets["label"]).astype(float), **found} if labelled else found

    def loss(outputs: Mapping[str, torch.Tensor], targets: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs[output], torch.as_tensor(targets["label"]))

    config: Any = head.model.config
    if labelled and (head.pooling or config.num_labels < 2):
        raise BadData("has labels, but the model has no classes", where=str(folder), fix="leave the labels out")
    return Workload(
        name=name,
        model=head,
        inputs=inputs,
        outputs=(output,),
        evaluation=functools.partial(batches, "evaluation"),
        calibration=functools.partial(batches, "calibration"),
        training=functools.partial(batches, "training"),
        loss=loss if labelled else None,
        scores=scores,
        bounded=True,
        inferred=(told,),
        # The slash says that it is a folder, as .py says that it is a file.
        source=f"{folder}/",
    )


def agreement(given: Array, wanted: Array, mask: Array | None) -> dict[str, Array]:
    """Return for each sample whether both name the same class, or for one logit how near they are.

    Args:
        given: logits, [n, classes], or [n, tokens, classes] with a mask.
        wanted: the trained model's.
        mask: [n, tokens], 1 where a token is none of the padding; the share of these that agree is the score.
    """
    if given.shape[-1] == 1:
        spread = float(wanted.std()) or 1.0
        return {"fidelity": np.clip(1 - np.abs(given - wanted).reshape(len(given), -1).mean(1) / spread, 0, 1)}
    same = (given.argmax(-1) == wanted.argmax(-1)).astype(float)
    return {"agreement": same if mask is None else (same * mask).sum(1) / mask.sum(1)}


def closeness(given: Array, wanted: Array) -> dict[str, Array]:
    """Return for each sample the cosine with the trained model's vector, and how many of its nearest it keeps."""
    given, wanted = (array / np.linalg.norm(array, axis=1, keepdims=True).clip(1e-12) for array in (given, wanted))
    count = min(NEIGHBOURS, len(given) - 1)
    nearest = [_nearest(array, count) for array in (given, wanted)]
    kept = [len(set(a) & set(b)) / count for a, b in zip(*(rows.tolist() for rows in nearest), strict=True)]
    return {"cosine": (given * wanted).sum(1).clip(0, 1), "fidelity": np.array(kept)}


def _nearest(vectors: Array, count: int) -> Array:
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1, kind="stable")[:, :count]
