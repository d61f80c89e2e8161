"""Interpreter: how programs of ours are started, by us and by the user.

Another Python process of ours runs our modules and never the caller's:

`python -m` looks for modules in the current folder first, where a file of the caller may have the name of one of ours.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of ours in this very interpreter; start it with `variables()`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def variables() -> dict[str, str]:
    """Return this process's environment, with a PYTHONPATH under which another process finds this very package."""
    return os.environ | {"PYTHONPATH": path()}


def path() -> str:
    """Return that PYTHONPATH. An empty entry would stand for the current folder, so none is passed on."""
    return os.pathsep.join([str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])


def program(name: str) -> str:
    """Return what the user types for a program of ours: its name if PATH finds this installation's, else its path."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not own.exists() or (found is not None and own.samefile(found)):
        return name
    return shlex.quote(min(os.path.relpath(own), str(own), key=len))
