"""Extra: what lathe can do only with packages beyond its usual ones, and how to say that they are missing."""

import importlib.util

from optimize.errors import MissingExtra

PACKAGES = {"openvino": ("openvino", "nncf")}
"""What each of lathe's optional extras brings, by its name in pyproject.toml."""


def require(extra: str) -> None:
    """Say at once that an extra is not installed; a name that is no extra requires nothing.

    Raises:
        MissingExtra: with the line that installs it.
    """
    for package in PACKAGES.get(extra, ()):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"the package {package} is not installed", fix=f"pip install 'lathe[{extra}]'")
