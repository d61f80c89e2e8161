"""A terminal of a stated width, for tests of what commands print there."""

import os
import pty
import re
import subprocess
from collections.abc import Iterator

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What moves the cursor, or colours text."""


def on_a_terminal(columns: int, *command: str) -> str:
    """Return what a command prints on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "50", "TERM": "xterm"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b"".join(_chunks(ours))
        process.wait(60)
    os.close(ours)
    return CONTROL.sub("", said.decode()).replace("\r\n", "\n")


def _chunks(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            yield os.read(terminal, 65536)
        except OSError:  # the other end is closed
            return
