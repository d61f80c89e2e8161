"""Keywords: the options that say which load to send, as Python values.

A keyword is the option's name with underscores, `in_flight` for `--in-flight`; what the command line declares decides
on defaults and on what is allowed.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Literal, TypedDict

import click

from loadtest.plan.options import load_options
from modelathe.errors import UsageError

Place = str | os.PathLike[str]
Seconds = float | str
"""A number of seconds, or a text such as `500ms`, `10s` or `2m`."""


class LoadOptions(TypedDict, total=False):
    """`loadtest run --help` says what each of them does."""

    duration: Seconds
    concurrency: int
    rate: float | Literal["max"]
    in_flight: int
    arrival: str
    profile: str
    trace: Place
    speed: float
    requests: int
    think: Seconds
    sequence: int
    mix: Mapping[str, float]
    batch: int
    version: str
    data: Place
    allow_nonfinite: bool
    fresh: bool
    constant: bool
    repository: Place
    shape: Mapping[str, Sequence[int]] | Sequence[str]
    tolerance: float
    seed: int
    timeout: Seconds
    retries: int
    warmup: Seconds
    workers: int
    ray: str
    index: int
    begin_at: datetime | str | float
    metrics: str
    ca: Place
    cert: Place
    key: Place
    header: Mapping[str, str]
    compression: Literal["gzip", "deflate"]
    streams: int
    shared_memory: Literal["system", "cuda"]


@click.command()
@load_options
def _declared(**_options: Any) -> None:
    """Carry the declarations."""


def declared() -> dict[str, click.Parameter]:
    """Return the options by their keywords."""
    return {option.opts[0].removeprefix("--").replace("-", "_"): option for option in _declared.params}


def gather(url: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options by the names that `plan_of` and `parts_of` read; what is not given, or None, has its default.

    Raises:
        UsageError: there is no such keyword, or its value cannot be.
    """
    known = declared()
    check(given, known)
    context = _declared.make_context("loadtest", ["--url", url])
    found = dict(context.params)
    for keyword, value in given.items():
        option = known[keyword]
        if value is not None:
            cast = partial(option.type_cast_value, context)
            found[str(option.name)] = converted(keyword, _listed(option, value), cast)
    return found


def converted(keyword: str, value: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a value as `convert` makes it, which may be that of a type of the command line.

    Raises:
        UsageError: it cannot be.
    """
    try:
        return convert(value)
    except click.BadParameter as error:
        raise UsageError(f"{keyword} = {value!r}: {error.message}", fix="change its value") from None


def check(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a keyword that is not known.

    Raises:
        UsageError: naming the one that was probably meant.
    """
    names = list(known)
    for keyword in given:
        if keyword not in names:
            close = difflib.get_close_matches(keyword, names, 1)
            fix = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names)}"
            raise UsageError(f"there is no option {keyword!r}", fix=fix)


def _listed(option: click.Parameter, value: Any) -> Any:
    """Return the values of an option that may be given several times, as its type takes them."""
    if not option.multiple:
        return value
    if option.name == "shapes" and isinstance(value, Mapping):
        return [({name: tuple(sizes) for name, sizes in value.items()}, None)]
    return list(value.items()) if isinstance(value, Mapping) else several(value)


def several(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return one text, or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)
