"""Target: the hardware and the runtime that a model is made for."""

import os
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

Device = Literal["cpu", "cuda"]
Runtime = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
TENSORRT = ("tensorrt", "tensorrt-rtx")
"""Runtimes that compile the graph."""
LARGEST_BATCH, MOST_CORES = 65536, 1024
"""Beyond these a number is a slip of the hand."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Target:
    """Where a model will run.

    Args:
        device: `cpu` or `cuda`.
        runtime: `onnxruntime`, or on a CPU `openvino`, which computes float32 in bfloat16 where the CPU can. On a GPU
            `tensorrt`, which Triton's backends bring, or `tensorrt-rtx`, NVIDIA's plug-in of ONNX Runtime for RTX GPUs.
        cores: CPU cores that the server may use; the default is what this process may use.
        batch: the batch sizes that matter; costs are measured at these, and the largest bounds the server's batches.
    """

    device: Device = "cpu"
    runtime: Runtime = "onnxruntime"
    cores: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1, le=MOST_CORES)
    batch: tuple[Annotated[int, Field(ge=1, le=LARGEST_BATCH)], ...] = Field(default=(1, 32), min_length=1)

    @field_validator("runtime")
    @classmethod
    def _fits_device(cls, runtime: str, values: ValidationInfo) -> str:
        if runtime == "openvino" and values.data.get("device") == "cuda":
            raise PydanticCustomError("runtime", 'openvino runs on a CPU: say device = "cpu", or another runtime')
        if runtime in TENSORRT and values.data.get("device") != "cuda":
            raise PydanticCustomError("runtime", f'{runtime} runs on a GPU: say device = "cuda", or another runtime')
        return runtime

    def document(self) -> dict[str, Any]:
        """Return the JSON form, as `lineage.json` and recipes hold it."""
        return {"device": self.device, "runtime": self.runtime, "cores": self.cores, "batch": list(self.batch)}
