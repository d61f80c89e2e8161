"""Contents: what the servers of a cluster serve of a repository, and what they need for it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from modelathe.errors import closest
from modelathe.tensors import TRITON_DTYPES, TensorSpec, packed
from serve.config import model_config, releases
from serve.config.errors import BadRepository
from serve.repository import interface, lint
from serve.repository import tree as repository
from serve.rollout import rollout
from serve.watch.probe import SEQUENCE

SHARED_GIB = 1
"""GiB of shared memory, through which Python backends pass tensors; it counts as the container's own."""
THREADS = "intra_op_thread_count"


@dataclass(frozen=True)
class Contents:
    """The live versions of a repository, or those with one candidate in its model's place.

    Args:
        place: the repository.
        configs: the configuration of each model, by its name.
        versions: the versions of each that are loaded.
        digests: the SHA-256 of every file that is served, by its path below `place`.
    """

    place: Path
    configs: Mapping[str, ModelConfig]
    versions: Mapping[str, tuple[int, ...]]
    digests: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One SHA-256 over all files that are served."""
        return repository.total(dict(self.digests))

    @property
    def cores(self) -> int:
        """CPU cores of a server: the largest target of its models, or the threads of one that names none."""
        return max(_cores(self.place, model, config, self.versions[model]) for model, config in self.configs.items())

    @property
    def gpus(self) -> int:
        """GPUs of a server."""
        groups = [
            group
            for config in self.configs.values()
            for group in config.instance_group
            if group.kind == ModelInstanceGroup.KIND_GPU
        ]
        return max((max(group.gpus, default=0) + 1 for group in groups), default=0)

    @property
    def memory_gib(self) -> int:
        """A first guess at a server's memory in GiB: one, the shared memory, and four times its files an instance."""
        need = 0
        for model, config in self.configs.items():
            files = sum((self.place / path).stat().st_size for path in self.digests if path.startswith(f"{model}/"))
            need += 4 * files * max(1, sum(group.count for group in config.instance_group))
        return 1 + SHARED_GIB + math.ceil(need / 2**30)

    @property
    def asked(self) -> list[str]:
        """The models that clients ask: those that no other of them calls."""
        called = {name for model in self.configs for name in repository.calls(self.place, model)}
        return [model for model in self.configs if model not in called] or list(self.configs)

    @property
    def delay_us(self) -> int:
        """The longest that a batcher waits for more requests, in microseconds."""
        return max(int(config.dynamic_batching.max_queue_delay_microseconds) for config in self.configs.values())

    def questions(self) -> list[dict[str, Any]]:
        """Return the smallest request to each model, as `serve.deploy.ask` sends it.

        Raises:
            BadRepository: a configuration does not say what its model takes.
        """
        return [question(self.place, model) for model in self.configs]


def read(place: Path) -> Contents:
    """Return what a repository serves now.

    Raises:
        BadRepository: a model has an error that `serve check` finds, no live version, or is being promoted.
    """
    names = repository.models(place)
    for name in names:
        if any(standing.state == "loading" for standing in rollout.standings(place, name)):
            raise BadRepository("is being promoted", where=str(place / name), fix=f"serve promote {name}")
    for finding in lint.check(place, image=releases.CLOSED):
        if finding.level == "error":
            raise BadRepository(finding.what, where=finding.where, fix=finding.fix)
    versions = {name: tuple(repository.live(place, name)) for name in names}
    digests = {path: digest for name in names for path, digest in _files(place, name, versions[name]).items()}
    return Contents(place, {name: repository.config(place, name) for name in names}, versions, digests)


def candidate(now: Contents, model: str) -> tuple[Contents, str]:
    """Return the contents with the newest staged version of `model` in its place, and that version's configuration.

    Raises:
        BadRepository: there is no such model, it has no version that was never live, or that is a part of a pipeline.
    """
    if model not in now.configs:
        known = ", ".join(now.configs)
        raise BadRepository(
            f"holds no model {model}", where=str(now.place), fix=f"{closest(model, list(now.configs))}it holds {known}"
        )
    staged = [one.number for one in rollout.standings(now.place, model) if one.state == "staged"]
    number = max(staged, default=0)
    if number < max(now.versions[model]):
        raise BadRepository(
            "has no candidate: its newest version is live, or did not load",
            where=str(now.place / model),
            fix="publish one with: optimize run, or serve add",
        )
    if len(parts := rollout.together(now.place, model, number)) > 1:
        raise BadRepository(
            f"its candidate changes together with {', '.join(sorted(set(parts) - {model}))}: no share of it can",
            where=str(now.place / model),
            fix="deploy without --canary, behind `serve promote`",
        )
    lineage = repository.read_lineage(now.place, model, number)
    repository.verify_version(now.place, model, number, lineage)
    digests = {path: digest for path, digest in now.digests.items() if not path.startswith(f"{model}/")}
    digests |= _files(now.place, model, (number,))
    digests[f"{model}/{repository.CONFIG}"] = lineage["digests"][repository.CONFIG]
    config = model_config.parse(lineage["config"], where=str(now.place / model / str(number)))
    return Contents(now.place, {**now.configs, model: config}, {**now.versions, model: (number,)}, digests), lineage[
        "config"
    ]


def _files(place: Path, model: str, numbers: tuple[int, ...]) -> dict[str, str]:
    """Return the digest of each file that a server reads of these versions, by its path below the repository."""
    ours = (repository.LINEAGE, repository.PAGE)
    home = place / model
    paths = [path for number in numbers for path in (home / str(number)).rglob("*") if path.is_file()]
    served = [path for path in paths if path.name not in ours and not path.name.startswith(".")]
    config = [home / repository.CONFIG] if (home / repository.CONFIG).is_file() else []
    return {path.relative_to(place).as_posix(): repository.digest(path) for path in sorted([*config, *served])}


def _cores(place: Path, model: str, config: ModelConfig, numbers: tuple[int, ...]) -> int:
    lineages = [
        repository.read_lineage(place, model, number)
        for number in numbers
        if repository.published(place / model / str(number))
    ]
    stated = [lineage["target"]["cores"] for lineage in lineages if "target" in lineage]
    threads = config.parameters[THREADS].string_value if THREADS in config.parameters else ""
    instances = max(1, sum(group.count for group in config.instance_group))
    return int(max(stated, default=instances * int(threads or 1)))


def question(place: Path, model: str) -> dict[str, Any]:
    """Return the smallest request to a model, as `serve.deploy.ask` sends it; errors as for `Contents.questions`."""
    found = interface.read(place, model)
    parameters: dict[str, Any] = {}
    if found.config.HasField("sequence_batching"):
        number = str(SEQUENCE) if found.text_ids else SEQUENCE
        parameters = {"sequence_id": number, "sequence_start": True, "sequence_end": True}
    inputs = [_tensor(spec) for spec in found.inputs if spec.name not in found.optional]
    return {"model": model, "inputs": inputs, "parameters": parameters}


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    """Return the smallest tensor that a model takes: one value, the largest that it may have, as often as it fits."""
    import numpy as np

    shape = spec.shape(size="minimum")
    word = spec.examples[0] if spec.examples else b"1"
    value = word if spec.dtype == "object" else (spec.values or (0, 1))[1]
    return {
        "name": spec.name,
        "datatype": TRITON_DTYPES[spec.dtype],
        "shape": list(shape),
        "value": packed(np.array([value], spec.dtype)).hex(),
        "count": math.prod(shape),
    }
