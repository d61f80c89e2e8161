"""The stub's two ports, open for as long as a `with` block lasts."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from modelathe.connection import UNLIMITED
from serve.clients.standin.answers import Stub
from serve.config.errors import PortTaken
from serve.server.options import HOST

GRPC_THREADS = 64
"""How many gRPC requests are answered at once; with a latency, each occupies a thread for so long."""
GRACE = 1.0
"""Seconds that requests in flight get at the end."""


@dataclass(frozen=True)
class Place:
    """Where a stub listens: `http://HOST:PORT`, `grpc://HOST:PORT`, and the models that it answers for."""

    http: str
    grpc: str
    models: tuple[str, ...]


@contextmanager
def running(stub: Stub, *, host: str = HOST, http_port: int = 0, grpc_port: int = 0) -> Iterator[Place]:
    """Answer as the stub does until the block ends, from threads of this process.

    Args:
        stub: the models and what they answer (`answers.load`).
        host: the address to listen at.
        http_port: 0 picks a free one, as for gRPC.
        grpc_port: see `http_port`.

    Raises:
        PortTaken: a port is in use.
    """
    with _listener(host, http_port, "--http-port") as http, _listener(host, grpc_port, "--grpc-port") as held:
        web_port, rpc_port = http.getsockname()[1], held.getsockname()[1]
        held.close()  # gRPC opens its ports itself
        with _grpc(stub, f"{host}:{rpc_port}"), _http(stub, http):
            yield Place(f"http://{host}:{web_port}", f"grpc://{host}:{rpc_port}", tuple(stub.models))


def _listener(host: str, port: int, option: str) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "there is no such port"
        raise PortTaken(
            f"{option} {port} cannot be used at {host}: {reason}", fix=f"choose another {option}, or stop what uses it"
        ) from None


@contextmanager
def _http(stub: Stub, listener: socket.socket) -> Iterator[None]:
    from aiohttp import web

    from serve.clients.standin import over_http

    loop = asyncio.new_event_loop()
    runner = web.AppRunner(over_http.application(stub), access_log=None, shutdown_timeout=GRACE, auto_decompress=False)

    async def start() -> None:
        await runner.setup()
        await web.SockSite(runner, listener, backlog=1024).start()

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(start(), loop).result()
        yield
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def _grpc(stub: Stub, address: str) -> Iterator[None]:
    import grpc

    from serve.clients.standin import over_grpc

    # Another program's port would otherwise be shared; the limits are tritonserver's.
    server = grpc.server(ThreadPoolExecutor(GRPC_THREADS), options=[("grpc.so_reuseport", 0), *UNLIMITED])
    server.add_generic_rpc_handlers((over_grpc.handler(stub),))
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:  # taken in the moment since it was tried
        raise PortTaken(f"gRPC cannot use {address}: {error}", fix="choose another --grpc-port") from None
    server.start()
    try:
        yield
    finally:
        server.stop(GRACE).wait()
