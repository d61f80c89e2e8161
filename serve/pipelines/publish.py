"""Publish: the models of a pipeline enter the repository together, once a throw-away server has answered through them.

The pipeline is the last of them: before it, nothing names the others. `lineage.json` says `kind` (`pipeline`, or `step`
of one), and of a pipeline what it `calls`.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelInstanceGroup, ModelOutput

from modelathe.client import Client
from modelathe.errors import RequestRejected, UsageError
from modelathe.tensors import Arrays, Dim, TensorSpec
from serve.config import model_config
from serve.config.errors import BadRepository
from serve.config.settings import Settings
from serve.config.target import Target
from serve.repository import numbering, scratch, staging
from serve.repository import tree as repository
from serve.server import dryload

MODELS = Path(__file__).with_name("models")
"""The files of our Python models: a folder for each, and beside them what they share."""
SHARED = ("step.py",)


@dataclass(frozen=True)
class Called:
    """The published model that a pipeline is built around.

    Args:
        place: its repository.
        name: its name.
        config: its configuration.
        lineage: that of its live version.
        inputs: the specs of its inputs.
        outputs: the specs of its outputs.
    """

    place: Path
    name: str
    config: ModelConfig
    lineage: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batch(self) -> Dim:
        """The batch axis."""
        axis = self.inputs[0].dims[0]
        assert isinstance(axis, Dim)
        return axis

    def error(self, what: str, fix: str) -> BadRepository:
        """Return why no pipeline can be built around the model."""
        return BadRepository(what, where=str(self.place / self.name), fix=fix)


@dataclass(frozen=True)
class Part:
    """One model of a pipeline.

    Args:
        config: its configuration, but for the versions.
        inputs: the specs of its inputs.
        outputs: the specs of its outputs.
        files: what goes into its version folder, by name.
        lineage: what to keep of it.
    """

    config: ModelConfig
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    lineage: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """A request that the called model must answer too, and what it means if it does not."""

    request: Arrays
    what: str


def called(place: Path, model: str) -> Called:
    """Return the model to build around.

    Raises:
        BadRepository: the repository does not hold it, its files changed, it has no lineage or does not take batches.
    """
    if model not in (names := repository.models(place)):
        raise BadRepository(f"holds no model {model}", where=str(place), fix=f"it holds {', '.join(names)}")
    repository.verify(place, [model])
    config, lineage = repository.config(place, model), repository.read_lineage(place, model)
    inputs, outputs = (tuple(map(TensorSpec.from_document, lineage[kind])) for kind in ("inputs", "outputs"))
    found = Called(place.absolute(), model, config, lineage, inputs, outputs)
    if lineage.get("kind"):
        raise found.error(f"is the {lineage['kind']} of a pipeline", "name the model that it calls")
    if not config.max_batch_size or config.HasField("sequence_batching"):
        raise found.error("a pipeline needs a model that takes batches and remembers nothing", "publish such a model")
    return found


def python(
    name: str, inner: Called, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], parameters: Mapping[str, Any]
) -> ModelConfig:
    """Return the configuration of a Python model that batches as much as the called one."""
    config = _boundary(ModelConfig(name=name, backend="python"), inner, inputs, outputs)
    config.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    config.dynamic_batching.SetInParent()
    for key, value in parameters.items():
        config.parameters[key].string_value = str(value)
    return config


def ensemble(
    name: str,
    inner: Called,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    steps: Sequence[tuple[str, Mapping[str, str], Mapping[str, str]]],
) -> ModelConfig:
    """Return the configuration of an ensemble; a step is a model, its inputs and outputs with the tensors' names."""
    config = _boundary(ModelConfig(name=name, platform="ensemble"), inner, inputs, outputs)
    for model, taken, given in steps:
        # The version that is live when the request comes.
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        step.input_map.update(taken)
        step.output_map.update(given)
    return config


def _boundary(
    config: ModelConfig, inner: Called, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> ModelConfig:
    config.max_batch_size = inner.config.max_batch_size
    config.input.extend(model_config.stated(ModelInput(), spec, True) for spec in inputs)
    config.output.extend(model_config.stated(ModelOutput(), spec, True) for spec in outputs)
    for tensor in (*config.input, *config.output):
        # Where the called model reshapes, it does so itself.
        tensor.ClearField("reshape")
    return config


def pipeline(inner: Called, **more: Any) -> dict[str, Any]:
    """Return what the lineage of a pipeline around `inner` says, with `more`."""
    digest = repository.total(inner.lineage["digests"])
    kept = {key: inner.lineage[key] for key in ("deviation",) if key in inner.lineage}
    call = {"model": inner.name, "number": inner.lineage["number"], "digest": digest}
    return {"kind": "pipeline", "calls": [call], **kept, **more}


def files(model: str, *shared: str) -> dict[str, Path]:
    """Return the files of one of our Python models, with what it shares with others."""
    return {"model.py": MODELS / model / "model.py", **{name: MODELS / name for name in (*SHARED, *shared)}}


def publish(
    inner: Called, parts: Sequence[Part], *, check: bool = True, trial: Trial | None = None
) -> list[staging.Version]:
    """Publish the parts of a pipeline, the pipeline itself last.

    The first version is live by its configuration; `rollout.promote` then tells a running server. Of a pipeline
    that was there before, all parts wait to be promoted, and are promoted together. Where one cannot be published,
    those before it are taken back.

    Args:
        inner: the model that is called.
        parts: steps, then the pipeline.
        check: let a throw-away server answer through all of them first.
        trial: what the model itself is asked then.

    Raises:
        UsageError: a name cannot be a model's, or two are the same.
        BadRepository: a name belongs to another model, or the server's answer is not what the specs say.
        ModelRefused: the server does not load a part.
    """
    place = inner.place
    _check_names(inner, parts)
    with scratch.folder(place.parent, f".{place.name}.staged-") as at:
        staged = [_lay_out(at, inner, part) for part in parts]
        if check:
            (at / inner.name).symlink_to(place / inner.name)
            _try(staged[-1], inner, trial)
            (at / inner.name).unlink()
        together = {"parts": {one.model: one.number for one in staged}}
        with _all_or_none(at, staged):
            return [staging.publish(one, {**part.lineage, **together}) for one, part in zip(staged, parts, strict=True)]


@contextmanager
def _all_or_none(at: Path, staged: Sequence[staging.Staged]) -> Iterator[None]:
    """Move what the block published back to the folder `at` if it fails, and the configurations to what they were."""
    configs = [one.repository / one.model / repository.CONFIG for one in staged]
    kept = [at / f"{one.model}.before" for one in staged]
    for config, copy in zip(configs, kept, strict=True):
        if config.exists():
            shutil.copy(config, copy)
    try:
        yield
    except BaseException:
        for one, config, copy in reversed(list(zip(staged, configs, kept, strict=True))):
            if one.folder.exists():
                continue  # it never left
            if copy.exists():
                copy.replace(config)
                (config.parent / str(one.number)).rename(one.folder)
            else:
                config.parent.rename(one.folder.parent)
        raise


def _check_names(inner: Called, parts: Sequence[Part]) -> None:
    names = [inner.name, *(part.config.name for part in parts)]
    if len(set(names)) < len(names):
        raise UsageError(f"--name {names[-1]} is the name of another model of the pipeline", fix="choose another name")
    for part in parts:
        name = part.config.name
        staging.check(inner.place, name)
        if not (inner.place / name).exists():
            continue
        newest = inner.place / name / str(max(repository.live(inner.place, name), default=0))
        known = repository.read_lineage(inner.place, name) if repository.published(newest) else {}
        if known.get("kind") != part.lineage["kind"]:
            raise BadRepository("is another model", where=str(inner.place / name), fix="choose another --name")


def _lay_out(at: Path, inner: Called, part: Part) -> staging.Staged:
    name = part.config.name
    number = numbering.upcoming(inner.place, name)
    part.config.version_policy.specific.versions[:] = [number]
    target = Target(**inner.lineage["target"])
    staged = staging.Staged(at, name, number, part.config, inner.place, part.inputs, part.outputs, target, Settings())
    staged.folder.mkdir(parents=True)
    (at / name / repository.CONFIG).write_text(model_config.text(part.config))
    for file, source in part.files.items():
        shutil.copyfile(source, staged.folder / file)
    return staged


def _try(staged: staging.Staged, inner: Called, trial: Trial | None) -> None:
    def ask_the_model(client: Client) -> None:
        if trial is None:
            return
        try:
            client.infer(inner.name, trial.request)
        except RequestRejected as error:
            raise inner.error(f"{trial.what}: {error.what}", "give the files that belong to the model") from None

    dryload.staged(staged, ask_the_model)
