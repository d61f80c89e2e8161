"""Text pipelines around models of many kinds: token types, int32 ids, and another runtime."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modelathe.client import connect
from modelathe.tensors import BATCH, TensorSpec
from serve.config.target import Target
from serve.pipelines.publish import called
from serve.pipelines.text import text
from serve.repository import staging
from serve.repository.source import Source
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.serve.backends.test_backend import save
from tests.serve.commands.test_up import serve, up
from tests.serve.pipelines.test_pipelines import EMBEDDING, SPECIAL, TOKENS, VECTORS, WORDS, texts
from tests.serve.rollout.test_rollout import asked

TYPES = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)
# By model: the dtype of its tokens, the names of ids, mask and types, its runtime.
MODELS = {
    "typed": ("int64", ("input_ids", "attention_mask", "token_type_ids"), "onnxruntime"),
    "typed_first": ("int64", ("token_type_ids", "input_ids", "attention_mask"), "onnxruntime"),
    "small": ("int32", ("input_word_ids", "input_mask", "segment_ids"), "onnxruntime"),
    "open": ("int64", ("input_ids", "attention_mask", "token_type_ids"), "openvino"),
    "open_small": ("int32", ("input_ids", "attention_mask", "token_type_ids"), "openvino"),
}
SENTENCES = ["the cat sat", "grüne Katze saß auf der Matte", "", "unknown words", " ".join(WORDS * 9)]


def publish(place: Path, onnx: Path, model: str) -> None:
    """Publish the mean, over the mask, of the vectors of tokens and of their types."""
    from onnx import TensorProto as T

    dtype, names, runtime = MODELS[model]
    types = next(name for name in names if "type" in name or "segment" in name)
    mask = next(name for name in names if "mask" in name)
    ids = next(name for name in names if name not in (types, mask))
    nodes = [
        ("Gather", ["vectors", ids], ["words"]),
        ("Gather", ["types", types], ["kinds"]),
        ("Add", ["words", "kinds"], ["rows"]),
        ("Cast", [mask], ["mask"], {"to": T.FLOAT}),
        ("Unsqueeze", ["mask", "last"], ["column"]),
        ("Mul", ["rows", "column"], ["masked"]),
        ("ReduceSum", ["masked", "first"], ["sum"], {"keepdims": 0}),
        ("ReduceSum", ["mask", "first"], ["count"], {"keepdims": 1}),
        ("Div", ["sum", "count"], ["embedding"]),
    ]
    weights = [("vectors", VECTORS), ("types", TYPES), ("last", np.array([-1])), ("first", np.array([1]))]
    kind = T.INT64 if dtype == "int64" else T.INT32
    tensors = [(name, kind, ["batch", "tokens"]) for name in names], [("embedding", T.FLOAT, ["batch", 8])]
    save(onnx, nodes, *tensors, weights)
    inputs = tuple(TensorSpec(name, dtype, (BATCH, TOKENS), (1, 1)) for name in names)
    with staging.stage(place, model, Source(onnx, inputs, (EMBEDDING,)), Target(cores=1, runtime=runtime)) as staged:
        staging.publish(staged, {})


def save_tokenizer(path: Path) -> Path:
    """Write a tokenizer of whole words, whose mark at the end is of the second type."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - a token of text, not a secret
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(path))
    return path


def embedded(sentence: str) -> np.ndarray:
    """What the models make of a text, by hand: cut to 64 tokens, the marks at the ends among them."""
    known = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    ids = [2, *[known.get(word, 1) for word in sentence.split()][:62], 3]
    kinds = [0] * (len(ids) - 1) + [1]
    return (VECTORS[ids] + TYPES[kinds]).mean(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, openvino_server: Path) -> Path:
    at = tmp_path_factory.mktemp("texts")
    place, tokenizer = at / "model_repository", save_tokenizer(at / "tokenizer.json")
    for model in MODELS:
        publish(place, at / "model.onnx", model)
        text(called(place, model), tokenizer)
        text(called(place, model), tokenizer, name=f"{model}_bls", style="bls")
    return place


@pytest.fixture(scope="module")
def lab(place: Path) -> Iterator[Endpoint]:
    with running(place, grace=0) as endpoint:
        yield endpoint


@pytest.mark.parametrize("style", ["text", "bls"])
@pytest.mark.parametrize("model", MODELS)
def test_text_becomes_the_models_own_embedding(lab: Endpoint, model: str, style: str) -> None:
    with connect(lab.grpc) as client:
        answer = client.infer(f"{model}_{style}", texts(*SENTENCES))["embedding"]
    np.testing.assert_allclose(answer, [embedded(sentence) for sentence in SENTENCES], atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_the_tokens_are_the_models_own(lab: Endpoint, model: str) -> None:
    dtype, names, _ = MODELS[model]
    with connect(lab.grpc) as client:
        made = client.infer(f"{model}_tokenizer", texts("the cat", "a"))
    assert {name: (array.dtype, array.shape) for name, array in made.items()} == dict.fromkeys(names, (dtype, (2, 16)))
    types = next(array for name, array in made.items() if "type" in name or "segment" in name)
    assert types.tolist() == [[0, 0, 0, 1, *[0] * 12], [0, 0, 1, *[0] * 13]]


def test_a_new_pipeline_reaches_the_running_server(tmp_path: Path, server_prefix: Path) -> None:
    place, runtime = tmp_path / "model_repository", tmp_path / "runtime"
    publish(place, tmp_path / "model.onnx", "typed")
    tokenizer = str(save_tokenizer(tmp_path / "tokenizer.json"))
    env = {"XDG_RUNTIME_DIR": str(runtime)}
    command = ("pipeline", "text", "typed", "--tokenizer", tokenizer, "--no-check", "--repository", str(place))
    with up(place, runtime) as (_, ready):
        done = serve(*command, env=env)
        loaded = [
            f"live: {model} version 1, loaded at {ready['http']}\n" for model in ("typed_tokenizer", "typed_text")
        ]
        assert done.stdout == "".join(loaded), done.stderr
        assert asked(env) == dict.fromkeys(("typed", "typed_text", "typed_tokenizer"), "answers")
        refused = serve("remove", "typed", "--all", "--repository", str(place), env=env)
        assert (refused.returncode, "is called by typed_text" in refused.stderr) == (4, True)
