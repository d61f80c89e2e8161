"""Digest: what a bundle was made from, as one chain.

Each bundle holds a digest of everything that it depends on: the trained model's of the user's code, the trained
weights and the evaluation data; a step's of the key of the bundle that it started from and what that bundle holds, of
the step's config, seed and target, and of the data that it reads. The digest of these is the bundle's key. What does
not change a bundle is not in it: budget, load test and serving.
"""

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modelathe.commandline import version
from optimize.machine import cpu
from optimize.methods.apply import reads
from optimize.methods.table import METHODS
from optimize.model.errors import BadWorkload

if TYPE_CHECKING:
    from optimize.run.recipe import Recipe
    from optimize.source.splits import Sets
    from optimize.source.workload import Workload
    from optimize.step.bundle import Bundle

BY_CPU = ("quantize.static", "quantize.dynamic", "quantize.mixed", "quantize.nncf", "quantize.qat")
"""Steps that give 8-bit numbers the range that this machine's CPU needs, unless their config says it."""
OURS = ("optimize", "serve", "loadtest")
_SEEN: dict[str, tuple[ModuleType, str]] = {}
"""Modules and the digests of their files when we first saw them: what changes in a file later is not what runs."""
_IMPORTED: dict[str, set[str]] = {}
"""The modules that each workload's file brought in while it ran, by the file or module that names the workload."""


@dataclass(frozen=True)
class Key:
    """By which a bundle is known again.

    Args:
        parts: the digest of each thing that it was made from, by its name; empty where that is not known.
    """

    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The one digest of all parts; empty for none."""
        return _of(json.dumps(dict(self.parts), sort_keys=True)) if self.parts else ""

    def changed(self, now: "Key") -> str:
        """Return the names of the parts that differ, with commas."""
        names = sorted({*self.parts, *now.parts})
        return ", ".join(name for name in names if self.parts.get(name) != now.parts.get(name))


def trained(workload: "Workload", sets: "Sets") -> Key:
    """Return the key of the trained model's bundle."""
    from optimize.step.contract import fingerprint

    module = workload.build()
    kinds = [(name, type(layer).__qualname__) for name, layer in module.named_modules()]
    return Key(
        {
            **{f"code of {name}": digest for name, digest in code(workload.source).items()},
            "trained weights": _of(fingerprint(module), repr(kinds)),
            "evaluation data": sets.digests["evaluation"],
            "lathe": version(),
        }
    )


def step(config: Any, source: "Bundle", recipe: "Recipe", sets: "Sets", *, last: bool = False) -> Key:
    """Return the key of the bundle that a step makes.

    Args:
        config: the step's.
        source: the bundle that it starts from.
        recipe: its seed and target are what a step may depend on.
        sets: of the workload.
        last: whether it is the recipe's last step, whose graph loses the names of its nodes.
    """
    from optimize.step.contract import fingerprint

    method = METHODS[type(config)]
    in_graph = method.stage == "graph"
    assert source.graph is not None or not in_graph
    values = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    found = {
        "step before": source.key.digest,
        "model before": fingerprint(source.graph if in_graph and source.graph else source.module),
        "config": _of(method.name, repr(sorted(values.items())), str(recipe.seed)),
        "target": _of(json.dumps(recipe.target.document(), sort_keys=True)),
        **{f"{kind} data": sets.digests[kind] for kind in reads(config, source.workload)},
    }
    if student := values.get("student"):
        found["student"] = fingerprint(source.workload.build(student))
    if method.name in BY_CPU:
        reduced = cpu.reduced_range(values.get("reduce_range"), "cpu")
        found["range of 8-bit numbers on this CPU"] = f"{7 if reduced else 8} bits"
    if in_graph:
        found["place in the recipe"] = "last" if last else "not last"
    return Key(found)


def code(source: str) -> dict[str, str]:
    """Return the digest of each file of the user's that a workload runs, its own included, by module.

    Imports are followed as they are written, inside functions too, and what else was imported while the workload's file
    ran is taken as well. Python's own modules, installed packages and lathe's do not count. Of a Hugging Face folder it
    is the JSON files.

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
    if parts[0] in OURS or parts[0] in sys.stdlib_module_names:
        return
    for count in range(1, len(parts) + 1):
        full = ".".join(parts[:count])
        spec = getattr(sys.modules.get(full), "__spec__", None) or PathFinder.find_spec(full, path)
        if spec is None:
            return
        if spec.has_location and spec.origin and _is_users(Path(spec.origin)):
            yield full, Path(spec.origin)
        if (path := spec.submodule_search_locations) is None:
            return


def _is_users(file: Path) -> bool:
    installed = {"site-packages", "dist-packages"} & {*file.parts}
    return not installed and not file.is_relative_to(sysconfig.get_path("stdlib"))


def _of(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _of_file(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise BadWorkload(
            "cannot be read", where=str(file), fix="let it be there as long as the command runs"
        ) from error
