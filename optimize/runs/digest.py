"""Digest: what a bundle was made from, as one chain.

Each bundle holds a digest of everything that it depends on: the trained model's of the user's code, the trained
weights and the evaluation data; a step's of the key of the bundle that it started from and what that bundle holds, of
the step's config, seed and target, and of the data that it reads. The digest of these is the bundle's key. What does
not change a bundle is not in it: budget, load test and serving.
"""

import json
import uuid
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from modelathe.commandline import version
from optimize.machine import cpu
from optimize.methods.apply import reads
from optimize.methods.table import METHODS
from optimize.source.code import code
from optimize.step import key
from optimize.step.key import Key

if TYPE_CHECKING:
    from optimize.runs.recipe import Recipe
    from optimize.source.splits import Sets
    from optimize.source.workload import Workload
    from optimize.step.bundle import Bundle

BY_CPU = ("quantize.static", "quantize.dynamic", "quantize.mixed", "quantize.nncf", "quantize.qat")
"""Steps that give 8-bit numbers the range that this machine's CPU needs, unless their config says it."""


def trained(workload: "Workload", sets: "Sets") -> Key:
    """Return the key of the trained model's bundle."""
    from optimize.step.contract import fingerprint

    module = workload.build()
    kinds = [(name, type(layer).__qualname__) for name, layer in module.named_modules()]
    return Key(
        {
            **_code(workload),
            "trained weights": key.of(fingerprint(module), repr(kinds)),
            "evaluation data": sets.digests["evaluation"],
            "modelathe": version(),
        }
    )


def _code(workload: "Workload") -> dict[str, str]:
    """Return the digests of the user's code by name; what is in no file equals that of no other run."""
    if not workload.source:
        return {"code made in Python": uuid.uuid4().hex}
    return {f"code of {name}": digest for name, digest in code(workload.source).items()}


def run(recipe: "Recipe", trained: Key, sets: "Sets") -> Key:
    """Return the key by which a run is known: of its whole recipe, of the trained model, and of all data."""
    asked = key.of(json.dumps(recipe.document(), sort_keys=True))
    data = {f"{kind} data": digest for kind, digest in sets.digests.items()}
    return Key({"recipe": asked, **trained.parts, **data})


def step(config: Any, source: "Bundle", recipe: "Recipe", sets: "Sets", *, last: bool = False) -> Key:
    """Return the key of the bundle that a step makes.

    Args:
        config: the step's.
        source: the bundle that it starts from.
        recipe: its seed and target are what a step may depend on.
        sets: of the workload.
        last: whether it is the recipe's last step, whose graph loses the names of its nodes.
    """
    from optimize.step.contract import fingerprint

    method = METHODS[type(config)]
    in_graph = method.stage == "graph"
    assert source.graph is not None or not in_graph
    values = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    found = {
        "step before": source.key.digest,
        "model before": fingerprint(source.graph if in_graph and source.graph else source.module),
        "config": key.of(method.name, repr(sorted(values.items())), str(recipe.seed)),
        "target": key.of(json.dumps(recipe.target.document(), sort_keys=True)),
        **{f"{kind} data": sets.digests[kind] for kind in reads(config, source.workload)},
    }
    if student := values.get("student"):
        found["student"] = fingerprint(source.workload.build(student))
    if method.name in BY_CPU:
        reduced = cpu.reduced_range(values.get("reduce_range"), "cpu")
        found["range of 8-bit numbers on this CPU"] = f"{7 if reduced else 8} bits"
    if in_graph:
        found["place in the recipe"] = "last" if last else "not last"
    return Key(found)
