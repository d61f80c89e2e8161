"""Extra: what lathe can do only with packages beyond its usual ones, and how to say that they are missing."""

import importlib.util

from optimize.model.errors import MissingExtra

PACKAGES = {
    "openvino": ("openvino", "nncf"),
    "tensorrt": ("tensorrt_rtx",),
    "tensorrt-rtx": ("tensorrt_rtx", "onnxruntime_ep_nv_tensorrt_rtx"),
}
"""What each of lathe's optional extras brings, by its name in pyproject.toml."""
RUNTIMES = {"openvino": "openvino", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt"}
"""The extra that a target's runtime needs."""


def line(extra: str) -> str:
    """Return the line that installs an extra."""
    return f"pip install 'lathe[{extra}]'"


def require(extra: str) -> None:
    """Say at once that an extra is not installed; a name that is no extra requires nothing.

    Raises:
        MissingExtra: with the line that installs it.
    """
    for package in PACKAGES.get(extra, ()):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"the package {package} is not installed", fix=line(extra))


def require_runtime(runtime: str) -> None:
    """Say at once that the extra which a target's runtime needs is not installed.

    Raises:
        MissingExtra: with the line that installs it.
    """
    if runtime in RUNTIMES:
        require(RUNTIMES[runtime])
