"""Rollout: which published version of a model is served, and how that changes without a failed request.

A version is *live* when `config.pbtxt` names it, *previous* when it was live before, *failed* when the server did not
load it, *loading* while it is not known whether a release of it succeeds, else *staged*. When it was live, and why it
failed, stands in its `lineage.json`; nothing else remembers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from modelathe import files
from modelathe.errors import closest
from serve.config.errors import BadRepository
from serve.repository import numbering, scratch
from serve.repository import tree as repository
from serve.rollout import promotion
from serve.server import control
from serve.server.endpoint import Endpoint

State = Literal["live", "previous", "failed", "staged", "loading"]


@dataclass(frozen=True)
class Standing:
    """Where a version stands; `digest` is empty for one that `optimize` did not publish."""

    number: int
    state: State
    digest: str

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def standings(place: Path, model: str) -> list[Standing]:
    """Return every version of `model` in the repository `place`, by number.

    Raises:
        BadRepository: there is no such model, or its configuration cannot be read.
    """
    if model not in (names := repository.models(place)):
        raise BadRepository(
            f"holds no model {model}", where=str(place), fix=f"{closest(model, names)}it holds {', '.join(names)}"
        )
    serving = repository.live(place, model)
    under_way = [change for journal in promotion.journals(place) for change in journal.changes]
    found = []
    for number in repository.numbers(place, model):
        lineage = _lineage(place, model, number)
        digest = repository.total(lineage["digests"]) if lineage else ""
        loading = any((change.model, change.number) == (model, number) for change in under_way)
        found.append(Standing(number, "loading" if loading else _state(number in serving, lineage), digest))
    return found


def known(place: Path, model: str, number: int | None = None) -> int:
    """Return `number`, or that of the newest version.

    Raises:
        BadRepository: there is no such model, or no such version of it.
    """
    there = [standing.number for standing in standings(place, model)]
    number = number or max(there, default=1)
    if number not in there:
        raise BadRepository(
            f"there is no version {number}",
            where=str(place / model),
            fix=f"there are {', '.join(map(str, there))}" if there else "publish one with: optimize run",
        )
    return number


@dataclass(frozen=True)
class Promoted:
    """A version that is live now; `url` is the server that loaded it, None where none runs."""

    number: int
    url: str | None


def promote(
    place: Path, model: str, number: int | None = None, endpoint: Endpoint | None = None, limit: float = promotion.LIMIT
) -> Promoted:
    """Make `number` the live version: one rename of the configuration, then the running server loads it.

    The server answers with the version before until the new one is ready. If it cannot load that one, the configuration
    becomes again what it was, and the version counts as failed. The models of a pipeline change together, or none does.

    Args:
        place: the repository.
        model: the model's name.
        number: the version; the newest unless it is given.
        endpoint: the server that serves `place`, where the caller has it.
        limit: seconds that it gets to load a model.

    Raises:
        BadRepository: there is no such version, it has no lineage, or its files changed after they were published.
        StillLoading: the server is not done in time; the next command on the model learns how it ended.
        ModelRefused: the server does not load it; what was live still is.
    """
    number = known(place, model, number)
    numbers = together(place, model, number)
    with promotion.alone(place, list(numbers), endpoint) as served:
        promotion.release(place, numbers, served, limit)
    return Promoted(number, served.http if served else None)


def together(place: Path, model: str, number: int) -> dict[str, int]:
    """Return the versions that were published with this one, as a pipeline's models are, itself included.

    Raises:
        BadRepository: one of them is not there any more.
    """
    lineage = _lineage(place, model, number) or {}
    return {name: known(place, name, one) for name, one in lineage.get("parts", {model: number}).items()}


def roll_back(place: Path, model: str, endpoint: Endpoint | None = None, limit: float = promotion.LIMIT) -> Promoted:
    """Promote the version that was live last before the one that is; arguments, result and errors as for `promote`."""
    known(place, model)
    with promotion.alone(place, [model], endpoint):
        number = before(place, model)
    return promote(place, model, number, endpoint, limit)


def before(place: Path, model: str) -> int:
    """Return the version that was live last before the one that is.

    Raises:
        BadRepository: there is none.
    """
    lived = {
        standing.number: max(_lived(_lineage(place, model, standing.number)), default="")
        for standing in standings(place, model)
        if standing.state == "previous"
    }
    if not lived:
        raise BadRepository(
            "no other version was live before", where=str(place / model), fix="name a version: serve promote"
        )
    return max(lived, key=lambda number: (lived[number], number))


def remove(place: Path, model: str, keep: int, endpoint: Endpoint | None = None) -> list[int]:
    """Delete all but the newest `keep` versions; what is live, and what it would be rolled back to, stays.

    A version folder is renamed out of Triton's sight before it is deleted. What the server that serves `place`, if one
    does, answers with is live too; `endpoint` is that server, where the caller has it.

    Returns:
        The numbers that went.
    """
    home = place / model
    known(place, model)
    with promotion.alone(place, [model], endpoint) as served:
        found = standings(place, model)
        spared = {standing.number for standing in found if standing.state == "live"}
        spared.update(serving(place, model, served))
        if any(standing.state == "previous" for standing in found):
            spared.add(before(place, model))
        spared.update(standing.number for standing in found[max(0, len(found) - keep) :])
        gone = [standing.number for standing in found if standing.number not in spared]
        numbering.keep(place, model)
        with scratch.folder(home, ".removed-") as hidden:
            for number in gone:
                files.move(home / str(number), hidden / str(number))
    return gone


def remove_model(place: Path, model: str, endpoint: Endpoint | None = None) -> list[int]:
    """Take a whole model out of the repository `place`, then out of the server that serves it, if one does.

    Args:
        place: the repository.
        model: the model's name.
        endpoint: that server, where the caller has it.

    Returns:
        The numbers of its versions.

    Raises:
        BadRepository: there is no such model, or another one calls it.
        ServerFailed: the server does not unload it; the repository holds it no more.
    """
    with promotion.alone(place, [model], endpoint) as served:
        if not (place / model).exists() and served and control.versions(served.http, model):
            # Its folder went, and the command that took it away was killed before it told the server.
            control.unload(served.http, served.secret, model)
            return []
        gone = [standing.number for standing in standings(place, model)]
        callers = [name for name in repository.models(place) if model in repository.calls(place, name)]
        if callers:
            raise BadRepository(
                f"is called by {', '.join(callers)}", where=str(place / model), fix=f"remove {callers[0]} first"
            )
        with scratch.folder(place.parent, f".{place.name}.removed-") as hidden:
            numbering.keep(place, model)
            # In this order, since the probe loads again what is there and not ready.
            files.move(place / model, hidden / model)
            if served:
                control.unload(served.http, served.secret, model)
    return gone


def serving(place: Path, model: str, endpoint: Endpoint | None) -> Sequence[int]:
    """Return the versions that answer now: by the running server, or by the configuration where none runs."""
    if endpoint is None:
        return repository.live(place, model)
    return control.versions(endpoint.http, model)


def _state(live: bool, lineage: dict[str, Any] | None) -> State:
    if live:
        return "live"
    if lineage and lineage.get("failed"):
        return "failed"
    return "previous" if _lived(lineage) else "staged"


def _lived(lineage: dict[str, Any] | None) -> list[str]:
    """Return when the version became live. What was published before this was noted did so at some time."""
    return list(lineage.get("lived", [""])) if lineage else []


def _lineage(place: Path, model: str, number: int) -> dict[str, Any] | None:
    there = repository.published(place / model / str(number))
    return repository.read_lineage(place, model, number) if there else None
