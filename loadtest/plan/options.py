"""Options: how a command line says which load to send, the same for every command that sends some."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelathe.commandline import PATH, quiet
from modelathe.errors import UsageError

if TYPE_CHECKING:
    from loadtest.plan.parts import Sizes
    from loadtest.plan.plan import Plan
    from loadtest.plan.traffic import Part
    from modelathe.connection import Connection

DURATION = 10.0
FULL = 64
"""Requests in flight of `--rate max`, unless `--in-flight` says otherwise."""
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """Return the seconds of a length of time such as `10s`, `500ms` or `2m`.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)", text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a duration; write 500ms, 10s or 2m")
    return float(match[1]) * _UNITS[match[2]]


class Duration(click.ParamType[float]):
    """A length of time such as `10s`, `500ms` or `2m`, as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds."""
        if isinstance(value, int | float):
            return float(value)
        try:
            return seconds(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Moment(click.ParamType[float]):
    """A time such as `2026-11-22T21:00:00Z`, as seconds since 1970; UTC where it names no zone."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds."""
        if isinstance(value, float):
            return value
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a time; write 2026-11-22T21:00:00Z", param, ctx)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class Share(click.ParamType[float]):
    """`5%` as 0.05."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share."""
        if isinstance(value, float) and 0 <= value < 1:
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", str(value).strip())
        if not match or not float(match[1]) < 100:
            self.fail(f"{value!r} is not a share; write 5%", param, ctx)
        return float(match[1]) / 100


class Shape(click.ParamType["Sizes"]):
    """`NAME:D1,D2` as the sizes of inputs; several names with blanks between, and `=WEIGHT` behind them for a mix."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Sizes":
        """Return the sizes by name, and the weight."""
        if isinstance(value, tuple):
            return value
        sizes, _, weight = str(value).partition("=")
        found = [re.fullmatch(r"(.+):(\d+(?:,\d+)*)", item) for item in sizes.split()]
        share = re.fullmatch(r"\d+(?:\.\d+)?", weight or "1")
        if not found or not all(found) or not share:
            self.fail(f"{value!r} is not a shape; write NAME:D1,D2 without the batch axis, or NAME:D1=3", param, ctx)
        by_name = {match[1]: tuple(int(size) for size in match[2].split(",")) for match in found if match}
        return by_name, float(weight) if weight else None


class Number(click.FloatRange):
    """A finite number in a range; click takes NaN for one in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Rate(click.ParamType[float]):
    """Requests per second; `max` is infinity."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the rate."""
        if value == "max":
            return math.inf
        rate = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(rate):
            self.fail(f"{value!r} is not a rate; write a number, or max for as fast as possible", param, ctx)
        return float(rate)


class Mix(click.ParamType[tuple[str, float]]):
    """`MODEL=WEIGHT` as both."""

    name = "mix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Return name and weight."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([^=]+)=(\d+(?:\.\d+)?)", str(value))
        if not match:
            self.fail(f"{value!r} is not a share; write MODEL=WEIGHT", param, ctx)
        return match[1], float(match[2])


class Header(click.ParamType[tuple[str, str]]):
    """`NAME: VALUE` as both."""

    name = "header"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return name and value."""
        if isinstance(value, tuple):
            return value
        colon = str(value).find(":", 1)  # that of `:authority` is its first letter
        if colon < 0:
            self.fail(f"{value!r} is not a header; write 'NAME: VALUE'", param, ctx)
        return str(value)[:colon].strip(), str(value)[colon + 1 :].strip()


_CONNECTION = (
    click.option("--ca", "authority", type=PATH, metavar="FILE", help="Check a grpcs:// or https:// server with this."),
    click.option(
        "--cert", "certificate", type=PATH, metavar="FILE", help="Client certificate, for a server that asks."
    ),
    click.option("--key", type=PATH, metavar="FILE", help="Its key."),
    click.option(
        "--header", "headers", type=Header(), multiple=True, metavar="'NAME: VALUE'", help="Send it with every request."
    ),
    click.option("--compression", type=click.Choice(["gzip", "deflate"]), help="Of requests and answers."),
    click.option("--streams", type=int, default=0, help="gRPC: send over so many streams.  [default: single calls]"),
    click.option(
        "--shared-memory",
        type=click.Choice(["system", "cuda"]),
        help="Tensors go through memory of this machine (cuda: tested on one H100).",
    ),
)
_OPTIONS = (
    click.option("--url", required=True, help="The server, as grpc://HOST:PORT or http://HOST:PORT."),
    click.option("--duration", type=Duration(), help="How long to send.  [default: 10s, or as long as the trace]"),
    click.option("--concurrency", type=int, help="Closed loop: requests always in flight.  [default: 8]"),
    click.option("--rate", type=Rate(), help="Open loop: requests per second, or max for all that go through."),
    click.option(
        "--in-flight", type=int, help="With a rate or trace: most requests at once.  [default: 1000; of max 64]"
    ),
    click.option("--arrival", help="With --rate: constant, poisson, gamma:burstiness=0.25.  [default: constant]"),
    click.option("--profile", help="With --rate: ramp:to=500, step, spike, sine.  [default: flat]"),
    click.option("--trace", type=PATH, metavar="FILE", help="Open loop: send times in seconds, or recorded traffic."),
    click.option(
        "--speed",
        type=Number(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="With --trace: times as fast.",
    ),
    click.option("--requests", type=int, help="Stop after so many requests."),
    click.option(
        "--think", type=Duration(), default="0s", show_default=True, help="Closed loop: pause before the next."
    ),
    click.option("--sequence", type=int, metavar="LENGTH", help="Send sequences, for a model that remembers."),
    click.option(
        "--mix", type=Mix(), multiple=True, metavar="MODEL=WEIGHT", help="Send to this model too; MODEL has 1."
    ),
    click.option("--batch", type=int, default=1, show_default=True, help="Samples per request."),
    click.option("--version", default="", help="Version of the model.  [default: the server's choice]"),
    click.option("--data", type=PATH, help="What to send: .npz, .json, .jsonl, .txt or a folder."),
    click.option("--allow-nonfinite", "nonfinite", is_flag=True, help="Let the data hold NaN and infinity."),
    click.option("--fresh", is_flag=True, help="New random values for every request."),
    click.option("--constant", is_flag=True, help="The same values in every request."),
    click.option(
        "--repository",
        type=PATH,
        metavar="DIR|none",
        help="Take ranges, tolerance from it.  [default: that of a `serve up`]",
    ),
    click.option(
        "--shape",
        "shapes",
        type=Shape(),
        multiple=True,
        metavar="NAME:D1,D2[=WEIGHT]",
        help="Sizes of an input; with weights, a mix.",
    ),
    click.option("--tolerance", type=Number(min=0), help="Check the outputs; the largest difference allowed."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the random values and arrival times."),
    click.option("--timeout", type=Duration(), help="For one request.  [default: none]"),
    click.option("--retries", type=int, default=0, show_default=True, help="Send a failed request again."),
    click.option(
        "--warmup", type=Duration(), default="1s", show_default=True, help="Load before the run, not counted."
    ),
    click.option("--workers", type=int, default=1, show_default=True, help="Processes that share the load."),
    click.option("--ray", metavar="ADDRESS", help="Run the workers on a Ray cluster: auto, HOST:PORT, or local."),
    click.option("--index", type=int, help="Be only this one of the workers; the others run elsewhere."),
    click.option(
        "--begin-at", "begin", type=Moment(), metavar="TIME", help="When to begin, as 2026-11-22T21:00:00Z; UTC."
    ),
    click.option(
        "--metrics", metavar="URL", help="The server's metrics, as http://HOST:PORT.  [default: 8002 beside 8000, 8001]"
    ),
)

threshold_option = click.option(
    "--threshold", "sentences", multiple=True, metavar="SENTENCE", help='Exit 3 unless it holds, as "p99 < 20ms".'
)

allow_option = click.option(
    "--allow", type=Share(), metavar="SHARE", help="Exit 3 when worse by more than this, as 5%, or more errors."
)


def load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which load to send; `plan_of` and `parts_of` read them."""
    for option in reversed(_OPTIONS + _CONNECTION):
        command = option(command)
    return command


SHAPE: dict[str, Any] = {
    "duration": 10.0,
    "concurrency": None,
    "rate": None,
    "in_flight": None,
    "arrival": None,
    "profile": None,
    "trace": None,
    "speed": 1.0,
    "requests": None,
    "think": 0.0,
    "sequence": None,
    "mix": (),
    "batch": 1,
    "seed": 0,
    "retries": 0,
}
"""The options that say how much is sent and when, with their defaults."""


PROBES_DECIDE = {"concurrency": None, "rate": 1.0, "profile": None, "trace": None, "speed": 1.0}
PROBES_DECIDE |= {"requests": None, "think": 0.0, "in_flight": None}
"""The options on which the probes of a search decide, and what they are in the plan that the probes change."""


def traffic_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `load_options` but for `SHAPE`, which it knows by itself."""
    command = load_options(command)
    kept = [option for option in getattr(command, "__click_params__", []) if option.name not in SHAPE]
    setattr(command, "__click_params__", kept)  # noqa: B010 -- Click's own place for a function's options
    return command


def plan_of(options: dict[str, Any]) -> "Plan":
    """Return the plan that the options describe."""
    from loadtest.plan.plan import Plan

    concurrency, rate, trace, tolerance = (options[key] for key in ("concurrency", "rate", "trace", "tolerance"))
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise UsageError(f"--tolerance is {tolerance:g}", fix="give 0 or more")
    for name in ("arrival", "profile"):
        if options[name] and rate in (None, math.inf):
            raise UsageError(f"--{name} needs a --rate in numbers", fix="a closed loop sends when an answer comes back")
    if options["in_flight"] is not None and concurrency is not None:
        raise UsageError("--in-flight and --concurrency say the same", fix="give one of the two")
    if rate == math.inf and concurrency is None:
        # As fast as possible means that no place is ever empty, which is what a closed loop does.
        rate, concurrency = None, FULL if options["in_flight"] is None else options["in_flight"]
    if options["speed"] != 1 and trace is None:
        raise UsageError("--speed needs --trace", fix="give the trace to replay")
    if concurrency is None and rate is None and trace is None:
        concurrency = 8
    taken = ("speed", "requests", "think", "sequence", "seed", "timeout", "retries", "warmup", "workers")
    limit = {} if options["in_flight"] is None or concurrency is not None else {"in_flight": options["in_flight"]}
    return Plan(
        options["url"],
        _duration(options),
        concurrency=concurrency,
        rate=rate,
        arrival=options["arrival"] or "constant",
        profile=options["profile"] or "flat",
        trace=str(trace) if trace else None,
        connection=connection_of(options),
        metrics=options["metrics"],
        thresholds=tuple(options.get("thresholds", ())),
        **{key: options[key] for key in ("ray", "index", "begin")},
        **{key: options[key] for key in taken},
        **limit,
    )


def _duration(options: dict[str, Any]) -> float:
    from loadtest.plan.data import trace

    if options["duration"] is not None:
        return float(options["duration"])
    if not options["trace"]:
        return DURATION
    if not options["speed"] > 0:
        raise UsageError(f"--speed is {options['speed']:g}", fix="give a number above 0")
    return trace.length(trace.read(options["trace"], options["speed"]))


def connection_of(options: dict[str, Any]) -> "Connection":
    """Return how the options say that the server is reached."""
    from modelathe.connection import Connection

    taken: dict[str, Any] = {
        key: str(options[key]) if options[key] else None for key in ("authority", "certificate", "key")
    }
    taken |= {key: options[key] for key in ("headers", "compression", "streams", "shared_memory")}
    return Connection(**taken)


def parts_of(plan: "Plan", model: str, options: dict[str, Any]) -> "list[Part]":
    """Return the traffic that the options describe, MODEL's share first; asks the server what its models take."""
    from loadtest.plan import parts, served

    with served.naming(plan.url, model):
        if options["repository"] == Path("none"):
            options = options | {"repository": None}
        elif options["repository"] is None and (state := served.at(plan.url)):
            options = options | {"repository": _repository_of(state, model, plan.url)}
        return parts.parts(plan, model, options)


def _repository_of(state: dict[str, Any], model: str, url: str) -> Path | None:
    """Return the repository of the `serve up` at `url`, and say so; None where the model has no lineage."""
    place = Path(state["repository"])
    if not any((place / model).glob("*/lineage.json")):
        return None
    if not quiet():
        click.echo(f"ranges and tolerance from {place}, which `serve up` serves at {url}", err=True)
    return place


def default_output(name: str, suffix: str = "") -> Path:
    """Return where results go that nobody named a place for: in `build/loads`, by name and time."""
    return Path("build/loads") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}{suffix}"


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Say where the results are, in a file or folder, of what did not come to its end."""
    before = path.stat().st_mtime_ns if path.exists() else None
    try:
        yield
    except BaseException:
        if path.exists() and path.stat().st_mtime_ns != before:
            click.echo(f"results so far: {path}", err=True)
        raise


def largest_batch(plan: "Plan", model: str, options: dict[str, Any]) -> int:
    """Return how many samples a request to the model may hold; 1 for a model without a batch axis."""
    from loadtest.plan import served
    from modelathe.client import connect
    from modelathe.tensors import Dim

    with served.naming(plan.url, model), connect(plan.url, connection=plan.connection) as client:
        inputs, _ = client.metadata(model, options["version"])
    axes = [spec.dims[0] for spec in inputs if spec.batched]
    return min((axis.maximum for axis in axes if isinstance(axis, Dim)), default=1)
