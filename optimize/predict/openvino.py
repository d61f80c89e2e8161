"""OpenVINO: a file in it, on the CPU."""

from functools import cache
from pathlib import Path
from typing import Any, Self

from modelathe.tensors import Array, Arrays
from optimize.machine import extra
from optimize.model.errors import BadGraph
from optimize.predict.onnxruntime import RUN


def _last_line(error: Exception) -> str:
    """Return where OpenVINO says what is wrong: after the places that the error went through."""
    return [line.strip(" -") for line in str(error).splitlines() if line.strip()][-1]


@cache
def _openvino_core() -> Any:
    """Return the process's only OpenVINO core, kept until it ends.

    Each core gives the thread that compiles first a signal stack of its own. Of two cores the one that goes last
    restores the other's, which is unmapped by then, and the next Ctrl-C is a segmentation fault (OpenVINO 2026.4.1).
    """
    import openvino

    return openvino.Core()


class OpenVinoPredictor:
    """An ONNX file in OpenVINO on the CPU, set up for one call at a time on all cores that it may use.

    Where the CPU has instructions for it, OpenVINO computes what a float32 graph says in bfloat16; that is its default.

    Args:
        path: the file; external data beside it is found.
        device: `cpu`.
        cores: threads; 0 lets OpenVINO take every core.

    Raises:
        MissingExtra: the package openvino is not installed.
        BadGraph: the file is missing, or has an operator that OpenVINO does not know.
    """

    def __init__(self, path: Path, device: str = "cpu", cores: int = 0) -> None:
        extra.require("openvino")
        self.name = "openvino"
        settings: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if cores:
            settings["INFERENCE_NUM_THREADS"] = cores
        core = _openvino_core()
        try:
            model = core.read_model(str(path))
            self._compiled = core.compile_model(model, device.upper(), settings)
        except Exception as error:
            raise BadGraph(
                f"OpenVINO cannot load it: {_last_line(error)}",
                where=str(path),
                fix='use runtime = "onnxruntime", or leave out the step that put the operator in',
            ) from error
        self._request = self._compiled.create_infer_request()
        self._inputs = {port.get_any_name() for port in model.inputs}
        # Not the compiled model's names, which are also those of inner values that became one with an output.
        self._outputs = [port.get_any_name() for port in model.outputs]

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Return the graph's outputs for one batch, in arrays of their own."""
        # OpenVINO would take what the call before has left in an input that is missing.
        if set(inputs) != self._inputs:
            raise BadGraph(
                f"OpenVINO cannot run it: the inputs are {sorted(self._inputs)}, given {sorted(inputs)}",
                where="model.onnx",
                fix=RUN,
            )
        try:
            values = self._request.infer(dict(inputs))
        except Exception as error:
            raise BadGraph(f"OpenVINO cannot run it: {_last_line(error)}", where="model.onnx", fix=RUN) from error
        return {name: values[index] for index, name in enumerate(self._outputs)}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Let the compiled model go."""
        del self._request, self._compiled
