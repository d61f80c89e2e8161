"""Build: the compiler's own process: parse a graph, compile it, write the engine, and say as JSON what came of it.

`optimize.tensorrt.compiler` starts it with an order, in JSON, on its standard input. TensorRT speaks to the descriptors
and may end the process; so the answer goes to a file, and is there only if the process came to its end.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Read the order and write the answer: `errors`, and of an engine `bytes`, `seconds` and the network's `layers`."""
    order = json.load(sys.stdin)
    try:
        answer = compiled(order)
    except OSError as error:
        answer = {"disk": f"{error.strerror}: {error.filename or order['engine']}"}
    Path(order["answer"]).write_text(json.dumps(answer))


def compiled(order: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to an order.

    Args:
        order: `graph` and `engine` are paths, `profiles` gives for each input of several sizes its smallest, typical
            and largest shape, `capabilities` names members of TensorRT's enum, `sparse` allows 2:4 kernels. With
            `parts` nothing is compiled: the answer says which nodes the parser takes.
    """
    import tensorrt_rtx as trt

    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        """Everything to standard error; errors are kept, for the builder gives its reasons nowhere else."""

        def log(self, severity: Any, message: str) -> None:
            print(f"{severity.name}: {message}", file=sys.stderr)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                said.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if order["parts"]:
        return {"errors": [], "parts": _parts(parser, Path(order["graph"]))}
    if not parser.parse_from_file(order["graph"]):
        found = [parser.get_error(number) for number in range(parser.num_errors)]
        return {"errors": [_error(error) for error in found]}
    started = time.monotonic()
    plan = builder.build_serialized_network(network, _config(builder, order))
    seconds = time.monotonic() - started
    if plan is None:
        return {"errors": [{"node": -1, "operator": "", "code": "", "text": text} for text in said]}
    Path(order["engine"]).write_bytes(plan)
    layers = [_layer(network.get_layer(number)) for number in range(network.num_layers)]
    return {"errors": [], "bytes": plan.nbytes, "seconds": seconds, "layers": layers, "version": trt.__version__}


def _parts(parser: Any, graph: Path) -> list[int]:
    """Return how many nodes each part of a graph has that the parser takes."""
    parser.supports_model_v2(graph.read_bytes(), str(graph))
    return [len(parser.get_subgraph_nodes(number)) for number in range(parser.num_subgraphs)]


def _error(error: Any) -> dict[str, Any]:
    return {
        "node": error.node(),
        "operator": error.node_operator(),
        "code": error.code().name,
        "text": error.desc(),
    }


def _config(builder: Any, order: dict[str, Any]) -> Any:
    import tensorrt_rtx as trt

    config = builder.create_builder_config()
    config.num_compute_capabilities = len(order["capabilities"])
    for number, name in enumerate(order["capabilities"]):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), number)
    if order["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    profile = builder.create_optimization_profile()
    for name, sizes in order["profiles"].items():
        profile.set_shape(name, *sizes)
    if order["profiles"]:
        config.add_optimization_profile(profile)
    return config


def _layer(layer: Any) -> dict[str, Any]:
    """Return a layer as plain values; a tensor is its name and its type."""
    inputs = [layer.get_input(number) for number in range(layer.num_inputs)]
    outputs = [layer.get_output(number) for number in range(layer.num_outputs)]
    return {
        "name": layer.name,
        "kind": layer.type.name,
        "inputs": [None if each is None else [each.name, each.dtype.name] for each in inputs],
        "outputs": [[each.name, each.dtype.name] for each in outputs],
    }


if __name__ == "__main__":
    main()
