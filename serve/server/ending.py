"""Ending: what the log of a tritonserver says of its end, or of that of a backend process, and what to do about it."""

import json
import re
import signal
from contextlib import suppress
from pathlib import Path

from modelathe.translation import UNNAMED
from serve.config.errors import ModelRefused, ServerFailed

REFUSED = "failed to load |Failed to initialize Python stub: |error: creating server: Invalid argument"
"""What the log of a server says that does not load the models of a repository."""
GAVE_UP = re.compile(f"{REFUSED}|error: creating server")
"""What the log of a server says that ends because it cannot start."""
MEMORY = r"([Oo]ut of|[Nn]ot enough|[Ii]nsufficient|[Ss]hared|allocate) memory|[Ff]ailed to allocate|bad_alloc"
"""What is said where the machine is too small; a model may be called memory."""
DIED = "Stub process .* is not healthy"
"""What is said where a backend process died while it loaded a model."""
FIXES = {
    r"KIND_GPU|no GPUs|CUDA": "set kind: KIND_CPU, or serve it on a machine with a GPU: serve install --gpu",
    r"cannot be loaded: .*No such file": "put that file there, or name the one that is there: default_model_filename",
    r"External initializer|file_length": "copy the file with the weights again: it is shorter than the model says",
    r"is not a registered": "export the model again with operators of ONNX alone: the server has no others",
    r"[Oo]pset \d+ is under development": "export the model again with an older opset",
    r"cannot be loaded|[Pp]rotobuf": "export the model again: its file is no graph that the runtime can read",
    r"External data|external data": "put the file with the weights beside the model",
    r"by config\.pbtxt and|in config\.pbtxt and|config\.pbtxt has": "correct config.pbtxt to what the model has",
    r"directory name must equal": "copy the right config.pbtxt, or set name in it to that of its folder",
    r"inconsistent": "give the tensor the same type and dims in the configurations of both models",
    r"circular dependency": "take one of these steps out",
    r"find backend library": "correct the name of its backend, or serve it with NVIDIA's image",
    r"empty reshape": "leave reshape out, and state dims: [1]",
    r"is not supported|are not supported": "change the configuration, or serve it with NVIDIA's image",
    r"unexpected shape for input": "correct the dims of the input in config.pbtxt, or those in its model_warmup",
    r"warmup|warm-up|killed by SIG.* after a request failed": "correct what model_warmup sends, or leave it out",
    r"allows maximum batch size": "lower its max_batch_size to the least of the models that it calls",
    MEMORY: "use a smaller max_batch_size, or a machine with more memory",
    r"the model refused the request": "the graph does not run for every batch; export it again with a free batch axis",
}
"""What to do about what the server says, by words in it."""
SIGNATURE = re.compile(r"\w+ onnxruntime::[^()]*\([^()]*\) ")
"""What the runtime's messages begin with where they name a function of its own."""


def error(http: str, log: Path, code: int, *, ready: bool = True) -> ServerFailed | ModelRefused:
    """Return the error for a server that ended by itself: `ModelRefused` where it did so because of a model.

    Args:
        http: its address.
        log: what it printed.
        code: its exit code, negative for a signal.
        ready: whether it had been ready. If not, what its log says of a start that failed comes before how it ended.
    """
    text = log.read_text(errors="replace")
    killed = code < 0 and signal.Signals(-code).name
    what = f"tritonserver was killed by {killed}" if killed else f"tritonserver ended by itself with exit code {code}"
    # Triton 24.10 does not always survive a model that refuses its warm-up.
    asked = killed and re.search(r'"(a request failed: .*)"\s*\Z', text)
    # A server that gives up while starting may still crash on its way out.
    if not ready and (not killed or GAVE_UP.search(text)):
        what = _reason(text) or what
    elif asked:
        what += f" after {asked[1]}"
    known = "" if ready else f"{fix(what)}; ".removeprefix("; ")
    of_a_model = not ready and bool(asked or re.search(REFUSED, text))
    return kind(what, refused=of_a_model)(what, where=http, fix=f"{known}the server's log has more: {log}")


def kind(what: str, *, refused: bool) -> type[ServerFailed | ModelRefused]:
    """Return the kind of the error for the words `what` of a server, which has `refused` a model or failed itself."""
    return ModelRefused if refused and not re.search(f"{MEMORY}|{DIED}", what) else ServerFailed


def fix(text: str) -> str:
    """Return what to do about a server's words; empty where that is not known."""
    return next((known for pattern, known in FIXES.items() if re.search(pattern, text)), "")


def answer(body: bytes) -> str:
    """Return what an order that was refused is answered with as one line, without code locations."""
    text = body.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"])
    text = re.sub(r"^load failed for model .*? is at UNAVAILABLE state: ", "", text.replace("\n", "\\n"))
    return _plain(text).rstrip("; ")


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
    text = SIGNATURE.sub("", text)
    return re.sub(r"^(?:Internal: |Invalid argument(?::| -) |TritonModelException: )+", "", text).strip()
