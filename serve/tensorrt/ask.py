"""Ask: put an order to NVIDIA's compiler, in a process of its own, and understand what it says."""

import importlib.util
import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from modelathe import interpreter
from modelathe.errors import MachineError
from serve.repository import scratch


def there() -> bool:
    """Say whether the compiler is installed."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


def ask(log: Path, **order: Any) -> dict[str, Any]:
    """Run the compiler's process on an order of `build.compiled`; what it says goes to the log.

    Raises:
        MachineError: it ended without an answer.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with scratch.folder() as place, log.open("w") as said:
        answer = place / "answer.json"
        done = subprocess.run(
            interpreter.command("serve.tensorrt.build"),
            input=json.dumps({**order, "answer": str(answer)}),
            stdout=said,
            stderr=said,
            env=interpreter.variables(),
            text=True,
            check=False,
        )
        if done.returncode or not answer.is_file():
            raise MachineError(
                f"TensorRT's compiler ended without an answer ({_ending(done.returncode)})",
                where=str(order["graph"]),
                fix=f"what it said stands in {log}; optimize tensorrt --no-compile and serve add --no-check do without",
            )
        found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def plain(text: str) -> str:
    """Return the part of a message that a person can use: without the condition in C++ and the place in the source."""
    text = re.sub(r"\.? In \w+ at \S+.*$", "", " ".join(text.split()))
    if found := re.search(r'Assertion failed: .*?(?:: |&& ")(.+?)"?$', text):
        text = found[1]
    if found := re.search(r"Error Code \d+: [\w ]+ \((.+?)\)?$", text):
        text = found[1]
    return text.rstrip(".")
