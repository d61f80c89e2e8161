"""Load: a workload by its name, from a file, a module or a Hugging Face folder."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType

from optimize.model.errors import BadWorkload
from optimize.source import code
from optimize.source.batch import guarded
from optimize.source.workload import Workload

OURS = Workload.__module__


def load_workload(source: str) -> Workload:
    """Return the workload that `path/to/file.py:function`, `package.module:function` or a Hugging Face folder names.

    Without `:function` it is `workload`, else the only function that says that it returns a Workload, or the only
    Workload in the file.

    Raises:
        BadWorkload: no such file or function, or the user's code raised; the message names the user's own line.
    """
    if (Path(source) / "config.json").is_file():
        from optimize.source import huggingface

        return huggingface.workload(Path(source))
    place, _, name = source.rpartition(":")
    if not place:
        place, name = source, ""
    with code.importing(place):
        if place.endswith(".py"):
            module = guarded(lambda: _import_file(Path(place)), place, place)
        else:
            module = _import_module(place)
    name = name or _only(module, place)
    made = getattr(module, name, None)
    if made is None:
        raise BadWorkload(
            f"there is no {name!r} in it",
            where=place,
            fix=f"define a function that returns a Workload, and name it here{_candidates(module)}",
        )
    file = getattr(module, "__file__", None) or place
    workload = made if isinstance(made, Workload) else guarded(made, f"{name}()", str(file))
    if not isinstance(workload, Workload):
        raise BadWorkload(
            f"{name}() returned {type(workload).__name__}, not a Workload", where=place, fix="return a Workload"
        )
    # Now, so that no later change of a file passes for the code that runs here.
    code.code(f"{place}:{name}")
    return replace(workload, source=f"{place}:{name}")


def _only(module: ModuleType, place: str) -> str:
    """Return the name of the workload in a module, where it is clear which it is.

    Raises:
        BadWorkload: several functions say that they return a Workload, and none of them is called `workload`.
    """
    found = [name for name, value in _own(module).items() if _is_workload(value)]
    if "workload" in vars(module) or not found:
        return "workload"
    if len(found) > 1:
        raise BadWorkload(
            f"has several workloads: {', '.join(found)}", where=place, fix=f"name one of them, as {place}:{found[0]}"
        )
    return found[0]


def _own(module: ModuleType) -> dict[str, object]:
    """Return what a module defines itself and does not keep to itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", module.__name__) in (module.__name__, OURS)
    }


def _is_workload(value: object) -> bool:
    returned = value.__annotations__.get("return") if isinstance(value, FunctionType) else type(value)
    return returned in (Workload, "Workload", "optimize.Workload")


def _candidates(module: ModuleType) -> str:
    names = [name for name, value in _own(module).items() if isinstance(value, FunctionType)]
    return f"; its functions are: {', '.join(names[:10])}" if names else ""


def file_of(source: str) -> Path | None:
    """Return the Python file behind a workload source, or a folder's weights, or None when it cannot be found."""
    if source.endswith("/"):
        from optimize.source import huggingface

        return huggingface.weights(Path(source))
    place = source.rpartition(":")[0] or source
    if place.endswith(".py"):
        return Path(place)
    module = sys.modules.get(place)
    return Path(module.__file__) if module and module.__file__ else None


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadWorkload("there is no such file", where=str(path), fix="give path/to/file.py:function")
    # A name that is the same in every run, and that no other module has.
    name = f"workload_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadWorkload("is not a Python file", where=str(path), fix="give path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look their module up by name; the file may import what lies beside it.
    sys.modules[name] = module
    _look_in(path.resolve().parent)
    spec.loader.exec_module(module)
    return module


def _import_module(place: str) -> ModuleType:
    """Import `package.module`, from the working directory too, which a console script does not search."""
    fix = "give path/to/file.py:function or package.module:function"
    if Path(place).exists() and not Path(place).is_dir():
        raise BadWorkload("is not a Python file", where=place, fix=fix)
    if (Path(place) / "bundle.json").is_file():
        raise BadWorkload(
            "is a bundle, not a workload",
            where=place,
            fix="give the workload that it was made from; optimize show says it",
        )
    if not all(part.isidentifier() for part in place.split(".")):
        raise BadWorkload("there is no such file or module", where=place or "SOURCE", fix=fix)
    _look_in(Path.cwd())
    try:
        module: ModuleType = guarded(lambda: importlib.import_module(place), place, place)
    except BadWorkload as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{place}.".startswith(f"{cause.name}."):
            raise BadWorkload("there is no such module", where=place, fix=fix) from cause
        raise
    return module


def _look_in(folder: Path) -> None:
    # Last, so that no file of the user's takes the place of a module that modelathe needs.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
