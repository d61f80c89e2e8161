"""Finding: one thing that is wrong with a model of a repository, and the model as the rules that look for it see it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tritonclient.grpc.model_config_pb2 import ModelConfig

from serve.repository import tree as repository

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        model: which model.
        where: the file or folder.
        what: the fault.
        fix: what to do about it.
        level: `error` or `warning`.
    """

    model: str
    where: str
    what: str
    fix: str
    level: Level = "error"

    def document(self) -> dict[str, str]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """A model as the rules see it: its folder, its configuration, the versions that it serves, and a lineage if any."""

    home: Path
    config: ModelConfig
    versions: tuple[int, ...]
    lineage: dict[str, Any]
    image: str

    @property
    def model(self) -> str:
        """The model's name: that of its folder."""
        return self.home.name

    @property
    def backend(self) -> str:
        """What runs it."""
        return str(self.config.backend or self.config.platform)

    def error(self, what: str, fix: str, where: Path | None = None) -> Finding:
        """Return an error in the configuration, or in another file."""
        return Finding(self.model, str(where or self.home / repository.CONFIG), what, fix)

    def warning(self, what: str, fix: str, where: Path | None = None) -> Finding:
        """Return a warning, likewise."""
        return Finding(self.model, str(where or self.home / repository.CONFIG), what, fix, "warning")
