"""The server's own environment: a virtual environment with the real tritonserver of the nvidia-pytriton wheel.

It is kept apart from the user's packages because the carried Python backend needs numpy 1. A marker file, written last,
says what the environment was made from: without it, or with another content, the environment counts as absent.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelathe import files
from serve.config.errors import NotInstalled

REQUIREMENTS = Path(__file__).with_name("server-requirements.txt")
OPENVINO = Path(__file__).with_name("server-requirements-openvino.txt")
BACKENDS = Path(__file__).parent.parent / "backends"
"""A folder for each backend, and beside them what they share."""
SUPPORTED = ((3, 11), (3, 12))
"""Python versions for which both the wheel's backend process and numpy 1.26 exist."""

_MARKER, _FORMER = "modelathe-server.json", "lathe-server.json"
"""What says that a folder is ours; the second is that of 0.1."""
_FIX = "run: serve install"


@dataclass(frozen=True)
class Environment:
    """Where the parts of an installed server are; every path is absolute and exists.

    Args:
        prefix: the virtual environment.
        python: its interpreter.
        tritonserver: the server binary.
        backends: the backend folder to start it with: NVIDIA's Python backend, and ours on top of it.
        site_packages: where its Python packages are.
        libdir: where the interpreter's shared library is.
        gpu: whether onnxruntime was installed with its CUDA provider.
        openvino: whether openvino was installed as well.
    """

    prefix: Path
    python: Path
    tritonserver: Path
    backends: Path
    site_packages: Path
    libdir: Path
    gpu: bool
    openvino: bool

    @property
    def caches(self) -> Path:
        """The folder of tritonserver's response caches."""
        return self.tritonserver.parent.parent / "caches"

    def require(self, backend: str) -> None:
        """Say at once that the server cannot run models of `backend`.

        Raises:
            NotInstalled: with the command that adds it.
        """
        if backend == "openvino" and not self.openvino:
            raise NotInstalled(
                "the server has no openvino", where=str(self.prefix), fix="run: serve install --with openvino"
            )


def prefix() -> Path:
    """Return the server's environment: `$MODELATHE_SERVER`, or `modelathe/server` in the user's data folder."""
    if chosen := os.environ.get("MODELATHE_SERVER"):
        return Path(chosen).expanduser().absolute()
    if old := os.environ.get("LATHE_SERVER"):
        raise NotInstalled("LATHE_SERVER is called MODELATHE_SERVER now", fix=f"set MODELATHE_SERVER={old}")
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "modelathe" / "server"


def install(
    prefix: Path | None = None, progress: Callable[[str], None] = print, *, gpu: bool = False, openvino: bool = False
) -> Path:
    """Make the server's environment if it is not there yet, and return its folder.

    A complete environment is left as it is. One that an older modelathe made, or whose making was cut short, is made
    anew. Two installs at once wait for each other.

    Args:
        prefix: where to make it; default `serve.server.install.prefix()`.
        progress: called with one line before each slow part.
        gpu: install onnxruntime with its CUDA provider, which wants CUDA 13 and cuDNN 9 on the machine.
        openvino: install openvino too; an environment that has it keeps it.

    Raises:
        NotInstalled: if Python, its shared library or the packages cannot be had.
    """
    place = _default(prefix)
    with _lock(place):
        marker = _marker(place)
        if not _packages_complete(place, marker) or (gpu and not marker["gpu"]):
            openvino = openvino or bool(marker.get("openvino"))
            _create(place, progress, gpu)
        if openvino and _marker(place)["openvino"] != _openvino_digest():
            _add_openvino(place, progress)
        _stage_backends(place)
    return place


def environment(prefix: Path | None = None) -> Environment:
    """Return the parts of the installed server, without changing the environment.

    Raises:
        NotInstalled: if it is absent, incomplete, or made from another list of packages than this modelathe's.
    """
    place = _default(prefix)
    marker = _marker(place)
    if not marker:
        former = place.parents[1] / "lathe" / "server"
        more = f"; {former}, which 0.1 made, is used no more" if former.is_dir() else ""
        raise NotInstalled("the server is not installed", where=str(place), fix=_FIX + more)
    if not _packages_complete(place, marker) or not _backends_current(place):
        raise NotInstalled("the server was installed by another version of modelathe", where=str(place), fix=_FIX)
    site = place / "lib" / f"python{marker['python']}" / "site-packages"
    return Environment(
        prefix=place,
        python=place / "bin" / "python",
        tritonserver=site / "pytriton" / "tritonserver" / "bin" / "tritonserver",
        backends=place / "backends",
        site_packages=site,
        libdir=Path(marker["libdir"]),
        gpu=marker["gpu"],
        openvino=marker["openvino"] == _openvino_digest(),
    )


def _marker(place: Path) -> dict[str, Any]:
    """Return what the environment in `place` was made from; empty if there is none or it is incomplete."""
    try:
        marker = json.loads((place / _MARKER).read_text())
        return {"openvino": "", **marker, **{key: marker[key] for key in ("digest", "python", "libdir", "gpu")}}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _packages_complete(place: Path, marker: dict[str, Any]) -> bool:
    # The interpreter is a link: it breaks when the Python that it was made from goes away.
    return bool(marker) and marker["digest"] == _digest(marker["gpu"]) and (place / "bin" / "python").exists()


def _staged(place: Path) -> Iterator[tuple[Path, Path]]:
    """Yield every file of our backends and its place: what they share is beside each `model.py`."""
    for model in sorted(BACKENDS.glob("*/model.py")):
        for file in (model, *sorted(BACKENDS.glob("*.py"))):
            yield file, place / "backends" / model.parent.name / file.name


def _backends_current(place: Path) -> bool:
    return all(there.is_file() and there.read_bytes() == file.read_bytes() for file, there in _staged(place))


def _stage_backends(place: Path) -> None:
    for file, there in _staged(place):
        if not (there.is_file() and there.read_bytes() == file.read_bytes()):
            there.parent.mkdir(exist_ok=True)
            files.write(there, file.read_bytes())


def _default(place: Path | None) -> Path:
    return (place or prefix()).expanduser().absolute()


@contextmanager
def _lock(place: Path) -> Iterator[None]:
    """Hold the lock beside the environment; the kernel lets go of it when its holder dies."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _requirements(gpu: bool) -> str:
    text = REQUIREMENTS.read_text()
    return text.replace("onnxruntime==", "onnxruntime-gpu==") if gpu else text


def _digest(gpu: bool) -> str:
    return hashlib.sha256(_requirements(gpu).encode()).hexdigest()


def _openvino_digest() -> str:
    return hashlib.sha256(OPENVINO.read_bytes()).hexdigest()


def _add_openvino(place: Path, progress: Callable[[str], None]) -> None:
    progress("installing openvino (about 60 MB, 180 MB on disk)")
    _pip(place, OPENVINO.read_text())
    _check(place, "openvino")
    _mark(place, {**_marker(place), "openvino": _openvino_digest()})


def _create(place: Path, progress: Callable[[str], None], gpu: bool) -> None:
    version = sys.version_info[:2]
    if version not in SUPPORTED:
        raise NotInstalled(
            f"the server cannot be installed by Python {version[0]}.{version[1]}",
            fix="run serve install once with Python 3.11 or 3.12; what it installs works for other versions too",
        )
    libdir = _shared_library()
    _empty(place)
    progress(f"creating the server's environment in {place}")
    _run([sys.executable, "-m", "venv", str(place)], "its virtual environment cannot be made", "install Python's venv")
    progress("installing tritonserver and onnxruntime (about 100 MB)")
    _pip(place, _requirements(gpu))
    _python_backend(place, f"{version[0]}.{version[1]}")
    _check(place, "onnxruntime")
    _mark(place, {"digest": _digest(gpu), "python": f"{version[0]}.{version[1]}", "libdir": str(libdir), "gpu": gpu})


def _mark(place: Path, marker: dict[str, Any]) -> None:
    files.write(place / _MARKER, json.dumps(marker))


def _empty(place: Path) -> None:
    """Remove a broken or older environment; a folder that never was one is refused."""
    marker = place / _MARKER
    ours = marker.exists() or (place / _FORMER).exists()
    if place.exists() and not (place.is_dir() and (ours or not any(place.iterdir()))):
        raise NotInstalled("is not a folder that modelathe made", where=str(place), fix="choose another --prefix")
    place.mkdir(parents=True, exist_ok=True)
    # From here on the folder is ours and incomplete, however far the removal and the installation get.
    files.write(marker, "{}")
    for child in place.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child != marker:
            child.unlink()


def _shared_library() -> Path:
    """Return the folder of libpythonX.Y.so, which tritonserver's backend process is linked against."""
    name = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    folders = [Path(str(sysconfig.get_config_var(key))) for key in ("LIBDIR", "LIBPL")]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    folders += [Path("/usr/lib") / str(multiarch), Path("/usr/lib64"), Path("/usr/lib")]
    for folder in folders:
        if (folder / name).exists():
            return folder
    raise NotInstalled(
        f"{name} is missing; tritonserver's backend process needs it",
        where=sys.executable,
        fix=f"sudo apt-get install {name.removesuffix('.so.1.0')}, or use a Python built with --enable-shared",
    )


def _pip(place: Path, requirements: str) -> None:
    with tempfile.NamedTemporaryFile("w", prefix="modelathe-requirements-", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        command = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run(
            [*command, "--no-deps", "--requirement", file.name],
            "its packages cannot be installed",
            "check the network and pip's index settings, then run it again",
        )


def _run(command: list[str], what: str, fix: str) -> None:
    """Run a program that is silent when all is well; its last words become the error."""
    # With the caller's PYTHONPATH, pip would take the caller's packages for installed ones; without a safe path, the
    # caller's folder would come first, and a file there called pip.py or numpy.py would run.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONSAFEPATH"] = "1"
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reasons = [line for line in words if line.startswith("ERROR")] or words or [f"exit code {done.returncode}"]
        raise NotInstalled(f"{what}: {' '.join(reasons[-3:])}", fix=fix)


def _python_backend(place: Path, version: str) -> None:
    """Lay out the backend folder with NVIDIA's Python backend and its process for this Python; ours come later."""
    wheel = place / "lib" / f"python{version}" / "site-packages" / "pytriton" / "tritonserver"
    python = place / "backends" / "python"
    python.mkdir(parents=True)
    # What Python compiles it would keep beside the file, in the user's repository. The process heeds no variable.
    (wheel.parents[1] / "modelathe.pth").write_text("import sys; sys.dont_write_bytecode = True\n")
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(wheel / "backends" / "python" / name, python)
    shutil.copy2(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", python)


def _check(place: Path, runtime: str) -> None:
    """Import what the backend imports, once, so that a broken package is found now and not by the first model."""
    code = f"import numpy, {runtime}"
    _run([str(place / "bin" / "python"), "-c", code], f"{runtime} does not start", "report it with this message")
