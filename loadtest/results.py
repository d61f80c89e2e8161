"""Results: the file of a load run, one JSON document per line, written while the run goes on.

First line: what was planned. Then one line per request: `n`, the times `planned`, `sent` and `done` in seconds after
the start (null where it did not happen), `verdict`, `payload`, `worker`, and `tries` where it was sent more than once.
Last line: `end`, what the server counted, the kinds of errors, how many answers were `checked` and the first
`mismatches` (see `answers.Answers`); a file without it comes from a run that was interrupted.
"""

import json
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from loadtest.commandline import FORMAT
from loadtest.errors import BadInput
from loadtest.statistics import Seconds

VERDICTS = ("ok", "mismatch", "error", "timeout", "dropped")
OK, MISMATCH, ERROR, TIMEOUT, DROPPED = VERDICTS


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


class Writer:
    """Writes a result file; use it in a `with` statement.

    `add` only keeps the line, so that no disk access falls between two requests; `flush` writes what was kept.
    """

    def __init__(self, path: Path, header: dict[str, Any], worker: int = 0) -> None:
        self._lines: list[str] = []
        self._worker = worker
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._file.write(json.dumps({"format": FORMAT, **header}) + "\n")
        self._file.flush()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, flight: Flight) -> None:
        """Keep one request's line."""
        sent = "null" if flight.sent is None else f"{flight.sent:.6f}"
        done = "null" if flight.done is None else f"{flight.done:.6f}"
        tries = f',"tries":{flight.tries}' if flight.tries > 1 else ""
        self._lines.append(
            f'{{"n":{flight.n},"planned":{flight.planned:.6f},"sent":{sent},"done":{done},'
            f'"verdict":"{flight.verdict}","payload":{flight.payload},"worker":{self._worker}{tries}}}\n'
        )

    def flush(self) -> None:
        """Write the lines kept so far."""
        lines, self._lines = self._lines, []
        self._file.writelines(lines)
        self._file.flush()

    def finish(self, end: dict[str, Any]) -> None:
        """Write the last line; the file is complete with it."""
        self.flush()
        self._file.write(json.dumps(end) + "\n")

    def close(self) -> None:
        """Write what is left and close the file."""
        with self._file:
            self.flush()


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
    """

    header: dict[str, Any]
    end: dict[str, Any] | None
    planned: Seconds
    sent: Seconds
    done: Seconds
    verdict: NDArray[np.int8]
    payload: NDArray[np.int32]
    tries: NDArray[np.int32]

    @property
    def open(self) -> bool:
        """Whether the requests were due at times of their own."""
        return self.header["plan"].get("concurrency") is None

    def of(self, *verdicts: str) -> NDArray[np.bool_]:
        """Return a mask of the requests with one of these verdicts."""
        return np.isin(self.verdict, [VERDICTS.index(verdict) for verdict in verdicts])


@dataclass
class _Columns:
    planned: "array[float]" = field(default_factory=lambda: array("d"))
    sent: "array[float]" = field(default_factory=lambda: array("d"))
    done: "array[float]" = field(default_factory=lambda: array("d"))
    verdict: "array[int]" = field(default_factory=lambda: array("b"))
    payload: "array[int]" = field(default_factory=lambda: array("i"))
    tries: "array[int]" = field(default_factory=lambda: array("i"))

    def add(self, row: dict[str, Any]) -> None:
        for column, key in ((self.planned, "planned"), (self.sent, "sent"), (self.done, "done")):
            value = row[key]
            column.append(float("nan") if value is None else value)
        self.verdict.append(VERDICTS.index(row["verdict"]))
        self.payload.append(row["payload"])
        self.tries.append(row.get("tries", 1))


def read(path: Path) -> Results:
    """Read a result file; the half line that a killed run may leave at the end is ignored.

    Raises:
        BadInput: the file is missing or is no result file; the message names the line.
    """
    columns, end, header = _Columns(), None, None
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    if header is None:
                        header = _checked_header(path, row)
                    elif "end" in row:
                        end = row
                    else:
                        columns.add(row)
                except (ValueError, KeyError, TypeError) as error:
                    if header is not None and not line.endswith("\n"):
                        break
                    raise BadInput(
                        f"line {number} is not that of a result file",
                        where=str(path),
                        fix="give a file that `loadtest run` wrote",
                    ) from error
    except FileNotFoundError:
        raise BadInput("there is no such file", where=str(path), fix="give a file that `loadtest run` wrote") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise BadInput("is not a result file", where=str(path), fix="give a file that `loadtest run` wrote") from error
    if header is None:
        raise BadInput("the file is empty", where=str(path), fix="give a file that `loadtest run` wrote")
    return _sorted(header, end, columns)


def _checked_header(path: Path, row: Any) -> dict[str, Any]:
    if row["format"] != FORMAT:
        raise BadInput(f"has the format {row['format']}; this version of lathe reads {FORMAT}", where=str(path))
    header: dict[str, Any] = {key: row[key] for key in ("plan", "model", "url")} | row
    return header


def _sorted(header: dict[str, Any], end: dict[str, Any] | None, columns: _Columns) -> Results:
    planned = np.array(columns.planned)
    order = np.argsort(planned, kind="stable")
    return Results(
        header,
        end,
        planned[order],
        np.array(columns.sent)[order],
        np.array(columns.done)[order],
        np.array(columns.verdict, dtype=np.int8)[order],
        np.array(columns.payload, dtype=np.int32)[order],
        np.array(columns.tries, dtype=np.int32)[order],
    )
