"""Promotion: the models of one release change to their new versions together, or none does, also after a kill.

Before anything changes, a journal in the folder of the first model says what was there. It goes when the new versions
are known to live. A journal that is found later belongs to a command that was killed, or that did not wait for the
server: `alone` then asks the server what it has loaded, and finishes the release or takes it back.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from modelathe import files
from modelathe.errors import ModelatheError
from serve.config.errors import BadRepository, ModelRefused, NoAnswer, ServerFailed, StillLoading
from serve.repository import scratch
from serve.repository import tree as repository
from serve.server import control, ending, state
from serve.server.endpoint import Endpoint

JOURNAL = ".promotion.json"
LIMIT = 120.0
"""Seconds that a server gets to load a model."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """One model of a release.

    Args:
        model: its name.
        number: its new version.
        config: what its `config.pbtxt` held before.
    """

    model: str
    number: int
    config: str


@dataclass(frozen=True)
class Journal:
    """A release that has begun.

    Args:
        path: where it is written.
        when: the time that the new versions get as theirs, ISO 8601.
        changes: the models, a model after those that it calls.
    """

    path: Path
    when: str
    changes: tuple[Change, ...]

    @property
    def place(self) -> Path:
        """The repository."""
        return self.path.parent.parent

    def names(self) -> str:
        """Return the new versions in words."""
        return ", ".join(f"{change.model} version {change.number}" for change in self.changes)


def journals(place: Path) -> list[Journal]:
    """Return the releases of a repository that neither ended nor were taken back.

    Raises:
        BadRepository: one cannot be read.
    """
    found = []
    for path in sorted(place.glob(f"*/{JOURNAL}")):
        try:
            written = json.loads(path.read_text())
            changes = tuple(Change(**change) for change in written["changes"])
            found.append(Journal(path, written["when"], changes))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            raise BadRepository("is not a journal that modelathe wrote", where=str(path), fix="remove it") from None
    return found


@contextmanager
def alone(place: Path, models: Sequence[str], endpoint: Endpoint | None = None) -> Iterator[Endpoint | None]:
    """Be the only command that works on these models; what an earlier one left half done is settled first.

    Args:
        place: the repository.
        models: their names.
        endpoint: the server that serves `place`, where the caller has it.

    Yields:
        The server that serves `place`, None if none does. No other begins before the block ends.

    Raises:
        MachineError: another command is at one of them.
        ServerFailed: the server of `place` is being started, or does not answer.
        StillLoading: the server is still about a version that an earlier command did not wait for.
    """
    with _locked(place, models) as left:
        # Not before: a server may begin until the locks are held, and `settle` refuses to begin one after that.
        endpoint = endpoint or state.serving(place)
        for journal in left:
            _settle(journal, endpoint)
        yield endpoint


def settle(place: Path) -> None:
    """Finish or take back what killed commands left, for a server that is being started for `place` (`state.claimed`).

    Raises:
        MachineError: a command is at one of the models. It may have found that no server runs.
    """
    with _locked(place, repository.models(place)) as left:
        for journal in left:
            _settle(journal, None)


@contextmanager
def _locked(place: Path, models: Sequence[str]) -> Iterator[list[Journal]]:
    """Hold the locks of these models and of those that were to change with them; yield the journals of that."""
    with ExitStack() as locks:

        def hold(names: Iterable[str]) -> None:
            for name in sorted(names):
                if (place / name).is_dir():
                    locks.enter_context(scratch.locked(place / name))

        hold(set(models))
        # Who begins a change or settles one holds the locks of all its models.
        left = [journal for journal in journals(place) if {change.model for change in journal.changes} & set(models)]
        hold({change.model for journal in left for change in journal.changes} - set(models))
        yield left


def release(place: Path, numbers: Mapping[str, int], endpoint: Endpoint | None, limit: float = LIMIT) -> None:
    """Make these versions the live ones; inside a block of `alone`.

    Args:
        place: the repository.
        numbers: the version of each model, a model after those that it calls.
        endpoint: what `alone` yielded.
        limit: seconds that it gets for each model.

    Raises:
        BadRepository: a version has no lineage, or its files changed after they were published.
        StillLoading: the server was not done in time; `alone` learns later how it ended.
        NoAnswer: the server went away meanwhile; the next command settles what is left.
        ModelRefused: the server does not load one; what was live still is.
    """
    configs = {}
    for model, number in numbers.items():
        lineage = repository.read_lineage(place, model, number)
        repository.verify_version(place, model, number, lineage)
        configs[model] = lineage["config"]
        _note_present(place, model, endpoint)
    journal = _begin(place, numbers)
    try:
        for model, config in configs.items():
            files.write(place / model / repository.CONFIG, config)
        for change in journal.changes if endpoint else ():
            _load(journal, change, endpoint, limit)
    except StillLoading:
        raise
    except BaseException:
        # Ctrl-C too: what was live stays so, on disk and, as far as there is time, in the server.
        with suppress(ModelatheError):
            _take_back(journal, endpoint, limit=5)
        raise
    _finish(journal)


def _begin(place: Path, numbers: Mapping[str, int]) -> Journal:
    changes = [
        Change(model, number, (place / model / repository.CONFIG).read_text()) for model, number in numbers.items()
    ]
    journal = Journal(place / changes[0].model / JOURNAL, repository.now(), tuple(changes))
    written = {"when": journal.when, "changes": [asdict(change) for change in changes]}
    files.write(journal.path, json.dumps(written, indent=2) + "\n")
    return journal


def _note_present(place: Path, model: str, endpoint: Endpoint | None) -> None:
    """Note of the versions that are to be replaced that they lived, where a kill kept that from being written."""
    serving = repository.live(place, model) if endpoint is None else control.versions(endpoint.http, model)
    for number in set(serving) & set(repository.numbers(place, model)):
        folder = place / model / str(number)
        if repository.published(folder):
            lineage = repository.read_lineage(place, model, number)
            if not lineage.get("lived", ["at some time"]):
                repository.note(folder, lived=[repository.now()])


def _load(journal: Journal, change: Change, endpoint: Endpoint | None, limit: float) -> None:
    assert endpoint
    try:
        control.load(endpoint.http, endpoint.secret, change.model, limit)
    except StillLoading as error:
        if _state(endpoint, change)[0] != "READY":
            raise StillLoading(
                f"version {change.number} is not loaded after {limit:g} s, and the server goes on with it",
                where=str(journal.place / change.model),
                fix="serve promote it again once serve status shows it, or give it more time with --load-timeout",
            ) from error
    except ModelatheError as error:
        if isinstance(error, NoAnswer) or not control.is_live(endpoint.http):
            raise NoAnswer(
                f"the server went away while it loaded version {change.number}: {error.what}",
                where=str(journal.place / change.model),
                fix="see with serve status whether it runs, and promote it again",
            ) from error
        _note_failed(journal, change, error.what)
        same = (journal.place / change.model / repository.CONFIG).read_text() == change.config
        still = "" if same else ", what was live still is"
        kind = ModelRefused if isinstance(error, ModelRefused) else ServerFailed
        raise kind(
            f"version {change.number} is not loaded{still}: {error.what}",
            where=str(journal.place / change.model),
            fix=ending.fix(error.what) or "mend and publish it again, or remove it",
        ) from error


def _settle(journal: Journal, endpoint: Endpoint | None) -> None:
    found = [_state(endpoint, change) for change in journal.changes] if endpoint else []
    said = {word for word, _ in found}
    if "LOADING" in said:
        raise StillLoading(
            f"the server is still loading {journal.names()}", where=str(journal.place), fix="wait, and try again"
        )
    named = all(change.number in repository.live(journal.place, change.model) for change in journal.changes)
    # Where the disk names an older version, the release was being taken back.
    if said == {"READY"} and named:
        _finish(journal)
        log.warning("a release was interrupted after the server had loaded it and is finished now: %s", journal.names())
    else:
        for change, (word, reason) in zip(journal.changes, found, strict=bool(found)):
            if word == "UNAVAILABLE" and reason not in ("", "unloaded"):
                _note_failed(journal, change, reason)
        _take_back(journal, endpoint)
        log.warning("a release was interrupted and is taken back: %s", journal.names())


def _state(endpoint: Endpoint, change: Change) -> tuple[str, str]:
    """Return what the server says of the new version, and why; empty where it does not know it."""
    return control.states(endpoint.http, endpoint.secret, change.model).get(change.number, ("", ""))


def _note_failed(journal: Journal, change: Change, why: str) -> None:
    folder = journal.place / change.model / str(change.number)
    repository.note(folder, failed={"when": repository.now(), "why": why})


def _finish(journal: Journal) -> None:
    for change in journal.changes:
        folder = journal.place / change.model / str(change.number)
        lived = repository.read_lineage(journal.place, change.model, change.number).get("lived", [""])
        repository.note(folder, lived=[*(time for time in lived if time != journal.when), journal.when], failed=None)
    files.remove(journal.path)


def _take_back(journal: Journal, endpoint: Endpoint | None, limit: float = LIMIT) -> None:
    """Give every model the configuration that it had, on disk and in the server; the journal goes last."""
    for change in journal.changes:
        home = journal.place / change.model
        files.write(home / repository.CONFIG, change.config)
        if (home / str(change.number)).exists():
            lineage = repository.read_lineage(journal.place, change.model, change.number)
            if journal.when in lineage.get("lived", []):
                lived = [time for time in lineage["lived"] if time != journal.when]
                repository.note(home / str(change.number), lived=lived)
    for change in journal.changes if endpoint else ():
        assert endpoint
        there = change.number in repository.live(journal.place, change.model)
        if not there and _state(endpoint, change)[0] in ("READY", "LOADING"):
            control.load(endpoint.http, endpoint.secret, change.model, limit)
    files.remove(journal.path)
