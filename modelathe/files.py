"""Files: the one place that writes so that a file or a folder is there whole or not at all, also after a power cut.

New content is written under a hidden name beside its place and made durable there; one rename puts it into place, and
the folder that now names it is made durable too. A reader sees the old content or the new, whenever the writer dies.
What a killed writer left under a hidden name is removed by the next one.
"""

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_YOUNG = 60.0
"""Seconds that something hidden may be without its lock: it is made first and locked next."""


def write(path: Path, content: str | bytes, mode: int | None = None) -> Path:
    """Give a file its content, whole or not at all, and return its path.

    Args:
        path: the file; its folder must exist.
        content: text is written as UTF-8, its line ends as they are.
        mode: its permissions; unless given those of the file that it replaces, or of any new file.

    Raises:
        OSError: the folder cannot be written or the disk is full; the file is then as it was.
    """
    with writing(path, mode) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def writing(path: Path, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Yield a file that takes the place of `path` at the end of the block; on an error nothing has happened.

    A pipe or a device, such as `/dev/stdout`, is written to as it is. Arguments and errors as for `write`.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    with _beside(path, mode) as (partial, file):
        yield file
        _finish(file)
        move(partial, path)


def place(folder: Path, destination: Path) -> None:
    """Move a complete folder to `destination`, its content durable before it is seen there.

    Raises:
        OSError: with ENOTEMPTY or EEXIST if a folder with content is there already.
    """
    sync(folder)
    move(folder, destination)


def move(source: Path, destination: Path) -> None:
    """Rename a file or a folder and make that durable; the content is not looked at."""
    source.replace(destination)
    for parent in {source.parent, destination.parent}:
        sync_entry(parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there, and make that durable."""
    path.unlink(missing_ok=True)
    sync_entry(path.parent)


def sync(tree: Path) -> None:
    """Make a folder durable with everything in it."""
    for path in (*tree.rglob("*"), tree):
        if not path.is_symlink():
            sync_entry(path)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file or folder during the block; the kernel lets go of it when its holder dies.

    Args:
        path: the file or folder, which must exist.
        wait: wait for whoever holds it, as for what takes a moment.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def sweep(folder: Path, prefix: str) -> None:
    """Remove what killed processes of this user left in `folder`: its name is `prefix` and eight random characters."""
    for path in folder.iterdir():
        if not re.fullmatch(f"{re.escape(prefix)}[a-z0-9_]{{8}}", path.name):
            continue
        with suppress(OSError):
            found = path.lstat()
            if path.is_symlink() or found.st_uid != os.getuid() or time.time() - found.st_mtime < _YOUNG:
                continue
            with locked(path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


@contextmanager
def _beside(path: Path, mode: int | None) -> Iterator[tuple[Path, IO[bytes]]]:
    """Yield the hidden name of a new, locked file beside `path`, and the file; the name is gone after the block."""
    prefix = f".{path.name}.part-"
    sweep(path.parent, prefix)
    partial = path.with_name(f"{prefix}{secrets.token_hex(4)}")
    handle = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666 if mode is None else mode)
    try:
        with os.fdopen(handle, "wb") as file:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if mode is None and path.exists():
                os.fchmod(handle, path.stat().st_mode & 0o7777)
            elif mode is not None:
                os.fchmod(handle, mode)
            yield partial, file
    finally:
        partial.unlink(missing_ok=True)


def _finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_entry(path: Path) -> None:
    """Make a file durable, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
