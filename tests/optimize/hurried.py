"""Speeds for tests that judge none; as a program, the command `optimize` with nine rounds for every speed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loadtest.judge import validity
from modelathe.entry import start
from optimize.judge import ruler
from optimize.judge.ruler import Speeds, Until, Visit

alternate = ruler.alternate


def each_faster(visit: Visit, names: Sequence[str], *, baseline: str, **_how: object) -> Speeds:
    """Open and time every file once, and let each be a tenth faster than the one before."""
    seconds = {
        name: {batch: [1e-3 * batch * 0.9**place] * 9 for batch in visit(name)} for place, name in enumerate(names)
    }
    return Speeds({**seconds, ruler.CONTROL: seconds[baseline]}, baseline, took=1.0)


def nine_rounds(*visited: Any, until: Until, **how: Any) -> Speeds:
    return alternate(*visited, until=replace(until, rounds=ruler.FEWEST), **how)


def decided() -> None:
    """Let every file of this process be faster than the one before, and every client be in time."""
    ruler.alternate, validity.LARGEST_LAG_MS = each_faster, 1e3


if __name__ == "__main__":
    ruler.alternate = nine_rounds
    start("optimize")
