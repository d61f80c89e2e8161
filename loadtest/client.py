"""Client: one V2 endpoint behind two protocols; every foreign exception is turned into ours here and nowhere else.

A server may have no more than the protocol asks for: what Triton's extensions would have said is then `unknown`.

For questions and single requests. The load itself is sent by `loadtest.senders`, because a general client costs more
than many models do.
"""

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from loadtest import streaming, wire
from loadtest.connection import PLAIN, Connection, address
from loadtest.counts import Statistics, statistics
from loadtest.errors import (
    LatheError,
    ModelMissing,
    RequestRejected,
    ServerAbsent,
    ServerFault,
    ServerNonsense,
)
from loadtest.tensors import TRITON_DTYPES, Array, Arrays, TensorSpec, in_bytes, stated_spec

IS_IT_UP = "check that the server runs and that the URL has its address, scheme and port; `serve up` prints them"
WHICH_AUTHORITY = "give the authority that signed the server's certificate, and a client certificate if it asks for one"
_CONFIG = "which axis is the batch's and how large it may be (no model configuration)"
_COUNTS = "the server's own counts, queue and compute times (no statistics)"
_Read = TypeVar("_Read")
WHICH_PORT = "check that the URL names the server's own {scheme} port; the HTTP and the gRPC port differ"

# What each gRPC status (and the HTTP status that Triton sends for it) says about who is at fault.
GRPC_ERRORS: dict[str, type[LatheError]] = {
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


def connect(url: str, timeout: float = 30.0, connection: Connection = PLAIN) -> "Client":
    """Return a client for the Triton server at `url`; use it in a `with` statement, from one thread.

    Args:
        url: `grpc://HOST:PORT` or `http://HOST:PORT`; `grpcs` or `https` where the server encrypts.
        timeout: seconds that one request may take.
        connection: certificates, headers and compression.

    Raises:
        ServerAbsent: nothing answers there.
        ServerNonsense: what answers is not a Triton server.
    """
    client = Client(url, timeout, connection)
    try:
        client.ready()
    except LatheError:
        client.close()
        raise
    return client


class Client:
    """A V2 server, asked over gRPC or HTTP. Not for use from several threads.

    Attributes:
        binary: whether it takes tensors as bytes, which over HTTP is an extension of the protocol; found out with the
            first request.
        unknown: what it does not say because it lacks an extension of Triton's, with its own words.
    """

    def __init__(self, url: str, timeout: float, connection: Connection = PLAIN) -> None:
        self.url, self.timeout, self._streams = url, timeout, connection.streams > 0
        self.binary: bool | None = None
        self.unknown: dict[str, str] = {}
        connection.check(url)
        self._scheme, place, encrypted = address(url)
        packing = connection.compression
        if self._scheme == "grpc":
            import tritonclient.grpc as library

            creds = connection.credentials() if encrypted else None
            # The library obeys http_proxy of the environment even for a loopback address.
            self._client = library.InferenceServerClient(
                place, creds=creds, channel_args=[("grpc.enable_http_proxy", 0)]
            )
            self._options: dict[str, Any] = {"client_timeout": timeout, "headers": dict(connection.headers) or None}
            self._packed: dict[str, Any] = {"compression_algorithm": packing}
        else:
            import tritonclient.http as library

            self._client = library.InferenceServerClient(
                place,
                ssl=encrypted,
                ssl_context_factory=connection.gevent_tls if encrypted else None,
                connection_timeout=min(timeout, 10),
                network_timeout=timeout,
            )
            self._options = {"headers": dict(connection.headers) or None}
            self._packed = {"request_compression_algorithm": packing, "response_compression_algorithm": packing}
        self._library = library

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server, or this model of it, takes requests."""
        with translated(self.url):
            if not model:
                return bool(self._client.is_server_ready(**self._options))
            return bool(self._client.is_model_ready(model, version, **self._options))

    def models(self) -> list[str]:
        """Return the names of the models that the server has ready, as NAME or NAME/VERSION."""
        with translated(self.url):
            index = self._json("get_model_repository_index")
            entries = index.get("models", []) if isinstance(index, dict) else index
            return [entry["name"] for entry in entries if entry.get("state") == "READY"]

    def metadata(self, model: str, version: str = "") -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Return the specs of the model's inputs and outputs as the server states them.

        The batch axis, where the model has one, is a `Dim` named `batch` up to the configured maximum. Another size
        that the server leaves open (-1) is a `Dim` whose maximum is `UNBOUNDED`. A server without model configurations
        does not say which axis is the batch's, so that no axis is; one that names no tensors gives empty lists.

        Raises:
            ModelMissing: the server does not have it.
        """
        stated, config = self._describe(model, version)
        with translated(self.url):
            limit = int(config.get("max_batch_size", 0))
            inputs = [stated_spec(tensor, limit) for tensor in stated.get("inputs", ())]
            return inputs, [stated_spec(tensor, limit) for tensor in stated.get("outputs", ())]

    def served_version(self, model: str, version: str = "") -> str:
        """Return the version that answers a request for `version`; empty where the server does not say it.

        An empty `version` means the highest that is loaded.
        """
        stated, _ = self._describe(model, version)
        with translated(self.url):
            numbers = [int(number) for number in stated.get("versions", ()) if str(number).isdecimal()]
            return version or str(max(numbers, default=""))

    def server_version(self) -> str:
        """Return the version of the server itself, as in `2.51.0`."""
        with translated(self.url):
            return str(self._json("get_server_metadata")["version"])

    def statistics(self, model: str, version: str = "") -> Statistics | None:
        """Return what the server has counted for the model, summed over its versions unless one is named.

        None where the server does not say it.
        """

        def read(answer: Any) -> Statistics:
            return sum(map(statistics, answer["model_stats"]), Statistics())

        return self._extension(_COUNTS, "get_inference_statistics", model, version, read)

    def infer(self, model: str, inputs: Arrays, version: str = "", *, sequence: int = 0) -> dict[str, Array]:
        """Send one request with binary tensors and return the model's outputs.

        Args:
            model: its name.
            inputs: by name, the batch axis first where the model has one.
            version: which one; the server's choice unless given.
            sequence: for a model that remembers, the id of a sequence that this request alone makes up.

        Raises:
            RequestRejected: the server calls the request wrong.
            ModelMissing: the server does not have the model.
            ServerAbsent: no answer in time, or no connection.
        """
        whole = {"sequence_id": sequence, "sequence_start": True, "sequence_end": True} if sequence else {}
        with self._naming(model, version):
            if self.binary is not None or self._scheme == "grpc":
                return self._infer(model, inputs, version, whole)
            try:
                outputs = self._infer(model, inputs, version, whole)
            except (RequestRejected, ServerFault, ServerNonsense):
                if self._says_binary():
                    raise
                self.binary = False
                try:
                    return self._infer(model, inputs, version, whole)
                except LatheError:
                    self.binary = None
                raise
            self.binary = True
            return outputs

    def _says_binary(self) -> bool:
        with translated(self.url):
            return "binary_tensor_data" in self._json("get_server_metadata").get("extensions", ())

    def _infer(self, model: str, inputs: Arrays, version: str, whole: dict[str, Any]) -> dict[str, Array]:
        form = {} if self._scheme == "grpc" else {"binary_data": self.binary is not False}
        with translated(self.url):
            tensors = []
            for name, array in inputs.items():
                tensor = self._library.InferInput(name, list(array.shape), TRITON_DTYPES[array.dtype.name])
                tensors.append(tensor.set_data_from_numpy(array, **form))
            request = {"inputs": tensors, "model_version": version, **whole}
            if self._streams:
                how = self.timeout, self._options["headers"], self._packed["compression_algorithm"]
                return wire.stream_outputs(streaming.ask(self._client, *how, model_name=model, **request))
            result = self._client.infer(model, **request, **self._options, **self._packed)
            answer = result.get_response()
            if self._scheme == "grpc":
                return wire.grpc_outputs(answer)
            return {output["name"]: in_bytes(result.as_numpy(output["name"])) for output in answer["outputs"]}

    def order(self, what: str, *args: Any) -> None:
        """Call one of the library's methods that answer nothing, such as `register_system_shared_memory`."""
        with translated(self.url):
            getattr(self._client, what)(*args, **self._options)

    def _describe(self, model: str, version: str) -> tuple[dict[str, Any], dict[str, Any]]:
        with self._naming(model, version):
            try:
                with translated(self.url):
                    stated = self._json("get_model_metadata", model, version)
            except ServerNonsense as error:
                self.server_version()  # what answers this speaks the protocol: it is the model that it does not have
                raise ModelMissing(error.what, where=self.url) from error

        def read(config: Any) -> dict[str, Any]:
            return dict(config.get("config", config))

        return stated, self._extension(_CONFIG, "get_model_config", model, version, read) or {}

    def _extension(
        self, what: str, question: str, model: str, version: str, read: Callable[[Any], "_Read"]
    ) -> "_Read | None":
        """Ask what only an extension of Triton's answers; None where the server lacks it, and then it is `unknown`."""
        try:
            with self._naming(model, version), translated(self.url):
                return read(self._json(question, model, version))
        except ServerAbsent:
            raise
        except LatheError as error:
            if isinstance(error, ModelMissing) and not self.ready(model, version):
                raise
            self.unknown[what] = error.what
            return None

    def _json(self, question: str, *args: str) -> Any:
        """Ask one of the library's questions and return the answer as JSON values."""
        ask = getattr(self._client, question)
        form = {"as_json": True} if self._scheme == "grpc" else {}
        return ask(*args, **form, **self._options)

    @contextmanager
    def _naming(self, model: str, version: str) -> Iterator[None]:
        """Make a `ModelMissing` say which model was asked for and which there are."""
        try:
            yield
        except ModelMissing as error:
            asked = f"{model}/{version}" if version else model
            raise ModelMissing(
                f"the server does not have the model {asked!r} ready", where=self.url, fix=self._there()
            ) from error

    def _there(self) -> str:
        try:
            return f"it has: {', '.join(sorted(set(self.models()))) or 'none'}"
        except LatheError:
            # A guarded server keeps its index to itself.
            return "check the name and the version with who runs the server"


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn whatever the client libraries raise inside the block into an error of ours that names `url`."""
    from tritonclient.utils import InferenceServerException

    try:
        yield
    except LatheError:
        raise
    except InferenceServerException as error:
        raise _from_status(url, str(error.status() or ""), str(error.message())) from error
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


def _from_status(url: str, status: str, message: str) -> LatheError:
    message = " ".join(message.split())
    code = status.removeprefix("StatusCode.")
    if "decoupled transaction policy" in message:
        fix = "send its requests over streams, with --streams 1 and the server's gRPC address"
        return RequestRejected(f"the server says: {message}", where=url, fix=fix)
    if code.isdigit():
        return _from_http(url, int(code), message)
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
    return _said(kind, url, message)


def is_no_connection(message: str) -> bool:
    """Whether the text of a gRPC UNAVAILABLE speaks of the connection, not of the model's queue."""
    words = message.lower()
    return any(word in words for word in _NO_CONNECTION)


def _from_http(url: str, status: int, message: str) -> LatheError:
    if 400 <= status < 500 and _names_a_missing_model(message):
        return _said(ModelMissing, url, message)
    if status == 404:
        return _nonsense(url, message or "404")
    return _said(RequestRejected if 400 <= status < 500 else ServerFault, url, message)


def _names_a_missing_model(message: str) -> bool:
    # Triton calls it 404 and NOT_FOUND in most answers, 400 and INVALID_ARGUMENT in that of the statistics.
    words = message.lower()
    return "unknown model" in words or ("model" in words and ("not found" in words or "not available" in words))


def _said(kind: type[LatheError], url: str, message: str) -> LatheError:
    fixes = {
        RequestRejected: "compare names, shapes and dtypes with the model's metadata",
        ServerFault: "look into the server's log",
        ModelMissing: "check the model's name and version",
        ServerAbsent: IS_IT_UP,
    }
    return kind(f"the server says: {message}", where=url, fix=fixes[kind])


def _nonsense(url: str, message: str) -> ServerNonsense:
    scheme = url.partition(":")[0]
    return ServerNonsense(
        f"what answers is not a V2 server ({message[:200]})", where=url, fix=WHICH_PORT.format(scheme=scheme)
    )
