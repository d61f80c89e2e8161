"""Translation: what servers and client libraries raise and say, as errors of ours: who is at fault, and what to do."""

import json
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from modelathe.errors import ModelatheError, ModelMissing, RequestRejected, ServerAbsent, ServerFault, ServerNonsense

IS_IT_UP = "check that the server runs and that the URL has its address, scheme and port; `serve up` prints them"
WHICH_AUTHORITY = "give the authority that signed the server's certificate, and a client certificate if it asks for one"
WHICH_PORT = (
    "check that the URL names the server's own {scheme} port; the HTTP and the gRPC port differ, and a gateway may "
    "want the server's name, as in --header 'Host: NAME'"
)

GATEWAY = "see that the server behind the gateway runs, and give its name where that has several: --header 'Host: NAME'"
FIXES = {
    "UNAUTHENTICATED": "give what it asks for, as in --header 'Authorization: Bearer TOKEN'",
    "413": "send smaller requests, or let what stands before the server take larger ones",
    "429": "send less, or let what stands before the server take more",
    **dict.fromkeys(("502", "503", "504"), GATEWAY),
    **dict.fromkeys(("301", "302", "303", "307", "308"), "give the address that it leads to, as https://HOST:PORT"),
}
"""What to do about an HTTP status that is no model server's, and a gRPC status."""
FIXES |= dict.fromkeys(("401", "403", "407", "PERMISSION_DENIED"), FIXES["UNAUTHENTICATED"])
UNNAMED = "[request id: <id_unknown>] "
"""What Triton says before the words for a request without a name."""

# What each gRPC status (and the HTTP status that Triton sends for it) says about who is at fault.
GRPC_ERRORS: dict[str, type[ModelatheError]] = {
    "OK": ServerNonsense,
    "CANCELLED": ServerAbsent,
    "UNKNOWN": ServerNonsense,
    "INVALID_ARGUMENT": RequestRejected,
    "DEADLINE_EXCEEDED": ServerAbsent,
    "NOT_FOUND": ModelMissing,
    "ALREADY_EXISTS": RequestRejected,
    "PERMISSION_DENIED": RequestRejected,
    "RESOURCE_EXHAUSTED": ServerFault,
    "FAILED_PRECONDITION": RequestRejected,
    "ABORTED": ServerFault,
    "OUT_OF_RANGE": RequestRejected,
    "UNIMPLEMENTED": ServerNonsense,
    "INTERNAL": ServerFault,
    "UNAVAILABLE": ServerFault,
    "DATA_LOSS": ServerNonsense,
    "UNAUTHENTICATED": RequestRejected,
}
# gRPC's own library uses UNAVAILABLE as well; these words are its, never Triton's.
_NO_CONNECTION = ("failed to connect", "connection", "socket closed", "resolv", "handshake", "goaway", "eof", "recvmsg")
_NOT_GRPC = (
    "http1",
    "http2",
    "http status",
    "http header",
    "settings frame",
    "protocol error",
    "wire type",
    "deseriali",
)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn whatever the client libraries raise inside the block into an error of ours that names `url`."""
    from tritonclient.utils import InferenceServerException

    try:
        yield
    except ModelatheError:
        raise
    except InferenceServerException as error:
        said = "" if error.debug_details() is None else _page(error.debug_details())
        raise _from_status(url, str(error.status() or ""), str(error.message()), said) from error
    except TimeoutError as error:
        raise ServerAbsent("the server did not answer in time", where=url, fix=IS_IT_UP) from error
    except ssl.SSLError as error:
        raise ServerAbsent(f"no encrypted connection: {error}", where=url, fix=WHICH_AUTHORITY) from error
    except OSError as error:
        raise ServerAbsent(f"no connection: {error.strerror or error}", where=url, fix=IS_IT_UP) from error
    except (MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:  # what a parser says about bytes that are no answer has no common class
        raise _nonsense(url, f"{type(error).__name__}: {error}") from error


def _from_status(url: str, status: str, message: str, page: str = "") -> ModelatheError:
    """Return the error for a status.

    Args:
        url: where it came from.
        status: of gRPC or HTTP.
        message: the words that belong to it.
        page: what an HTTP answer says that is not the JSON of a model server.
    """
    message = " ".join(message.replace(UNNAMED, "").split())
    code = status.removeprefix("StatusCode.")
    if "decoupled transaction policy" in message:
        fix = "send its requests over streams, with --streams 1 and the server's gRPC address"
        return RequestRejected(f"the server says: {message}", where=url, fix=fix)
    if "correlation ID" in message:
        return RequestRejected(f"the server says: {message}", where=url, fix="send sequences, as with --sequence 5")
    if code.isdigit():
        return _from_http(url, int(code), _titled(code, page) if page else message, bool(page))
    words = message.lower()
    if code not in GRPC_ERRORS or (code in ("UNAVAILABLE", "INTERNAL") and any(word in words for word in _NOT_GRPC)):
        return _nonsense(url, message)
    kind = ModelMissing if _names_a_missing_model(message) else GRPC_ERRORS[code]
    if code == "UNAVAILABLE" and is_no_connection(message):
        kind = ServerAbsent
    if kind is ServerNonsense:
        return _nonsense(url, message)
    if kind is ServerAbsent:
        text = "the server did not answer in time" if code == "DEADLINE_EXCEEDED" else f"no connection: {message}"
        return ServerAbsent(text, where=url, fix=WHICH_AUTHORITY if "ssl" in words or "certif" in words else IS_IT_UP)
    return _said(kind, url, message, FIXES.get(code, ""))


def is_no_connection(message: str) -> bool:
    """Whether the text of a gRPC UNAVAILABLE speaks of the connection, not of the model's queue."""
    words = message.lower()
    return any(word in words for word in _NO_CONNECTION)


def _page(body: str) -> str:
    """Return what a page says, or JSON of another form than a model server's: its title, or all its text."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        body = next((str(found[key]) for key in ("detail", "message") if found.get(key)), body)
    elif title := re.search(r"<title>(.+?)</title>", body, re.DOTALL | re.IGNORECASE):
        body = title[1]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())[:200] or "an empty page"


def _titled(status: str, page: str) -> str:
    return f"HTTP {page if page.startswith(status) else f'{status}: {page}'}"


def _from_http(url: str, status: int, message: str, strange: bool) -> ModelatheError:
    """Return the error for a status of HTTP; `strange` says that the words are not of a model server's form."""
    if 400 <= status < 500 and _names_a_missing_model(message):
        return _said(ModelMissing, url, message)
    if status == 404:
        return _nonsense(url, message or "404")
    # Triton itself says 503 where a queue is full, and then a gateway is not to blame.
    fix = FIXES.get(str(status), "") if strange or status < 500 else ""
    return _said(RequestRejected if 400 <= status < 500 else ServerFault, url, message, fix)


def _names_a_missing_model(message: str) -> bool:
    # Triton calls it 404 and NOT_FOUND in most answers, 400 and INVALID_ARGUMENT in that of the statistics.
    words = message.lower()
    return "unknown model" in words or ("model" in words and ("not found" in words or "not available" in words))


def _said(kind: type[ModelatheError], url: str, message: str, fix: str = "") -> ModelatheError:
    fixes = {
        RequestRejected: "compare names, shapes and dtypes with the model's metadata",
        ServerFault: "look into the server's log",
        ModelMissing: "check the model's name and version",
        ServerAbsent: IS_IT_UP,
    }
    return kind(f"the server says: {message}", where=url, fix=fix or fixes[kind])


def _nonsense(url: str, message: str) -> ServerNonsense:
    scheme = url.partition(":")[0]
    return ServerNonsense(
        f"what answers is not a V2 server ({message[:200]})", where=url, fix=WHICH_PORT.format(scheme=scheme)
    )
