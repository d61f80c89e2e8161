"""Client: one V2 endpoint behind two protocols; every foreign exception is turned into ours (`modelathe.translation`).

A server may have no more than the protocol asks for: what Triton's extensions would have said is then `unknown`.

For questions and single requests. The load itself is sent by `loadtest.send`, because a general client costs more
than many models do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from modelathe import blame
from modelathe.connection import PLAIN, Connection, address, base
from modelathe.errors import (
    ModelatheError,
    ModelMissing,
    RequestRejected,
    ServerAbsent,
    ServerFault,
    ServerNonsense,
    closest,
)
from modelathe.outputs import ask_stream, grpc_outputs, stream_outputs
from modelathe.tensors import TRITON_DTYPES, Array, Arrays, TensorSpec, in_bytes, reshaped, stated_spec
from modelathe.translation import translated

_CONFIG = "which axis is the batch's and how large it may be (no model configuration)"
_COUNTS = "the server's own counts, queue and compute times (no statistics)"
_Read = TypeVar("_Read")


def connect(url: str, timeout: float = 30.0, connection: Connection = PLAIN) -> "Client":
    """Return a client for the Triton server at `url`; use it in a `with` statement, from one thread.

    Args:
        url: `grpc://HOST:PORT` or `http://HOST:PORT`; `grpcs` or `https` where the server encrypts.
        timeout: seconds that one request may take.
        connection: certificates, headers and compression.

    Raises:
        ServerAbsent: nothing answers there.
        ServerNonsense: what answers is not a Triton server.
        UsageError: the server does not take so many bytes of headers.
    """
    client = Client(url, timeout, connection)
    try:
        client.ready()
    except ModelatheError as error:
        client.close()

        def again(other: Connection, _: str) -> None:
            with Client(url, timeout, other) as plain:
                plain.ready()

        blame.headers(again, url, connection, error)
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
        self.url, self.timeout, self._connection = url, timeout, connection
        self.binary: bool | None = None
        self.unknown: dict[str, str] = {}
        connection.check(url)
        self._scheme, place, encrypted = address(url)
        packing = connection.compression
        if self._scheme == "grpc":
            import tritonclient.grpc as library

            creds = connection.credentials() if encrypted else None
            # What is given here takes the place of all of the library's own options.
            self._client = library.InferenceServerClient(place, creds=creds, channel_args=connection.channel())
            self._options: dict[str, Any] = {"client_timeout": timeout, "headers": dict(connection.others) or None}
            self._packed: dict[str, Any] = {"compression_algorithm": packing}
        else:
            import tritonclient.http as library

            self._client = library.InferenceServerClient(
                f"{place}{base(url)}",
                ssl=encrypted,
                ssl_context_factory=connection.gevent_tls if encrypted else None,
                connection_timeout=min(timeout, 10),
                network_timeout=timeout,
            )
            named = {"Host": connection.host} if connection.host else {}
            self._options = {"headers": {**named, **dict(connection.others)} or None}
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

    def metadata(
        self, model: str, version: str = "", *, own: bool = False
    ) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Return the specs of the model's inputs and outputs as requests carry them, or as the model has its `own`.

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
            outputs = [stated_spec(tensor, limit) for tensor in stated.get("outputs", ())]
            if own:
                return reshaped(inputs, config.get("input", ())), reshaped(outputs, config.get("output", ()))
            return inputs, outputs

    def optional(self, model: str, version: str = "") -> frozenset[str]:
        """Return the inputs that a request may leave out, as far as the server says it."""
        _, config = self._describe(model, version)
        with translated(self.url):
            return frozenset(tensor["name"] for tensor in config.get("input", ()) if tensor.get("optional"))

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

    def model_stats(self, model: str, version: str = "") -> list[dict[str, Any]] | None:
        """Return what the server has counted for each version of the model, or for the one that is named.

        It is `model_stats` in the JSON form of either protocol; None where the server does not say it.
        """
        return self._extension(
            _COUNTS, "get_inference_statistics", model, version, lambda answer: answer["model_stats"]
        )

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
            UsageError: the server answers the same request where it is not compressed, goes over no stream, or to no
                version that is named.
        """
        try:
            return self._answered(model, inputs, version, sequence)
        except (RequestRejected, ServerFault, ServerNonsense) as error:

            def again(connection: Connection, version: str) -> None:
                with Client(self.url, self.timeout, connection) as other:
                    other._answered(model, inputs, version, sequence)

            blame.options(again, self.url, self._connection, version, error)
            raise

    def _answered(self, model: str, inputs: Arrays, version: str, sequence: int) -> dict[str, Array]:
        """Send one request, over HTTP as bytes or, where the server does not take these, as JSON."""
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
                except ModelatheError:
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
            if self._connection.streams:
                how = self.timeout, self._options["headers"], self._packed["compression_algorithm"]
                return stream_outputs(ask_stream(self._client, *how, model_name=model, **request))
            result = self._client.infer(model, **request, **self._options, **self._packed)
            answer = result.get_response()
            if self._scheme == "grpc":
                return grpc_outputs(answer)
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
        except ModelatheError as error:
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
                f"the server does not have the model {asked!r} ready", where=self.url, fix=self._there(model)
            ) from error

    def _there(self, model: str) -> str:
        try:
            names = sorted(set(self.models()))
            return f"{closest(model, names)}it has: {', '.join(names) or 'none'}"
        except ModelatheError:
            # A guarded server keeps its index to itself.
            return "check the name and the version with who runs the server"
