"""The entry of the three commands: Ctrl-C shows no traceback, also not while a command's modules are still imported."""

import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def start(room: str) -> NoReturn:
    """Import the commands of `room` (optimize, serve, loadtest) and run the one that the command line names."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    main = importlib.import_module(f"{room}.cli").main
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    main()
    raise AssertionError("a command ends by itself")


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    # Nothing has begun, so nothing is left behind; an exception could be swallowed by a half-imported module.
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(130)
