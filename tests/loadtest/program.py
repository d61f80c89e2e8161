"""The command as a user meets it: a program of its own."""

import subprocess
import sys


def loadtest(*args: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-m", "loadtest", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr
    return done
