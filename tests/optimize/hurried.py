"""The command `optimize`, nine rounds for every speed: for tests that start it as a program and judge none."""

from dataclasses import replace
from typing import Any

from modelathe.entry import start
from optimize.judge import ruler

alternate = ruler.alternate


def rounds(*visited: Any, until: ruler.Until, **how: Any) -> ruler.Speeds:
    return alternate(*visited, until=replace(until, rounds=ruler.FEWEST), **how)


if __name__ == "__main__":
    ruler.alternate = rounds
    start("optimize")
