"""Become the program `argv[2:]`, which the kernel stops when the process `argv[1]` dies, however that one dies.

Beside it stays a watcher, which kills what the program leaves of its process group: a backend process that was just
starting would outlive it. A script of its own: Python code that runs between fork and exec can hang in a process with
threads.
"""

import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1


def watch(program: int) -> None:
    """Wait until the process `program` has ended, and kill its group, this process included."""
    # What is meant for the program must not end the watch over it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    select.select([os.pidfd_open(program)], [], [])
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    program = os.getpid()
    if os.getpgrp() == program and os.fork() == 0:
        watch(program)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that asked for the server is gone")
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell is wanted
