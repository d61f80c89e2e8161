"""LitServe with its own batching."""

import json
import sys
from typing import Any

import litserve
from graph import DELAY_SECONDS, LARGEST, Graph, port


class Served(litserve.LitAPI):
    """One model at the path of the V2 protocol; the session is made in the worker process."""

    def __init__(self, name: str, entry: dict[str, Any]) -> None:
        super().__init__(max_batch_size=LARGEST, batch_timeout=DELAY_SECONDS, api_path=f"/v2/models/{name}/infer")
        self.entry = entry

    def setup(self, device: str) -> None:
        self.graph = Graph(**self.entry)

    def decode_request(self, request: dict[str, Any]) -> Any:
        return self.graph.feed(request)

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, feeds: Any) -> Any:
        return self.graph.run(feeds)

    def unbatch(self, outputs: Any) -> Any:
        return outputs

    def encode_response(self, outputs: Any) -> dict[str, Any]:
        answer = self.graph.answer(outputs)
        for entry in answer["outputs"]:
            entry["data"] = entry["data"].tolist()
        return answer


if __name__ == "__main__":
    served = [Served(name, entry) for name, entry in json.loads(sys.argv[2]).items()]
    server = litserve.LitServer(served, accelerator="cpu", workers_per_device=1, healthcheck_path="/v2/health/ready")
    server.run(host="127.0.0.1", port=port(), log_level="warning", generate_client_file=False)
