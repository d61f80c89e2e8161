"""Recipe: seed, budget, target and an ordered list of steps, to and from TOML."""

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from loadtest.plan.schedule import FASTEST, MOST_IN_FLIGHT
from modelathe.errors import closest
from optimize.judge.budget import Budget
from optimize.methods.apply import for_target
from optimize.methods.export.onnx import Onnx
from optimize.methods.table import METHODS, NAMES
from optimize.model.errors import BadRecipe
from serve.config.settings import Settings
from serve.config.target import Target

if TYPE_CHECKING:
    from optimize.source.workload import Workload

PRESETS = Path(__file__).parent / "presets"
PRESET = "preset:"
"""What stands before the name of a preset where a recipe extends one."""
DEFAULTS = ("cpu-int8", "cpu-small")
"""The presets of a run that names neither a recipe nor a preset, in turn; the first needs calibration data."""
STAGES = ("torch", "export", "graph")
EXTENDS = "extends"
"""The key of a recipe that names another one, of which it holds what differs."""
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Load:
    """The load test at the end of a run: closed loop with `concurrency`, or open loop at `rate` per second."""

    duration: float = Field(default=5.0, gt=0, allow_inf_nan=False, description="Seconds.")
    concurrency: int = Field(default=8, ge=1, le=MOST_IN_FLIGHT, description="Requests in flight, without a rate.")
    rate: float | None = Field(default=None, gt=0, le=FASTEST, description="Requests per second, in an open loop.")


@dataclass(frozen=True)
class Recipe:
    """A run in data: everything that is needed to do it again.

    Args:
        steps: configs whose types stand in `METHODS`, torch steps before graph steps; the export is inserted where it
            is missing.
        seed: seeds every random choice.
        budget: what the result must keep and may cost.
        target: where the result will run.
        load: the load test at the endpoint.
        serve: how the result is served, beside what the target says.
    """

    steps: tuple[Any, ...]
    seed: int = 0
    budget: Budget = Budget()
    target: Target = Target()
    load: Load = Load()
    serve: Settings = Settings()

    def __post_init__(self) -> None:
        """State in each step what its config leaves to the target."""
        object.__setattr__(self, "steps", tuple(for_target(step, self.target) for step in self.steps))

    @property
    def names(self) -> list[str]:
        """The names of the steps' methods, in their order."""
        return [METHODS[type(step)].name for step in self.steps]

    def document(self) -> dict[str, Any]:
        """Return the plain mapping that `parse` reads back."""
        values: dict[str, Any] = {"seed": self.seed, "target": self.target.document()}
        for name in ("budget", "load"):
            values[name] = {key: value for key, value in asdict(getattr(self, name)).items() if value is not None}
        if asked := self.serve.document():
            values["serve"] = asked
        values["step"] = [{"use": METHODS[type(step)].name, **_plain(step)} for step in self.steps]
        return values

    def toml(self) -> str:
        """Return the recipe as TOML."""
        return tomli_w.dumps(self.document())


def load(recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str]) -> Recipe:
    """Return a recipe itself, the one that a mapping describes, or the one in a TOML file or of a `preset:NAME`.

    Where it `extends` another, which is named from its own folder (a mapping's is the current one) or as in
    `preset:cpu-int8`, its keys go before those of the other, table by table; steps replace all of the other's.

    Raises:
        BadRecipe: no such file, not TOML, an unknown key, a wrong value, steps out of order, or recipes that extend
            each other.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse(_extended(recipe, Path("recipe"), ()))
    name = os.fspath(recipe)
    return parse(_whole(preset(name.removeprefix(PRESET)) if name.startswith(PRESET) else Path(name), ()), name)


def preset(name: str) -> Path:
    """Return the file of a recipe that comes with modelathe.

    Raises:
        BadRecipe: there is none of that name.
    """
    if name not in presets():
        raise BadRecipe(f"there is no preset {name!r}", fix=_meant(name, presets()))
    return PRESETS / f"{name}.toml"


def presets() -> list[str]:
    """Return the names of the recipes that come with modelathe."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def asked(path: Path | None, name: str | None) -> Path | None:
    """Return the file of the recipe that two options ask for, `--recipe` or `--preset`; None where neither is given.

    Raises:
        BadRecipe: both are given, or there is no such preset.
    """
    if path and name:
        fix = f'give one: a recipe may say {EXTENDS} = "{PRESET}{name}"'
        raise BadRecipe("--recipe and --preset are both given", fix=fix)
    return preset(name) if name else path


def chosen(recipe: Any, workload: "Workload", tell: Callable[[str, float], None]) -> dict[str, Recipe]:
    """Return what `load` makes of a recipe, under an empty name.

    Of None it is the presets for a CPU that fit the workload, under their names, to be tried in turn; which is told.
    """
    if recipe is not None:
        return {"": load(recipe)}
    names = DEFAULTS if workload.calibration is not None else DEFAULTS[1:]
    first, *others = (f"the preset {name}" for name in names)
    more = f"; where that is refused, {', '.join(others)}" if others else ", for the workload has no calibration data"
    tell(f"no --recipe and no --preset: {first}{more}", 0.0)
    return {name: load(preset(name)) for name in names}


def _whole(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Return the mapping of a recipe's file with all that it extends; `above` are those that extend it."""
    if path.resolve() in above:
        raise BadRecipe("extends itself, by a way round", where=str(path), fix=f"take {EXTENDS} out of one of them")
    return _extended(_read(path), path, (*above, path.resolve()))


def _extended(given: Mapping[str, Any], path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    document = dict(given)
    if (other := document.pop(EXTENDS, None)) is None:
        return document
    if not isinstance(other, str):
        raise BadRecipe(f"{EXTENDS} is {other!r}", where=str(path), fix="name another recipe's file")
    place = preset(other.removeprefix(PRESET)) if other.startswith(PRESET) else path.parent / other
    base = _whole(place, above)
    both = {key: {**base[key], **value} for key, value in document.items() if _are_tables(value, base.get(key))}
    return {**base, **document, **both}


def _are_tables(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecipe("is not a text file", where=str(path), fix="give the path of a TOML file") from error
    except OSError as error:
        reason = "" if isinstance(error, FileNotFoundError | IsADirectoryError) else f": {error.strerror}"
        raise BadRecipe(
            f"there is no such recipe{reason}", where=str(path), fix="give the path of a TOML file"
        ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadRecipe(
            f"is not TOML: {error}", where=str(path), fix="mend that line; text stands in quotes"
        ) from error


def parse(document: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Return the recipe that a mapping describes.

    Raises:
        BadRecipe: as `load`.
    """
    _check_keys(document, ["seed", "budget", "target", "load", "serve", "step"], where)
    tables = document.get("step", [])
    if not isinstance(tables, list) or not tables:
        raise BadRecipe("has no steps", where=where, fix="add a [[step]] table with a `use` key")
    steps = tuple(_step(table, f"{where}, step {number}") for number, table in enumerate(tables, 1))
    seed = document.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED:
        raise BadRecipe(f"seed is {seed!r}", where=where, fix=f"use a whole number from 0 to {LARGEST_SEED}")
    recipe = Recipe(
        ordered(steps, where),
        seed,
        build(Budget, document.get("budget", {}), f"{where}, [budget]"),
        build(Target, document.get("target", {}), f"{where}, [target]"),
        build(Load, document.get("load", {}), f"{where}, [load]"),
        build(Settings, document.get("serve", {}), f"{where}, [serve]"),
    )
    if recipe.budget.keep is not None and recipe.budget.max_drop is not None:
        raise BadRecipe("keep and max_drop are both given", where=f"{where}, [budget]", fix="keep one of them")
    return recipe


def ordered(steps: tuple[Any, ...], where: str = "recipe") -> tuple[Any, ...]:
    """Return the steps with the export inserted where it is missing.

    Raises:
        BadRecipe: a torch step after a graph step, or two exports; the message gives the order that works.
    """
    stages = [STAGES.index(METHODS[type(step)].stage) for step in steps]
    if stages != sorted(stages) or stages.count(1) > 1:
        right = [
            METHODS[type(step)].name for _, step in sorted(zip(stages, steps, strict=True), key=lambda pair: pair[0])
        ]
        exports = [name for name in right if METHODS[NAMES[name]].stage == "export"]
        one = f"keep one of {', '.join(exports)}: each exports the model"
        raise BadRecipe(
            "the steps are out of order: torch steps, then one export, then graph steps",
            where=where,
            fix=one if len(exports) > 1 else f"this order works: {', '.join(right)}",
        )
    if 1 in stages:
        return steps
    torch_steps = stages.count(0)
    return (*steps[:torch_steps], Onnx(), *steps[torch_steps:])


def build(config: type, values: object, where: str) -> Any:
    """Return `config(**values)`, or say in one line which field is wrong.

    Raises:
        BadRecipe: an unknown key (with the one that was probably meant) or a wrong value.
    """
    if not isinstance(values, Mapping):
        raise BadRecipe(f"is {values!r}, not a table", where=where, fix="write it as a [table] with keys")
    _check_keys(values, [entry.name for entry in fields(config)], where)
    try:
        return TypeAdapter(config).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise BadRecipe(
            f"{name} = {first['input']!r} cannot be",
            where=where,
            fix=first["msg"].replace("Input", name, 1).replace("tuple", "list"),
        ) from error


def _step(table: object, where: str) -> Any:
    if not isinstance(table, Mapping) or not isinstance(table.get("use"), str):
        raise BadRecipe("has no `use`", where=where, fix=f"use one of {', '.join(NAMES)}")
    name = table["use"]
    if name not in NAMES:
        raise BadRecipe(f"there is no method {name!r}", where=where, fix=_meant(name, list(NAMES)))
    return build(NAMES[name], {key: value for key, value in table.items() if key != "use"}, f"{where} ({name})")


def _check_keys(table: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise BadRecipe(f"unknown key {key!r}", where=where, fix=_meant(key, known))


def _meant(name: str, known: list[str]) -> str:
    return closest(name, known).strip() or f"use one of {', '.join(known) or 'no key at all'}"


def _plain(step: Any) -> dict[str, Any]:
    values = {entry.name: getattr(step, entry.name) for entry in fields(step)}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value is not None
    }
