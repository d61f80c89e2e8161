"""Ranking: which units of each group go, given their scores. Pure functions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Ranked:
    """The scores of one group.

    Args:
        scores: one for each unit that there is.
        parts: channels in a unit.
        initial: units before the first cut.
    """

    scores: torch.Tensor
    parts: int
    initial: int


def choose(
    ranked: Mapping[str, Ranked], ratio: float, scope: Literal["layer", "global"], round_to: int
) -> dict[str, list[int]]:
    """Return the units to remove from each group, so that `ratio` of the initial ones is gone; at least one stays.

    Args:
        ranked: groups by name.
        ratio: share of the channels, in [0, 1].
        scope: take the share from every group, or the lowest scores wherever they are.
        round_to: channels that are kept are a multiple of it, in a group that has so many.
    """
    wanted = {name: group.initial * (1 - ratio) for name, group in ranked.items()}
    if scope == "global":
        wanted = _globally(ranked, sum(wanted[name] * group.parts for name, group in ranked.items()))
    chosen = {}
    for name, group in ranked.items():
        kept = _rounded(wanted[name], len(group.scores), round_to // math.gcd(round_to, group.parts))
        lowest = torch.argsort(group.scores, stable=True)[: len(group.scores) - kept]
        if len(lowest):
            chosen[name] = sorted(lowest.tolist())
    return chosen


def _globally(ranked: Mapping[str, Ranked], channels: float) -> dict[str, float]:
    """Return how many units of each group are among the best of all, up to so many channels."""
    names = [name for name, group in ranked.items() for _ in group.scores]
    order = torch.argsort(torch.cat([group.scores for group in ranked.values()]), descending=True, stable=True)
    kept = dict.fromkeys(ranked, 0.0)
    # The best unit of each group stays, whatever the others score.
    firsts = set()
    for group, offset in zip(ranked.values(), _offsets(ranked), strict=True):
        firsts.add(offset + int(group.scores.argmax()))
    for index in [*firsts, *(index for index in order.tolist() if index not in firsts)]:
        parts = ranked[names[index]].parts
        if channels < parts / 2 and index not in firsts:
            break
        kept[names[index]] += 1
        channels -= parts
    return kept


def _offsets(ranked: Mapping[str, Ranked]) -> list[int]:
    sizes = [len(group.scores) for group in ranked.values()]
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _rounded(wanted: float, current: int, step: int) -> int:
    """Return the multiple of `step` nearest to `wanted`, between `step` and `current`; all of them where none fits."""
    if current < step:
        return current
    return min(max(step, step * math.floor(wanted / step + 0.5)), current)
