"""The smallest fleet, the highest rate, and what may happen, also where figures are not in order."""

from dataclasses import replace

import pytest

from modelathe.errors import Refused
from serve.planning import objective
from serve.planning import search as searches
from serve.planning.arrivals import POISSON, Arrivals
from serve.planning.cases import SCALER, Asked, cases, needed, target
from serve.planning.engines.balancers import Balancer
from serve.planning.fleet import Fleet, Outcome, simulate
from serve.planning.plan import Wanted, make
from serve.planning.search import Search, highest
from serve.simulate.configuration import Configuration
from tests.serve.planning.curves import drawn

FLEET = Fleet(drawn(), Configuration(32), objective.parse("p99 < 12ms, errors < 0.1%"), POISSON, requests=50_000)
RATE = 20_000.0


def answering(monkeypatch: pytest.MonkeyPatch, *holding: int) -> None:
    """Let these numbers of replicas hold, and all from 60 on."""

    def stands_in(fleet: Fleet, replicas: int, rate: float) -> Outcome:
        took = 5.0 if replicas in holding or replicas >= 60 else 12.0 + 1 / replicas
        judged = fleet.objective.judge({"p99": took}, 10_000)
        return Outcome(replicas, rate, 10_000, {"p99": took}, 1.0, 0.5, 0.5, 1.0, tuple(judged))

    monkeypatch.setattr(searches, "simulate", stands_in)


def test_the_smallest_number_holds_and_one_less_does_not() -> None:
    found = Search(FLEET, RATE).smallest()
    assert simulate(FLEET, found, RATE).holds
    assert not simulate(FLEET, found - 1, RATE).holds
    assert found > RATE / FLEET.capacity


def test_a_number_that_holds_by_chance_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 9, 11, 12, 13)
    search = Search(FLEET, RATE)
    assert search.smallest(above=8) == 11
    assert not search.at(10).holds


def test_most_is_the_most_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch)
    assert Search(FLEET, RATE, most=60).smallest() == 60
    with pytest.raises(Refused, match="no number of replicas up to 59 holds") as caught:
        Search(FLEET, RATE, most=59).smallest()
    nearest = caught.value.partial["nearest"]
    assert nearest[0]["replicas"] == 59
    assert "59 replicas: p99 < 12ms is 12 ms" in caught.value.what
    assert [one["passed"] for one in nearest[0]["conditions"]] == [False, True]


def test_an_objective_below_one_call_says_what_can_be_reached() -> None:
    with pytest.raises(Refused, match=r"no number of replicas holds p99 < 1ms: .* idle has p99 1\.\d+ ms") as caught:
        Search(replace(FLEET, objective=objective.parse("p99 < 1ms, p50 < 50ms")), RATE).smallest()
    assert caught.value.partial["lowest"]["p99 < 1ms"] == pytest.approx(1.58, rel=0.1)


def test_one_client_that_is_too_fast_is_the_condition_that_binds() -> None:
    pinned = replace(FLEET, balancer=Balancer("pinned", 2))
    with pytest.raises(Refused, match="a client's connection is never split"):
        Search(pinned, 5 * FLEET.capacity, most=40).smallest()


def test_the_highest_rate_holds_and_a_little_more_does_not() -> None:
    rate = highest(FLEET, 10, 10_000.0)
    assert simulate(FLEET, 10, rate).holds
    assert not simulate(FLEET, 10, rate * 1.05).holds


def test_what_is_needed_when_something_is_gone() -> None:
    assert needed(10, Asked(fail=0)) == 10
    assert needed(10, Asked(fail=2)) == 12
    # With 15 in 3 zones one takes 5 away; of 14 it may take 5 too.
    assert needed(10, Asked(fail=1, zones=3)) == 15
    assert needed(10, Asked(fail=1, unavailable=4)) == 14
    assert needed(1, Asked(fail=0, zones=2)) == 2


def test_what_may_happen_to_a_fleet() -> None:
    search = Search(FLEET, RATE)
    smallest = search.smallest()
    asked = Asked(fail=1, zones=3, unavailable=2, start=10.0)
    replicas = needed(smallest, asked)
    found = {(case.name, case.more.get("unavailable")): case for case in cases(search, smallest, replicas, asked)}
    assert all(case.outcome.holds for key, case in found.items() if key[0] != "burst")
    zone = found["zone", None]
    assert zone.needed == replicas
    assert zone.outcome.replicas == replicas - -(-replicas // 3) >= smallest
    # Little's law: what is inside one replica.
    whole = search.at(replicas)
    inside = RATE / replicas * whole.latency_ms["mean"] / 1000
    assert found["replica", None].more["lost_requests"] == pytest.approx(inside)
    assert found["update", 0].more["seconds"] == 10.0 * replicas
    assert found["update", 2].more["seconds"] == 10.0 * -(-replicas // 2)
    assert found["update", 2].outcome.replicas == replicas - 2


def test_bursts_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    even = Search(replace(FLEET, arrivals=Arrivals("uniform", 0.0), balancer=Balancer("round-robin")), 20_000.0)
    smallest = even.smallest()
    burst = next(case for case in cases(even, smallest, smallest, Asked(fail=0)) if case.name == "burst")
    assert burst.more["variation"] == 2
    assert burst.outcome.latency_ms["p99"] > 1.2 * even.at(smallest).latency_ms["p99"]
    assert burst.needed is not None and burst.needed >= smallest


def test_the_target_leaves_room_for_what_is_lost_and_for_what_comes() -> None:
    asked = Asked(fail=1, start=45.0)
    assert asked.reacts == SCALER + 45 == 120
    assert target(1000.0, 10, asked, growth=0.1) == pytest.approx(1000 * 0.9 / 1.2)
    assert target(1000.0, 10, Asked(fail=1), growth=0.1) is None


def test_a_plan_says_what_it_left_out() -> None:
    fleet = replace(FLEET, configuration=Configuration(32, delay=0.002, preferred=(4,)), requests=10_000)
    fleet = replace(fleet, balancer=Balancer("least-loaded"))
    told: list[str] = []
    asked = Wanted(RATE, Asked())
    plan = make(fleet, asked, lambda text, _fraction: told.append(text))
    assert plan["replicas"] == plan["smallest"]["replicas"] + 1
    assert plan["planned"]["headroom"]["ratio"] > plan["smallest"]["headroom"]["ratio"] >= 1
    assert plan["per_pod_rate"] is None
    assert {"a delay of 2,000 µs", "preferred batch", "no target for", "errors: those"} <= {
        start
        for note in plan["notes"]
        for start in ("a delay of 2,000 µs", "preferred batch", "no target for", "errors: those")
        if note.startswith(start)
    }
    assert any("does not hold" in text for text in told)
    assert plan == make(fleet, asked, lambda _text, _fraction: None)
