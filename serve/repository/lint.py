"""Lint: what is wrong with a model repository, found without starting anything.

An *error* is what a server refuses, answers wrongly or in the end no more; a *warning* is what makes it slow, or could
not be judged here. What needs no more than the configurations is in `serve.repository.contradictions` and
`serve.repository.scheduling`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from modelathe.errors import ModelatheError, closest
from serve.backends import graph
from serve.config import cache, gpu, releases
from serve.config.errors import BadRepository
from serve.repository import contradictions, onnx_file, scheduling
from serve.repository import tree as repository
from serve.repository.finding import Finding, Subject

FILES = {
    "onnxruntime": repository.MODEL_FILE,
    "openvino": repository.MODEL_FILE,
    "tensorrt": gpu.PLAN,
    "python": "model.py",
}
THREADS = "intra_op_thread_count"
VERSION = slice(24, 28)
"""Where a TensorRT engine states the version of TensorRT that built it, by its makers' word (NVIDIA/TensorRT #3073)."""


def check(place: Path, model: str | None = None, image: str = "") -> list[Finding]:
    """Return what is wrong with the repository, or with one model of it.

    Args:
        place: the repository.
        model: its name; every model unless it is given.
        image: the release of Triton that will serve it, as in `26.07`; ours unless given.

    Raises:
        BadRepository: it is no folder, is empty, or holds no such model.
    """
    found = names(place)
    if model is not None and model not in found:
        raise BadRepository(
            f"holds no model {model}", where=str(place), fix=f"{closest(model, found)}it holds {', '.join(found)}"
        )
    return [finding for name in found if model in (None, name) for finding in _model(place / name, image)]


def names(place: Path) -> list[str]:
    """Return the names of the models in the repository, whether in order or not.

    Raises:
        BadRepository: it is no folder, or is empty.
    """
    try:
        found = sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise BadRepository(f"cannot be read: {error.strerror}", where=str(place), fix="give the folder") from None
    if not found:
        raise BadRepository("holds no model", where=str(place), fix="publish one with: serve add")
    return found


def _model(home: Path, image: str) -> Iterator[Finding]:
    yield from _folder(home)
    path = home / repository.CONFIG
    try:
        config = repository.config(home.parent, home.name)
        versions = repository.live(home.parent, home.name)
        lineage = _lineage(home, max(versions, default=0))
    except ModelatheError as error:
        yield Finding(home.name, error.where or str(path), error.what, error.fix or "publish the model again")
        return
    subject = Subject(home, config, tuple(versions), lineage, image)
    for rule in RULES:
        yield from rule(subject)


def _folder(home: Path) -> Iterator[Finding]:
    """Find what a rename, a copy or a link left that should not be there."""
    try:
        repository.check_name(home.name)
    except ModelatheError as error:
        yield Finding(home.name, str(home), error.what, error.fix)
    for path in (home, *sorted(home.rglob("*"))):
        # Of a link to itself `Path.resolve` makes an error.
        there = Path(os.path.realpath(path))
        if path.is_symlink() and not there.is_relative_to(os.path.realpath(home.parent)):
            fix = "put the file itself here, if others may change what the link points at"
            yield Finding(
                home.name, str(path), f"is a link out of the repository, to {path.readlink()}", fix, "warning"
            )
    for path in sorted(home.iterdir()):
        if path.is_dir() and not repository.NUMBER.fullmatch(path.name) and not path.name.startswith("."):
            fix = "rename it to a number without zeros before it, or move it away"
            yield Finding(home.name, str(path), "is no version: Triton passes it over", fix, "warning")


def _lineage(home: Path, number: int) -> dict[str, Any]:
    there = repository.published(home / str(number))
    return repository.read_lineage(home.parent, home.name, number) if there else {}


def _names(subject: Subject) -> Iterator[Finding]:
    if subject.config.name not in ("", subject.model):
        yield subject.error(
            f"is the configuration of {subject.config.name}", f"copy the right one, or set name: {subject.model!r}"
        )


def _versions(subject: Subject) -> Iterator[Finding]:
    policy = subject.config.version_policy
    there = repository.numbers(subject.home.parent, subject.model)
    missing = [number for number in policy.specific.versions if number not in there]
    if missing:
        yield subject.error(
            f"names version {', '.join(map(str, missing))}, which is not there",
            f"serve promote {subject.model}" if there else "publish the model again",
        )
    elif not subject.versions:
        yield subject.error("there is no version to serve", "publish one with: serve add", subject.home)


def _files(subject: Subject) -> Iterator[Finding]:
    """Look for the model's file in each version, and compare what has a lineage with its digests."""
    name = subject.config.default_model_filename or FILES.get(subject.backend, "")
    for number in repository.numbers(subject.home.parent, subject.model):
        folder = subject.home / str(number)
        serves = number in subject.versions
        if name and not (folder / name).is_file():
            say = subject.error if serves else subject.warning
            yield say(f"has no {name}: half copied?", "copy the whole version again, or remove it", folder)
        elif repository.published(folder):
            try:
                repository.verify_version(
                    subject.home.parent,
                    subject.model,
                    number,
                    repository.read_lineage(subject.home.parent, subject.model, number),
                    live=serves,
                )
            except ModelatheError as error:
                yield subject.error(error.what, error.fix, Path(error.where))


def _graph(subject: Subject) -> Iterator[Finding]:
    """Compare the configuration with the ONNX file: names, types, dims and the batch axis."""
    if subject.backend not in ("onnxruntime", "openvino"):
        return
    whole = bool(subject.config.input and subject.config.output)
    stated = json_format.MessageToDict(subject.config, preserving_proto_field_name=True)
    stated = {"max_batch_size": 0, "input": [], "output": [], **stated}
    if not whole:
        yield subject.warning(
            "does not list inputs and outputs: the server completes it at each start, with batches of 4 at most",
            f"serve add {subject.home}/{max(subject.versions, default=1)}/{repository.MODEL_FILE} --name "
            f"{subject.model}, into another repository, writes a whole one",
        )
    elif reason := graph.refusal(stated, "1"):
        yield subject.error(reason, "change the configuration, or serve it with NVIDIA's image")
        return
    for number in subject.versions:
        path = subject.home / str(number) / (subject.config.default_model_filename or repository.MODEL_FILE)
        if not path.is_file():
            continue
        try:
            if not whole:
                onnx_file.values(path)
            boundary = onnx_file.boundary(path)
            onnx_file.external(path)
        except ModelatheError as error:
            yield subject.error(error.what, error.fix, path)
            continue
        for kind, tensors in zip(("input", "output"), boundary, strict=True):
            if different := graph.mismatch(stated, kind, tensors):
                yield subject.error(
                    different, "correct the configuration, or export the model with these names, types and dims"
                )


def _calls(subject: Subject) -> Iterator[Finding]:
    """Look for the models that a pipeline calls, and for the tensors that its steps hand over."""
    place = subject.home.parent
    there = names(place)
    missing = [name for name in repository.calls(place, subject.model) if name not in there]
    for name in missing:
        yield subject.error(
            f"calls {name}, which is not in the repository", f"publish {name}, or move {subject.model} away"
        )
    for step in subject.config.ensemble_scheduling.step:
        if step.model_name in missing:
            continue
        try:
            inner = repository.config(place, step.model_name)
        except ModelatheError:
            continue  # the finding is that model's own
        for kind, asked, stated in (("input", step.input_map, inner.input), ("output", step.output_map, inner.output)):
            unknown = sorted(set(asked) - {tensor.name for tensor in stated})
            if stated and unknown:
                yield subject.error(
                    f"calls {step.model_name} with the {kind} {', '.join(unknown)}, which it does not have",
                    "make the pipeline again: serve pipeline",
                )


def _padded(subject: Subject) -> bool:
    """Whether a pipeline of the repository pads what it sends to the model."""
    place = subject.home.parent
    for name in names(place):
        with suppress(ModelatheError):
            if subject.model in repository.calls(place, name) and "buckets" in repository.read_lineage(place, name):
                return True
    return False


def _hardware(subject: Subject) -> Iterator[Finding]:
    groups = subject.config.instance_group
    on_gpu = any(group.kind == ModelInstanceGroup.KIND_GPU for group in groups)
    accelerators = subject.config.optimization.execution_accelerators.gpu_execution_accelerator
    device = (subject.lineage.get("target") or {}).get("device")
    if device == "cpu" and (on_gpu or accelerators):
        yield subject.error("asks for a GPU, and the target is a CPU", "set kind: KIND_CPU, or publish it for cuda")
    elif subject.image and any(each.name == gpu.RTX for each in accelerators):
        yield subject.error(
            f"asks for the accelerator {gpu.RTX}, which NVIDIA's image refuses: only our own server knows it",
            'publish it with accelerator = "tensorrt", or serve it with serve install --gpu',
        )
    elif on_gpu and not gpu.here():
        yield subject.warning("asks for a GPU, and this machine has none", "serve it on a machine with a GPU")
    cores = len(os.sched_getaffinity(0))
    stated = {key: value.string_value for key, value in subject.config.parameters.items()}.get(THREADS) or "0"
    if not stated.isdecimal():
        yield subject.error(
            f"the parameter {THREADS} is {stated!r}, no number", f"set {THREADS} to a number of threads"
        )
        return
    threads = int(stated) or cores
    copies = sum(group.count for group in groups if group.kind == ModelInstanceGroup.KIND_CPU)
    if copies > 1 and copies * threads > cores:
        yield subject.warning(
            f"{copies} instances with {threads} threads each share {cores} cores, which can halve the throughput",
            f"set {THREADS} to {max(1, cores // copies)}, or count to 1",
        )


def _engine(subject: Subject) -> Iterator[Finding]:
    """Compare the TensorRT that built an engine with that of the image that is to serve it."""
    if subject.backend != "tensorrt":
        return
    if not subject.image:
        yield subject.warning(
            "is a TensorRT engine, which only NVIDIA's image serves", "say which: serve check --image 26.07"
        )
    for number in subject.versions:
        path = subject.home / str(number) / (subject.config.default_model_filename or gpu.PLAN)
        built = ".".join(map(str, path.read_bytes()[VERSION])) if path.is_file() else ""
        theirs = releases.TENSORRT.get(subject.image, "")
        if subject.image and not theirs:
            yield subject.warning(
                f"which TensorRT is in {subject.image} is not known", "build the engine in that image"
            )
        elif built and theirs and not releases.same(built, theirs):
            yield subject.error(
                f"was built by TensorRT {built}, and Triton {subject.image} has {theirs}",
                "build the engine in the image that serves it",
                path,
            )


def _elsewhere(subject: Subject) -> Iterator[Finding]:
    """Say of a model that no dry load tries, so that silence about it is no praise."""
    if subject.backend == "python" and not subject.lineage:
        yield subject.warning("is Python of others, so it is not tried here", "try it with: serve up")
    elif not subject.backend:
        yield subject.warning("states no backend, so it is not tried here", "set backend, as in backend: 'onnxruntime'")
    elif subject.backend not in (*FILES, "ensemble"):
        yield subject.warning(
            f"asks for the backend {subject.backend}, which our server does not have, so it is not tried here",
            "correct its name, or serve it with NVIDIA's image",
        )


def _batching(subject: Subject) -> Iterator[Finding]:
    batching = subject.config.dynamic_batching
    if not subject.config.HasField("dynamic_batching"):
        return
    if not subject.config.max_batch_size:
        yield subject.error("dynamic_batching without max_batch_size", "set max_batch_size, or leave it out")
        return
    free = [t.name for t in subject.config.input if any(dim < 0 for dim in t.dims) and not t.allow_ragged_batch]
    buckets = (subject.lineage.get("serve") or {}).get("buckets")
    if free and not buckets and not _padded(subject):
        yield subject.warning(
            f"requests whose {', '.join(free)} differ in size are not batched together",
            "let clients pad to few sizes: serve add --set 'buckets={NAME = [16, 32, 64]}', or send them through a "
            "pipeline that pads",
        )
    too_large = [size for size in batching.preferred_batch_size if size > subject.config.max_batch_size]
    if too_large:
        yield subject.error(f"preferred_batch_size {too_large[0]} is above max_batch_size", "lower it")


def _cache(subject: Subject) -> Iterator[Finding]:
    if reason := cache.refusal(subject.config):
        yield subject.error(reason, cache.FIX)


RULES: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    *(_names, _versions, _files, _graph, _calls, _hardware, _engine, _elsewhere, _batching, _cache),
    *contradictions.RULES,
    scheduling.findings,
)
