"""Become the program `argv[2:]`, which the kernel stops when the process `argv[1]` dies, however that one dies.

A script of its own: Python code that runs between fork and exec can hang in a process with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that asked for the server is gone")
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell is wanted
