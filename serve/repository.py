"""The model repository: Triton's own tree, written so that a server never sees half of anything.

A version is *staged* in a private folder beside the repository, itself a complete repository, and *published* by
renames. To Triton's files we add `lineage.json` in the version folder: where the version came from, its TensorSpecs,
Target and full configuration, and the digests of its files.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from loadtest import files
from loadtest.errors import UsageError
from loadtest.tensors import TensorSpec
from serve import model_config, onnx_file, scratch
from serve.errors import BadRepository
from serve.settings import Settings
from serve.target import Target

LINEAGE = "lineage.json"
CONFIG = "config.pbtxt"
MODEL_FILE = "model.onnx"
NUMBER = re.compile(r"0|[1-9][0-9]*")


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


@dataclass(frozen=True)
class Version:
    """A published version; `digest` is a SHA-256 over the digests of its files, `path` its folder."""

    model: str
    number: int
    digest: str
    path: Path


@contextmanager
def stage(
    repository: Path,
    model: str,
    onnx: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    target: Target,
    settings: Settings = model_config.DEFAULT,
) -> Iterator[Staged]:
    """Lay out the next version of `model` in a private folder beside `repository`, removed at the end of the block.

    Args:
        repository: the model repository; made at the first publish if it does not exist.
        model: the name to serve it under.
        onnx: the model file; files with external data that it names are taken along.
        inputs: the specs of the graph's inputs.
        outputs: the specs of the graph's outputs.
        target: what the configuration is derived for.
        settings: what it is to say beside that.

    Raises:
        UsageError: if the name cannot be a folder and a model name.
        BadRepository: if `repository` is not a folder that can be written.
    """
    repository = repository.absolute()
    check(repository, model)
    number = max(numbers(repository, model), default=0) + 1
    config = model_config.build(model, inputs, outputs, target, [number], settings)
    with scratch.folder(repository.parent, f".{repository.name}.staged-") as at:
        staged = Staged(at, model, number, config, repository, tuple(inputs), tuple(outputs), target, settings)
        staged.folder.mkdir(parents=True)
        (staged.path / model / CONFIG).write_text(model_config.text(config))
        onnx_file.copy(onnx, staged.folder / MODEL_FILE)
        yield staged


def check(repository: Path, model: str) -> None:
    """Say at once that `model` could not be published to `repository`; makes the folder that the repository is in.

    Raises:
        UsageError: if the name cannot be a folder and a model name.
        BadRepository: if `repository` is a file, cannot be written, or is a mount point.
    """
    check_name(model)
    _check_writable(repository.absolute())


def publish(staged: Staged, lineage: dict[str, Any], *, live: bool = True) -> Version:
    """Put a staged version into the repository and make it the one that a server loads.

    The first version arrives with its whole model folder by one rename. A later one arrives as a folder that the
    present configuration does not mention, then one rename replaces the configuration; the version before stays.

    Args:
        staged: what `stage` gave.
        lineage: what to keep in `lineage.json` beside the keys that are written here.
        live: without it, a version that is not the first waits in the repository for `serve.rollout.promote`.

    Raises:
        BadRepository: if another command published this number meanwhile, or the repository cannot be written.
    """
    model, number = staged.model, staged.number
    home = staged.repository / model
    digests = _digests(staged.folder, staged.path / model / CONFIG)
    record = {
        **lineage,
        "model": model,
        "number": number,
        **_boundary(staged),
        "target": staged.target.document(),
        "serve": staged.settings.document(),
        "config": model_config.text(staged.config),
        "digests": digests,
        "lived": [now()] if live or not home.exists() else [],
    }
    (staged.folder / LINEAGE).write_text(json.dumps(record, indent=2) + "\n")
    files.sync(staged.path)
    try:
        staged.repository.mkdir(parents=True, exist_ok=True)
        if home.exists():
            files.move(staged.folder, home / str(number))
            if live:
                files.write(home / CONFIG, record["config"])
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


def models(repository: Path) -> list[str]:
    """Return the names of the models in the repository, sorted.

    Raises:
        BadRepository: if it is not a folder, or holds no model.
    """
    if not repository.exists():
        raise BadRepository("does not exist", where=str(repository), fix="publish a model to it with: optimize run")
    if not repository.is_dir():
        raise BadRepository("is a file, not a model repository", where=str(repository), fix="give the folder of models")
    try:
        names = sorted(path.name for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise BadRepository(f"cannot be read: {error.strerror}", where=str(repository)) from None
    if not names:
        raise BadRepository("holds no model", where=str(repository), fix="publish one to it with: optimize run")
    for name in names:
        if not (repository / name / CONFIG).is_file() and not _bare(repository / name):
            raise BadRepository(
                f"has no {CONFIG}", where=str(repository / name), fix="write one, or move the folder away"
            )
    return names


def numbers(repository: Path, model: str) -> list[int]:
    """Return the numbers of all version folders of `model`, sorted; empty if there is no such model."""
    home = repository / model
    return sorted(int(path.name) for path in home.glob("[0-9]*/") if NUMBER.fullmatch(path.name))


def config(repository: Path, model: str) -> ModelConfig:
    """Return the model's present configuration; of a model without one, what Triton will complete.

    Raises:
        BadRepository: if there is none, or it cannot be parsed.
    """
    path = repository / model / CONFIG
    if not path.exists() and _bare(repository / model):
        return ModelConfig(name=model, backend="onnxruntime")
    try:
        return model_config.parse(path.read_text(), where=str(path))
    except (OSError, UnicodeDecodeError):
        raise BadRepository("cannot be read", where=str(path), fix="publish the model again") from None


def live(repository: Path, model: str) -> list[int]:
    """Return the numbers of the versions that a server loads by the present configuration, sorted."""
    there = numbers(repository, model)
    policy = config(repository, model).version_policy
    if policy.HasField("specific"):
        return sorted(set(policy.specific.versions) & set(there))
    return there if policy.HasField("all") else there[-max(1, policy.latest.num_versions) :]


def calls(repository: Path, model: str) -> list[str]:
    """Return the names of the models that `model` calls, sorted: the steps of an ensemble, and what its lineage names.

    Raises:
        BadRepository: its configuration or its lineage cannot be read.
    """
    steps = {step.model_name for step in config(repository, model).ensemble_scheduling.step}
    number = max(live(repository, model), default=0)
    if (repository / model / str(number) / LINEAGE).exists():
        steps.update(call["model"] for call in read_lineage(repository, model, number).get("calls", ()))
    return sorted(steps)


def read_lineage(repository: Path, model: str, number: int | None = None) -> dict[str, Any]:
    """Return the `lineage.json` of a version; of the highest live one unless `number` is given.

    Raises:
        BadRepository: if the version or its lineage is not there, or the file is not what `publish` writes.
    """
    if number is None:
        number = max(live(repository, model), default=0)
    path = repository / model / str(number) / LINEAGE
    try:
        lineage = json.loads(path.read_text())
        if not isinstance(lineage, dict) or not isinstance(lineage["digests"], dict):
            raise ValueError
    except FileNotFoundError:
        raise BadRepository("this version has no lineage", where=str(path), fix="publish it with optimize") from None
    except (OSError, ValueError, KeyError):
        raise BadRepository(
            "is not a lineage that lathe wrote", where=str(path), fix="publish the model again"
        ) from None
    return lineage


def verify(repository: Path, names: Sequence[str] | None = None) -> None:
    """Compare every live version's files with the digests in its lineage; versions without one are taken as they are.

    Args:
        repository: the model repository.
        names: which models; all unless given.

    Raises:
        BadRepository: for the first file that is missing or changed.
    """
    for model in models(repository) if names is None else names:
        for number in live(repository, model):
            folder = repository / model / str(number)
            if (folder / LINEAGE).exists():
                _verify_version(folder, read_lineage(repository, model, number)["digests"])


def verify_version(repository: Path, model: str, number: int, lineage: dict[str, Any], *, live: bool = False) -> None:
    """Compare the files of a version, and its configuration in the lineage, with their digests.

    Args:
        repository: the model repository.
        model: the model's name.
        number: the version's number.
        lineage: its lineage.
        live: compare the model's present configuration too.

    Raises:
        BadRepository: for the first that is missing or changed.
    """
    digests = dict(lineage["digests"])
    folder = repository / model / str(number)
    if hashlib.sha256(lineage["config"].encode()).hexdigest() != digests[CONFIG]:
        raise BadRepository(
            "its configuration changed after it was published", where=str(folder / LINEAGE), fix="publish it again"
        )
    _verify_version(folder, digests if live else {name: digests[name] for name in digests if name != CONFIG})


def _verify_version(folder: Path, digests: dict[str, str]) -> None:
    for name, wanted in digests.items():
        path = folder.parent / CONFIG if name == CONFIG else folder / name
        if not path.is_file():
            raise BadRepository("is missing", where=str(path), fix="publish the model again")
        if digest(path) != wanted:
            raise BadRepository(
                "changed after it was published: its digest is not the one in the lineage",
                where=str(path),
                fix=f"publish the model again, or remove {folder / LINEAGE} to serve it unverified",
            )


def _bare(home: Path) -> bool:
    """Whether a model without a configuration has an ONNX file, by which Triton can complete one."""
    return any(home.glob(f"[0-9]*/{MODEL_FILE}"))


def check_name(model: str) -> None:
    """Refuse a name that cannot be a folder of a repository and a model's name.

    Raises:
        UsageError: saying which letters it may have.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", model) or ".." in model:
        raise UsageError(
            f"the model name {model!r} cannot be a folder of the repository",
            fix="use letters, digits, '_', '-' and '.', and begin with a letter, digit or '_'",
        )


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


def _digests(folder: Path, configuration: Path) -> dict[str, str]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: digest(path) for name, path in sorted({**found, CONFIG: configuration}.items())}


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now() -> str:
    """Return the time as lineages hold it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def total(digests: dict[str, str]) -> str:
    """Return the digest of a version: a SHA-256 over those of its files."""
    return hashlib.sha256(
        "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items())).encode()
    ).hexdigest()
