"""Clients: short programs that ask one model for an answer, made from its interface. Each runs as it is.

All three send the same values: one sample of typical size. Names come from a graph and may hold anything, so in Python
they stand as `repr` writes them, also in comments, and in the shell between quotation marks or in a here-document.
"""

import base64
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from modelathe import files
from modelathe.errors import UsageError
from modelathe.tensors import TRITON_DTYPES, UNBOUNDED, Array, Dim, TensorSpec, packed
from serve.config.address import parse_url
from serve.repository.interface import Interface

TEXT = b"some text"
"""What the examples send in every element of a tensor of strings."""
END = "END_OF_REQUEST"

PAD = """

# The model is served with dims of few sizes, because only requests of one shape share a batch. Zeros fill them up to
# the next size, and outputs come back as long. The model must know which values are padding, as by a mask of zeros.
def pad(array, axis, sizes, fill=0):
    length = array.shape[axis]
    missing = next((size for size in sizes if size >= length), length) - length
    return np.pad(array, [(0, missing * (at == axis)) for at in range(array.ndim)], constant_values=fill)
"""
PYTHON = """\
# Asks the model {model!r} for one answer over {protocol}. It needs: pip install 'tritonclient[{extra}]'
import numpy as np
import tritonclient.{extra} as triton
{pad}

def tensor(name, datatype, array):
    return triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


{rng}tensors = [
{tensors}
]
with triton.InferenceServerClient({address!r}) as client:
{ask}
for name in {outputs!r}:
    print(name, answer.as_numpy(name))
"""
ASK = "    answer = client.infer({model!r}, tensors)"
ASK_IN_SEQUENCE = """\
    # All requests of a sequence carry its id; the first and the last say what they are.
    for step in range(2):
        flags = {{"sequence_id": {sequence!r}, "sequence_start": step == 0, "sequence_end": step == 1}}
        answer = client.infer({model!r}, tensors, **flags)"""

SHELL = """\
#!/bin/sh
# Asks the model {model!r} for one answer over HTTP. It needs curl 7.76 or newer.
{notes}set -eu
url={url}
"""
CURL = "curl --silent --show-error --fail-with-body --output - --header '{header}' --data-binary @- \"$url\""


def texts(asked: Interface, url: str, grpc_url: str) -> dict[str, str]:
    """Return the text of each file by its name: `client.py`, `request.sh` and `grpc_client.py`.

    Args:
        asked: what the model takes and gives.
        url: of a server, `http://HOST:PORT`.
        grpc_url: of the same, `grpc://HOST:PORT`.

    Raises:
        UsageError: an address is not of that form.
    """
    addresses = {}
    for scheme, given in (("http", url), ("grpc", grpc_url)):
        found, addresses[scheme] = parse_url(given)
        if found != scheme:
            raise UsageError(f"not an address of {scheme}", where=given, fix=f"write {scheme}://HOST:PORT")
    return {
        "client.py": _python(asked, "HTTP", "http", addresses["http"]),
        "request.sh": _shell(asked, addresses["http"]),
        "grpc_client.py": _python(asked, "gRPC", "grpc", addresses["grpc"]),
    }


def write(texts: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the files into `folder`, which is made if it is not there, and return their paths; each appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    return [files.write(folder / name, text, 0o755 if name.endswith(".sh") else 0o644) for name, text in texts.items()]


def _python(asked: Interface, protocol: str, extra: str, address: str) -> str:
    drawn = any(spec.dtype != "object" for spec in asked.inputs)
    lines = [
        f"    # {_described(asked, spec)}\n"
        f"    tensor({spec.name!r}, {TRITON_DTYPES[spec.dtype]!r}, {_expression(asked, spec)}),"
        for spec in asked.inputs
    ]
    ask = ASK_IN_SEQUENCE if asked.config.HasField("sequence_batching") else ASK
    return PYTHON.format(
        model=asked.model,
        protocol=protocol,
        extra=extra,
        address=address,
        pad=PAD if any(_padding(asked, spec) for spec in asked.inputs) else "",
        rng="rng = np.random.default_rng(0)\n" if drawn else "",
        tensors="\n".join(lines),
        ask=ask.format(model=asked.model, sequence=_sequence(asked)),
        outputs=[spec.name for spec in asked.outputs],
    )


def _expression(asked: Interface, spec: TensorSpec) -> str:
    """Return the Python expression that makes the same array as `_array`."""
    shape, (low, high) = spec.shape(1), spec.values or (0, 1)
    if spec.dtype == "object":
        text = f"np.full({shape}, {TEXT!r}, dtype=object)"
    elif _whole(spec):
        text = f"rng.integers({int(low)}, {int(high)}, {shape}, endpoint=True).astype({spec.dtype!r})"
    else:
        text = f"rng.uniform({low}, {high}, {shape}).astype({spec.dtype!r})"
    for axis, sizes in _padding(asked, spec).items():
        fill = ", b''" if spec.dtype == "object" else ""
        text = f"pad({text}, {axis}, {sizes}{fill})"
    return text


def _array(asked: Interface, spec: TensorSpec, rng: np.random.Generator) -> Array:
    array = np.full(spec.shape(1), TEXT, object) if spec.dtype == "object" else spec.generate(rng, 1)
    for axis, sizes in _padding(asked, spec).items():
        length = array.shape[axis]
        missing = next((size for size in sizes if size >= length), length) - length
        widths = [(0, missing * (at == axis)) for at in range(array.ndim)]
        array = np.pad(array, widths, constant_values=b"" if spec.dtype == "object" else 0)
    return array


def _whole(spec: TensorSpec) -> bool:
    return spec.dtype == "bool" or np.issubdtype(np.dtype(spec.dtype), np.integer)


def _padding(asked: Interface, spec: TensorSpec) -> dict[int, tuple[int, ...]]:
    """Return the sizes that each axis of a tensor is padded to, by the axis."""
    named = {axis: dim.name for axis, dim in enumerate(spec.dims) if isinstance(dim, Dim)}
    return {axis: asked.buckets[name] for axis, name in named.items() if name in asked.buckets}


def _sequence(asked: Interface) -> int | str:
    return "example" if asked.text_ids else 1


def _described(asked: Interface, spec: TensorSpec) -> str:
    """Return one line on a tensor: its datatype and dims, and what of its values is stated and what is not."""
    parts = [", ".join(_plain(dim.name) if isinstance(dim, Dim) else str(dim) for dim in spec.dims)]
    for dim in (dim for dim in spec.dims if isinstance(dim, Dim)):
        if dim.maximum == UNBOUNDED:
            parts.append(f"no size of {_plain(dim.name)} is stated, so it is 1 here")
        else:
            parts.append(f"{_plain(dim.name)} from {dim.minimum} to {dim.maximum}")
    low, high = spec.values or (0, 1)
    if spec.dtype not in ("object", "bool"):
        unknown = "no range of its values is stated, so they are from 0 to 1 here"
        parts.append(f"values from {low} to {high}" if asked.ranged else unknown)
    return "; ".join([f"{TRITON_DTYPES[spec.dtype]} [{parts[0]}]", *parts[1:]])


def _plain(name: str) -> str:
    return repr(name)[1:-1]


def _shell(asked: Interface, address: str) -> str:
    notes, raw, rng = [], b"", np.random.default_rng(0)
    inputs = []
    for spec in asked.inputs:
        notes.append(f"{spec.name!r}: {_described(asked, spec)}")
        if _padding(asked, spec):
            notes.append("  padded with zeros to a size that the model is served for; outputs come back as long")
        array = _array(asked, spec, rng)
        tensor: dict[str, Any] = {"name": spec.name, "shape": array.shape, "datatype": TRITON_DTYPES[spec.dtype]}
        if spec.dtype == "float16":
            notes.append("  JSON cannot carry FP16 to the server: it stands in base64 behind the JSON")
            tensor["parameters"] = {"binary_data_size": len(packed(array))}
            raw += packed(array)
        else:
            tensor["data"] = [_number(value) for value in array.ravel()]
        inputs.append(tensor)
    header: dict[str, Any] = {"inputs": inputs}
    if half := [spec.name for spec in asked.outputs if spec.dtype == "float16"]:
        notes.append(f"FP16 comes back as bytes behind the JSON, {half}: send the answer to a file")
        header["outputs"] = [
            {"name": spec.name, "parameters": {"binary_data": spec.dtype == "float16"}} for spec in asked.outputs
        ]
    if asked.config.HasField("sequence_batching"):
        notes.append("All requests of a sequence carry its id; the first and the last say what they are, this is both")
        header["parameters"] = {"sequence_id": _sequence(asked), "sequence_start": True, "sequence_end": True}
    start = SHELL.format(
        model=asked.model,
        notes="".join(f"# {note}\n" for note in notes),
        url=shlex.quote(f"http://{address}/v2/models/{quote(asked.model, safe='')}/infer"),
    )
    return start + _request(header, raw)


def _request(header: dict[str, Any], raw: bytes) -> str:
    """Return the shell command that sends a header, with what of the tensors is not in it behind."""
    lines = ",\n".join(json.dumps(tensor) for tensor in header["inputs"])
    others = "".join(f',\n"{key}": {json.dumps(value)}' for key, value in header.items() if key != "inputs")
    text = f'{{"inputs": [\n{lines}\n]{others}}}\n'
    if not raw:
        return f"{CURL.format(header='Content-Type: application/json')} <<'{END}'\n{text}{END}\n"
    behind = base64.encodebytes(raw).decode()
    curl = CURL.format(header=f"Inference-Header-Content-Length: {len(text)}")
    return f"{{\ncat <<'{END}'\n{text}{END}\nbase64 -d <<'{END}'\n{behind}{END}\n}} | {curl}\n"


def _number(value: Any) -> Any:
    """Return a numpy value as JSON has it; a float with no more digits than its dtype holds."""
    if isinstance(value, bytes):
        return value.decode()
    return float(str(value)) if isinstance(value, np.floating) else value.item()
