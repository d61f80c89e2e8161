"""FastAPI with a micro-batcher: what a careful engineer writes by hand."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from graph import LARGEST, Graph, graphs, port


class Batcher:
    """Runs what has come since the last call as one batch, in a thread of its own; nothing waits for more."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.pool = graph, ThreadPoolExecutor(1)
        self.queue: asyncio.Queue = asyncio.Queue()
        self.task: asyncio.Task | None = None

    async def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.task = self.task or asyncio.create_task(self.work())
        done = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((feed, done))
        return await done

    async def work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            calls = [await self.queue.get()]
            while len(calls) < LARGEST and not self.queue.empty():
                calls.append(self.queue.get_nowait())
            feeds = [feed for feed, _ in calls]
            try:
                results = await loop.run_in_executor(self.pool, self.graph.run, feeds)
            except Exception as error:
                for _, done in calls:
                    done.set_exception(error)
                continue
            for (_, done), result in zip(calls, results, strict=True):
                done.set_result(result)


app = FastAPI()
BATCHERS = {name: Batcher(graph) for name, graph in graphs().items()}


@app.get("/v2/health/ready")
async def ready() -> Response:
    return Response()


@app.post("/v2/models/{model}/infer")
async def infer(model: str, request: Request) -> Response:
    batcher = BATCHERS[model]
    outputs = await batcher.run(batcher.graph.feed(orjson.loads(await request.body())))
    body = orjson.dumps(batcher.graph.answer(outputs), option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type="application/json")


@app.post("/raw/{model}")
async def raw(model: str, request: Request) -> Response:
    """One sample as the bytes of its inputs, one after another, all of one type and length."""
    graph, body = BATCHERS[model].graph, await request.body()
    length = len(body) // len(graph.inputs)
    feed = {
        name: np.frombuffer(body[at * length : (at + 1) * length], dtype)[None]
        for at, (name, dtype) in enumerate(zip(graph.inputs, graph.dtypes, strict=True))
    }
    outputs = await BATCHERS[model].run(feed)
    return Response(b"".join(output.tobytes() for output in outputs))


uvicorn.run(app, host="127.0.0.1", port=port(), log_level="warning", loop="uvloop", http="httptools")
