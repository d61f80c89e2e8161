"""Results: the file of a load run, one JSON document per line, written while the run goes on.

First line: what was planned. Then one line per request: `n`, the times `planned`, `sent` and `done` in seconds after
the start (null where it did not happen), `verdict`, `payload`, `worker`, `tries` where it was sent more than once, and
`kind`, the short name of what went wrong. Requests that could not be sent any more because the run or the server ended
share a line: `count` of them from `n` on, due from `planned` to `until`; readers spread them evenly over that time.
`responses` are the times of a decoupled model's responses to a request, whose `done` is then the end of the answer.
Between them, about once a second, a line with `reading`, the second of the run, and what the server's machine said of
itself then (`loadtest.load.readings`). Last line: `end`, what the server counted, the kinds of errors, how many answers
were `checked` and the first `mismatches` (see `answers.Answers`); a file without it comes from a run that was
interrupted.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from loadtest.record.responses import Collected, Responses
from loadtest.record.statistics import Seconds
from modelathe.commandline import FORMAT, finite
from modelathe.errors import BadInput

VERDICTS = ("ok", "mismatch", "error", "timeout", "dropped")
OK, MISMATCH, ERROR, TIMEOUT, DROPPED = VERDICTS
_CODES = {verdict: code for code, verdict in enumerate(VERDICTS)}
_DTYPES: dict[str, type[np.generic]] = {
    "planned": np.float64,
    "sent": np.float64,
    "done": np.float64,
    "verdict": np.int8,
    "payload": np.int32,
    "tries": np.int32,
    "kind": np.int32,
}
_BLOCK = 2**20
_LONGEST_KIND = 60
_MOST_KINDS = 50
_FIX = "give a file that `loadtest run` wrote"


@dataclass(frozen=True, slots=True)
class Script:
    """What a sequence is made of: `length` requests that go round `count` payloads from number `first` on.

    Its first request carries the payload `shift` further on.
    """

    first: int
    count: int
    length: int
    shift: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A request's place in a sequence: the id of that, what it is made of, and the request's number from 1."""

    id: int
    script: Script
    place: int = 1

    @property
    def start(self) -> bool:
        """Whether it is the first request."""
        return self.place == 1

    @property
    def end(self) -> bool:
        """Whether it is the last request."""
        return self.place == self.script.length

    @property
    def payload(self) -> int:
        """The number of the payload that it carries."""
        return self.script.first + (self.script.shift + self.place - 1) % self.script.count


@dataclass(slots=True)
class Flight:
    """One request. Times are seconds after the start of the run, None where it did not happen.

    Args:
        n: its number in the run, from 0.
        planned: when it was due.
        payload: which of the payloads it carries.
        sent: when its first byte was handed to the connection, the first time if it was sent again.
        done: when the whole answer was there, or the failure was known.
        verdict: one of `VERDICTS`.
        error: what went wrong, in words.
        gone: whether the connection failed, rather than the request.
        tries: how often it was sent.
        first: when it was sent first, once it was sent again.
        turn: its place in a sequence.
        count: how many requests it stands for; more than one where a run of them was dropped.
        until: when the last of these was due.
        responses: when each response came, where there were several or the end of the answer came apart from the last.
    """

    n: int
    planned: float
    payload: int
    sent: float | None = None
    done: float | None = None
    verdict: str = OK
    error: str = ""
    gone: bool = False
    tries: int = 1
    first: float | None = None
    turn: Turn | None = None
    count: int = 1
    until: float = 0.0
    responses: tuple[float, ...] = ()


def line(flight: Flight, worker: int = 0) -> str:
    """Return one request's line."""
    sent = "null" if flight.sent is None else f"{flight.sent:.6f}"
    done = "null" if flight.done is None else f"{flight.done:.6f}"
    more = f',"tries":{flight.tries}' if flight.tries > 1 else ""
    if flight.count > 1:
        more += f',"count":{flight.count},"until":{flight.until:.6f}'
    if flight.responses:
        more += f',"responses":[{",".join(f"{at:.6f}" for at in flight.responses)}]'
    if flight.error:
        more += f',"kind":{json.dumps(kind(flight.error))}'
    return (
        f'{{"n":{flight.n},"planned":{flight.planned:.6f},"sent":{sent},"done":{done},'
        f'"verdict":"{flight.verdict}","payload":{flight.payload},"worker":{worker}{more}}}\n'
    )


def kind(error: str) -> str:
    """Return what comes before the details in the text of an error, as `HTTP 503` or `UNAVAILABLE`."""
    return error.partition(":")[0][:_LONGEST_KIND]


class Writer:
    """Writes a result file; use it in a `with` statement.

    `add` only keeps the line, so that no disk access falls between two requests; `flush` writes what was kept.
    """

    def __init__(self, path: Path, header: dict[str, Any], worker: int = 0) -> None:
        self._lines: list[str] = []
        self._worker = worker
        self._file: IO[bytes] = path.open("wb")
        self._file.write(document_line({"format": FORMAT, **header}))
        self._file.flush()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, flight: Flight) -> None:
        """Keep one request's line."""
        self._lines.append(line(flight, self._worker))

    def lines(self, whole: bytes) -> None:
        """Write whole lines that a worker made."""
        self._file.write(whole)

    def reading(self, values: dict[str, Any]) -> None:
        """Write what was read of the server's machine; `values` has the key `reading`."""
        self.flush()
        self._file.write(document_line(values))

    def flush(self) -> None:
        """Write the lines kept so far."""
        lines, self._lines = self._lines, []
        self._file.write("".join(lines).encode())
        self._file.flush()

    def finish(self, end: dict[str, Any]) -> None:
        """Write the last line; the file is complete with it."""
        self.flush()
        self._file.write(document_line(end))

    def close(self) -> None:
        """Write what is left and close the file."""
        with self._file:
            self.flush()


def document_line(values: dict[str, Any]) -> bytes:
    """Return the line of a document, such as the first and the last one."""
    return json.dumps(finite(values), allow_nan=False).encode() + b"\n"


@dataclass(frozen=True)
class Results:
    """A result file in memory: arrays with one element per request, ordered by planned time.

    Args:
        header: the first line.
        end: the last line; None when the run was interrupted.
        planned, sent, done: seconds after the start, NaN where it did not happen.
        verdict: index into `VERDICTS`.
        payload: the number of what it carried.
        tries: how often it was sent.
        kind: index into `kinds`, 0 where nothing went wrong.
        kinds: the short names of what went wrong, an empty one first.
        readings: what the server's machine said of itself during the run, in order of time.
        responses: of requests that were answered in several; None where nobody read them.
    """

    header: dict[str, Any]
    end: dict[str, Any] | None
    planned: Seconds
    sent: Seconds
    done: Seconds
    verdict: NDArray[np.int8]
    payload: NDArray[np.int32]
    tries: NDArray[np.int32]
    kind: NDArray[np.int32]
    kinds: list[str]
    readings: list[dict[str, Any]]
    responses: Responses | None = None

    @property
    def open(self) -> bool:
        """Whether the requests were due at times of their own."""
        return self.header["plan"].get("concurrency") is None

    def of(self, *verdicts: str) -> NDArray[np.bool_]:
        """Return a mask of the requests with one of these verdicts."""
        return np.isin(self.verdict, [VERDICTS.index(verdict) for verdict in verdicts])


class _Columns:
    """The requests of a file while it is read: arrays of one block each, so that no list of all lines ever exists."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[NDArray[Any]]] = {name: [] for name in _DTYPES}
        self.kinds = {"": 0}
        self.count, self.responses = 0, Collected()
        self.readings: list[dict[str, Any]] = []
        self.end: dict[str, Any] | None = None

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take the lines of one block.

        Raises:
            KeyError, TypeError, ValueError: one of them is not that of a result file.
        """
        requests = [row for row in rows if "n" in row]
        if len(requests) < len(rows):
            self._others([row for row in rows if "n" not in row])
        kinds = [row.get("kind", "") for row in requests]
        for name in dict.fromkeys(kinds):
            # Texts with a number in them could be as many as the requests.
            self.kinds.setdefault(name, len(self.kinds) if len(self.kinds) < _MOST_KINDS else _MOST_KINDS - 1)
        columns = {
            "planned": [row["planned"] for row in requests],
            "sent": [row["sent"] for row in requests],
            "done": [row["done"] for row in requests],
            "verdict": [_CODES[row["verdict"]] for row in requests],
            "payload": [row["payload"] for row in requests],
            "tries": [row.get("tries", 1) for row in requests],
            "kind": [self.kinds[name] for name in kinds],
        }
        # numpy makes NaN of None.
        blocks = {name: np.array(values, _DTYPES[name]) for name, values in columns.items()}
        counts = np.array([row.get("count", 1) for row in requests], np.int64)
        if any("responses" in row for row in requests):
            self.responses.add(requests, self.count + np.cumsum(counts) - counts)
        self.count += int(counts.sum())
        if any("count" in row for row in requests):
            blocks = _spread(blocks, counts, requests)
        for name, block in blocks.items():
            self.blocks[name].append(block)

    def _others(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if "end" in row:
                self.end = row
            else:
                float(row["reading"])
                self.readings.append(row)

    def results(self, header: dict[str, Any]) -> Results:
        """Return everything, ordered by planned time."""
        joined = {name: np.concatenate([*blocks, np.array([], _DTYPES[name])]) for name, blocks in self.blocks.items()}
        order = np.argsort(joined["planned"], kind="stable")
        arrays = {name: column[order] for name, column in joined.items()}
        kinds = [name for name, number in self.kinds.items() if number < _MOST_KINDS - 1]
        if len(self.kinds) >= _MOST_KINDS:
            kinds.append("other errors")
        return Results(
            header, self.end, **arrays, kinds=kinds, readings=self.readings, responses=self.responses.whole(order)
        )


def _spread(
    blocks: dict[str, NDArray[Any]], counts: NDArray[np.int64], requests: list[dict[str, Any]]
) -> dict[str, NDArray[Any]]:
    """Return the columns with each line that stands for several requests as so many elements, evenly over its time."""
    last = np.array([row.get("until", row["planned"]) for row in requests], np.float64)
    if (counts < 1).any():
        raise ValueError("a line stands for no request")
    step = (last - blocks["planned"]) / np.maximum(counts - 1, 1)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = {name: np.repeat(block, counts) for name, block in blocks.items()}
    return columns | {"planned": columns["planned"] + place * np.repeat(step, counts)}


def read(path: Path) -> Results:
    """Read a result file; the half line that a killed run may leave at the end is ignored.

    Raises:
        BadInput: the file is missing or is no result file; the message names the line.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except FileNotFoundError:
        raise BadInput("there is no such file", where=str(path), fix=_FIX) from None
    except IsADirectoryError as error:
        raise BadInput("is not a result file", where=str(path), fix=_FIX) from error


def _read(path: Path, file: IO[bytes]) -> Results:
    first = file.readline()
    if not first:
        raise BadInput("the file is empty", where=str(path), fix=_FIX)
    try:
        header = _checked_header(path, parsed(first))
    except (ValueError, KeyError, TypeError) as error:
        raise _not_a_result_file(path, 1) from error
    columns, number = _Columns(), 2
    for block in _blocks(file):
        lines = block.count(b"\n")
        try:
            # One parse for thousands of lines is far quicker than one for each.
            columns.add(parsed(b"[" + block[:-1].replace(b"\n", b",") + b"]"))
        except (ValueError, KeyError, TypeError) as error:
            raise _not_a_result_file(path, number + _first_bad(block)) from error
        number += lines
    return columns.results(header)


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Yield whole lines, many at a time; the half line at the end of the file is left out."""
    while block := file.read(_BLOCK):
        block += file.readline()
        whole = block[: block.rfind(b"\n") + 1]
        if whole:
            yield whole


def parsed(text: bytes) -> Any:
    """Return what a JSON text holds, also one with a NaN, as older files and some servers' answers have it."""
    try:
        return orjson.loads(text)
    except ValueError:
        return json.loads(text)


def _first_bad(block: bytes) -> int:
    for place, one in enumerate(block.splitlines()):
        try:
            _Columns().add([parsed(one)])
        except (ValueError, KeyError, TypeError):
            return place
    return 0


def check_new(folder: Path) -> None:
    """Refuse a place for several result files that holds something already.

    Raises:
        BadInput: it does, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput("is there already", where=str(folder), fix="name a new folder for the results")


def _not_a_result_file(path: Path, number: int) -> BadInput:
    return BadInput(f"line {number} is not that of a result file", where=str(path), fix=_FIX)


def _checked_header(path: Path, row: Any) -> dict[str, Any]:
    if row["format"] != FORMAT:
        raise BadInput(f"has the format {row['format']}; this version of modelathe reads {FORMAT}", where=str(path))
    header: dict[str, Any] = {key: row[key] for key in ("plan", "model", "url")} | row
    return header
