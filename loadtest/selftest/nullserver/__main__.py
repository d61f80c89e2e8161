"""The process of a null server; its settings are the one argument, as JSON."""

import asyncio
import json
import os
import sys

import grpc.aio

from loadtest.load import eventloop
from loadtest.selftest.nullserver import over_grpc, over_http
from loadtest.selftest.nullserver.model import Model, Queue
from modelathe.connection import UNLIMITED
from modelathe.tensors import TensorSpec

_OPTIONS = [("grpc.so_reuseport", 0), *UNLIMITED]


async def _serve(model: Model) -> None:
    """Answer until standard input ends, which it does at the latest with the process that started this one."""
    loop = asyncio.get_running_loop()
    web = await loop.create_server(over_http.connections(model), "127.0.0.1", 0, backlog=4096)
    rpc = grpc.aio.server(options=_OPTIONS)
    rpc.add_generic_rpc_handlers((over_grpc.handlers(model),))
    ports = {"http": web.sockets[0].getsockname()[1], "grpc": rpc.add_insecure_port("127.0.0.1:0")}
    await rpc.start()
    sys.stdout.write(json.dumps(ports) + "\n")
    sys.stdout.flush()
    ended = asyncio.Event()
    loop.add_reader(sys.stdin, ended.set)
    await ended.wait()
    os._exit(0)  # nothing here is worth a tidy end: no files, no state, and whoever asked is gone


def _main(settings: str) -> None:
    values = json.loads(settings)
    inputs, outputs = ([TensorSpec.from_document(one) for one in values.pop(key)] for key in ("inputs", "outputs"))
    with asyncio.Runner(loop_factory=eventloop.fine_loop) as runner:
        runner.run(_serve(Model(inputs, outputs, Queue(**values))))


if __name__ == "__main__":
    _main(sys.argv[1])
