"""Dry load: a throw-away server loads a model and answers each batch that it is warmed up with."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig

from loadtest.client import Client, connect
from loadtest.errors import LatheError
from loadtest.tensors import Arrays, Dim, TensorSpec
from serve import interface, repository, scratch, staging
from serve.errors import BadRepository, NotInstalled
from serve.lint import Finding
from serve.server import running

HERE = ("onnxruntime", "openvino")
"""Backends that the server of `serve install` has."""
FIXES = {
    r"KIND_GPU|no GPUs|CUDA": "set kind: KIND_CPU, or serve it on a machine with a GPU: serve install --gpu",
    r"cannot be loaded|[Pp]rotobuf": "export the model again: its file is no graph that the runtime can read",
    r"External data|external data": "put the file with the weights beside the model",
    r"by config\.pbtxt and|in config\.pbtxt and|config\.pbtxt has": "correct config.pbtxt to what the model has",
    r"is not supported|are not supported": "change the configuration, or serve it with NVIDIA's image",
    r"unexpected shape for input": "correct the dims of the input in config.pbtxt, or those in its model_warmup",
    r"warmup|warm-up|killed by SIG.* after a request failed": "correct what model_warmup sends, or leave it out",
    r"memory|bad_alloc": "use a smaller max_batch_size, or a machine with more memory",
    r"the model refused the request": "the graph does not run for every batch; export it again with a free batch axis",
}
"""What to do about what the server says, by words in it."""


def staged(version: staging.Staged, more: Callable[[Client], None] = lambda _: None) -> None:
    """Try a version that no server sees yet.

    Args:
        version: what `serve.staging.stage` gave, or the last part of a pipeline.
        more: asks the same server further questions, and raises where an answer is not right.

    Raises:
        ServerFailed: the server does not load it, or does not answer.
        BadRepository: an answer lacks an output, has another shape than the specs say, or is not finite.
    """
    with running(version.path, grace=0) as endpoint, connect(endpoint.grpc) as client:
        more(client)
        inner = version.settings.inner()
        inputs, outputs = (
            [spec for spec in specs if spec.name not in inner] for specs in (version.inputs, version.outputs)
        )
        _ask(client, version.config, inputs, outputs)


def published(place: Path, model: str, log: Path | None = None) -> None:
    """Try what `model`'s configuration serves in the repository `place`; `log` as in `running`; raises as `staged`."""
    models = [*repository.calls(place, model), model]
    with running(place, models=models, grace=0, log=log) as endpoint, connect(endpoint.grpc) as client:
        found = interface.read(place, model, client=client)
        _ask(client, found.config, found.inputs, found.outputs)


def findings(place: Path, model: str) -> list[Finding]:
    """Return what a throw-away server says is wrong with `model`, in plain words; nothing where all is well.

    A model that only NVIDIA's image can run is passed over, and so is Python of others: who knows what it imports.
    """
    try:
        if not _runs_here(place, model):
            return []
        with scratch.folder() as at:
            published(place, model, at / "server.log")
    except NotInstalled:
        raise
    except LatheError as error:
        what, fix = _plain(error.what)
        return [
            Finding(model, str(place / model), what, fix or f"read what the server says: serve up {place} --log FILE")
        ]
    return []


def _runs_here(place: Path, model: str) -> bool:
    config = repository.config(place, model)
    if config.platform == "ensemble":
        return all(_runs_here(place, name) for name in repository.calls(place, model))
    if config.backend == "python":
        number = max(repository.live(place, model), default=0)
        ours = (place / model / str(number) / repository.LINEAGE).exists()
        return ours and all(_runs_here(place, name) for name in repository.calls(place, model))
    return config.backend in HERE


def _plain(text: str) -> tuple[str, str]:
    """Return the server's words without its own circumstance, and what to do about them."""
    text = re.sub(r"^(?:the server says: |model \S+, version \d+: )+", "", text)
    return text, next((fix for pattern, fix in FIXES.items() if re.search(pattern, text)), "")


def _ask(client: Client, config: ModelConfig, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    alone = int(config.HasField("sequence_batching"))
    rng = np.random.default_rng(0)
    # The steps of a pipeline are not warmed up.
    ours = {1, config.max_batch_size} if config.backend in ("", "python") else {1}
    sizes = {sample.batch_size for sample in config.model_warmup} or ours
    for size in sorted(sizes):
        batch = size if config.max_batch_size else None
        answer = client.infer(config.name, {spec.name: spec.generate(rng, batch) for spec in inputs}, sequence=alone)
        for spec in outputs:
            _check_answer(config.name, spec, answer, batch)


def _check_answer(model: str, spec: TensorSpec, answer: Arrays, batch: int | None) -> None:
    where = f"{model}, output {spec.name}"
    if spec.name not in answer:
        raise BadRepository("the server does not answer with it", where=where, fix="export the model again")
    array = answer[spec.name]
    dims = spec.dims or (1,)
    wanted = [batch if axis == 0 and batch else dim for axis, dim in enumerate(dims)]
    if spec.batched and len(dims) == 1:
        wanted.append(1)
    if len(wanted) != array.ndim or any(
        have != want for have, want in zip(array.shape, wanted, strict=True) if not isinstance(want, Dim)
    ):
        raise BadRepository(
            f"the served shape is {list(array.shape)}, the spec says {list(spec.shape(batch))}",
            where=where,
            fix="correct the workload's specs",
        )
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise BadRepository("the served values are not finite", where=where, fix="look at the model's last step")
