"""Contradictions: what a configuration says against itself, its model or those that it calls: rules of `lint`.

A server may load such a model all the same, and refuse each of its requests in words that name another cause.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from modelathe.errors import ModelatheError
from serve.config import sequences
from serve.repository import onnx_file
from serve.repository import tree as repository
from serve.repository.finding import Finding, Subject


def _doubled(subject: Subject) -> Iterator[Finding]:
    for kind, tensors in (("input", subject.config.input), ("output", subject.config.output)):
        for name, times in Counter(tensor.name for tensor in tensors).items():
            if times > 1:
                yield subject.error(f"lists the {kind} {name} {times} times", "leave it there once")


def _text_ids(subject: Subject) -> Iterator[Finding]:
    """Look for ids of sequences that are text; NVIDIA's later images are not known to pad them."""
    for name in sequences.text_ids(subject.config) if not subject.image else ():
        yield subject.error(
            f"the input {name} takes a sequence's id as text, which Triton 24.10 does not hand on as it is",
            "let the model take a number, or list this input among those that clients send",
        )


def _without_default(subject: Subject) -> Iterator[Finding]:
    """Compare the inputs that a request may leave out with those for which the ONNX file has a value."""
    optional = [tensor.name for tensor in subject.config.input if tensor.optional]
    if not optional or subject.backend not in ("onnxruntime", "openvino"):
        return
    for number in subject.versions:
        path = subject.home / str(number) / (subject.config.default_model_filename or repository.MODEL_FILE)
        try:
            needed = onnx_file.required(path)
        except (ModelatheError, OSError):  # another rule's finding
            continue
        for name in sorted(set(optional) & needed):
            yield subject.error(
                f"the input {name} is optional by config.pbtxt, and the model has no value of its own for it",
                "leave optional out, or export the model with a default for this input",
            )


def _circles(subject: Subject) -> Iterator[Finding]:
    if circle := _circle(subject.home.parent, (subject.model,), set()):
        yield subject.error(
            f"never ends, since its steps call each other: {', '.join(circle)}", "take one of these steps out"
        )


def _circle(place: Path, way: tuple[str, ...], ending: set[str]) -> tuple[str, ...]:
    """Return the models on the way from the first to one that is called again; empty where none is.

    What is found to lead into no circle joins `ending` and is not gone through again: ways multiply where steps share
    their own steps.
    """
    called: list[str] = []
    with suppress(ModelatheError):  # the finding is that model's own
        called = repository.calls(place, way[-1])
    for name in called:
        if name in way:
            return (*way, name)
        if name not in ending and (found := _circle(place, (*way, name), ending)):
            return found
    ending.add(way[-1])
    return ()


RULES = (_doubled, _text_ids, _without_default, _circles)
