"""A text pipeline: `text` → tokenizer → model → the model's outputs, as an ensemble or as one model that calls it."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loadtest.plan.data.payload import describe
from modelathe.errors import UsageError
from modelathe.tensors import Dim, TensorSpec
from serve.config.errors import BadRepository
from serve.pipelines import publish as publishing
from serve.pipelines.publish import Called, Part, Trial, pipeline
from serve.repository import staging
from serve.server.install import environment

Style = Literal["ensemble", "bls"]
Roles = dict[str, TensorSpec]
ROLES = {"mask": "mask", "type": "types", "segment": "types"}
"""What an input is by a word in its name; one without any of them takes the ids."""
MOST_TOKENS, SHORTEST = 128, 16
TOKENIZER = "tokenizer.json"
EXAMPLES = (
    b"short",
    "Ein Satz mit Umlauten: Grüße über Größe.".encode(),
    b"A text of ordinary length, as a search box or the title of a page would hold it, ends here.",
    b" ".join([b"A long text says more than a model of this kind reads, and it is cut where its room ends."] * 12),
)
"""What load tests, probes and dry loads send: one text for each of several length buckets."""
READ = """
import sys
from tokenizers import Tokenizer
try:
    print(Tokenizer.from_file(sys.argv[1]).get_vocab_size(with_added_tokens=True))
except Exception as error:
    sys.exit(str(error))
"""


def text(
    inner: Called,
    tokenizer: Path,
    *,
    name: str | None = None,
    max_tokens: int | None = None,
    style: Style = "ensemble",
    check: bool = True,
) -> list[staging.Version]:
    """Publish a pipeline that takes strings `text` [batch, 1] and answers with the outputs of `inner`.

    Rows are padded to the shortest length bucket that holds them: the buckets in the model's settings, else powers of
    two from 16 on. A model without a mask would take padding for text, so all its rows have the one greatest length.

    Args:
        inner: a model that takes token ids, and may take a mask and token types, integers [batch, tokens].
        tokenizer: its `tokenizer.json`.
        name: of the pipeline; `MODEL_text` unless given.
        max_tokens: where a text is cut, special tokens counted; 128 unless given, or what the model's sizes say.
        style: `ensemble`, with a model `MODEL_tokenizer` (`NAME_tokenizer` where a name is given), or `bls`.
        check: let a throw-away server answer through it first.

    Returns:
        The versions that were published, the pipeline last.

    Raises:
        UsageError: `max_tokens` does not fit the model, or the name cannot be one.
        BadRepository: the model takes no token ids, or the tokenizer cannot be read or is not its own.
        ModelRefused: the throw-away server does not load it.
    """
    roles = _roles(inner)
    buckets = _buckets(inner, roles, max_tokens)
    trial = _trial(tokenizer, roles, buckets) if check else None
    if not tokenizer.is_file():
        raise _unreadable(tokenizer, "there is no such file")
    build = _bls if style == "bls" else _ensemble
    lineage = pipeline(inner, style=style, buckets=buckets, max_tokens=buckets[-1])
    parts = build(inner, name, roles, buckets, lineage, tokenizer)
    return publishing.publish(inner, parts, check=check, trial=trial)


def _roles(inner: Called) -> Roles:
    """Return the model's inputs by what they are: ids, mask, types; the last two only where it has them."""
    roles: Roles = {}
    for spec in inner.inputs:
        role = next((role for word, role in ROLES.items() if word in spec.name), "ids")
        like = next(iter(roles.values()), spec)
        fits = spec.batched and len(spec.dims) == 2 and spec.dtype in ("int64", "int32") and role not in roles
        if not fits or (spec.dims, spec.dtype) != (like.dims, like.dtype):
            roles = {}
            break
        roles[role] = spec
    if "ids" not in roles:
        described = "; ".join(map(describe, inner.inputs))
        raise inner.error(
            f"its inputs are not token ids: {described}",
            "name a model of int64 or int32 [batch, tokens]: ids, and a mask and token types where it takes them",
        )
    return roles


def _buckets(inner: Called, roles: Roles, asked: int | None) -> list[int]:
    """Return the lengths that rows may have, ascending."""
    dim = roles["ids"].dims[1]
    if isinstance(dim, int):
        dim = Dim("tokens", dim, dim, dim)
    stated = inner.lineage.get("serve", {}).get("buckets", {}).get(dim.name, [])
    most = asked or min(max(stated, default=MOST_TOKENS), dim.maximum)
    most = most if asked else max(most, dim.minimum)
    if not dim.minimum <= most <= dim.maximum:
        raise UsageError(
            f"--max-tokens {most}: {inner.name} takes {dim.minimum} to {dim.maximum} tokens", fix="choose one of these"
        )
    if "mask" not in roles:
        return [most]
    sizes = stated or [SHORTEST * 2**power for power in range(most.bit_length())]
    return sorted({size for size in sizes if dim.minimum <= size < most} | {most})


def _trial(tokenizer: Path, roles: Roles, buckets: Sequence[int]) -> Trial:
    """Return a request with the tokenizer's last token: a tokenizer of another model may have more than the model."""
    last = _vocabulary(tokenizer) - 1
    filled = {"ids": last, "mask": 1, "types": 0}
    request = {spec.name: np.full((1, buckets[0]), filled[role], spec.dtype) for role, spec in roles.items()}
    return Trial(request, f"the tokens of {tokenizer} go up to {last}, which the model refuses")


def _vocabulary(tokenizer: Path) -> int:
    """Return how many tokens there are, as the library in the server's environment reads the file."""
    if not tokenizer.is_file():
        raise _unreadable(tokenizer, "there is no such file")
    command = [str(environment().python), "-I", "-c", READ, str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it ends without a word"]
        raise _unreadable(tokenizer, f"the library cannot read it: {said[-1]}")
    return int(done.stdout)


def _unreadable(tokenizer: Path, what: str) -> BadRepository:
    return BadRepository(what, where=str(tokenizer), fix="give the tokenizer.json that came with the model")


def _settings(roles: Roles, buckets: Sequence[int]) -> dict[str, str]:
    names = {role: spec.name for role, spec in roles.items()}
    return {**names, "dtype": roles["ids"].dtype, "buckets": ",".join(map(str, buckets))}


def _ensemble(
    inner: Called, name: str | None, roles: Roles, buckets: Sequence[int], lineage: dict[str, Any], tokenizer: Path
) -> list[Part]:
    given = _text(inner)
    made = tuple(roles.values())
    first = f"{name or inner.name}_tokenizer"
    files = {**publishing.files("tokenizer", "tokens.py"), TOKENIZER: tokenizer}
    config = publishing.python(first, inner, [given], made, _settings(roles, buckets))
    same = {spec.name: spec.name for spec in made}
    steps = [
        (first, {given.name: given.name}, same),
        (inner.name, same, {spec.name: spec.name for spec in inner.outputs}),
    ]
    whole = publishing.ensemble(name or f"{inner.name}_text", inner, [given], inner.outputs, steps)
    return [
        Part(config, (given,), made, {"kind": "step"}, files),
        Part(whole, (given,), inner.outputs, lineage),
    ]


def _bls(
    inner: Called, name: str | None, roles: Roles, buckets: Sequence[int], lineage: dict[str, Any], tokenizer: Path
) -> list[Part]:
    given = _text(inner)
    outputs = ",".join(spec.name for spec in inner.outputs)
    settings = {**_settings(roles, buckets), "model": inner.name, "outputs": outputs}
    config = publishing.python(name or f"{inner.name}_text", inner, [given], inner.outputs, settings)
    # It forms the batches that the model itself would form.
    config.dynamic_batching.CopyFrom(inner.config.dynamic_batching)
    files = {**publishing.files("text_bls", "tokens.py"), TOKENIZER: tokenizer}
    return [Part(config, (given,), inner.outputs, lineage, files)]


def _text(inner: Called) -> TensorSpec:
    return TensorSpec("text", "object", (inner.batch, 1), examples=EXAMPLES)
