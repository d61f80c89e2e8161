"""A small but real V2 server, HTTP and gRPC, whose one model doubles its input and which fails on command.

It stands where a real tritonserver cannot: a stall of exactly half a second, an answer that is garbage, a death in the
middle of a run. What it says otherwise is what tritonserver 2.51 was seen to say.
"""

# ruff: noqa: N802 -- the method names are those of the HTTP library and of the protocol
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

MAX_BATCH = 8


@dataclass
class StandIn:
    """The server's state and its faults.

    Args:
        since: number of the inference (from 1) from which on it refuses, talks garbage, is wrong or hangs.
        until: number of the last inference that it does so with.
        stall: number of the inference (from 1) that holds everything up for `stall_seconds`.
        refuse: HTTP status and gRPC code that inferences are answered with, and the text.
        garbage: answer inferences with bytes that are no answer.
        wrong: answer with other values than asked for.
        hang: never answer inferences.
        die: number of the inference at which all connections are cut and the ports closed.
        size: what the metadata states as the second dim of the input.
    """

    since: int = 1
    until: int = 10**9
    stall: int = 0
    stall_seconds: float = 0.5
    refuse: tuple[int, grpc.StatusCode, str] | None = None
    garbage: bool = False
    wrong: bool = False
    hang: threading.Event | None = None
    die: int = 0
    size: int = 4
    inferences: int = 0
    arrivals: list[float] = field(default_factory=list)
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    dead: threading.Event = field(default_factory=threading.Event)
    http: str = ""
    grpc: str = ""

    def url(self, scheme: str) -> str:
        return self.http if scheme == "http" else self.grpc

    def infer(self, x: np.ndarray) -> np.ndarray:
        arrived = time.monotonic()
        with self.lock:
            self.inferences += 1
            self.arrivals.append(arrived)
            if self.inferences == self.stall:
                time.sleep(self.stall_seconds)
            if self.die and self.inferences >= self.die:
                self.dead.set()
            self.seconds += time.monotonic() - arrived
        if self.hang and self.faulty:
            self.hang.wait(10)
        return x * (3 if self.wrong and self.faulty else 2)

    @property
    def faulty(self) -> bool:
        return self.since <= self.inferences <= self.until

    def metadata(self) -> dict[str, Any]:
        tensor = {"datatype": "FP32", "shape": [-1, self.size]}
        return {
            "name": "double",
            "versions": ["1"],
            "platform": "",
            "inputs": [{"name": "x", **tensor}],
            "outputs": [{"name": "y", **tensor}],
        }

    def statistics(self) -> dict[str, Any]:
        count = {"count": self.inferences, "ns": int(self.seconds * 1e9)}
        keys = ("success", "queue", "compute_input", "compute_infer", "compute_output")
        return {
            "name": "double",
            "version": "1",
            "inference_count": self.inferences,
            "execution_count": self.inferences,
            "inference_stats": {key: count for key in keys},
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Two small writes with Nagle's algorithm in between would cost 40 ms.
    wbufsize = -1
    disable_nagle_algorithm = True
    state: StandIn

    def do_GET(self) -> None:
        state = self.state
        answers: dict[str, Any] = {
            "/v2/health/ready": {},
            "/v2/health/live": {},
            "/v2": {"name": "stand-in", "version": "0.0.0", "extensions": []},
            "/v2/models/double": state.metadata(),
            "/v2/models/double/ready": {},
            "/v2/models/double/config": {"name": "double", "max_batch_size": MAX_BATCH},
            "/v2/models/double/stats": {"model_stats": [state.statistics()]},
        }
        if self.path in answers:
            self.answer(200, json.dumps(answers[self.path]).encode())
        else:
            self.answer(404, b'{"error":"Request for unknown model: it is not found"}')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v2/repository/index":
            self.answer(200, json.dumps([{"name": "double", "version": "1", "state": "READY"}]).encode())
            return
        if self.path != "/v2/models/double/infer":
            self.answer(404, b'{"error":"Request for unknown model: it is not found"}')
            return
        state, split = self.state, int(self.headers["Inference-Header-Content-Length"])
        tensor = json.loads(body[:split])["inputs"][0]
        y = state.infer(np.frombuffer(body[split:], np.float32).reshape(tensor["shape"]))
        if state.dead.is_set():
            self.close_connection = True
        elif state.refuse and state.faulty:
            self.answer(state.refuse[0], json.dumps({"error": state.refuse[2]}).encode())
        elif state.garbage and state.faulty:
            self.wfile.write(b"\x00\x01\x02 this is not HTTP\r\n\r\n")
            self.close_connection = True
        else:
            raw = y.tobytes()
            output = {"name": "y", "datatype": "FP32", "shape": y.shape, "parameters": {"binary_data_size": len(raw)}}
            head = json.dumps({"model_name": "double", "model_version": "1", "outputs": [output]}).encode()
            self.answer(200, head + raw, {"Inference-Header-Content-Length": str(len(head))})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


class _HttpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[_Handler]) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that leaves is what some of the tests are about

    def cut(self) -> None:
        """Close the port and every connection, as a killed server does."""
        self.shutdown()
        self.server_close()
        for connection in tuple(self.open):
            with suppress(OSError):  # its own thread may have closed it in this moment
                connection.shutdown(socket.SHUT_RDWR)


class _Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, state: StandIn) -> None:
        self.state = state

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name == "double")

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name="stand-in", version="0.0.0")

    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        return service_pb2.RepositoryIndexResponse(models=[{"name": "double", "version": "1", "state": "READY"}])

    def _known(self, name: str, context: Any) -> None:
        if name != "double":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        self._known(request.name, context)
        return service_pb2.ModelMetadataResponse(**self.state.metadata())

    def ModelConfig(self, request: Any, context: Any) -> Any:
        self._known(request.name, context)
        config = model_config_pb2.ModelConfig(name="double", max_batch_size=MAX_BATCH)
        return service_pb2.ModelConfigResponse(config=config)

    def ModelStatistics(self, request: Any, context: Any) -> Any:
        self._known(request.name, context)
        return service_pb2.ModelStatisticsResponse(model_stats=[self.state.statistics()])

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self._known(request.model_name, context)
        state, shape = self.state, list(request.inputs[0].shape)
        y = state.infer(np.frombuffer(request.raw_input_contents[0], np.float32).reshape(shape))
        if state.refuse and state.faulty:
            context.abort(state.refuse[1], state.refuse[2])
        if state.garbage and state.faulty:
            return service_pb2.ModelInferResponse(model_name="double")
        output = {"name": "y", "datatype": "FP32", "shape": shape}
        return service_pb2.ModelInferResponse(model_name="double", outputs=[output], raw_output_contents=[y.tobytes()])


@contextmanager
def running(**faults: Any) -> Iterator[StandIn]:
    """Run a stand-in on two free ports of the loopback address; stop it at the end of the block."""
    state = StandIn(**faults)
    web = _HttpServer(type("Handler", (_Handler,), {"state": state}))
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    rpc = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Service(state), rpc)
    state.http = f"http://127.0.0.1:{web.server_address[1]}"
    state.grpc = f"grpc://127.0.0.1:{rpc.add_insecure_port('127.0.0.1:0')}"
    rpc.start()

    def undertaker() -> None:
        state.dead.wait()
        web.cut()
        rpc.stop(0).wait()

    grave = threading.Thread(target=undertaker, daemon=True)
    grave.start()
    try:
        yield state
    finally:
        if state.hang:
            state.hang.set()
        state.dead.set()
        grave.join()


@pytest.fixture
def stand_in() -> Callable[..., AbstractContextManager[StandIn]]:
    """`with stand_in(stall=100) as server:` runs a server that stalls at its hundredth inference."""
    return running
