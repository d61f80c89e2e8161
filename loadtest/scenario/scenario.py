"""Scenario: phases of load, one after another, and what they must show; read from TOML.

A field of a phase is the command line's option of the same name, so a scenario adds no second meaning to anything.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from loadtest.judge import thresholds
from loadtest.plan.options import seconds
from loadtest.scenario.judges import JUDGES
from modelathe.errors import UsageError

FOLDER = Path(__file__).parent / "scenarios"
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
_STRICT = ConfigDict(extra="forbid", strict=True)


def _seconds(value: object) -> object:
    return seconds(value) if isinstance(value, str) else float(value) if type(value) is int else value


def _rate(value: object) -> object:
    if isinstance(value, str):
        if not _SHARE.fullmatch(value):
            raise ValueError("write requests per second, or a share of the saturation such as '70%'")
        return value
    return float(value) if type(value) is int else value


def _sentences(values: tuple[str, ...]) -> tuple[str, ...]:
    try:
        thresholds.parse(values)
    except UsageError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error
    return values


def _known(value: str) -> str:
    if value not in JUDGES:
        raise ValueError(f"use one of {', '.join(JUDGES)}")
    return value


Span = Annotated[float, BeforeValidator(_seconds), Field(ge=0, allow_inf_nan=False)]
Longer = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float | str, BeforeValidator(_rate)]
Count = Annotated[int, Field(ge=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1)]
Sentences = Annotated[tuple[str, ...], AfterValidator(_sentences)]


@dataclass(frozen=True, config=_STRICT)
class Phase:
    """A stretch of load. Its fields but `name` and `thresholds` are options of `loadtest run`.

    Args:
        name: of its result file and its row in the report.
        duration: seconds, or a text such as `30s`.
        concurrency: closed loop; several numbers make a phase of each.
        rate: open loop, requests per second, or a share of the measured saturation such as `70%`.
        arrival: as `--arrival`.
        profile: as `--profile`; a number in it may be a share of the saturation too.
        requests: stop after so many.
        think: seconds, or a text.
        warmup: seconds, or a text.
        batch: samples per request; several numbers make a phase of each, as far as the model takes them.
        thresholds: what this phase must show, beside the scenario's own.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")]
    duration: Longer
    concurrency: Count | Counts | None = None
    rate: Rate | None = None
    arrival: str | None = None
    profile: str | None = None
    requests: Count | None = None
    think: Span = 0.0
    warmup: Span = 1.0
    batch: Count | Counts | None = None
    thresholds: Sentences = ()

    def options(self) -> dict[str, Any]:
        """Return what the phase says as options of `loadtest run`; a field left away is not among them."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in own.items() if name not in ("name", "thresholds") and value is not None}


@dataclass(frozen=True, config=_STRICT)
class Saturation:
    """The short closed loop that shares of the saturation are taken of."""

    concurrency: Count = 16
    duration: Longer = 3.0


@dataclass(frozen=True, config=_STRICT)
class Scenario:
    """What to send and what it must show.

    Args:
        description: one line for the list.
        phase: in their order.
        verdict: a name in `judges.JUDGES`.
        thresholds: what every phase must show, as sentences.
        sequence: as `--sequence`, for all phases.
        mix: other models as NAME = weight, for all phases.
        saturation: how the rate that shares are taken of is measured.
    """

    description: Annotated[str, Field(min_length=1)]
    phase: Annotated[tuple[Phase, ...], Field(min_length=1)]
    verdict: Annotated[str, AfterValidator(_known)] = "thresholds"
    thresholds: Sentences = ()
    sequence: Count | None = None
    mix: Mapping[str, float] = Field(default_factory=dict)
    saturation: Saturation = Saturation()

    def options(self) -> dict[str, Any]:
        """Return what holds for all phases as options of `loadtest run`."""
        taken: dict[str, Any] = {"mix": tuple(self.mix.items())} if self.mix else {}
        return taken | ({"sequence": self.sequence} if self.sequence else {})

    @property
    def relative(self) -> bool:
        """Whether some phase states a share of the saturation."""
        return any("%" in f"{phase.rate} {phase.profile}" for phase in self.phase)


def shipped() -> list[str]:
    """Return the names of the scenarios that come with modelathe."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name: str) -> Path:
    """Return the file of a shipped scenario's name, or the path that `name` is.

    Raises:
        UsageError: it is neither.
    """
    if name in shipped():
        return FOLDER / f"{name}.toml"
    if not Path(name).is_file():
        raise UsageError(
            "there is no such scenario", where=name, fix=f"give the path of a TOML file, or {_meant(name, shipped())}"
        )
    return Path(name)


def load(path: Path, settings: Iterable[str] = ()) -> Scenario:
    """Read a scenario, with `settings` in place of what the file says.

    Args:
        path: a TOML file.
        settings: each KEY=VALUE, for every phase, or PHASE.KEY=VALUE, for one, or saturation.KEY=VALUE.

    Raises:
        UsageError: not TOML, or a key or value that does not fit; the message names file and field.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"is not TOML: {error}", where=str(path), fix="mend that line; text stands in quotes"
        ) from error
    phases = document.get("phase")
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases) or not phases:
        raise UsageError("phase: there is none", where=str(path), fix="add a [[phase]] table with name and duration")
    for setting in settings:
        _set(document, setting)
    try:
        # As JSON, because of Python's own values strict validation wants tuples and dataclasses, which TOML lacks.
        scenario: Scenario = TypeAdapter(Scenario).validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        raise _explained(error, path) from error
    _check(scenario, path)
    return scenario


def phases(scenario: Scenario, largest: int) -> list[Phase]:
    """Return the phases with a list of numbers taken apart, one phase for each; without batches beyond `largest`."""
    found = []
    for phase in scenario.phase:
        if isinstance(phase.concurrency, tuple):
            found += [replace(phase, name=f"{phase.name}-{n}", concurrency=n) for n in phase.concurrency]
        elif isinstance(phase.batch, tuple):
            taken = [n for n in phase.batch if n <= largest] or phase.batch[:1]
            found += [replace(phase, name=f"{phase.name}-{n}", batch=n) for n in taken]
        else:
            found.append(phase)
    return found


def resolved(phase: Phase, saturation: float | None) -> Phase:
    """Return the phase with shares of the saturation (requests per second) as numbers."""
    if saturation is None:
        return phase

    def amount(text: str) -> str:
        return _SHARE.sub(lambda found: f"{float(found[1]) / 100 * saturation:.6g}", text)

    rate = float(amount(phase.rate)) if isinstance(phase.rate, str) else phase.rate
    return replace(phase, rate=rate, profile=phase.profile and amount(phase.profile))


def _set(document: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    name, _, key = key.strip().rpartition(".")
    tables: list[dict[str, Any]] = document["phase"]
    if name == "saturation":
        tables = [document.setdefault(name, {})]
        name = ""
    chosen = [table for table in tables if not name or table.get("name") == name]
    if not equals or not chosen:
        what = f"no phase is called {name!r}" if equals else "there is no ="
        names = ", ".join(str(table.get("name")) for table in tables)
        raise UsageError(what, where=f"--set {setting}", fix=f"write KEY=VALUE or PHASE.KEY=VALUE; phases: {names}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if key in ("rate", "concurrency") and tables is document["phase"]:
        # A phase has one of them; the other kind of load is another scenario.
        chosen = [table for table in chosen if key in table]
        if not chosen:
            raise UsageError(f"no phase states a {key}", where=f"--set {setting}", fix="write a scenario of your own")
    for table in chosen:
        table[key] = value


def _explained(error: ValidationError, path: Path) -> UsageError:
    # A misspelt key is also a missing one, and says more.
    first = min(error.errors(), key=lambda one: one["type"] != "unexpected_keyword_argument")
    places = [part for part in first["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z_]+", part)]
    table = Phase if places[:1] == ["phase"] and len(places) > 1 else Scenario
    places = places[: 3 if table is Phase else 2]
    field = "".join(f" {part + 1}" if isinstance(part, int) else f".{part}" for part in places).strip(".")
    if first["type"] == "unexpected_keyword_argument":
        what, fix = "there is no such key", _meant(str(places[-1]), [entry.name for entry in fields(table)])
    elif first["type"] == "missing":
        what, fix = "is missing", f"add {places[-1]} = ..."
    else:
        message = first["msg"].removeprefix("Value error, ").replace("tuple", "list")
        what, fix = f"{first['input']!r} cannot be", message.replace("Input", str(places[-1]), 1)
    return UsageError(f"{field}: {what}", where=str(path), fix=fix)


def _check(scenario: Scenario, path: Path) -> None:
    for number, phase in enumerate(scenario.phase, 1):
        place = f"phase {number} ({phase.name})"
        if (phase.concurrency is None) == (phase.rate is None):
            what = f"{place}: has {'no' if phase.rate is None else 'both'} rate and concurrency"
            raise UsageError(what, where=str(path), fix="give one of the two")
        if isinstance(phase.concurrency, tuple) and isinstance(phase.batch, tuple):
            what = f"{place}: concurrency and batch are both lists"
            raise UsageError(what, where=str(path), fix="use a phase for each batch")
        if phase.rate is None and (phase.arrival or phase.profile):
            raise UsageError(f"{place}.arrival: is for a rate", where=str(path), fix="leave arrival and profile away")
    names = [phase.name for phase in phases(scenario, 2**31)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"phase.name: {twice.pop()!r} is there twice", where=str(path), fix="give each its own")


def _meant(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"
