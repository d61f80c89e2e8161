"""An image pipeline: `image`, JPEG or PNG → decode and normalize → model → `label` and `score`, as an ensemble."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loadtest.plan.data.payload import describe
from modelathe.errors import UsageError
from modelathe.tensors import Dim, TensorSpec
from serve.config.errors import BadRepository
from serve.pipelines import publish as publishing
from serve.pipelines.publish import Called, Part, pipeline
from serve.repository import onnx_file, staging
from serve.repository import tree as repository

Mode = Literal["gray", "rgb"]
Scores = Literal["logits", "probabilities"]
CHANNELS: dict[Mode, int] = {"gray": 1, "rgb": 3}
LAYOUTS = {"CHW": (1, 2, 0), "HWC": (0, 1, 2)}
"""Where height, width and channels are among a sample's dims."""
BLOCKS, EXAMPLES = 7, 4
PROBABLE = ("Softmax", "Sigmoid", "HardSigmoid")
"""Operators of ONNX whose results are probabilities."""


@dataclass(frozen=True)
class Pixels:
    """What a file becomes before the model sees it.

    Args:
        size: height and width in pixels; the model's own where they are fixed.
        mode: what the channels are; by their number unless given.
        mean: what is taken off the scaled pixels, one value or one for each channel.
        std: what the rest is divided by, likewise.
        scale: what pixels, 0 to 255, are divided by first; 255 unless given, or 1 where the model takes uint8.
    """

    size: tuple[int, int] | None = None
    mode: Mode | None = None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    scale: float | None = None


USUAL = Pixels()


def image(
    inner: Called,
    *,
    name: str | None = None,
    pixels: Pixels = USUAL,
    scores: Scores | None = None,
    labels: Path | None = None,
    check: bool = True,
) -> list[staging.Version]:
    """Publish a pipeline that takes `image`, a JPEG or PNG file for each sample [batch, 1], and answers what is on it.

    The outputs are `label`, strings [batch, 1], and `score`, float32 [batch, 1], the probability of that class: the
    softmax of the greatest logit, or the greatest of the model's own probabilities.

    Args:
        inner: a model that takes pixels [batch, channels, height, width], [batch, height, width, channels] or, gray,
            without channels, as floats or uint8, and answers with one output [batch, classes].
        name: of the pipeline; `MODEL_image` unless given.
        pixels: what the model wants of an image.
        scores: what that output is; where not given, probabilities if a softmax or a sigmoid makes it, else logits.
        labels: text file, a line for each class; without it the label is the index as text.
        check: let a throw-away server answer through it first.

    Returns:
        The versions that were published, the pipeline last.

    Raises:
        UsageError: a value does not fit the model, or the name cannot be one.
        BadRepository: its tensors are not those of an image classifier.
        ModelRefused: the throw-away server does not load it.
    """
    taken, layout, mode = _taken(inner, pixels.mode)
    height, width = _size(taken, layout, pixels.size)
    classes = _classes(inner)
    _check_labels(inner, classes, labels)
    settings = {
        **{"height": height, "width": width, "mode": mode, "layout": layout, "dtype": taken.dtype},
        **_normalization(taken.dtype, mode, pixels),
    }
    given = TensorSpec("image", "object", (inner.batch, 1), examples=_examples(height, width, CHANNELS[mode]))
    answer = (TensorSpec("label", "object", (inner.batch, 1)), TensorSpec("score", "float32", (inner.batch, 1)))
    stem = name or inner.name
    first, last, whole = f"{stem}_decoder", f"{stem}_label", name or f"{inner.name}_image"
    decoded = TensorSpec("pixels", taken.dtype, taken.dims)
    answered = TensorSpec("classes", classes.dtype, classes.dims)
    steps = [
        (first, {"image": "image"}, {"pixels": "pixels"}),
        (inner.name, {taken.name: "pixels"}, {classes.name: "classes"}),
        (last, {"classes": "classes"}, {"label": "label", "score": "score"}),
    ]
    kept = {"labels.txt": labels} if labels else {}
    parts = [
        Part(
            publishing.python(first, inner, [given], [decoded], settings),
            *((given,), (decoded,), {"kind": "step"}, publishing.files("image")),
        ),
        Part(
            publishing.python(last, inner, [answered], answer, {"scores": scores or _scores(inner, classes)}),
            *((answered,), answer, {"kind": "step"}, {**publishing.files("label"), **kept}),
        ),
        Part(
            publishing.ensemble(whole, inner, [given], answer, steps),
            *((given,), answer, pipeline(inner, **_moved(inner, classes))),
        ),
    ]
    return publishing.publish(inner, parts, check=check)


def _taken(inner: Called, asked: Mode | None) -> tuple[TensorSpec, str, Mode]:
    """Return the model's one input, where its channels are, and what they are."""
    spec = inner.inputs[0]
    sample = spec.dims[1:]
    found: list[tuple[str, Mode]] = [
        (layout, mode)
        for layout, (_, _, at) in LAYOUTS.items()
        for mode, channels in CHANNELS.items()
        if len(sample) == 3 and sample[at] == channels
    ]
    if len(sample) == 2:
        found = [("HW", "gray")]
    if len(inner.inputs) > 1 or not (spec.dtype.startswith("float") or spec.dtype == "uint8") or not found:
        raise inner.error(
            f"its inputs are not one image: {'; '.join(map(describe, inner.inputs))}",
            "name a model of pixels [batch, channels, height, width] or [batch, height, width, channels]",
        )
    for layout, mode in found:
        if asked in (None, mode):
            return spec, layout, mode
    raise UsageError(f"--mode {asked} does not fit {describe(spec)}", fix=f"say --mode {found[0][1]}, or leave it out")


def _size(spec: TensorSpec, layout: str, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Return height and width."""
    sample = spec.dims[1:]
    dims = [sample[axis] for axis in LAYOUTS.get(layout, (0, 1))[:2]]
    if asked is None:
        if not all(isinstance(dim, int) for dim in dims):
            raise UsageError(f"{describe(spec)} takes images of several sizes", fix="say --size HEIGHTxWIDTH")
        asked = (int(str(dims[0])), int(str(dims[1])))
    for dim, pixels in zip(dims, asked, strict=True):
        least, most = (dim.minimum, dim.maximum) if isinstance(dim, Dim) else (dim, dim)
        if not least <= pixels <= most:
            raise UsageError(
                f"--size {asked[0]}x{asked[1]} does not fit {describe(spec)}", fix="give the height and width it takes"
            )
    return asked


def _normalization(dtype: str, mode: Mode, pixels: Pixels) -> dict[str, str]:
    """Return what is done to the values of the pixels, as the decoder's settings."""
    mean, std, scale = pixels.mean, pixels.std, pixels.scale
    for option, values in (("--mean", mean), ("--std", std)):
        if len(values) not in (1, CHANNELS[mode]):
            raise UsageError(f"{option}: {len(values)} values for {CHANNELS[mode]} channels", fix="give one for each")
    if scale is None:
        scale = 1.0 if dtype == "uint8" else 255.0
    if not scale or not all(std):
        raise UsageError("--scale or --std is 0, and pixels are divided by them", fix="use 1 to leave them as they are")
    if dtype == "uint8" and (scale != 1 or any(mean) or set(std) != {1}):
        raise UsageError(
            "the model takes uint8, and normalized pixels are no such numbers",
            fix="leave out --scale, --mean and --std",
        )
    return {"scale": str(scale), "mean": ",".join(map(str, mean)), "std": ",".join(map(str, std))}


def _moved(inner: Called, classes: TensorSpec) -> dict[str, Any]:
    """Return how far the score moves with batch mates: no further than the values that it is made of."""
    stated = inner.lineage.get("deviation")
    return {"deviation": {"score": stated[classes.name]}} if isinstance(stated, Mapping) else {}


def _scores(inner: Called, classes: TensorSpec) -> Scores:
    """Return what the model's file says that its output is; a file that is no ONNX says nothing."""
    onnx = inner.place / inner.name / str(inner.lineage["number"]) / repository.MODEL_FILE
    made_by = onnx_file.maker(onnx, classes.name) if onnx.exists() else ""
    return "probabilities" if made_by in PROBABLE else "logits"


def _classes(inner: Called) -> TensorSpec:
    fitting = [spec for spec in inner.outputs if spec.dtype.startswith("float") and len(spec.dims) == 2]
    if len(fitting) != 1:
        raise inner.error(
            f"one output [batch, classes] of floats is wanted, it has {'; '.join(map(describe, inner.outputs))}",
            "name a model that classifies",
        )
    return fitting[0]


def _check_labels(inner: Called, classes: TensorSpec, labels: Path | None) -> None:
    if labels is None:
        return
    try:
        count = len(labels.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        raise BadRepository("cannot be read as UTF-8 text", where=str(labels), fix="write a label a line") from None
    if isinstance(classes.dims[1], int) and count != classes.dims[1]:
        raise BadRepository(
            f"has {count} lines, and {inner.name} tells {classes.dims[1]} classes apart",
            where=str(labels),
            fix="write a label a line, in the order of the classes",
        )


def _examples(height: int, width: int, channels: int) -> tuple[bytes, ...]:
    """Return PNG files of coloured blocks, which the lineage keeps for load tests, probes and dry loads."""
    rng = np.random.default_rng(0)
    rows, columns = (np.arange(size) * BLOCKS // size for size in (height, width))
    blocks = rng.integers(0, 256, (EXAMPLES, BLOCKS, BLOCKS, channels), np.uint8)
    return tuple(_png(pixels[rows][:, columns]) for pixels in blocks)


def _png(pixels: np.ndarray) -> bytes:
    """Return uint8 pixels [height, width, 1 or 3] as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
