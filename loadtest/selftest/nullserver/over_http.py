"""Over HTTP: the null server's connections, with bytes that are made once."""

import asyncio
import json
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

from loadtest.selftest.nullserver.model import MODEL, Model


def connections(model: Model) -> Callable[[], asyncio.Protocol]:
    """Return what makes the protocol of a new connection."""
    # The answer's bytes by the request's JSON header: equal headers ask for equal shapes.
    infer = lru_cache(maxsize=1024)(partial(_answer, model))
    return lambda: _Connection(model, infer)


class _Connection(asyncio.Protocol):
    """One connection. Heads and JSON headers repeat, so what they mean is kept."""

    def __init__(self, model: Model, infer: Callable[[bytes], tuple[bytes, int]]) -> None:
        self.model, self.infer = model, infer
        self.buffer = b""
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        data = self.buffer + data if self.buffer else data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            path, length, split = _request_head(data[:end])
            if len(data) - end - 4 < length:
                break
            header, data = data[end + 4 : end + 4 + split], data[end + 4 + length :]
            if path.endswith("/infer"):
                self._infer(path, header)
            else:
                self.transport.write(_document(self.model, path))
        self.buffer = data

    def _infer(self, path: str, header: bytes) -> None:
        if not path.startswith(f"/v2/models/{MODEL}/"):
            self.transport.write(_unknown(path))
            return
        try:
            answer, batch = self.infer(header)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self.transport.write(_http(400, _json({"error": f"the request cannot be read: {error!r}"})))
            return
        if due := self.model.queue.due(batch):
            self.loop.call_at(due, self._reply, answer)
        else:
            self.transport.write(answer)

    def _reply(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)


@lru_cache(maxsize=256)
def _request_head(head: bytes) -> tuple[str, int, int]:
    """Return the path, the length of the body and that of the JSON header in it."""
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(fields.get("content-length", 0))
    return first.split(" ")[1], length, int(fields.get("inference-header-content-length", length))


def _answer(model: Model, header: bytes) -> tuple[bytes, int]:
    asked = json.loads(header)
    batch = model.batch(asked["inputs"][0]["shape"])
    outputs, raw = model.answer(batch)
    for output, tensor in zip(outputs, raw, strict=True):
        output["parameters"] = {"binary_data_size": len(tensor)}
    named = {"id": asked["id"]} if "id" in asked else {}
    head = _json({**named, "model_name": MODEL, "model_version": "1", "outputs": outputs})
    return _http(200, head, b"".join(raw)), batch


def _document(model: Model, path: str) -> bytes:
    if path == "/v2/repository/index":
        return _http(200, _json([{"name": MODEL, "version": "1", "state": "READY"}]))
    if path == "/v2":
        return _http(200, _json({"name": "null server", "version": "1", "extensions": []}))
    if path in ("/v2/health/ready", "/v2/health/live"):
        return _http(200, b"")
    asked = path.removeprefix(f"/v2/models/{MODEL}").removeprefix("/versions/1")
    answers: dict[str, Callable[[], Any]] = {"": model.metadata, "/config": model.config, "/stats": model.statistics}
    answers |= {"/ready": dict}
    return _http(200, _json(answers[asked]())) if asked in answers else _unknown(path)


def _unknown(path: str) -> bytes:
    return _http(404, _json({"error": f"Request for unknown model: {path} is not found"}))


def _http(status: int, head: bytes, raw: bytes = b"") -> bytes:
    split = f"Inference-Header-Content-Length: {len(head)}\r\n" if raw else "Content-Type: application/json\r\n"
    start = f"HTTP/1.1 {status} \r\n{split}Content-Length: {len(head) + len(raw)}\r\n\r\n"
    return start.encode() + head + raw


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
