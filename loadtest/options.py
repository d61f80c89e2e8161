"""Options: how a command line says which load to send, the same for every command that sends some."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from loadtest.commandline import PATH
from loadtest.errors import BadInput, UsageError

if TYPE_CHECKING:
    from loadtest.plan import Plan
    from loadtest.traffic import Part

PAYLOADS = 16
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType[float]):
    """A length of time such as `10s`, `500ms` or `2m`, as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)", str(value).strip())
        if not match:
            self.fail(f"{value!r} is not a duration; write 500ms, 10s or 2m", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


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


class Shape(click.ParamType[tuple[str, tuple[int, ...]]]):
    """`NAME:D1,D2` as the name of an input and its sizes."""

    name = "shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        """Return name and sizes."""
        match = re.fullmatch(r"(.+):([1-9]\d*(?:,[1-9]\d*)*)", str(value))
        if not match:
            self.fail(f"{value!r} is not a shape; write NAME:D1,D2 without the batch axis", param, ctx)
        return match[1], tuple(int(size) for size in match[2].split(","))


class Mix(click.ParamType[tuple[str, float]]):
    """`MODEL=WEIGHT` as both."""

    name = "mix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Return name and weight."""
        match = re.fullmatch(r"([^=]+)=(\d+(?:\.\d+)?)", str(value))
        if not match:
            self.fail(f"{value!r} is not a share; write MODEL=WEIGHT", param, ctx)
        return match[1], float(match[2])


_OPTIONS = (
    click.option("--url", required=True, help="The server, as grpc://HOST:PORT or http://HOST:PORT."),
    click.option("--duration", type=Duration(), default="10s", show_default=True, help="How long to send."),
    click.option("--concurrency", type=int, help="Closed loop: requests always in flight.  [default: 8]"),
    click.option("--rate", type=float, help="Open loop: requests per second, whatever the server does."),
    click.option("--arrival", help="With --rate: constant, poisson, gamma:burstiness=0.25.  [default: constant]"),
    click.option("--profile", help="With --rate: ramp:to=500, step, spike, sine.  [default: flat]"),
    click.option("--trace", type=PATH, metavar="FILE", help="Open loop: the send times, one per line, in seconds."),
    click.option("--speed", type=float, default=1.0, show_default=True, help="With --trace: times as fast."),
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
    click.option("--data", type=PATH, metavar="FILE.npz", help="Samples to send."),
    click.option("--repository", type=PATH, metavar="DIR", help="Take ranges, tolerance from it."),
    click.option("--shape", "shapes", type=Shape(), multiple=True, metavar="NAME:D1,D2", help="Sizes of an input."),
    click.option("--tolerance", type=float, help="Check the outputs; the largest difference allowed."),
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


def load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which load to send; `plan_of` and `parts_of` read them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def plan_of(url: str, options: dict[str, Any]) -> "Plan":
    """Return the plan that the options describe."""
    from loadtest.plan import Plan

    concurrency, rate, trace, tolerance = (options[key] for key in ("concurrency", "rate", "trace", "tolerance"))
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise UsageError(f"--tolerance is {tolerance:g}", fix="give 0 or more")
    for name in ("arrival", "profile"):
        if options[name] and rate is None:
            raise UsageError(f"--{name} needs --rate", fix="a closed loop sends when an answer comes back")
    if concurrency is None and rate is None and trace is None:
        concurrency = 8
    taken = ("duration", "speed", "requests", "think", "sequence", "seed", "timeout", "retries", "warmup", "workers")
    return Plan(
        url,
        concurrency=concurrency,
        rate=rate,
        arrival=options["arrival"] or "constant",
        profile=options["profile"] or "flat",
        trace=str(trace) if trace else None,
        metrics=options["metrics"],
        **{key: options[key] for key in ("ray", "index", "begin")},
        **{key: options[key] for key in taken},
    )


def parts_of(plan: "Plan", model: str, options: dict[str, Any]) -> "list[Part]":
    """Return the traffic that the options describe, MODEL's share first; asks the server what its models take."""
    return [_part(plan, name, weight, options) for name, weight in [(model, 1.0), *options["mix"]]]


def _part(plan: "Plan", model: str, weight: float, options: dict[str, Any]) -> "Part":
    """Return one model's share of the traffic, from --data, --repository or the server's metadata."""
    from loadtest import answers, payload
    from loadtest.client import connect
    from loadtest.traffic import Part

    with connect(plan.url) as client:
        stated, _ = client.metadata(model, options["version"])
        version = client.served_version(model, options["version"])
    specs, tolerance = stated, options["tolerance"]
    if options["repository"]:
        specs, deviation = payload.from_lineage(options["repository"], model, version)
        if tolerance is None and deviation is not None:
            tolerance = answers.tolerance(deviation)
        if {(spec.name, spec.dtype) for spec in specs} != {(spec.name, spec.dtype) for spec in stated}:
            raise BadInput(
                "its inputs are not those of the model that the server has",
                where=str(options["repository"] / model / version / "lineage.json"),
                fix="give the repository that the server serves",
            )
    if options["data"]:
        payloads = payload.load_npz(options["data"], stated, options["batch"])
    else:
        specs = payload.with_shapes(specs, dict(options["shapes"]))
        payloads = payload.generate(specs, PAYLOADS, plan.seed, options["batch"])
    return Part(model, payloads, options["version"], weight, tolerance)
