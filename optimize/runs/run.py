"""Run: what all stages of one run share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.runs.baseline import Progress, Trained, silent
from optimize.runs.recipe import Recipe
from optimize.source.splits import Sets


@dataclass(frozen=True)
class Terms:
    """What a user lets a run do that it would not do by itself.

    Args:
        force: publish although a gate said no; the lineage says so for ever.
        strict: judge the worse end of the paired interval, not the value.
        allow_overlap: go on though evaluation samples stand in another set; lineage and page say so.
        allow_unmeasured: publish what is made for a GPU from a machine that has none, so that neither its speed nor its
            endpoint was measured; lineage and page say so.
        patience: seconds that speed may be measured for longer than usual, until its promise is decided; `PATIENCE` of
            `optimize.judge.speed` unless given, and `HASTE` where another preset is tried after this one.
        promote: make what is published the live version, though another one is live.
        price: of the machine for an hour, in any currency; lets the page say what a million samples cost.
    """

    force: bool = False
    strict: bool = False
    allow_overlap: bool = False
    allow_unmeasured: bool = False
    patience: float | None = None
    promote: bool = False
    price: float | None = None


@dataclass(frozen=True)
class Turn:
    """The place of a run among presets that are tried in turn.

    Args:
        preset: the one that is tried; empty where a recipe or a preset was named.
        following: those that are tried after it where it is refused.
        tried: those that were tried before it: `preset`, `why` it was refused, and its `page`, None where it has none.
    """

    preset: str = ""
    following: Sequence[str] = ()
    tried: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Run:
    """One run, as its stages see it.

    Args:
        recipe: seed, budget, target and steps.
        trained: the model that everything is compared with.
        sets: which samples judge and which do not.
        folder: takes what the run makes.
        terms: what the user lets it do.
        progress: called with a text and the fraction of the current step.
        runs: holds other runs of the model, whose bundles may be copied; None for a run beside which there are none.
        turn: the preset that is tried, beside others.
    """

    recipe: Recipe
    trained: Trained
    sets: Sets
    folder: Path
    terms: Terms = Terms()
    progress: Progress = silent
    runs: Path | None = None
    turn: Turn = Turn()
