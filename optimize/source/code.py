"""Code: which of the user's files a workload runs, and their digests."""

import ast
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from optimize.model import userline
from optimize.model.errors import BadWorkload

_SEEN: dict[str, tuple[ModuleType, str]] = {}
"""Modules and the digests of their files when we first saw them: what changes in a file later is not what runs."""
_IMPORTED: dict[str, set[str]] = {}
"""The modules that each workload's file brought in while it ran, by the file or module that names the workload."""


def code(source: str) -> dict[str, str]:
    """Return the digest of each file of the user's that a workload runs, its own included, by module.

    Imports are followed as they are written, inside functions too, and what else was imported while the workload's file
    ran is taken as well. Python's own modules, installed packages and modelathe's do not count. Of a Hugging Face
    folder it is the JSON files.

    Args:
        source: the workload's.
    """
    if source.endswith("/"):
        return {file.name: _of_file(file) for file in sorted(Path(source).glob("*.json"))}
    place = source.rpartition(":")[0]
    waiting = [(Path(place).name, Path(place))] if place.endswith(".py") else list(_located(place))
    waiting += [found for name in sorted(_IMPORTED.get(place, ())) for found in _located(name)]
    digests: dict[str, str] = {}
    while waiting:
        name, file = waiting.pop()
        if name not in digests:
            digests[name] = _first_seen(name, file)
            waiting += _imports(name, file)
    return digests


def commit(source: str) -> str:
    """Return the git commit that a workload's file stands in, `-dirty` where files differ from it, or nothing."""
    place = Path(source if source.endswith("/") else source.rpartition(":")[0])
    asked = ["git", "-C", str(place.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@contextmanager
def importing(place: str) -> Iterator[None]:
    """Remember which modules the code in this block brings in: it runs the workload's file `place`."""
    before = set(sys.modules)
    yield
    _IMPORTED.setdefault(place, set()).update(set(sys.modules) - before - {f"workload_of_{Path(place).stem}"})


def _first_seen(name: str, file: Path) -> str:
    module = sys.modules.get(name)
    if module is None:
        return _of_file(file)
    if name not in _SEEN or _SEEN[name][0] is not module:
        _SEEN[name] = module, _of_file(file)
    return _SEEN[name][1]


def _imports(name: str, file: Path) -> Iterator[tuple[str, Path]]:
    """Yield the user's modules that a Python file imports."""
    if file.suffix != ".py":
        return
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _located(alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # What is imported may be a module itself.
                yield from _located(f"{base}.{alias.name}")


def _located(name: str) -> Iterator[tuple[str, Path]]:
    """Yield a module and the packages that it is in, as far as they are the user's; nothing is imported."""
    parts, path = name.split("."), None
    if parts[0] in userline.OURS or parts[0] in sys.stdlib_module_names:
        return
    for count in range(1, len(parts) + 1):
        full = ".".join(parts[:count])
        spec = getattr(sys.modules.get(full), "__spec__", None) or PathFinder.find_spec(full, path)
        if spec is None:
            return
        if spec.has_location and spec.origin and userline.is_users(Path(spec.origin)):
            yield full, Path(spec.origin)
        if (path := spec.submodule_search_locations) is None:
            return


def _of_file(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise BadWorkload(
            "cannot be read", where=str(file), fix="let it be there as long as the command runs"
        ) from error
