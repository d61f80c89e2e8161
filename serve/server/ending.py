"""Ending: what the log of a tritonserver says of its end, or of that of a backend process."""

import re
import signal
from pathlib import Path

from serve.config.errors import ServerFailed

GAVE_UP = re.compile("failed to load '|Failed to initialize Python stub: |error: creating server")
"""What the log of a server says that ends because it cannot start."""
UNNAMED = "[request id: <id_unknown>] "


def error(http: str, log: Path, code: int, *, ready: bool = True) -> ServerFailed:
    """Return the error for a server that ended by itself.

    Args:
        http: its address.
        log: what it printed.
        code: its exit code, negative for a signal.
        ready: whether it had been ready. If not, what its log says of a start that failed comes before how it ended.
    """
    text = log.read_text(errors="replace")
    killed = code < 0 and signal.Signals(-code).name
    what = f"tritonserver was killed by {killed}" if killed else f"tritonserver ended by itself with exit code {code}"
    # A server that gives up while starting may still crash on its way out.
    if not ready and (not killed or GAVE_UP.search(text)):
        what = _reason(text) or what
    elif killed and (refused := re.search(r'"(a request failed: .*)"\s*\Z', text)):
        # Triton 24.10 does not always survive a model that refuses its warm-up.
        what += f" after {refused[1]}"
    return ServerFailed(what, where=http, fix=f"the server's log has more: {log}")


def last_words(log: Path) -> str:
    """Return what a backend process said last, which is not in the form of Triton's own lines; empty for nothing."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line and not re.match(r"[IWEF]\d{4} |[|+]", line)]
    return f": {said[-1]}" if said else ""


def _reason(log: str) -> str:
    """Return Triton's own reason for ending as one line, without code locations; empty if its log has none."""
    if failed := re.search(r'"failed to load \'([^\']+)\' version (\d+): (.*)"$', log, re.MULTILINE):
        return f"model {failed[1]}, version {failed[2]}: {_plain(failed[3])}"
    if failed := re.search(r"Failed to initialize Python stub: (.*)$", log, re.MULTILINE):
        return _plain(failed[1])
    lines = re.findall(r'^(?:E\d{4} .*?\] "|error: )(.*?)"?$', log, re.MULTILINE)
    # On a machine without a GPU every start logs this one as an error.
    lines = [line for line in lines if "CudaDriverHelper" not in line]
    return _plain(lines[0]) if lines else ""


def _plain(text: str) -> str:
    text = text.split("\\n\\nAt:")[0].replace("\\n", " ").partition(" NOTE: ")[0].replace(UNNAMED, "")
    return re.sub(r"^(?:Internal: |Invalid argument(?::| -) |TritonModelException: )+", "", text).strip()
