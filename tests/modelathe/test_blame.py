"""What a server or a gateway does not take is told as that, and the way out that is named works."""

# ruff: noqa: N802 -- the method names are those of the HTTP library
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from loadtest.cli import main
from modelathe.client import connect
from modelathe.connection import Connection
from modelathe.errors import ModelatheError, ServerFault
from tests.loadtest.send.test_v2 import PAYLOADS, Handler, Model, serving, web


class Silent(Handler):
    """Ends the connection where a request is not plain JSON, and knows the model by no version but its own."""

    model = Model()

    def do_POST(self) -> None:
        if "Content-Encoding" in self.headers or "Inference-Header-Content-Length" in self.headers:
            self.close_connection = True
        else:
            super().do_POST()

    def do_GET(self) -> None:
        self.path = self.path.replace("/versions/1", "")
        super().do_GET()


def load(url: str, at: Path, *options: str) -> tuple[int, dict[str, Any]]:
    np.savez(at / "d.npz", **{name: np.stack([payload[name] for payload in PAYLOADS]) for name in ("x",)})
    command = ["run", "double", "--url", url, "--requests", "6", "--warmup", "0s", "--allow-invalid", "--json"]
    done = CliRunner().invoke(main, [*command, "--output", str(at / "r.jsonl"), *options])
    return done.exit_code, json.loads(done.stdout)


OPTIONS = {
    "a compressed body": ("json", ["--compression", "gzip"], 2, "without --compression gzip, and not with it"),
    "another one": ("silent", ["--compression", "deflate"], 2, "without --compression deflate, and not with it"),
    "a version": ("silent", ["--version", "1"], 2, "without --version 1, and not with it"),
    "streams": ("raw", ["--streams", "2"], 2, "without --streams 2, and not with it"),
    "shared memory": ("json", ["--shared-memory", "system"], 4, "no shared memory, which is an extension"),
    "shared memory over gRPC": ("raw", ["--shared-memory", "system"], 4, "no shared memory, which is an extension"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_the_server_does_not_take(case: str, tmp_path: Path) -> None:
    kind, option, code, says = OPTIONS[case]
    data = ["--shape", "x:1,4", "--shape", "name:1,2"]
    with web(Silent) if kind == "silent" else serving(kind, Model()) as url:
        ended, document = load(url, tmp_path, *data, *option)
        assert (ended, says in document["error"]["what"]) == (code, True), document
        assert document["error"]["fix"] == f"leave {option[0]} away"
        ended, document = load(url, tmp_path, *data)
        assert (ended, document["requests"]["done"]) == (0, 6), document


def test_a_moment_without_an_answer_is_blamed_on_nothing() -> None:
    class Busy(Handler):
        model = Model()
        asked = 0

        def do_POST(self) -> None:
            type(self).asked += 1
            self.rfile.read(int(self.headers["Content-Length"]))
            right = [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]
            if self.asked > 2:
                self.say(200, {"model_name": "double", "outputs": right})
            else:
                self.say(500, {"error": "too busy"})

    with (
        web(Busy) as url,
        connect(url, 10, Connection(compression="gzip")) as client,
        pytest.raises(ServerFault, match="too busy"),
    ):
        client.infer("double", PAYLOADS[0])


PAGE = b"<html><head><title>%s</title></head><body>a gateway</body></html>"
GATEWAYS = {
    "a token, as JSON": (401, b'{"error": "no token"}', 4, "no token", "--header 'Authorization: Bearer TOKEN'"),
    "a token, as JSON of another form": (401, b'{"detail": "who?"}', 4, "HTTP 401: who?", "--header 'Authorization"),
    "a token, as a page": (403, PAGE % b"403 Forbidden", 4, "HTTP 403 Forbidden", "--header 'Authorization"),
    "a size": (413, PAGE % b"413 Too Large", 4, "HTTP 413 Too Large", "send smaller requests"),
    "a rate": (429, b"slow down", 4, "HTTP 429: slow down", "send less"),
    "nothing behind it": (502, PAGE % b"Bad Gateway", 5, "HTTP 502: Bad Gateway", "--header 'Host: NAME'"),
    "nothing behind it, and no words": (503, b"<br>", 5, "HTTP 503: an empty page", "see that the server behind"),
    "another place": (308, PAGE % b"Moved", 5, "HTTP 308: Moved", "give the address that it leads to, as https://"),
    "no such place": (404, b"no route", 5, "not a V2 server (HTTP 404: no route)", "--header 'Host: NAME'"),
    "a queue of Triton's": (503, b'{"error": "Exceeds maximum queue size"}', 5, "maximum queue", "the server's log"),
}


@pytest.mark.parametrize("case", GATEWAYS)
def test_a_gateway_that_answers_by_itself(case: str) -> None:
    status, body, code, says, fix = GATEWAYS[case]

    class Gateway(Handler):
        model = Model()

        def do_GET(self) -> None:
            if self.headers.get("Authorization") or self.path == "/v2/health/ready":
                super().do_GET()
            else:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

    with web(Gateway) as url, connect(url, timeout=10) as client, pytest.raises(ModelatheError) as caught:
        client.metadata("double")
    assert (caught.value.exit_code, says in caught.value.what, fix in caught.value.fix) == (code, True, True)
    assert "exception occurred" not in caught.value.what
    if "TOKEN" in fix:
        name, value = fix.partition("'")[2].strip("'").split(": ")
        with web(Gateway) as url, connect(url, 10, Connection(headers=((name, value),))) as client:
            assert client.metadata("double")[0]


def test_a_gateway_that_ends_kept_connections_as_a_request_comes(tmp_path: Path) -> None:
    class Ending(Handler):
        model = Model()
        answered = 0

        def do_POST(self) -> None:
            type(self).answered += 1
            if self.answered % 4 == 0:
                self.close_connection = True
                return
            super().do_POST()

    command = ["run", "double", "--requests", "6", "--warmup", "0s", "--shape", "x:1,4", "--shape", "name:1,2"]
    with web(Ending) as url:
        said = CliRunner().invoke(main, [*command, "--url", url, "--output", str(tmp_path / "r.jsonl")])
        assert said.exit_code == 3
        assert "closed before the answer" in said.output
        way = said.output.partition("gateway cuts off with ")[2].partition(",")[0].split()
        ended, document = load(url, tmp_path, *command[6:], "--concurrency", "1", *way)
        assert (ended, document["requests"]["failed"]) == (0, 0), document
