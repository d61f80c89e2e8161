"""Staging: the next version of a model, laid out where no server sees it, and published by renames.

A version is *staged* in a private folder beside the repository, itself a complete repository, and *published* into it.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe import files
from modelathe.tensors import TensorSpec
from serve.config import model_config
from serve.config.errors import BadRepository
from serve.config.settings import Settings
from serve.config.target import Target
from serve.repository import numbering, onnx_file, scratch
from serve.repository.source import Source
from serve.repository.tree import CONFIG, LINEAGE, MODEL_FILE, PAGE, check_name, digest, total

EXTENDED = 1
"""Of Triton's levels of graph optimization the one that float16 bears (`onnx_file.in_float16`)."""


@dataclass(frozen=True)
class Staged:
    """A version that no server sees yet.

    Args:
        path: a complete Triton repository that holds only this version; gone when the `stage` block ends.
        model: the model's name.
        number: the version's number.
        config: its configuration.
        repository: where it will be published.
        inputs: the specs of its inputs.
        outputs: the specs of its outputs.
        target: what it is made for.
        settings: how it is served beside that.
    """

    path: Path
    model: str
    number: int
    config: ModelConfig
    repository: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    target: Target
    settings: Settings

    @property
    def folder(self) -> Path:
        """The version's own folder inside `path`."""
        return self.path / self.model / str(self.number)

    @property
    def digests(self) -> dict[str, str]:
        """The digests of the files that are served, and of the configuration, by name."""
        found = {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*") if path.is_file()}
        found[CONFIG] = self.path / self.model / CONFIG
        return {name: digest(path) for name, path in sorted(found.items())}


@dataclass(frozen=True)
class Version:
    """A published version; `digest` is a SHA-256 over the digests of its files, `path` its folder."""

    model: str
    number: int
    digest: str
    path: Path


@contextmanager
def stage(
    repository: Path, model: str, source: Source, target: Target, settings: Settings = model_config.DEFAULT
) -> Iterator[Staged]:
    """Lay out the next version of `model` in a private folder beside `repository`, removed at the end of the block.

    Args:
        repository: the model repository; made at the first publish if it does not exist.
        model: the name to serve it under.
        source: the file, which takes its external data along, and the specs of the graph's inputs and outputs.
        target: what the configuration is derived for.
        settings: what it is to say beside that.

    Raises:
        UsageError: if the name cannot be a folder and a model name.
        BadRepository: if `repository` is not a folder that can be written.
    """
    repository = repository.absolute()
    check(repository, model)
    number = numbering.upcoming(repository, model)
    inputs, outputs = source.inputs, source.outputs
    config = model_config.build(model, inputs, outputs, target, [number], settings)
    if target.runtime != "openvino" and onnx_file.in_float16(source.onnx):
        config.optimization.graph.level = EXTENDED
    if not config.max_batch_size:
        inputs, outputs = (tuple(spec.unbatched for spec in specs) for specs in (inputs, outputs))
    with scratch.folder(repository.parent, f".{repository.name}.staged-") as at:
        staged = Staged(at, model, number, config, repository, inputs, outputs, target, settings)
        staged.folder.mkdir(parents=True)
        (staged.path / model / CONFIG).write_text(model_config.text(config))
        onnx_file.copy(source.onnx, staged.folder / MODEL_FILE)
        yield staged


def check(repository: Path, model: str) -> None:
    """Say at once that `model` could not be published to `repository`; makes the folder that the repository is in.

    Raises:
        UsageError: if the name cannot be a folder and a model name.
        BadRepository: if `repository` is a file, cannot be written, or is a mount point.
    """
    check_name(model)
    _check_writable(repository.absolute())


def publish(staged: Staged, lineage: dict[str, Any], page: str | None = None) -> Version:
    """Put a staged version into the repository, where it waits for `serve.rollout.rollout.promote`.

    The first version arrives with its whole model folder, configuration included, by one rename: a server that starts
    loads it. A later one arrives as a folder that the present configuration does not mention.

    Args:
        staged: what `stage` gave.
        lineage: what to keep in `lineage.json` beside the keys that are written here.
        page: the proof of the version, as HTML, where there is one.

    Raises:
        BadRepository: if another command published this number meanwhile, or the repository cannot be written.
    """
    model, number = staged.model, staged.number
    home = staged.repository / model
    digests = staged.digests
    proof = {PAGE: digest(files.write(staged.folder / PAGE, page))} if page else {}
    record = {
        **lineage,
        "model": model,
        "number": number,
        **_boundary(staged),
        "target": staged.target.document(),
        "serve": staged.settings.document(),
        "config": model_config.text(staged.config),
        "digests": digests,
        **({"proof": proof} if proof else {}),
        "lived": [],
    }
    (staged.folder / LINEAGE).write_text(json.dumps(record, indent=2) + "\n")
    files.sync(staged.path)
    try:
        staged.repository.mkdir(parents=True, exist_ok=True)
        numbering.take(staged.repository, model, number)
        if home.exists():
            files.move(staged.folder, home / str(number))
        else:
            files.move(staged.path / model, home)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise BadRepository(
                f"version {number} was published by another command meanwhile", where=str(home), fix="run it again"
            ) from None
        raise
    return Version(model, number, total(digests), home / str(number))


def _boundary(staged: Staged) -> dict[str, Any]:
    """Return the specs of what clients send and get, and under `kept` of what the server fills in and keeps itself."""
    inner = staged.settings.inner()
    found: dict[str, Any] = {"kept": {}}
    for kind, specs in (("inputs", staged.inputs), ("outputs", staged.outputs)):
        found[kind] = [spec.document() for spec in specs if spec.name not in inner]
        found["kept"][kind] = [spec.document() for spec in specs if spec.name in inner]
    return found


def _check_writable(repository: Path) -> None:
    if repository.exists() and not repository.is_dir():
        raise BadRepository("is a file, not a model repository", where=str(repository), fix="give the folder of models")
    try:
        repository.parent.mkdir(parents=True, exist_ok=True)
        here = repository if repository.exists() else repository.parent
        if not (os.access(here, os.W_OK) and os.access(repository.parent, os.W_OK)):
            raise PermissionError
    except (PermissionError, FileExistsError, NotADirectoryError):
        raise BadRepository(
            "the repository and the folder it is in must be writable",
            where=str(repository),
            fix="check its permissions",
        ) from None
    if here.stat().st_dev != repository.parent.stat().st_dev:
        raise BadRepository(
            "is a mount point, so nothing can be renamed into it",
            where=str(repository),
            fix="use a folder inside it as the repository",
        )
