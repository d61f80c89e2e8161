"""Ask: the probe inside the container, in the standard library of the python3 that NVIDIA's image has.

`ask.py started` wants an answer from every model. `ask.py ready` bears a model that is silent, as with a full queue: a
busy server that is taken away makes all the others busier. What is gone or dead it does not bear (`serve.watch.probe`).
"""

import http.client
import json
import sys
import time
from pathlib import Path
from typing import Any

DEAD = "is not healthy"
"""What the server's answer says when the model's backend process has died."""
SECONDS = 8.0
"""For all models together; the probes that call this wait ten."""


def say(host: str, method: str, path: str, body: bytes = b"", head: int = 0, left: float = SECONDS) -> tuple[int, str]:
    """Send a request and return the status, 0 where there is none, and the words of what is no success."""
    connection = http.client.HTTPConnection(host, timeout=max(left, 0.1))
    headers = {"Inference-Header-Content-Length": str(head)} if head else {}
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        text = reply.read()
        return reply.status, "" if reply.status == 200 else text.decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error) or type(error).__name__
    finally:
        connection.close()


def packed(question: dict[str, Any]) -> tuple[bytes, int]:
    """Return the body of a question with binary tensors, each one value many times, and the length of its JSON part."""
    raws = [bytes.fromhex(tensor["value"]) * tensor["count"] for tensor in question["inputs"]]
    inputs = [
        {**{key: tensor[key] for key in ("name", "datatype", "shape")}, "parameters": {"binary_data_size": len(raw)}}
        for tensor, raw in zip(question["inputs"], raws, strict=True)
    ]
    parameters = {"binary_data_output": True, **question["parameters"]}
    head = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    return head + b"".join(raws), len(head)


def fault(host: str, question: dict[str, Any], starting: bool, until: float) -> str:
    """Ask one model; return what is wrong, empty where it answers or where that can be borne."""
    body, head = packed(question)
    path = f"/v2/models/{question['model']}"
    status, words = say(host, "POST", f"{path}/infer", body, head, until - time.monotonic())
    if status == 200:
        return ""
    if starting or DEAD in words or say(host, "GET", f"{path}/ready")[0] not in (0, 200):
        return f"{question['model']}: {words}"
    return ""


def main(mode: str, questions: str, host: str = "127.0.0.1:8000") -> str:
    """Return what is wrong with the server at `host`, empty where nothing is.

    Args:
        mode: `started` or `ready`.
        questions: the file that has one for each model.
        host: `HOST:PORT` of its HTTP.
    """
    until = time.monotonic() + SECONDS
    status, words = say(host, "GET", "/v2/health/ready")
    if status != 200:
        return f"the server is not ready: {words or status}"
    asked = json.loads(Path(questions).read_text())
    return "; ".join(filter(None, (fault(host, question, mode == "started", until) for question in asked)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or 0)
