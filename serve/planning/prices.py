"""Prices: the machines that a plan may use, from a list that the user gives.

::

    [[machine]]
    name = "c4"
    cores = 4
    price = 0.17   # for an hour, in any currency
"""

import tomllib
from math import ceil
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from modelathe.errors import BadInput, closest
from serve.simulate.curve_file import Measured


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class Machine:
    """One kind of machine.

    Args:
        name: of it.
        cores: of it.
        price: for an hour.
    """

    name: Annotated[str, Field(min_length=1)]
    cores: Annotated[int, Field(ge=1)]
    price: Annotated[float, Field(gt=0, allow_inf_nan=False)]


def read(path: Path) -> list[Machine]:
    """Return the machines of a list of prices.

    Raises:
        BadInput: there is no such file, it is not TOML or has no machine, or a machine lacks something; it is named.
    """
    fix = 'write [[machine]] with name = "…", cores = 4 and price = 0.17 (for an hour)'
    try:
        listed = tomllib.loads(path.read_text(encoding="utf-8")).get("machine")
    except FileNotFoundError:
        raise BadInput("there is no such file", where=str(path), fix=fix) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"is not TOML: {error}", where=str(path), fix=fix) from None
    if not isinstance(listed, list) or not listed:
        raise BadInput("lists no machine", where=str(path), fix=fix)
    return [_machine(values, number, path, fix) for number, values in enumerate(listed, 1)]


def _machine(values: Any, number: int, path: Path, fix: str) -> Machine:
    try:
        return TypeAdapter(Machine).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        named = values.get("name") if isinstance(values, dict) else None
        name = f"the machine {named!r}" if named else f"machine {number}"
        key = ".".join(str(part) for part in first["loc"]) or "it"
        what = f"{name} has no {key}" if first["type"] == "missing" else f"{name}: {key}: {first['msg'].lower()}"
        raise BadInput(what, where=str(path), fix=fix) from None


def chosen(machines: list[Machine], measured: Measured, name: str, path: Path) -> Machine:
    """Return the machine that the times were measured on: times of one kind say nothing of another.

    Args:
        machines: the list.
        measured: the times.
        name: what the user calls the machine; empty takes what the file of times says.
        path: of the list.

    Raises:
        BadInput: nobody says which it is, it is not in the list, or it has too few cores for one replica.
    """
    asked, names = name or measured.machine, [machine.name for machine in machines]
    if not asked:
        raise BadInput(
            f"which of the machines {', '.join(names)} were the times measured on?",
            where=str(path),
            fix="say --machine NAME: times of one kind of machine say nothing of another",
        )
    found = next((machine for machine in machines if machine.name == asked), None)
    if found is None:
        raise BadInput(
            f"has no price for the machine {asked!r}",
            where=str(path),
            fix=f"{closest(asked, names)}it lists {', '.join(names)}",
        )
    if found.cores < measured.cores:
        raise BadInput(
            f"the machine {asked!r} has {found.cores} cores, and a replica was measured with {measured.cores}",
            where=str(path),
            fix="measure with as many cores as a replica will have",
        )
    return found


def cost(machine: Machine, measured: Measured, replicas: int, rate: float) -> dict[str, Any]:
    """Return how many machines so many replicas take, and what a million requests cost at the rate."""
    each = machine.cores // measured.cores
    machines = ceil(replicas / each)
    hour = machines * machine.price
    return {
        "machine": machine.name,
        "price": machine.price,
        "replicas_per_machine": each,
        "machines": machines,
        "per_hour": hour,
        "per_million": hour / 3600 / rate * 1e6,
    }
