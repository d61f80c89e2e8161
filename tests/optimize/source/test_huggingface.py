"""Folders as transformers writes them, made here with random weights: nothing is fetched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelathe.commandline import install_line
from optimize.model.errors import BadData, BadWorkload
from optimize.predict.module import TorchPredictor
from optimize.runs import open as source
from optimize.source import huggingface, texts
from optimize.source.load import load_workload
from optimize.step import bundle as bundles
from tests.optimize.conftest import Optimize

transformers = pytest.importorskip("transformers")

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "fish", "sun", "moon"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 512}


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **marks)
    fast.save_pretrained(folder)


def sentences(count: int = 64) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(count)]


def text_folder(folder: Path, architecture: str = "BertForSequenceClassification", **changes: Any) -> Path:
    torch.manual_seed(0)
    kind = getattr(transformers, architecture)
    config = kind.config_class(
        **{**SMALL, "vocab_size": 16, "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": 0, **changes}
    )
    kind(config).save_pretrained(folder)
    tokenizer(folder)
    (folder / "texts.txt").write_text("\n".join(sentences()))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose labels are its own answers, one in eight of them wrong."""
    folder = text_folder(tmp_path_factory.mktemp("models") / "tiny.bert")
    made = load_workload(str(folder))
    predictor = TorchPredictor(made.build(), made.outputs)
    rows = []
    for number, text in enumerate(sentences()):
        tokens = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        logits = predictor.predict({"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), int)})
        answer = int(logits["logits"].argmax())
        rows.append({"text": text, "label": (answer + (number % 8 == 0)) % 3})
    (folder / "texts.txt").unlink()
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_classifier_with_labels_has_its_accuracy(classifier: Path, optimize: Optimize) -> None:
    result = json.loads(optimize("evaluate", classifier, "--json").out)
    assert result["quality"]["metric"] == "accuracy"
    assert 0.8 <= result["quality"]["value"] < 1
    assert [also["metric"] for also in result["also"]] == ["agreement"]
    assert result["also"][0]["value"] == 1


def test_labels_by_name_where_only_the_names_by_number_are_written(classifier: Path, tmp_path: Path) -> None:
    folder = tmp_path / "named"
    shutil.copytree(classifier, folder)
    config = json.loads((folder / "config.json").read_text())
    names = ["low", "middle", "high"]
    config |= {"label2id": None, "id2label": {str(number): name for number, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    named = [json.dumps({"text": row["text"], "label": names[row["label"]]}) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(named))
    made = load_workload(str(folder))
    labels = [
        sorted(np.concatenate([batch.targets["label"] for batch in each.batches("evaluation")]).tolist())
        for each in (made, load_workload(str(classifier)))
    ]
    assert labels[0] == labels[1]
    (folder / "data.jsonl").write_text("\n".join([json.dumps({"text": "red", "label": "other"}), *named]))
    with pytest.raises(BadData, match="'other' is no class of the model") as raised:
        load_workload(str(folder))
    assert raised.value.fix == "its classes are: low, middle, high"


def test_how_the_samples_are_divided_is_told(classifier: Path) -> None:
    (told,) = load_workload(str(classifier)).inferred
    sizes = {kind: sum(batch.size for batch in load_workload(str(classifier)).batches(kind)) for kind in texts.PARTS}
    assert f"{sum(sizes.values())} texts in data.jsonl" in told
    for kind, eighths in (("evaluation", 3), ("training", 4), ("calibration", 1)):
        assert f"{sizes[kind]} for {kind} ({eighths}/8)" in told


def test_the_workload_says_what_the_model_takes(classifier: Path) -> None:
    made = load_workload(str(classifier))
    assert made.name == "tiny_bert"
    assert made.outputs == ("logits",)
    ids, mask = made.inputs
    assert (ids.name, ids.dtype, ids.values) == ("input_ids", "int64", (4, 15))
    assert (mask.name, mask.values) == ("attention_mask", (1, 1))
    assert ids.dims[1] == mask.dims[1]
    assert (ids.dims[1].minimum, ids.dims[1].maximum) == (2, 40)  # type: ignore[union-attr]


def test_no_text_is_in_two_parts(classifier: Path) -> None:
    found = texts.read(classifier, {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2})
    parts = [set(found.part(kind).texts) for kind in texts.PARTS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(set(found.texts))


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_quantize_makes_a_bundle_that_remembers_the_folder(
    classifier: Path, optimize: Optimize, tmp_path: Path
) -> None:
    result = json.loads(optimize("quantize", classifier, "--output", tmp_path / "int8", "--batch", "1", "--json").out)
    assert result["quality"]["metric"] == "accuracy"
    loaded = source.load(str(tmp_path / "int8"))
    assert loaded.workload.name == "tiny_bert"
    assert Path(loaded.workload.source).resolve() == classifier.resolve()
    described = bundles.describe(tmp_path / "int8")["workload"]
    assert described["digest"] == bundles.digest(classifier / "model.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_a_recipe_runs_on_a_folder(classifier: Path, optimize: Optimize, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[budget]\nmax_drop = 0.5\n[target]\nbatch = [1]\n[[step]]\nuse = "distill.logits"\nepochs = 1\n'
        '[[step]]\nuse = "quantize.dynamic"\n'
    )
    run = optimize("run", classifier, "--recipe", recipe, "--output", tmp_path / "run", "--json")
    assert run.code == 0, run.err
    result = json.loads(run.out)
    assert result["gates"] and all(gate["passed"] for gate in result["gates"])
    assert [step["name"] for step in result["steps"]] == ["distill.logits", "export.onnx", "quantize.dynamic"]


def test_an_encoder_is_pooled_as_sentence_transformers_wrote_it_down(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "encoder", "BertModel")
    (folder / "1_Pooling").mkdir()
    inputs = {"input_ids": np.array([[2, 5, 6, 3], [2, 7, 3, 0]]), "attention_mask": np.array([[1] * 4, [1, 1, 1, 0]])}
    bert = transformers.BertModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = bert(**{name: torch.from_numpy(array) for name, array in inputs.items()}).last_hidden_state.numpy()

    def answer() -> Any:
        made = load_workload(str(folder))
        assert made.outputs == ("sentence_embedding",)
        return TorchPredictor(made.build(), made.outputs).predict(inputs)["sentence_embedding"]

    np.testing.assert_allclose(answer()[1], hidden[1, :3].mean(0), atol=1e-5)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    np.testing.assert_allclose(answer(), hidden[:, 0], atol=1e-5)
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    np.testing.assert_allclose(np.linalg.norm(answer(), axis=1), 1, atol=1e-5)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(BadWorkload, match="pooling_mode_max_tokens"):
        load_workload(str(folder))


@pytest.mark.slow
def test_an_encoder_is_judged_by_its_distance_from_the_trained_model(
    tmp_path: Path, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "DOCSTRINGS", 256)
    folder = text_folder(tmp_path / "encoder", "BertModel")
    (folder / "texts.txt").unlink()  # docstrings instead
    result = json.loads(optimize("evaluate", folder, "--json").out)
    assert (result["quality"]["metric"], result["quality"]["value"]) == ("cosine", pytest.approx(1))
    # Three of eight texts; the tiny tokenizer knows 16 words, and what is one text to the model counts once.
    assert 0 < result["quality"]["samples"] < 96
    vectors = np.eye(3, dtype=np.float32)
    assert huggingface.closeness(vectors, vectors[::-1])["cosine"].tolist() == [0, 1, 0]


def test_roberta_counts_its_positions_from_behind_the_padding(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "roberta", "RobertaForSequenceClassification", pad_token_id=1)
    ids = load_workload(str(folder)).inputs[0]
    assert ids.dims[1].maximum == 38  # type: ignore[union-attr]


def test_an_output_for_each_token_agrees_over_the_tokens_that_are_there(tmp_path: Path, optimize: Optimize) -> None:
    folder = text_folder(tmp_path / "tagger", "BertForTokenClassification")
    result = json.loads(optimize("evaluate", folder, "--json").out)
    assert (result["quality"]["metric"], result["quality"]["value"]) == ("agreement", 1)
    given = np.array([[[1, 0], [0, 1], [0, 1]]], np.float32)
    wanted = np.array([[[1, 0], [1, 0], [1, 0]]], np.float32)
    assert huggingface.agreement(given, wanted, np.array([[1, 1, 0]]))["agreement"].tolist() == [0.5]


def vit_folder(folder: Path, labels: bool = True) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_channels=3, num_labels=4)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    arrays = {"pixel_values": rng.normal(size=(64, 3, 16, 16)).astype(np.float32)}
    if labels:
        arrays["labels"] = rng.integers(0, 4, 64)
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("labels", [True, False])
def test_a_vision_model_is_judged_on_the_images_beside_it(labels: bool, tmp_path: Path, optimize: Optimize) -> None:
    folder = vit_folder(tmp_path / "vit", labels)
    result = json.loads(optimize("evaluate", folder, "--json").out)
    assert result["quality"]["metric"] == ("accuracy" if labels else "agreement")
    assert result["quality"]["samples"] == 24


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_quantize_takes_a_vision_model(tmp_path: Path, optimize: Optimize) -> None:
    folder = vit_folder(tmp_path / "vit")
    command = ["quantize", folder, "--method", "static", "--output", tmp_path / "int8", "--batch", "1", "--json"]
    result = json.loads(optimize(*command).out)
    assert result["quality"]["samples"] == 24
    assert source.load(str(tmp_path / "int8")).workload.inputs[0].dims[1:] == (3, 16, 16)


def rewrite(file: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        change(document)
        (folder / file).write_text(json.dumps(document))

    return apply


FAULTS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), BadWorkload, "no model.safetensors"),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
        BadWorkload,
        "cannot be loaded",
    ),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), BadWorkload, "is not JSON"),
    "a generator": (
        rewrite("config.json", lambda config: config.update(architectures=["GPT2LMHeadModelForCausalLM"])),
        BadWorkload,
        "GPT2LMHeadModelForCausalLM",
    ),
    "own code": (
        rewrite("config.json", lambda config: config.update(architectures=["MyOwnModel"])),
        BadWorkload,
        "has no MyOwnModel",
    ),
    "other weights": (
        rewrite("config.json", lambda config: config.update(num_hidden_layers=2)),
        BadWorkload,
        "are not in it",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        BadWorkload,
        "no tokenizer",
    ),
    "few texts": (lambda folder: (folder / "texts.txt").write_text("one\ntwo"), BadData, "2 texts are too few"),
    "no text": (lambda folder: (folder / "data.jsonl").write_text("[]"), BadData, "data.jsonl, line 1"),
    "a label of no class": (
        lambda folder: (folder / "data.jsonl").write_text('{"text": "one", "label": 3}'),
        BadData,
        "3 is no class",
    ),
    "some labels": (
        lambda folder: (folder / "data.jsonl").write_text('{"text": "a", "label": "LABEL_0"}\n{"text": "b"}'),
        BadData,
        "only some",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_folder_that_cannot_be_used_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "model")
    damage, kind, words = FAULTS[name]
    damage(folder)
    with pytest.raises(kind, match=words) as raised:
        load_workload(str(folder))
    assert raised.value.fix  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "arrays", [None, {"pixel_values": np.zeros((64, 3, 16, 16))}, {"pixel_values": np.zeros((3, 3, 16, 16), "f4")}]
)
def test_a_vision_model_without_fit_images_is_refused(arrays: Any, tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "vit")
    (folder / "data.npz").unlink()
    if arrays:
        np.savez(folder / "data.npz", **arrays)
    with pytest.raises(BadData, match=r"data\.npz"):
        load_workload(str(folder))


def test_a_folder_without_transformers_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimize: Optimize
) -> None:
    import sys

    folder = text_folder(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    ended = optimize("evaluate", folder)
    assert ended.code == 5
    assert install_line("optimize,huggingface") in ended.err
