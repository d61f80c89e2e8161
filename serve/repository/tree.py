"""The model repository, read: Triton's own tree, which models and versions it holds, and whether they are as published.

To Triton's files we add to the version folder `lineage.json`: where the version came from, its TensorSpecs, Target and
full configuration, and the digests of its files; and beside it the page of its proof, where it has one.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe import files
from modelathe.errors import UsageError
from serve.config import model_config
from serve.config.errors import BadRepository

LINEAGE = "lineage.json"
PAGE = "report.html"
"""The proof of a version. Its digest stands in the lineage under `proof`: the version's own is of what is served."""
CONFIG = "config.pbtxt"
MODEL_FILE = "model.onnx"
NUMBER = re.compile(r"0|[1-9][0-9]*")
PLATFORMS = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt"}
"""Triton's older names of backends."""
FOUND = {MODEL_FILE: "onnxruntime", "model.xml": "openvino", "model.plan": "tensorrt", "model.py": "python"}
"""The backend that Triton takes by the name of a file, the first in this order, where a configuration names none."""


def models(repository: Path) -> list[str]:
    """Return the names of the models in the repository, sorted.

    Raises:
        BadRepository: if it is not a folder, or holds no model.
    """
    publishing = f"publish a model to it: optimize run WORKLOAD --repository {shlex.quote(str(repository))}"
    if not repository.exists():
        raise BadRepository("does not exist", where=str(repository), fix=f"check the path, or {publishing}")
    if not repository.is_dir():
        raise BadRepository("is a file, not a model repository", where=str(repository), fix="give the folder of models")
    try:
        names = sorted(path.name for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise BadRepository(f"cannot be read: {error.strerror}", where=str(repository)) from None
    if not names:
        raise BadRepository("holds no model", where=str(repository), fix=publishing)
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
    """Return the model's present configuration, with the name and the backend that Triton takes where it has none.

    Raises:
        BadRepository: if there is none, or it cannot be parsed.
    """
    home = repository / model
    path = home / CONFIG
    try:
        bare = not path.exists() and _bare(home)
        found = ModelConfig() if bare else model_config.parse(path.read_text(), where=str(path))
    except (OSError, UnicodeDecodeError):
        raise BadRepository("cannot be read", where=str(path), fix="publish the model again") from None
    found.name = found.name or model
    if not found.backend:
        found.backend = _backend(found, home)
    return found


def _backend(config: ModelConfig, home: Path) -> str:
    """Return the backend that Triton takes for a configuration that names none; empty if it takes none."""
    if config.platform in PLATFORMS:
        return PLATFORMS[config.platform]
    if config.default_model_filename:
        return FOUND.get(config.default_model_filename, "")
    if config.platform:
        return ""
    return next((backend for file, backend in FOUND.items() if any(home.glob(f"[0-9]*/{file}"))), "")


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
    if published(repository / model / str(number)):
        steps.update(call["model"] for call in read_lineage(repository, model, number).get("calls", ()))
    return sorted(steps)


def published(folder: Path) -> bool:
    """Whether the version in this folder was published by us: its lineage is there."""
    return (folder / LINEAGE).exists()


def page(folder: Path) -> Path | None:
    """Return the page of the proof of the version in this folder, None where it has none."""
    return path if (path := folder / PAGE).is_file() else None


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
            "is not a lineage that modelathe wrote", where=str(path), fix="publish the model again"
        ) from None
    return lineage


def note(folder: Path, **values: Any) -> None:
    """Write `values` into the lineage of the version in `folder`."""
    path = folder / LINEAGE
    files.write(path, json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n")


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
            if published(folder):
                lineage = read_lineage(repository, model, number)
                _verify_version(folder, {**lineage["digests"], **lineage.get("proof", {})})


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
    own = digests if live else {name: digests[name] for name in digests if name != CONFIG}
    _verify_version(folder, {**own, **lineage.get("proof", {})})


def _verify_version(folder: Path, digests: dict[str, str]) -> None:
    _check_closed(folder, digests)
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


def _check_closed(folder: Path, digests: dict[str, str]) -> None:
    """Refuse a file that was not published with the version, and a shared library beside it: Triton would run it."""
    there = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    # A lineage is written under a hidden name first; a killed command may have left it.
    known = {folder / name for name in (*digests, LINEAGE)} | set(folder.glob(f".{LINEAGE}.part-*"))
    more = [path for path in there if path not in known or path.is_symlink()]
    for path in sorted([*more, *folder.parent.glob("*.so")]):
        raise BadRepository(
            "was not published with the version", where=str(path), fix="move it away, and find out who put it there"
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
