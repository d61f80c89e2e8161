"""Exchange: two folders change places in one step."""

import ctypes
import errno
import os
import secrets
from pathlib import Path

from modelathe import files

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of Linux's `renameat2`, which the standard library does not offer."""


def swap(folder: Path, other: Path) -> None:
    """Let two folders of one file system change places in one step, the content of the first durable before."""
    files.sync(folder)
    try:
        _exchange(folder, other)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        # Such a file system has no single step: a kill in between leaves the old folder complete under this name.
        aside = other.with_name(f".{other.name}.before-{secrets.token_hex(4)}")
        files.move(other, aside)
        files.move(folder, other)
        files.move(aside, folder)
    for parent in {folder.parent, other.parent}:
        files.sync_entry(parent)


def _exchange(one: Path, other: Path) -> None:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))
