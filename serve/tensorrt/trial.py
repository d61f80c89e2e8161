"""Trial: whether NVIDIA's compiler takes a model's graph with the profile that its configuration states."""

import tempfile
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from serve.config import gpu
from serve.config.errors import BadRepository
from serve.repository import scratch
from serve.tensorrt import ask
from serve.tensorrt.capability import CAPABILITIES, USUAL

PREFIXES = {"tensorrt": "trt", gpu.RTX: "nv"}
"""What the keys of a profile start with, by the accelerator's name."""


def needed(config: ModelConfig) -> bool:
    """Say whether a configuration asks for TensorRT where no GPU is, so that its compiler alone can be asked."""
    on_gpu = any(group.kind == ModelInstanceGroup.KIND_GPU for group in config.instance_group)
    return on_gpu and bool(_accelerators(config)) and ask.there() and not gpu.here()


def compiled(model: str, config: ModelConfig, graph: Path) -> str:
    """Return in one line what the compiler says of a graph that it takes.

    Raises:
        BadRepository: it does not take the graph, or not with these shapes.
        MachineError: it ended without an answer.
    """
    (name, parameters), *_ = _accelerators(config).items()
    profiles = _profiles(model, PREFIXES[name], parameters)
    with scratch.folder() as place, tempfile.NamedTemporaryFile(prefix="modelathe-compiler-", delete=False) as log:
        order = {"engine": str(place / "engine"), "sparse": False, "parts": False, "profiles": profiles}
        capabilities = [CAPABILITIES[capability] for capability in USUAL]
        # Where it ends without an answer, the log stays.
        found = ask.ask(Path(log.name), graph=str(graph.absolute()), capabilities=capabilities, **order)
    Path(log.name).unlink()
    if found.get("disk"):
        raise BadRepository(f"the engine could not be written: {found['disk']}", where=model, fix="make room there")
    if found["errors"]:
        error = found["errors"][0]
        said = ask.plain(error["text"])
        if not profiles and "profile" in said:
            return "not loaded, because there is no GPU here; not compiled, because its configuration states no profile"
        raise BadRepository(
            f"TensorRT's compiler refuses it: {': '.join(filter(None, (error['operator'], said)))}",
            where=model,
            fix=f'make it for the target: device = "cuda", runtime = "{name}"; or leave the accelerator out',
        )
    return f"not loaded, because there is no GPU here; TensorRT for RTX {found['version']} compiled it"


def _accelerators(config: ModelConfig) -> dict[str, dict[str, str]]:
    stated = config.optimization.execution_accelerators.gpu_execution_accelerator
    return {each.name: dict(each.parameters) for each in stated if each.name in PREFIXES}


def _profiles(model: str, prefix: str, parameters: dict[str, str]) -> dict[str, list[tuple[int, ...]]]:
    texts = {size: parameters.get(f"{prefix}_profile_{size}_shapes", "") for size in gpu.SIZES}
    try:
        shapes = {size: _shapes(text) for size, text in texts.items()}
        return {tensor: [shapes[size][tensor] for size in gpu.SIZES] for tensor in set().union(*shapes.values())}
    except (KeyError, ValueError):
        raise BadRepository(
            f"its configuration states no whole profile: {', '.join(texts.values())}",
            where=model,
            fix=f"state each tensor's shape as NAME:1x4 in {prefix}_profile_min_shapes, _opt_shapes and _max_shapes",
        ) from None


def _shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Return shapes by tensor of a text as `serve.config.gpu.joined_shapes` writes it."""
    pairs = (entry.rpartition(":") for entry in text.split(",") if entry)
    return {name: tuple(map(int, sizes.split("x"))) for name, _, sizes in pairs}
