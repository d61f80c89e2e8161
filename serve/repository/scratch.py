"""Scratch: private folders that go away when their block ends, or, where that was cut short, when the next one begins.

A folder in use is locked. The kernel lets go of the lock when its holder dies, in whatever way.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from modelathe import files
from modelathe.errors import MachineError

PREFIX = "modelathe-scratch-"
GLANCE = 1.0
"""Seconds in which a command that only looks whether another works in a folder lets go of it."""


@contextmanager
def folder(at: Path | None = None, prefix: str = PREFIX) -> Iterator[Path]:
    """Yield a new folder that only this user can read; it and its content are gone after the block.

    Args:
        at: where it is made; default the system's folder for temporary files.
        prefix: of its name. Folders of that name that killed processes left in `at` are removed first.
    """
    place = at or Path(tempfile.gettempdir())
    files.sweep(place, prefix)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    try:
        with files.locked(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Be the only command that works in the folder `place`, which must exist.

    Raises:
        MachineError: another one is at it, and not only to look whether one is.
    """
    last = time.monotonic() + GLANCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(files.locked(place))
                break
            except BlockingIOError:
                if time.monotonic() > last:
                    raise MachineError(
                        "another command works in this folder",
                        where=str(place),
                        fix="wait for its end, or work in another folder",
                    ) from None
                time.sleep(0.01)
        yield
