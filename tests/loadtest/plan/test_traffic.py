"""Which request is n-th: weights, recorded order, sequences."""

from collections import Counter

import numpy as np
import pytest

from loadtest.plan.data import payload
from loadtest.plan.traffic import Chooser, Fresh, Part, Sequences, firsts
from modelathe.errors import BadInput, UsageError
from modelathe.tensors import BATCH, TensorSpec

X = TensorSpec("x", "float32", (BATCH, 3), (-2.0, 2.0))


def part(payloads: int, weight: float = 1.0, **fields) -> Part:
    return Part("m", [{"x": np.full((1, 3), n, np.float32)} for n in range(payloads)], weight=weight, **fields)


def test_shares_are_those_of_the_weights_within_chance() -> None:
    weights = (1.0, 3.0, 6.0)
    parts = [part(4, weight) for weight in weights]
    chooser, requests = Chooser(parts, seed=3), 20_000
    counts = Counter(chooser.pick(n) // 4 for n in range(requests))
    for number, weight in enumerate(weights):
        share = weight / 10
        # Five standard deviations of a binomial count.
        assert counts[number] / requests == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / requests))
    assert set(map(chooser.pick, range(requests))) == set(range(12))


def test_every_worker_makes_the_same_choice_in_any_order() -> None:
    parts = [part(3), part(5, 2.0)]
    one, two = Chooser(parts, 1), Chooser(parts, 1)
    forward = [one.pick(n) for n in range(10_000)]
    assert [two.pick(n) for n in reversed(range(10_000))] == forward[::-1]
    assert [Chooser(parts, 2).pick(n) for n in range(100)] != forward[:100]


def test_one_part_is_cycled_through() -> None:
    assert [Chooser([part(3)], 0).pick(n) for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert firsts([part(3), part(2), part(1)]) == [0, 3, 5]


def test_recorded_traffic_keeps_its_order_over_models() -> None:
    chooser = Chooser([part(3, order=[0, 2, 3]), part(2, order=[1, 4])], 0)
    assert [chooser.pick(n) for n in range(7)] == [0, 3, 1, 2, 4, 0, 3]


def test_a_sequence_keeps_its_order_and_its_model() -> None:
    chooser = Chooser([part(4), part(6, 2.0)], 0)
    for number in range(50):
        script = chooser.sequence(number, 5)
        own = range(4) if script.first == 0 else range(4, 10)
        sequences = Sequences(chooser, 5, number, 1000)
        turn, payloads, flags = sequences.next(), [], []
        for _ in range(5):
            payloads.append(turn.payload)
            flags.append((turn.start, turn.end))
            sequences.finished(turn)
            turn = sequences.next()
        assert set(payloads) <= set(own)
        assert np.all(np.diff([own.index(payload) for payload in payloads]) % len(own) == 1)
        assert flags == [(True, False), (False, False), (False, False), (False, False), (False, True)]


def test_streams_are_played_one_for_each_sequence() -> None:
    sequences = Sequences(Chooser([part(9, streams=[4, 3, 2])], 0), None)
    played = []
    for _ in range(9):
        turn = sequences.next()
        played.append((turn.id, turn.payload, turn.start, turn.end))
        sequences.finished(turn)
    assert [payload for _, payload, _, _ in played] == list(range(9))
    assert [place for place, one in enumerate(played) if one[2]] == [0, 4, 7]
    assert [place for place, one in enumerate(played) if one[3]] == [3, 6, 8]
    assert len({one[0] for one in played}) == 3
    # A length of the user's own goes round the stream, or stops in it.
    longer = Chooser([part(9, streams=[4, 3, 2])], 0).sequence(2, 5)
    assert (longer.first, longer.count, longer.length) == (7, 2, 5)


def test_one_request_of_a_sequence_at_a_time() -> None:
    sequences = Sequences(Chooser([part(4)], 0), 3)
    first, second = sequences.next(), sequences.next()
    assert first.id != second.id
    sequences.finished(second)
    assert (sequences.next().id, sequences.next().start) == (second.id, True)


def test_ids_of_workers_and_seeds_are_never_the_same_and_equally_long() -> None:
    ids = []
    for seed in (0, 1, 999):
        for worker in range(3):
            sequences = Sequences(Chooser([part(4)], seed), 1, worker, 3)
            ids += [sequences.next().id for _ in range(100)]
    assert len(set(ids)) == 900
    assert len({len(str(number)) for number in ids}) == 1
    assert max(ids) < 2**63


def test_a_sequence_of_a_billion_costs_nothing() -> None:
    assert Sequences(Chooser([part(4)], 0), 10**9).next().script.length == 10**9


def test_fresh_values_are_new_in_range_and_repeatable() -> None:
    fresh = Fresh([X], 2, seed=4)
    made = [fresh.make(n)["x"] for n in range(100)]
    assert len({array.tobytes() for array in made}) == 100
    assert all(array.shape == (2, 3) and np.abs(array).max() <= 2 for array in made)
    np.testing.assert_array_equal(made[7], Fresh([X], 2, seed=4).make(7)["x"])
    sent_before = payload.generate([X], len(made), 4, 2)
    assert not any(np.array_equal(one, other["x"]) for one in made for other in sent_before), "a cache would know them"


def test_parts_that_make_no_sense() -> None:
    with pytest.raises(BadInput, match="no payload"):
        part(0)
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="weight of m"):
            part(1, weight)
