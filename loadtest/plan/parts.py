"""Parts: the traffic that a command's options describe, from data, lineage or what the server says of its models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtest.plan.data import answers, npz, payload, read, recorded
from loadtest.plan.data.request import Data, Signature
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Fresh, Part
from modelathe.client import Client, connect
from modelathe.errors import BadInput, UsageError
from modelathe.tensors import TensorSpec

PAYLOADS = 16
"""Different requests of random values, which a run goes through again and again."""
Sizes = tuple[dict[str, tuple[int, ...]], float | None]
"""The sizes of some inputs, and the weight that requests of these sizes have."""


def parts(plan: Plan, model: str, options: dict[str, Any]) -> list[Part]:
    """Return the traffic, the share of `model` first; asks the server what its models take.

    Args:
        plan: says where the server is, and the trace.
        model: the command's.
        options: by the names of the command line: `mix`, `version`, `batch`, `data`, `repository`, `shapes`,
            `tolerance`, `fresh`, `constant` and `nonfinite`.

    Raises:
        BadInput: the data cannot be used.
        UsageError: options that contradict each other, or sizes that the model does not take.
        ModelMissing: the server does not have a model.
    """
    if options["data"] is None and plan.trace and recorded.holds_requests(Path(plan.trace)):
        options = options | {"data": Path(plan.trace)}
    source = options["data"]
    _check(plan, options)
    with connect(plan.url, connection=plan.connection) as client:
        if source is not None and source.suffix == read.RECORDED:
            return _replayed(client, source, model, options)
        return [
            replace(part, weight=weight * part.weight)
            for name, weight in [(model, 1.0), *options["mix"]]
            for part in _of_model(client, plan, name, options if name == model else options | {"version": ""})
        ]


def _check(plan: Plan, options: dict[str, Any]) -> None:
    source = options["data"]
    stated, checked = source is not None, options["tolerance"] is not None
    replayed = source is not None and source.suffix == read.RECORDED
    weighted = any(weight is not None for _, weight in options["shapes"])
    contradictions = {
        "--fresh makes values and --data states them": options["fresh"] and stated,
        "--fresh and --constant contradict each other": options["fresh"] and options["constant"],
        "--fresh values have no right answers to check against": options["fresh"] and checked,
        "--sequence makes values whose right answers --tolerance cannot know": plan.sequence and checked and not stated,
        "a mix of shapes is made, and --data states the values": weighted and stated,
        "recorded traffic has its own mix of models": options["mix"] and replayed,
        "recorded traffic has its own shapes": options["shapes"] and replayed,
        "recorded traffic is not --constant": options["constant"] and replayed,
    }
    for text, found in contradictions.items():
        if found:
            raise UsageError(text, fix="leave one of the two away")


def _replayed(client: Client, path: Path, model: str, options: dict[str, Any]) -> list[Part]:
    """Return recorded traffic: a part for each model; lines that name none are MODEL's."""
    lines = list(enumerate(recorded.lines(path)))
    found = []
    for name in dict.fromkeys(line.model or model for _, line in lines):
        own = [(n, line) for n, line in lines if (line.model or model) == name]
        version = options["version"] if name == model else ""
        signature, _, tolerance = _known(client, name, version, options)
        data = recorded.requests(path, [line for _, line in own], signature, options["batch"])
        part = _carrying(name, version, data, tolerance)
        found.append(replace(part, order=[n for n, _ in own]))
    return found


def _of_model(client: Client, plan: Plan, model: str, options: dict[str, Any]) -> list[Part]:
    """Return one model's traffic, a part for each of the shapes that are mixed."""
    version, source = options["version"], options["data"]
    signature, stated, tolerance = _known(client, model, version, options)
    alternatives = _alternatives(options["shapes"], stated if options["mix"] else None)
    if source is not None:
        shaped = replace(signature, inputs=payload.with_shapes(signature.inputs, alternatives[0][0]))
        data = read.read(source, shaped, options["batch"])
        if options["constant"]:
            data = Data(data.requests[:1], data.streams and [1])
        return [_carrying(model, version, data, tolerance)]
    found, count = [], 1 if options["constant"] else PAYLOADS
    for sizes, share in alternatives:
        specs = payload.with_shapes(stated, sizes)
        payloads = payload.generate(specs, count, plan.seed, options["batch"])
        fresh = Fresh(specs, options["batch"], plan.seed) if options["fresh"] else None
        found.append(Part(model, payloads, version, share, None if fresh else tolerance, fresh=fresh))
    return found


def _alternatives(
    shapes: Sequence[Sizes], only: Sequence[TensorSpec] | None
) -> list[tuple[dict[str, tuple[int, ...]], float]]:
    """Return the sizes to mix and their shares; those without a weight hold for all.

    In a mix of models each gets what is said of its inputs, `only`.
    """
    always = {name: sizes for one, weight in shapes if weight is None for name, sizes in one.items()}
    mixed = [(always | one, weight) for one, weight in shapes if weight is not None] or [(always, 1.0)]
    shares: dict[tuple[tuple[str, tuple[int, ...]], ...], float] = {}
    for sizes, weight in mixed:
        own = tuple((name, sizes[name]) for name in sizes if only is None or any(spec.name == name for spec in only))
        shares[own] = shares.get(own, 0.0) + weight
    whole = sum(shares.values())
    if not whole > 0:
        raise UsageError("all weights of --shape are 0", fix="give one a weight above 0")
    return [(dict(own), weight / whole) for own, weight in shares.items()]


def _carrying(model: str, version: str, data: Data, tolerance: answers.Tolerance | None) -> Part:
    expected = data.expected
    if expected and tolerance is None:
        tolerance = answers.EXACT
    return Part(model, data.payloads, version, 1.0, tolerance, expected, streams=data.streams)


def _known(
    client: Client, model: str, version: str, options: dict[str, Any]
) -> tuple[Signature, Sequence[TensorSpec], answers.Tolerance | None]:
    """Return the signature that the server states, the inputs with what the lineage adds, and the tolerance."""
    stated, outputs = client.metadata(model, version)
    stated = stated or _assumed(client.url, options)
    signature = Signature(stated, outputs, client.optional(model, version), options["nonfinite"])
    tolerance = options["tolerance"]
    if not options["repository"]:
        return signature, stated, tolerance
    version = client.served_version(model, version)
    specs, deviation = payload.from_lineage(options["repository"], model, version)
    if tolerance is None and deviation is not None:
        tolerance = answers.tolerance(deviation)
    if {(spec.name, spec.dtype) for spec in specs} != {(spec.name, spec.dtype) for spec in stated}:
        raise BadInput(
            "its inputs are not those of the model that the server has",
            where=str(options["repository"] / model / version / "lineage.json"),
            fix="give the repository that the server serves",
        )
    return signature, specs, tolerance


def _assumed(url: str, options: dict[str, Any]) -> list[TensorSpec]:
    """Return the inputs of a model of which the server names none: those of an .npz file, or float32 of each --shape.

    Raises:
        UsageError: nobody says what they are.
    """
    source = options["data"]
    if source is not None and source.suffix == ".npz":
        return npz.inputs(source)
    always = {name: sizes for one, _ in options["shapes"] for name, sizes in one.items()}
    if not always:
        raise UsageError(
            "the server does not say which inputs the model has",
            where=url,
            fix="give them as --shape NAME:D1,D2 for float32 values, or as --data FILE.npz",
        )
    return [TensorSpec(name, "float32", sizes) for name, sizes in always.items()]
