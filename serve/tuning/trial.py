"""Trial: private copies of a model's live version, each served with a configuration of its own by one server."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from loadtest.plan.data import payload
from modelathe.errors import BadInput
from modelathe.tensors import TensorSpec
from serve.config import model_config
from serve.repository import scratch, tree
from serve.server.endpoint import Endpoint
from serve.server.options import Listen
from serve.server.tritonserver import running
from serve.simulate.configuration import THREADS, Configuration


@dataclass(frozen=True)
class Subject:
    """What is tuned.

    Args:
        repository: where the model is.
        model: its name.
        number: its highest live version.
        config: its present configuration.
    """

    repository: Path
    model: str
    number: int
    config: ModelConfig

    @property
    def folder(self) -> Path:
        """The version's folder."""
        return self.repository / self.model / str(self.number)

    @property
    def digest(self) -> str:
        """The digest of the version's files, its lineage apart."""
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.name != tree.LINEAGE)
        return tree.total({str(path.relative_to(self.folder)): tree.digest(path) for path in found})

    def inputs(self) -> list[TensorSpec] | None:
        """Return the inputs as requests carry them, with typical sizes; None where no lineage states them."""
        if not tree.published(self.folder):
            return None
        return payload.from_lineage(self.repository, self.model, str(self.number))[0]


def subject(repository: Path, model: str) -> Subject:
    """Return the model's live version.

    Raises:
        BadInput: there is no such model, or none of its versions is live.
    """
    if model not in tree.models(repository):
        known = ", ".join(tree.models(repository))
        raise BadInput("there is no such model", where=f"{repository}/{model}", fix=f"tune one of {known}")
    live = tree.live(repository, model)
    if not live:
        raise BadInput("no version of it is live", where=f"{repository}/{model}", fix="make one live: serve promote")
    return Subject(repository, model, live[-1], tree.config(repository, model))


def edited(config: ModelConfig, wanted: Configuration) -> ModelConfig:
    """Return the configuration with threads, instances, largest batch and delay as wanted; all else stays."""
    made = ModelConfig()
    made.CopyFrom(config)
    made.parameters[THREADS].string_value = str(wanted.threads)
    if not made.instance_group:
        made.instance_group.add(name=made.name)
    del made.instance_group[1:]
    made.instance_group[0].count = wanted.instances
    if made.max_batch_size:
        made.max_batch_size = wanted.max_batch
        warm = [one for one in made.model_warmup if one.batch_size <= wanted.max_batch]
        del made.model_warmup[:]
        made.model_warmup.extend(warm)
    if not wanted.dynamic:
        made.ClearField("dynamic_batching")
        return made
    made.dynamic_batching.SetInParent()
    made.dynamic_batching.max_queue_delay_microseconds = round(wanted.delay * 1e6)
    preferred = [size for size in made.dynamic_batching.preferred_batch_size if size <= wanted.max_batch]
    del made.dynamic_batching.preferred_batch_size[:]
    made.dynamic_batching.preferred_batch_size.extend(preferred)
    return made


@contextmanager
def served(subject: Subject, configs: Mapping[str, ModelConfig], log: Path) -> Iterator[Endpoint]:
    """Serve copies of the version until the block ends.

    Args:
        subject: what is copied; its repository is not touched.
        configs: a name of a copy, and what it is served with.
        log: what the server prints.

    Raises:
        ModelRefused: the server does not load one.
        ServerFailed: it died.
    """
    with scratch.folder() as at:
        for name, config in configs.items():
            home = at / name
            # Without its lineage, whose digests are those of another configuration.
            leave = shutil.ignore_patterns(tree.LINEAGE, tree.PAGE)
            shutil.copytree(subject.folder, home / str(subject.number), ignore=leave)
            made = ModelConfig()
            made.CopyFrom(config)
            made.name = name
            made.ClearField("response_cache")
            (home / tree.CONFIG).write_text(model_config.text(made))
        with running(at, listen=Listen(log=log), cache=False) as endpoint:
            yield endpoint
