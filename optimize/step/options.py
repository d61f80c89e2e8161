"""Options: the fields that the configs of several methods share, each said once."""

from typing import Literal

from pydantic import Field

EXCLUDED_LAYERS: tuple[str, ...] = Field(default=(), description="Layers to leave alone, as globs on module names.")
"""The field `exclude` of methods that work on modules."""
EXCLUDED_NODES: tuple[str, ...] = Field(default=(), description="Globs of node names that stay float.")
"""The field `exclude` of methods that quantize a graph."""
PARTIAL: bool = Field(default=False, description="Go on where most bytes of the weights cannot be quantized.")
"""The field `partial` of every method that quantizes weights."""
REDUCE_RANGE: bool | None = Field(
    default=None,
    description="Weights of 7 bits, for CPUs without VNNI, whose 8-bit products overflow; unless said, as this CPU "
    "needs it.",
)
ACTIVATIONS: Literal["auto", "uint8", "int8"] = Field(
    default="auto",
    description="uint8 with a zero point, which is fast on a CPU, or int8 without, which TensorRT asks for; auto "
    "goes by the target's device.",
)
EPOCHS: int = Field(default=4, ge=1, description="Passes over the training data.")
LEARNING_RATE: float = Field(
    default=1e-3, gt=0, allow_inf_nan=False, description="Peak rate of AdamW; it falls along a cosine."
)
STUDENT: str = Field(default="", description="The workload's student to train; the model as it comes unless named.")
OUTPUT_WEIGHT: float = Field(
    default=1.0, ge=0, allow_inf_nan=False, description="Weight of drawing the outputs to the trained model's."
)
PRECISION: Literal["float32", "bfloat16", "auto"] = Field(
    default="float32",
    description="Of the forward passes; bfloat16 is faster where the hardware has it, and what auto takes there.",
)
