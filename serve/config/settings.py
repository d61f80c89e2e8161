"""Settings: how a model is to be served, beside what its TensorSpecs and Target say. The `[serve]` table of a recipe.

Every setting has a default that suits most models; `serve.config.model_config` turns them into Triton's own fields.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from modelathe.errors import BadInput, UsageError
from modelathe.tensors import Dim, TensorSpec
from serve.config.target import LARGEST_BATCH, Target

Count = Annotated[int, Field(ge=1)]
BATCHING = ("preferred", "queue_delay_us", "priorities", "queue", "timeout_ms", "on_timeout", "buckets")
"""Settings of the server's batching."""
GPU_ONLY = ("gpus", "accelerator", "precision", "cuda_graphs", "pinned")
Sizes = tuple[Annotated[int, Field(ge=1, le=LARGEST_BATCH)], ...]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Sequences:
    """Requests of one sequence go to the same instance, in order; what the model remembers passes through the server.

    Args:
        strategy: `direct` keeps a slot of the batch for each sequence, `oldest` batches whichever have a request.
        idle_s: a sequence without a request for so long is over.
        slots: how many sequences there may be at a time (`oldest`); one more is refused, as UNAVAILABLE. With `direct`,
            there are as many as the largest batch has rows, and one more waits until another has ended.
        start: the input that says whether a request is the first of its sequence.
        end: the input that says whether it is the last.
        ready: the input that says whether the slot has a request at all (`direct`).
        id: the input that takes the sequence's id.
        state: pairs of an input and the output that it gets back at the sequence's next request, zeros at first.
    """

    strategy: Literal["direct", "oldest"] = "oldest"
    idle_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    slots: int | None = Field(default=None, ge=1, le=10**6)
    start: str | None = None
    end: str | None = None
    ready: str | None = None
    id: str | None = None
    state: dict[str, str] = Field(default_factory=dict)

    def inner(self) -> set[str]:
        """Return the names of the tensors that the server itself fills and keeps: no client sends or gets them."""
        return {*self.controls().values(), *self.state, *self.state.values()}

    def controls(self) -> dict[str, str]:
        """Return Triton's name of each control that is used, and the input that takes it."""
        named = {"START": self.start, "END": self.end, "READY": self.ready, "CORRID": self.id}
        return {f"CONTROL_SEQUENCE_{kind}": name for kind, name in named.items() if name}


def _field(text: str, default: Any, **limits: Any) -> Any:
    return Field(default=default, description=text, **limits)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Settings:
    """How a model is served; each field's description is what `serve add --help` says of it."""

    max_batch: int | None = _field("largest batch that the server forms; 0: none", None, ge=0, le=LARGEST_BATCH)
    queue_delay_us: int | None = _field("how long a request waits for others to share its batch", None, ge=0, le=10**8)
    preferred: Sizes = _field("batch sizes that do not wait for more; for engines built so", ())
    instances: int = _field("copies of the model, per GPU where there are some", 1, ge=1, le=256)
    threads: int | None = _field(
        "CPU threads of an instance; default: its share of the cores, in a run 1 for a small model", None, ge=1
    )
    gpus: tuple[Annotated[int, Field(ge=0)], ...] = _field("which GPUs; default: all", ())
    accelerator: Literal["tensorrt", "tensorrt-rtx"] | None = _field(
        "what ONNX Runtime hands the graph to on a GPU", None
    )
    precision: Literal["FP32", "FP16", "BF16", "INT8"] = _field("what the accelerator may compute in", "FP32")
    cuda_graphs: bool = _field("let the accelerator replay recorded kernels", False)
    pinned: bool = _field("copy to and from a GPU through pinned memory", True)
    cache: bool = _field("answer a repeated request from memory; for one output and inputs of one shape", False)
    resources: dict[str, Count] = _field("what an instance must hold to run, as {memory = 1}", {})
    weight: int = _field("of the rate limiter: with 2, it runs half as often", 0, ge=0)
    priorities: int = _field("levels of priority that a request can ask for; 1 is first", 0, ge=0, le=1000)
    queue: int = _field("requests that may wait; more are refused at once", 0, ge=0)
    timeout_ms: float = _field("how long a request may wait", 0.0, ge=0, allow_inf_nan=False)
    on_timeout: Literal["reject", "delay"] = _field("what then becomes of it; delay: after all others", "reject")
    nonfinite: Literal["pass", "refuse"] = _field("what becomes of NaN and infinity in a request", "pass")
    buckets: dict[str, tuple[Count, ...]] = _field("sizes that clients pad a dim to, as {tokens = [16, 128]}", {})
    sequence: Sequences | None = _field("a table, for a model that remembers", None)

    def inner(self) -> set[str]:
        """Return the names of the tensors that the server itself fills and keeps; none without a sequence."""
        return self.sequence.inner() if self.sequence else set()

    def document(self) -> dict[str, Any]:
        """Return the JSON form: what differs from the defaults."""
        values, usual = asdict(self), asdict(Settings())
        return {key: value for key, value in values.items() if value != usual[key]}


DESCRIPTIONS: dict[str, str] = {entry.name: cast(Any, entry.default).description for entry in fields(Settings)}


def read(values: Mapping[str, Any], where: str) -> Settings:
    """Return the settings in a mapping.

    Raises:
        UsageError: an unknown key or a wrong value.
    """
    try:
        return TypeAdapter(Settings).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            known = ", ".join(entry.name for entry in fields(Settings))
            raise UsageError(f"unknown key {name!r}", where=where, fix=f"use one of {known}") from None
        raise UsageError(
            f"{name} = {first['input']!r} cannot be", where=where, fix=first["msg"].replace("Input", name, 1)
        ) from None


def check(
    settings: Settings, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], target: Target, batch: int
) -> None:
    """Refuse settings that would have no effect, or that the server would refuse.

    Args:
        settings: what was asked for.
        inputs: the model's inputs.
        outputs: its outputs.
        target: what it is made for.
        batch: the largest batch; 0 where the server forms none.

    Raises:
        BadInput: naming the setting.
    """
    names = {spec.name for spec in (*inputs, *outputs)}
    named = settings.inner()
    dims = {dim.name for spec in inputs for dim in spec.dims[1:] if isinstance(dim, Dim)}
    asked = settings.document()
    gpu_only = [key for key in GPU_ONLY if key in asked]
    batching = [key for key in BATCHING if key in asked]
    accelerated = [key for key in ("precision", "cuda_graphs") if key in asked]
    wrong = {
        f"{', '.join(gpu_only)}: only a GPU has that": gpu_only and target.device != "cuda",
        f"{', '.join(accelerated)}: for the accelerator, which is not set": accelerated and not settings.accelerator,
        f"{', '.join(batching)}: the server forms no batches of it": batching and not batch,
        f"max_batch = {settings.max_batch}: the model has no batch axis": settings.max_batch and not batch,
        f"{', '.join(batching)}: not together with a sequence": batching and settings.sequence,
        f"preferred = {list(settings.preferred)}: above the largest batch, {batch}": (
            batch and max(settings.preferred, default=0) > batch
        ),
        "weight: it weighs who gets resources, and there are none": settings.weight and not settings.resources,
        "on_timeout: there is no timeout_ms": settings.on_timeout == "delay" and not settings.timeout_ms,
        f"buckets: the inputs' dims that change size are {', '.join(sorted(dims)) or 'none'}": (
            set(settings.buckets) - dims
        ),
        f"sequence: the tensors are {', '.join(sorted(names))}": named - names,
    }
    for what, holds in wrong.items():
        if holds:
            raise BadInput(what, where="settings", fix="leave it out, or change what it goes with")


def gather(file: Path | None, pairs: Sequence[str], base: Mapping[str, Any]) -> Settings:
    """Return the settings of `base`, changed by the `[serve]` table of a TOML file, changed by pairs `KEY=VALUE`.

    Raises:
        UsageError: the file is not TOML or lacks the table, a pair has no `=`, or a key or value is wrong.
    """
    values = dict(base)
    if file is not None:
        values |= _table(file)
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise UsageError(f"--set {pair}: has no value", fix="write --set KEY=VALUE")
        values[key.strip()] = _value(value.strip())
    return read(values, "--set" if pairs else str(file or "settings"))


def _value(text: str) -> Any:
    """Return a value as TOML reads it; what it cannot read is text, so that words need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _table(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("serve")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fix = "mend that line; text stands in quotes"
        raise UsageError(f"is not TOML: {error}", where=str(file), fix=fix) from None
    if not isinstance(table, dict):
        raise UsageError("has no table [serve]", where=str(file), fix="write the settings below a line [serve]")
    return table
