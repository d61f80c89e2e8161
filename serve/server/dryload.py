"""Dry load: a throw-away server loads a model and answers each batch that it is warmed up with."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe.client import Client, connect
from modelathe.errors import ModelatheError
from modelathe.tensors import Arrays, Dim, TensorSpec, generated
from serve.config.errors import BadRepository, NotInstalled
from serve.repository import batching, interface, onnx_file, scratch, staging
from serve.repository import tree as repository
from serve.repository.finding import Finding
from serve.server import ending
from serve.server.options import Listen
from serve.server.tritonserver import running
from serve.tensorrt import trial

HERE = ("onnxruntime", "openvino")
"""Backends that the server of `serve install` has."""


def staged(version: staging.Staged, more: Callable[[Client], None] = lambda _: None, *, nonfinite: bool = False) -> str:
    """Try a version that no server sees yet; where it wants TensorRT and there is no GPU, compile it.

    Args:
        version: what `serve.repository.staging.stage` gave, or the last part of a pipeline.
        more: asks the same server further questions, and raises where an answer is not right.
        nonfinite: take NaN and infinity for answers.

    Returns:
        Why no server tried it, and what did; empty where one did.

    Raises:
        ModelRefused: the server does not load it.
        BadRepository: an answer lacks an output, has another shape than the specs say, is not finite, or depends on
            the batch that its sample is in.
    """
    if trial.needed(version.config):
        return trial.compiled(version.model, version.config, _file(version.config, version.folder))
    # A cache would answer what is asked twice.
    with running(version.path, grace=0, cache=False) as endpoint, connect(endpoint.grpc) as client:
        more(client)
        inner = version.settings.inner()
        inputs, outputs = (
            [spec.served for spec in specs if spec.name not in inner] for specs in (version.inputs, version.outputs)
        )
        strange = _ask(client, version.model, version.config, inputs, outputs)
        if strange and not nonfinite:
            raise BadRepository(
                f"the answers hold NaN or infinity in {strange}",
                where=version.model,
                fix="if the model is made so, say --allow-nonfinite; else look at its weights and its last step",
            )
        if output := _mixed(client, version.model, version.config, inputs, version.folder):
            raise BadRepository(
                f"the {output} of a sample depends on the batch that it is in",
                where=version.model,
                fix="say --batch-axis none if the first dim is no batch axis; else export the model in evaluation mode",
            )
    return ""


def published(place: Path, model: str, log: Path | None = None) -> Iterator[Finding]:
    """Try what `model`'s configuration serves in the repository `place`; `log` as in `Listen`; raises as `staged`.

    Yields what is to be said of answers that a server gives.
    """
    config = repository.config(place, model)
    if trial.needed(config):
        for number in sorted(repository.live(place, model)):
            said = trial.compiled(model, config, _file(config, place / model / str(number)))
            yield Finding(model, str(place / model), said, "try it on a machine with a GPU", "warning")
        return
    models = [*repository.calls(place, model), model]
    with (
        running(place, models=models, listen=Listen(log=log), grace=0, cache=False) as endpoint,
        connect(endpoint.grpc) as client,
    ):
        found = interface.read(place, model, client=client)
        where = str(place / model)
        if strange := _ask(client, model, found.config, found.inputs, found.outputs, found.optional):
            what, fix = f"the answers hold NaN or infinity in {strange}", "look at its weights and its last step"
            yield Finding(model, where, what, f"{fix}, unless the model is made so", "warning")
        if output := _mixed(client, model, found.config, found.inputs, place / model / str(found.number)):
            fix = "set max_batch_size to 0, and state the first dim of each tensor, -1, if it is no batch axis"
            yield Finding(model, where, f"the {output} of a sample depends on the batch that it is in", fix)


def findings(place: Path, model: str) -> list[Finding]:
    """Return what a throw-away server says is wrong with `model`, in plain words; nothing where all is well.

    A model that only NVIDIA's image can run is passed over, and so is Python of others: who knows what it imports.
    """
    try:
        if not _runs_here(place, model):
            return []
        with scratch.folder() as at:
            return list(published(place, model, at / "server.log"))
    except NotInstalled:
        raise
    except ModelatheError as error:
        what = re.sub(r"^(?:the server says: |model \S+, version \d+: )+", "", error.what)
        fix = ending.fix(what) or f"read what the server says: serve up {place} --log FILE"
        return [Finding(model, str(place / model), what, fix)]


def _runs_here(place: Path, model: str) -> bool:
    config = repository.config(place, model)
    if config.platform == "ensemble":
        return all(_runs_here(place, name) for name in repository.calls(place, model))
    if config.backend == "python":
        number = max(repository.live(place, model), default=0)
        ours = repository.published(place / model / str(number))
        return ours and all(_runs_here(place, name) for name in repository.calls(place, model))
    return config.backend in HERE


def _ask(
    client: Client,
    model: str,
    config: ModelConfig,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    optional: Collection[str] = (),
) -> str:
    """Ask the model for each batch that it is warmed up with, and once without its optional inputs.

    Returns:
        The outputs that held NaN or infinity.
    """
    sequence = int(config.HasField("sequence_batching"))
    rng = np.random.default_rng(0)
    # The steps of a pipeline are not warmed up.
    ours = {1, config.max_batch_size} if config.backend in ("", "python") else {1}
    sizes = sorted({sample.batch_size for sample in config.model_warmup} or ours)
    required = [spec for spec in inputs if spec.name not in optional]
    strange: dict[str, None] = {}
    for size, specs in [*((size, inputs) for size in sizes), *([(sizes[0], required)] if optional else [])]:
        batch = size if config.max_batch_size else None
        answer = client.infer(model, generated(specs, batch, rng), sequence=sequence)
        for spec in outputs:
            _check_answer(model, spec, answer, batch)
            if answer[spec.name].dtype.kind == "f" and not np.isfinite(answer[spec.name]).all():
                strange[spec.name] = None
    return ", ".join(strange)


def _mixed(client: Client, model: str, config: ModelConfig, inputs: Sequence[TensorSpec], folder: Path) -> str:
    """Return the output of a batched model whose rows depend on each other; its parts answer for a pipeline."""
    if config.backend not in HERE or config.HasField("sequence_batching") or not all(spec.batched for spec in inputs):
        return ""
    largest = config.max_batch_size or min(spec.largest_batch for spec in inputs)
    coarse = config.backend != "onnxruntime" or onnx_file.in_integers(_file(config, folder))
    return batching.mixed(partial(client.infer, model), inputs, largest, coarse)


def _file(config: ModelConfig, folder: Path) -> Path:
    return folder / (config.default_model_filename or repository.MODEL_FILE)


def _check_answer(model: str, spec: TensorSpec, answer: Arrays, batch: int | None) -> None:
    where = f"{model}, output {spec.name}"
    if spec.name not in answer:
        raise BadRepository("the server does not answer with it", where=where, fix="export the model again")
    array = answer[spec.name]
    wanted = [batch if axis == 0 and batch else dim for axis, dim in enumerate(spec.dims)]
    if len(wanted) != array.ndim or any(
        have != want for have, want in zip(array.shape, wanted, strict=True) if not isinstance(want, Dim)
    ):
        raise BadRepository(
            f"the served shape is {list(array.shape)}, the spec says {list(spec.shape(batch))}",
            where=where,
            fix="correct the workload's specs, or say --batch-axis none if the first dim is no batch axis",
        )
