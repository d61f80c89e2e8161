"""Questions and orders to a running server beyond inference: is it ready, and load or unload a model.

Over HTTP with the standard library: a gRPC channel that found its port closed waits a second before it looks again.
"""

import http.client
import json
from urllib.parse import quote, urlsplit

from serve.config.errors import NoAnswer, ServerFailed, StillLoading
from serve.server import ending

ADMIN_KEY = "admin-key"
"""The HTTP header that carries the secret; over gRPC it is `triton-grpc-protocol-admin-key`."""
ANSWER = 5.0
"""Seconds that the answer to a question may take."""
RESTRICTED = "model-repository,shared-memory,logging,trace"
"""The protocols that answer only to the secret."""


def is_live(url: str) -> bool:
    """Return whether a server answers at `url`; it may not be ready, as while an old version is unloaded."""
    return _says_yes(url, "/v2/health/live") is True


def is_ready(url: str, model: str = "") -> bool:
    """Return whether the server at `url`, or one model of it, takes requests; False also if nothing answers."""
    return readiness(url, model) is True


def readiness(url: str, model: str = "") -> bool | None:
    """Return whether the server at `url`, or one model of it, takes requests by its own word; None if it says none."""
    return _says_yes(url, f"/v2/models/{quote(model)}/ready" if model else "/v2/health/ready")


def _says_yes(url: str, path: str) -> bool | None:
    try:
        status, _ = _ask(url, "GET", path, {}, timeout=ANSWER)
    except (OSError, http.client.HTTPException):
        return None
    return status == http.client.OK


def versions(url: str, model: str) -> list[int]:
    """Return the versions of `model` that the server at `url` answers with, sorted; empty if it serves none.

    Raises:
        ServerFailed: nothing answers.
    """
    try:
        status, body = _ask(url, "GET", f"/v2/models/{quote(model)}", {}, timeout=ANSWER)
    except (OSError, http.client.HTTPException) as error:
        raise ServerFailed(f"cannot be asked for its versions of {model}: {error}", where=url) from error
    return sorted(map(int, json.loads(body).get("versions", []))) if status == http.client.OK else []


def states(url: str, secret: str, model: str) -> dict[int, tuple[str, str]]:
    """Return what the server says of each version of `model`: LOADING, READY, UNLOADING or UNAVAILABLE, and why.

    Raises:
        ServerFailed: nothing answers, or it answers something else.
    """
    try:
        status, body = _ask(url, "POST", "/v2/repository/index", {ADMIN_KEY: secret}, timeout=5)
        if status != http.client.OK:
            raise ValueError(body.decode(errors="replace"))
        found = [row for row in json.loads(body) if row["name"] == model and row.get("version")]
        return {int(row["version"]): (row.get("state", ""), row.get("reason", "")) for row in found}
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise ServerFailed(f"cannot be asked for its versions of {model}: {error}", where=url) from error


def load(url: str, secret: str, model: str, timeout: float = 120) -> None:
    """Make the server load `model`, and wait for it, at most `timeout` seconds.

    Raises:
        StillLoading: it takes longer.
        NoAnswer: the server gives no answer.
        ModelRefused, ServerFailed: with the server's own words.
    """
    _order(url, secret, model, "load", timeout)


def unload(url: str, secret: str, model: str, timeout: float = 120) -> None:
    """Make the server unload `model`; it answers requests for it with an error from then on.

    Raises:
        StillLoading: it takes longer.
        NoAnswer: the server gives no answer.
        ServerFailed: with the server's own words.
    """
    _order(url, secret, model, "unload", timeout)


def reload(url: str, secret: str, model: str, timeout: float = 120) -> None:
    """Make the server load a `model` anew that it has; it answers with what it has until the new processes are ready.

    A plain load does nothing where the files are as they were. One that brings the configuration along, here the one
    that is served already, always loads.

    Raises:
        ModelRefused, ServerFailed: with the server's own words; what was loaded still is.
    """
    try:
        status, config = _ask(url, "GET", f"/v2/models/{quote(model)}/config", {}, timeout)
    except (OSError, http.client.HTTPException) as error:
        raise ServerFailed(f"cannot be asked for the configuration of {model}: {error}", where=url) from error
    if status != http.client.OK:
        raise ServerFailed(f"has no configuration of {model}: {config.decode(errors='replace')}", where=url)
    _order(url, secret, model, "load", timeout, json.dumps({"parameters": {"config": config.decode()}}))


def _order(url: str, secret: str, model: str, verb: str, timeout: float, said: str | None = None) -> None:
    path = f"/v2/repository/models/{quote(model)}/{verb}"
    try:
        status, body = _ask(url, "POST", path, {ADMIN_KEY: secret}, timeout, said)
    except TimeoutError as error:
        raise StillLoading(f"has not done after {timeout:g} s: {verb} {model}", where=url) from error
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"cannot be asked to {verb} {model}: {error}", where=url) from error
    if status != http.client.OK:
        what = ending.answer(body)
        raise ending.kind(what, refused=verb == "load")(f"does not {verb} {model}: {what}", where=url)


def _ask(
    url: str, method: str, path: str, headers: dict[str, str], timeout: float, said: str | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    try:
        connection.request(method, path, body=said, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
