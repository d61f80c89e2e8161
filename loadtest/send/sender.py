"""Sender: what the driver needs of a way to reach the server, and what the ways share."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from loadtest.plan.data.answers import Answers
from loadtest.plan.traffic import Part, in_sequences
from loadtest.record.results import ERROR, MISMATCH, Flight, Turn
from loadtest.send.wire import NO_OUTPUTS
from modelathe.tensors import Array, Arrays

Encode = Callable[[Flight], bytes]
Finished = Callable[[Flight], None]
_LONGEST_TEXT = 300


class Sender(Protocol):
    """Puts ready-made bytes on the wire and times the answer. `send` never raises and never waits.

    Attributes:
        finished: set by the driver; called with every flight that ended, well or badly.
    """

    finished: Finished

    async def open(self, connections: int) -> None:
        """Connect, so that the first requests do not pay for it."""

    def send(self, flight: Flight) -> None:
        """Send a flight's payload; sets `sent`, later `done` and `verdict`, then calls `finished`."""

    def start(self, zero: float) -> None:
        """Take `zero` (the event loop's clock) as the start of the run."""

    async def close(self) -> None:
        """Drop all connections."""


def encoder(
    request: Callable[[str, Arrays, str, Turn | None], bytes], parts: Sequence[Part], sequence: int | None
) -> Encode:
    """Return the function from a flight to its bytes, which are made now where they can be.

    Args:
        request: makes the bytes of one request from model, inputs, version and turn.
        parts: what is sent.
        sequence: the length of sequences; with them requests carry a turn that is not known before they leave.
    """
    numbered = [(part, inputs) for part in parts for inputs in part.payloads]
    if not in_sequences(parts, sequence) and not any(part.fresh for part in parts):
        ready = [request(part.model, inputs, part.version, None) for part, inputs in numbered]
        return lambda flight: ready[flight.payload]

    def encode(flight: Flight) -> bytes:
        part, inputs = numbered[flight.payload]
        inputs = part.fresh.make(flight.n) if part.fresh else inputs
        return request(part.model, inputs, part.version, flight.turn)

    return encode


class Carrier:
    """What senders share that have connections of their own.

    Args:
        encode: makes the bytes of a request.
        timeout: seconds until a request counts as timed out; None waits.
        answers: what to compare the outputs with; None leaves them unchecked.
        elsewhere: the values of the outputs are asked for in shared memory.

    Attributes:
        loop: the event loop, whose clock it is; set when the connections are opened.
        zero: the start of the run on that clock.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, encode: Encode, timeout: float | None, answers: Answers | None, elsewhere: bool) -> None:
        self.encode, self.timeout, self.answers, self.elsewhere = encode, timeout, answers, elsewhere
        self.finished: Finished = lambda flight: None
        self.zero = 0.0

    def start(self, zero: float) -> None:
        """Take `zero` as the start of the run."""
        self.zero = zero


def end(sender: Carrier, flight: Flight, judge: Callable[[], None]) -> None:
    """End a flight, the one place where that happens: its time, its verdict, and on to whoever counts it.

    Args:
        sender: that carried it.
        flight: whose answer is there, or whose failure is known.
        judge: gives it its verdict. Whatever reading the answer raises is a failure of this request: what a parser says
            about bytes that are no answer has no common class, and a flight that is not ended would be lost.
    """
    flight.done = sender.loop.time() - sender.zero
    try:
        judge()
    except Exception as error:
        fail(flight, f"the answer cannot be read: {error!r}")
    sender.finished(flight)


def check(
    answers: Answers | None, flight: Flight, raw: bytes, missing: str, decode: Callable[[], dict[str, Array]]
) -> None:
    """Give the flight its verdict if its answer is not the right one, or, as `missing` says, not a whole one."""
    if missing != NO_OUTPUTS and answers and (text := answers.wrong(flight.n, flight.payload, raw, decode)):
        fail(flight, text, verdict=MISMATCH)
    elif missing:
        fail(flight, missing)


def fail(flight: Flight, text: str, *, gone: bool = False, verdict: str = ERROR) -> None:
    """Give the flight a bad verdict; `gone` says that the connection failed, rather than the request."""
    flight.verdict, flight.error, flight.gone = verdict, text[:_LONGEST_TEXT], gone
