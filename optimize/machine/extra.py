"""Extra: what modelathe can do only with packages beyond its usual ones, and how to say that they are missing."""

import importlib.util

from modelathe.commandline import install_line
from optimize.model.errors import MissingExtra

PACKAGES = {
    "openvino": ("openvino", "nncf"),
    "mlflow": ("mlflow",),
    "tensorrt": ("tensorrt_rtx",),
    "tensorrt-rtx": ("tensorrt_rtx", "onnxruntime_ep_nv_tensorrt_rtx"),
}
"""What each of modelathe's optional extras brings, by its name in pyproject.toml."""
RUNTIMES = {"openvino": "openvino", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt"}
"""The extra that a target's runtime needs."""
METHODS = {"quantize.nncf": "openvino"}
"""The extra that a method needs."""


def require(extra: str) -> None:
    """Say at once that an extra is not installed; a name that is no extra requires nothing.

    Raises:
        MissingExtra: with the line that installs it.
    """
    for package in PACKAGES.get(extra, ()):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"the package {package} is not installed", fix=install_line(extra))


def require_runtime(runtime: str) -> None:
    """Say at once that the extra which a target's runtime needs is not installed.

    Raises:
        MissingExtra: with the line that installs it.
    """
    if runtime in RUNTIMES:
        require(RUNTIMES[runtime])


def require_method(name: str) -> None:
    """Say at once that the extra which the method of this name needs is not installed.

    Raises:
        MissingExtra: with the line that installs it.
    """
    if name in METHODS:
        require(METHODS[name])
