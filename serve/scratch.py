"""Scratch: private folders that go away when their block ends, or, where that was cut short, when the next one begins.

A folder in use is locked. The kernel lets go of the lock when its holder dies, in whatever way.
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from loadtest.errors import MachineError

PREFIX = "lathe-scratch-"
_YOUNG = 60.0
"""Seconds that a folder may be without its lock: it is made first and locked next."""


@contextmanager
def folder(at: Path | None = None, prefix: str = PREFIX) -> Iterator[Path]:
    """Yield a new folder that only this user can read; it and its content are gone after the block.

    Args:
        at: where it is made; default the system's folder for temporary files.
        prefix: of its name. Folders of that name that killed processes left in `at` are removed first.
    """
    place = at or Path(tempfile.gettempdir())
    _sweep(place, prefix)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    try:
        with _locked(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Be the only command that works in the folder `place`, which must exist.

    Raises:
        MachineError: another one is at it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(place))
        except BlockingIOError:
            raise MachineError(
                "another command works in this folder",
                where=str(place),
                fix="wait for its end, or work in another folder",
            ) from None
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sweep(place: Path, prefix: str) -> None:
    """Remove what killed processes of this user left: only names as `tempfile` makes them, nothing of the user's."""
    for path in place.iterdir():
        if not re.fullmatch(f"{re.escape(prefix)}[a-z0-9_]{{8}}", path.name):
            continue
        with suppress(OSError):
            found = path.lstat()
            if path.is_dir() and found.st_uid == os.getuid() and time.time() - found.st_mtime > _YOUNG:
                with _locked(path):
                    shutil.rmtree(path, ignore_errors=True)
