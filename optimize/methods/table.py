"""Table: the one table of methods, which alone imports them.

A method is one file: a frozen config whose type picks the function, and the function. It joins by a row in `METHODS`.
The files in the table import torch and onnx only inside their functions, so that `--help` stays light.
"""

from collections.abc import Mapping

from optimize.methods.distill import features, logits, relations
from optimize.methods.export import fuse
from optimize.methods.export import onnx as export_onnx
from optimize.methods.prune import channels, heads, layers, weights
from optimize.methods.quantize import dynamic, fp8, half, mixed, nncf, qat, smooth, static, weight_only
from optimize.step.contract import Method
from serve.config.target import Target


def nothing(_config: object) -> tuple[str, ...]:
    """Return what a method needs that needs nothing of the workload but its model."""
    return ()


def _searched(config: mixed.Mixed, target: Target) -> mixed.Mixed:
    """Return the config of a search.

    Raises:
        BadRecipe: the target's runtime lacks what a method writes that the search applies.
    """
    for name in mixed.over(config):
        kind, method = BY_NAME[name]
        method.suited(kind(), target)
    return config


METHODS: Mapping[type, Method] = {
    channels.Channels: Method(
        "prune.channels", "torch", frozenset({"smaller", "faster"}), channels.needs, channels.apply, channels.matches
    ),
    heads.Heads: Method(
        "prune.heads", "torch", frozenset({"smaller", "faster"}), heads.needs, heads.apply, heads.matches
    ),
    layers.Layers: Method(
        "prune.layers", "torch", frozenset({"smaller", "faster"}), layers.needs, layers.apply, layers.matches
    ),
    weights.Weights: Method("prune.weights", "torch", frozenset(), weights.needs, weights.apply, weights.matches),
    logits.Logits: Method("distill.logits", "torch", frozenset(), logits.needs, logits.apply, logits.matches),
    features.Features: Method(
        "distill.features", "torch", frozenset(), features.needs, features.apply, features.matches
    ),
    relations.Relations: Method(
        "distill.relations", "torch", frozenset(), relations.needs, relations.apply, relations.matches
    ),
    export_onnx.Onnx: Method("export.onnx", "export", frozenset(), nothing, export_onnx.apply, export_onnx.matches),
    fuse.Fuse: Method("export.fuse", "graph", frozenset(), nothing, fuse.apply, fuse.matches),
    smooth.Smooth: Method("quantize.smooth", "graph", frozenset(), smooth.needs, smooth.apply, smooth.matches),
    static.Static: Method(
        "quantize.static", "graph", frozenset({"smaller", "faster"}), static.needs, static.apply, static.matches
    ),
    qat.Qat: Method("quantize.qat", "export", frozenset({"smaller", "faster"}), qat.needs, qat.apply, qat.matches),
    mixed.Mixed: Method(
        "quantize.mixed",
        "graph",
        frozenset({"smaller", "faster"}),
        mixed.needs,
        mixed.apply,
        mixed.matches,
        selects=True,
        suited=_searched,
    ),
    nncf.Nncf: Method("quantize.nncf", "graph", frozenset({"smaller", "faster"}), nncf.needs, nncf.apply, nncf.matches),
    dynamic.Dynamic: Method(
        "quantize.dynamic",
        "graph",
        frozenset({"smaller", "faster"}),
        nothing,
        dynamic.apply,
        dynamic.matches,
        suited=dynamic.suited,
    ),
    weight_only.WeightOnly: Method(
        "quantize.weight_only",
        "graph",
        frozenset({"smaller"}),
        nothing,
        weight_only.apply,
        weight_only.matches,
        suited=weight_only.suited,
    ),
    half.Half: Method(
        "quantize.half", "graph", frozenset({"smaller"}), half.needs, half.apply, half.matches, suited=half.suited
    ),
    fp8.Fp8: Method("quantize.fp8", "graph", frozenset({"smaller"}), fp8.needs, fp8.apply, fp8.matches),
}
NAMES: Mapping[str, type] = {method.name: config for config, method in METHODS.items()}
BY_NAME: Mapping[str, tuple[type, Method]] = {method.name: (config, method) for config, method in METHODS.items()}
