"""`serve.add`, which the command `serve add` calls too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from pydantic import ValidationError

from loadtest.calls import keywords
from loadtest.calls.keywords import Place
from modelathe.commandline import document, reporting
from modelathe.errors import UsageError
from modelathe.notebook import Result, View
from modelathe.tensors import Dim
from serve.config import settings
from serve.config.settings import Settings
from serve.config.target import Target
from serve.repository import source as sources
from serve.repository import staging
from serve.repository.source import Source
from serve.rollout import rollout
from serve.server import dryload

TARGET = ("device", "runtime", "cores", "batch")


class AddOptions(TypedDict, total=False):
    """The options of the command `serve add`; `dim` takes Dims, and `settings` a mapping too."""

    dim: Sequence[Dim]
    batch_axis: str
    device: Literal["cpu", "cuda"]
    runtime: Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
    cores: int
    batch: Sequence[int]
    settings: Place | Mapping[str, Any] | None
    set: Sequence[str]
    check: bool
    allow_nonfinite: bool
    load_timeout: float


@dataclass(frozen=True, kw_only=True)
class Added(Result):
    """A version that was put into a repository.

    Args:
        model: its model's name.
        number: its own.
        state: `live`, or `staged` until it is promoted.
        url: the server that has loaded it; None where none serves the repository.
        untried: what the throw-away server could not be asked; empty where it was.
    """

    model: str
    number: int
    state: Literal["live", "staged"]
    url: str | None
    untried: str

    def view(self) -> View:
        """Return where it is, and what was not tried."""
        shown = {"state": self.state, "server": self.url or "none", "digest": self.document["digest"]}
        return View(f"{self.model} version {self.number}", shown, [self.untried])


def add(
    source: Place,
    repository: Place = "model_repository",
    *,
    name: str = "",
    quiet: bool = False,
    **options: Unpack[AddOptions],
) -> Added:
    """Put a model into a repository as its next version, once a throw-away server has loaded it.

    The first version of a model is live at once, also on a server over the repository; a later one waits for
    `serve promote`.

    Args:
        source: an ONNX file, a bundle of `optimize`, or REPOSITORY/MODEL/NUMBER.
        repository: where it is put.
        name: the model's; needed where the source is an ONNX file.
        quiet: say nothing while it goes on.
        options: those of the command, with underscores: `settings={"queue_delay_us": 200}`, `batch=(1, 32)`,
            `dim=[Dim("tokens", 1, 128, 512)]`. `load_timeout` is in seconds.

    Raises:
        BadRepository: the source is no model, or the repository cannot be written.
        ModelRefused: the server does not load it; nothing was published.
        UsageError: a wrong option.
    """
    keywords.check(options, AddOptions.__annotations__)
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    dims = {dim.name: dim for dim in given.get("dim", ())}
    place, check = Path(repository), given.get("check", True)
    found = sources.load(Path(source), dims, given.get("batch_axis", ""))
    model = name or found.name
    if not model:
        raise UsageError("the model needs a name", fix="say --name NAME")
    made_for, asked = _target(found, given), _settings(found, given)
    with reporting(quiet) as report, staging.stage(place, model, found, made_for, asked) as staged:
        untried = "" if check else "not tried: --no-check"
        if check:
            report("loading it in a throw-away server", 0.0)
            untried = dryload.staged(staged, nonfinite=given.get("allow_nonfinite", False))
        first = not (place / model).exists()
        page = found.page.read_text() if found.page else None
        version = staging.publish(staged, dict(found.lineage), page)
    limit = {"limit": given["load_timeout"]} if "load_timeout" in given else {}
    url = rollout.promote(place, model, version.number, **limit).url if first else None
    state: Literal["live", "staged"] = "live" if first else "staged"
    shown = {"model": model, "number": version.number, "state": state, "url": url, "untried": untried}
    told = document(**shown, digest=version.digest)
    return Added(document=told, model=model, number=version.number, state=state, url=url, untried=untried)


def _target(found: Source, given: Mapping[str, Any]) -> Target:
    wanted = {key: given[key] for key in TARGET if key in given}
    if "batch" in wanted:
        wanted["batch"] = tuple(wanted["batch"])
    try:
        return replace(found.target or Target(), **wanted)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UsageError(f"--{wrong['loc'][0]}: {wrong['msg']}", fix="change that option") from None


def _settings(found: Source, given: Mapping[str, Any]) -> Settings:
    told, pairs = given.get("settings"), keywords.several(given.get("set", ()))
    if isinstance(told, Mapping):
        return settings.gather(None, pairs, {**found.settings, **told})
    return settings.gather(None if told is None else Path(told), pairs, found.settings)
