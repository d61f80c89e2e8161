"""Interface: what clients send to a version of a model and get back, from its configuration and its lineage.

The configuration has the names, dtypes and dims, which the server holds a request to. The lineage knows what it does
not say: how large the dims are that change size, in which range values lie, and examples of strings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelOutput

from modelathe.client import Client
from modelathe.tensors import NUMPY_DTYPES, UNBOUNDED, Dim, TensorSpec
from serve.config import datatypes, sequences
from serve.config.errors import BadRepository
from serve.repository import tree as repositories


@dataclass(frozen=True)
class Interface:
    """A version of a model as its clients see it.

    Args:
        model: the model's name.
        number: the version's number.
        config: the model's configuration.
        inputs: the specs of its inputs; a dim whose sizes nobody stated has the maximum `UNBOUNDED`.
        outputs: the specs of its outputs.
        optional: the inputs that may be left out.
        buckets: sizes that clients pad a dim to, by the dim's name.
        ranged: whether a lineage says in which range values lie.
    """

    model: str
    number: int
    config: ModelConfig
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    optional: frozenset[str]
    buckets: Mapping[str, tuple[int, ...]]
    ranged: bool

    @property
    def text_ids(self) -> bool:
        """Whether the model takes the ids of its sequences as strings."""
        return bool(sequences.text_ids(self.config))


def read(place: Path, model: str, number: int | None = None, client: Client | None = None) -> Interface:
    """Return the interface of a version of `model` in the repository `place`.

    Args:
        place: the repository.
        model: the model's name.
        number: the version; the highest live one unless given.
        client: of a server that serves it, and is asked for what the configuration leaves to the server.

    Raises:
        BadRepository: the configuration lists no inputs or outputs and there is no client, or one of a type that numpy
            has not; the lineage cannot be read.
    """
    config = repositories.config(place, model)
    number = max(repositories.live(place, model), default=0) if number is None else number
    where = str(place / model / repositories.CONFIG)
    known: dict[str, Any] = {}
    if repositories.published(place / model / str(number)):
        known = repositories.read_lineage(place, model, number)
    if config.input and config.output:
        inputs, outputs = (
            tuple(_spec(tensor, known.get(kind, ()), config.max_batch_size, where) for tensor in tensors)
            for kind, tensors in (("inputs", config.input), ("outputs", config.output))
        )
    elif client:
        inputs, outputs = map(tuple, client.metadata(model))
    else:
        raise BadRepository("lists no inputs or no outputs", where=where, fix="complete it, or publish with: serve add")
    buckets = {name: tuple(sorted(sizes)) for name, sizes in known.get("serve", {}).get("buckets", {}).items()}
    optional = frozenset(tensor.name for tensor in config.input if tensor.optional)
    return Interface(model, number, config, inputs, outputs, optional, buckets, bool(known))


def _spec(
    tensor: ModelInput | ModelOutput, documents: Sequence[Mapping[str, Any]], max_batch: int, where: str
) -> TensorSpec:
    """Return a tensor as requests carry it; its dims are the configuration's, their names and ranges the lineage's."""
    datatype = datatypes.in_protocol(tensor.data_type)
    if datatype not in NUMPY_DTYPES:
        raise BadRepository(
            f"the tensor {tensor.name!r} has the type {datatype}",
            where=where,
            fix=f"types that can be sent: {', '.join(NUMPY_DTYPES)}",
        )
    stated = [TensorSpec.from_document(document) for document in documents if document["name"] == tensor.name]
    own = [dim for spec in stated for dim in spec.dims[spec.batched :]]
    dims: list[int | Dim] = [Dim("batch", 1, min(8, max_batch), max_batch)] if max_batch else []
    for axis, size in enumerate(tensor.dims):
        dim = own[axis] if len(own) == len(tensor.dims) else size
        unknown = Dim(f"{tensor.name}_{axis + bool(max_batch)}", 1, 1, UNBOUNDED)
        dims.append(size if size >= 0 else dim if isinstance(dim, Dim) else unknown)
    spec = TensorSpec(tensor.name, NUMPY_DTYPES[datatype], tuple(dims))
    return replace(spec, values=stated[0].values, examples=stated[0].examples) if stated else spec
