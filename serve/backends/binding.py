"""Running an ONNX Runtime session with its tensors bound to places: inputs from the host, outputs to memory of ours.

A plain run of a session on a GPU copies every output into pageable memory, which the GPU reaches only through a copy of
the driver's. Bound to pinned memory, an output is written there at once, and numpy reads it in that same place.

It lies beside each backend's `model.py` in the server's environment.
"""

from onnxruntime import OrtDeviceMemoryType, OrtDeviceVendorId
from onnxruntime.capi._pybind_state import OrtDevice

HOST = OrtDevice(OrtDevice.cpu(), OrtDevice.default_memory(), 0)
"""Plain memory of this process."""


def pinned(number):
    """Return the host memory that GPU `number` writes to directly; its CUDA provider has an allocator for it."""
    kind = int(OrtDeviceMemoryType.HOST_ACCESSIBLE)
    return OrtDevice(OrtDevice.cuda(), kind, int(OrtDeviceVendorId.NVIDIA), number)


def outputs_to(config, number):
    """Return where the outputs of GPU `number` go by Triton's configuration, which pins them unless told otherwise."""
    wanted = (config.get("optimization") or {}).get("output_pinned_memory") or {}
    return pinned(number) if wanted.get("enable", True) else HOST


def run(session, names, feed, options, place):
    """Return the outputs of these names as arrays, in order; with no names nothing runs.

    Args:
        session: an `InferenceSession`.
        names: of its outputs.
        feed: arrays by the names of its inputs; numbers, because strings cannot be bound.
        options: ONNX Runtime's RunOptions.
        place: the memory that the outputs come to lie in: `HOST`, or `pinned(number)`.

    Raises:
        ValueError: an input that the graph needs is missing; bound runs would take it for one left out on purpose.
        RuntimeError: onnxruntime refuses a name, a type or a shape. The text has no error code, as a plain run's has.
    """
    if not names:
        return []
    if lacking := [tensor.name for tensor in session.get_inputs() if tensor.name not in feed]:
        raise ValueError(f"the input {', '.join(lacking)} is missing")
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_cpu_input(name, array)
    for name in names:
        # Its public method names devices, and none of its names is that of pinned memory.
        binding._iobinding.bind_output(name, place)
    binding.synchronize_inputs()
    session.run_with_iobinding(binding, options)
    binding.synchronize_outputs()
    return [value.numpy() for value in binding.get_outputs()]
