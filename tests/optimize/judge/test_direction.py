"""Which way is better: a workload says it for each score, and everything that judges one heeds it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modelathe.tensors import Array
from optimize.judge import evaluate, gate, intervals
from optimize.judge.budget import Budget
from optimize.judge.evaluate import Difference, Score
from optimize.model.errors import BadRecipe, BadWorkload
from optimize.report import figures, page, table
from optimize.source.workload import Workload
from tests.optimize.conftest import Optimize
from tests.optimize.report.test_page import bundle_only
from tests.optimize.runs.test_faults import UNTRAINED


def judged(workload: Workload, **scores: Any) -> list[Score]:
    """Return the scores that `scores()` of a workload gives, judged as every command of ours does."""
    arrays = {name: np.asarray(values, float) for name, values in scores.items()}
    return list(evaluate.judge(replace(workload, scores=lambda *_: arrays), {}, None, {}).scores)


def perplexity(workload: Workload, mean: float, spread: float = 0.3) -> tuple[Workload, Score]:
    """Return a workload whose figure is the exponential of the mean loss of a token, and such a score."""
    losses = np.log(mean) + spread * np.random.default_rng(0).normal(size=400)
    losses += np.log(mean) - losses.mean()
    stated = replace(
        workload,
        bounded=False,
        aggregate=lambda samples: float(np.exp(samples.mean())),
        higher_is_better={"perplexity": False},
    )
    return stated, judged(stated, perplexity=losses)[0]


@pytest.mark.parametrize("strict", [False, True])
def test_perplexity_from_12_to_900_is_refused(small: Workload, strict: bool) -> None:
    workload, trained = perplexity(small, 12.0)
    _, result = perplexity(small, 900.0)
    assert (round(trained.value, 6), round(result.value, 6)) == (12.0, 900.0)
    refused = gate.quality(
        Budget(max_drop=0.1), trained, result, evaluate.compare(workload, result, trained), strict=strict
    )
    assert not refused.passed
    assert refused.limit == "rise ≤ 0.1"
    assert refused.measured.startswith("900.0000 (+888.0000, 95 % interval [+")
    better = gate.quality(
        Budget(max_drop=0.1), result, trained, evaluate.compare(workload, trained, result), strict=strict
    )
    assert better.passed


def test_a_direction_that_is_not_stated_is_refused_with_the_line_that_states_it(
    user_file: Callable[..., str], optimize: Optimize
) -> None:
    unstated = (
        'return {"accuracy": right.astype(float), "agreement": ',
        'return {"loss": 3 - right.astype(float), "agreement": ',
    )
    ended = optimize("evaluate", user_file(UNTRAINED, unstated, ("        bounded=True,\n", "")))
    assert ended.code == 4
    assert "does not say whether more or less of 'loss' is better" in ended.err
    assert 'higher_is_better={"loss": …}' in ended.err
    ended = optimize("evaluate", user_file(UNTRAINED, unstated))
    assert ended.code == 4
    assert "says bounded=True, but 'loss' is 2." in ended.err
    stated = ("bounded=True", 'higher_is_better={"loss": False, "agreement": True}')
    ended = optimize("evaluate", user_file(UNTRAINED, unstated, stated))
    assert ended.code == 0, ended.err
    assert "loss, less is better 2." in ended.out


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"accuracy": True, "los": False}, "higher_is_better names 'los', scores\\(\\) returns 'accuracy', 'loss'"),
        ({"accuracy": True}, "'loss' is 2.5, not in"),
        ({"accuracy": True, "loss": False}, ""),
        ({"loss": False}, ""),
    ],
)
def test_each_score_has_its_own(small: Workload, stated: Mapping[str, bool], said: str) -> None:
    workload = replace(small, higher_is_better=stated)
    scores = {"accuracy": [0, 1, 1], "loss": [1.5, 2.5, 3.5]}
    if said:
        with pytest.raises(BadWorkload, match=said):
            judged(workload, **scores)
        return
    accuracy, loss = judged(workload, **scores)
    assert (accuracy.higher_is_better, loss.higher_is_better) == (True, False)
    assert loss.high > 1, "the other score's bounds are not its own"
    assert loss.document()["higher_is_better"] is False


@pytest.mark.parametrize("stated", [{"accuracy": "yes"}, {"accuracy": None}, True])
def test_a_direction_is_true_or_false(small: Workload, stated: Any) -> None:
    with pytest.raises(BadWorkload, match="higher_is_better is"):
        replace(small, higher_is_better=stated)


def test_a_share_is_kept_only_of_what_more_is_better_of(
    user_file: Callable[..., str], optimize: Optimize, tmp_path: Path
) -> None:
    errors = ('return {"accuracy": right.astype(float),', 'return {"errors": 1.0 - right,')
    source = user_file(UNTRAINED, errors, ("bounded=True", 'bounded=True, higher_is_better={"errors": False}'))
    (tmp_path / "recipe.toml").write_text("[budget]\nkeep = 0.99\n[[step]]\nuse = 'export.onnx'\n")
    ended = optimize("run", source, "--recipe", tmp_path / "recipe.toml", "--output", tmp_path / "run")
    assert ended.code == 2
    assert "of 'errors' less is better" in ended.err
    assert "set max_drop" in ended.err
    with pytest.raises(BadRecipe, match="less is better"):
        gate.check_metric(Budget(), Score("errors", np.zeros(3), 0.1, 0, 1, False, True))
    gate.check_metric(Budget(max_drop=0.1), Score("errors", np.zeros(3), 0.1, 0, 1, False, True))


def test_a_comparison_says_worse_and_which_samples(small: Workload) -> None:
    workload = replace(small, bounded=False, higher_is_better={"loss": False})
    first, second = judged(workload, loss=np.ones(200))[0], judged(workload, loss=np.r_[np.full(198, 2.0), 0.5, 1])[0]
    difference = evaluate.compare(workload, second, first)
    assert difference.verdict == "worse"
    assert difference.flipped == tuple(range(199))
    assert difference.worsened == tuple(range(198))
    assert evaluate.compare(workload, first, second).verdict == "better"
    assert evaluate.compare(workload, first, first).verdict == "undecided"


def test_compare_names_the_worse_of_two(user_file: Callable[..., str], optimize: Optimize, tmp_path: Path) -> None:
    loss = (
        "    right = ",
        '    x = outputs["logits"]\n'
        '    return {"loss": np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), targets]}\n'
        "    right = ",
    )
    trained = user_file(loss, ("bounded=True", 'higher_is_better={"loss": False}'))
    untrained = tmp_path / "untrained.py"
    untrained.write_text((tmp_path / "user.py").read_text().replace(*UNTRAINED))
    ended = optimize("compare", trained, f"{untrained}:workload")
    assert "difference +" in ended.out, ended.err
    assert "]: worse; 397 samples differ, " in ended.out
    ended = optimize("compare", f"{untrained}:workload", trained, "--json")
    found = json.loads(ended.out)
    assert (found["verdict"], found["first"]["higher_is_better"]) == ("better", False)
    assert found["high"] < 0


def test_the_limit_on_the_page_lies_on_the_worse_side(tmp_path: Path) -> None:
    document = bundle_only()
    assert figures.limit(document) == pytest.approx(0.9907 - 0.005)
    for entry in (document["trained"], *document["steps"], document["result"]):
        entry["quality"] |= {"metric": "loss", "higher_is_better": False}
    assert figures.limit(document) == pytest.approx(0.9907 + 0.005)
    assert table.metric(document["trained"]["quality"]) == "loss, less is better"
    assert "<span>loss, less is better, in ONNX Runtime</span>" in page.render(document, tmp_path)


FINITE = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 6))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    size = draw(st.integers(1, 30))
    values = draw(st.sampled_from([st.sampled_from([0.0, 1.0]), FINITE]))
    rows = st.lists(values, min_size=size, max_size=size)
    return np.array(draw(rows)), np.array(draw(rows))


@settings(max_examples=60, deadline=None)
@given(pairs(), st.floats(0, 1e3), st.booleans())
def test_the_same_scores_with_the_other_sign_are_judged_the_same(
    small: Workload, both: tuple[Array, Array], allowed: float, strict: bool
) -> None:
    more, less = (replace(small, bounded=False, higher_is_better={"score": up}) for up in (True, False))

    def judge(workload: Workload, sign: float) -> tuple[gate.Gate, Difference]:
        trained, result = (judged(workload, score=sign * samples)[0] for samples in both)
        difference = evaluate.compare(workload, result, trained)
        return gate.quality(Budget(max_drop=allowed), trained, result, difference, strict), difference

    with mock.patch.object(intervals, "RESAMPLES", 100):
        (one, difference), (other, mirrored) = judge(more, 1.0), judge(less, -1.0)
    edge = difference.loss[2] if strict else difference.loss[0]
    assume(abs(edge - allowed) > 1e-9 * max(1.0, abs(edge)))
    assert one.passed is other.passed
    assert difference.verdict == mirrored.verdict or min(map(abs, difference.loss[1:])) < 1e-9
    assert difference.worsened == mirrored.worsened
    assert difference.loss == pytest.approx(mirrored.loss, rel=1e-9, abs=1e-9)
