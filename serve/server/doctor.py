"""Doctor: what serving works with on this machine, what is missing, and the command that brings it."""

import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from serve.config.errors import NotInstalled
from serve.server import install
from serve.server.tritonserver import SHARED_MEMORY

WHEELS = {"0.7.0": "2.51.0 (24.10)"}
"""What a release of nvidia-pytriton carries."""
LEAST_SHARED, LEAST_FILES = 64 * 2**20, 4096
"""Bytes of shared memory that some models' backend processes need, and open files for a thousand connections."""
PROGRAMS = {
    "nginx": "TLS and a limit for bodies before the HTTP port: sudo apt-get install nginx-light; then serve proxy",
    "docker": "NVIDIA's image: serve up --container 26.07",
    "prometheus": "figures over time: sudo apt-get install prometheus",
}


@dataclass(frozen=True)
class Check:
    """One thing looked for.

    Args:
        name: what.
        found: the version or the state; empty where it is not there.
        wanted: what is needed, or what it would be good for.
        ok: whether what is wanted is there.
        fix: the command that brings it; empty where all is well or nothing can be done.
        required: whether the work on a CPU needs it.
    """

    name: str
    found: str
    wanted: str
    ok: bool
    fix: str = ""
    required: bool = False


def checks() -> list[Check]:
    """Return everything that was looked for."""
    return [*(replace(check, required=True) for check in server()), *_limits(), *gpu(), *_programs()]


def broken(found: Sequence[Check]) -> list[Check]:
    """Return what the work on a CPU needs and does not have."""
    return [check for check in found if check.required and not check.ok]


def _limits() -> list[Check]:
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        Check(
            "shared memory",
            f"{free / 2**20:.0f} MiB free",
            f"{LEAST_SHARED / 2**20:.0f} MiB in {SHARED_MEMORY}, where requests reach the backend processes",
            free >= LEAST_SHARED,
            "" if free >= LEAST_SHARED else "in a container, start it with --shm-size=1g",
            required=True,
        ),
        Check(
            "open files",
            str(files),
            f"{LEAST_FILES}, for many connections",
            files >= LEAST_FILES,
            "" if files >= LEAST_FILES else f"ulimit -n {min(most, 65536)}",
        ),
    ]


def _programs() -> list[Check]:
    found = {name: shutil.which(name) or "" for name in PROGRAMS}
    return [
        Check(
            name, path, PROGRAMS[name].partition(":")[0], bool(path), "" if path else PROGRAMS[name].partition(": ")[2]
        )
        for name, path in found.items()
    ]


def server() -> list[Check]:
    """Look for the server's own environment."""
    wanted = "the environment that serve install makes, for proof at an endpoint"
    try:
        made = install.environment()
    except NotInstalled as error:
        return [Check("server", "", wanted, False, f"serve install  ({error.what})")]
    return [Check("server", f"tritonserver {triton_version(made.site_packages)} in {made.prefix}", wanted, True)]


def triton_version(site_packages: Path) -> str:
    """Return which tritonserver the nvidia-pytriton wheel there carries; the binary itself does not say."""
    wheel = next((path.stem.partition("-")[2] for path in site_packages.glob("nvidia_pytriton-*.dist-info")), "")
    return WHEELS.get(wheel, f"of nvidia-pytriton {wheel or 'of no stated version'}")


def gpu() -> list[Check]:
    """Look for a GPU and its driver."""
    wanted = 'an NVIDIA GPU and its driver, for device = "cuda" and TensorRT'
    program = shutil.which("nvidia-smi")
    if program is None:
        return [Check("driver", "", wanted, False, "install NVIDIA's driver on a machine with a GPU")]
    query = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Check("driver", "", wanted, False, f"nvidia-smi does not answer: {error}")]
    found = " | ".join(done.stdout.split("\n")).strip(" |")
    if done.returncode or not found:
        return [Check("driver", "", wanted, False, f"nvidia-smi: {(done.stdout + done.stderr).strip()[:200]}")]
    return [Check("driver", found, wanted, True)]
