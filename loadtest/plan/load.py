"""Load: a plan, the requests that it sends, and the answers that are right."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.plan.data.answers import Answers
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part


@dataclass(frozen=True)
class Load:
    """All that whoever sends a load has to know.

    Args:
        plan: what is sent, when and to whom.
        parts: the requests that it is made of.
        answers: what their answers are compared with; None leaves them unchecked.
    """

    plan: Plan
    parts: Sequence[Part]
    answers: Answers | None = None
