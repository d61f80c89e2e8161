"""Shared memory: tensors that the server reads and writes in place, instead of getting and sending them.

All inputs lie in one region; each request in flight has a region of its own for its outputs. CUDA shared
memory was tested on one H100.
"""

import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from loadtest.plan.data.answers import Answers
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part, firsts
from loadtest.record.results import OK, TIMEOUT, Flight
from loadtest.send.sender import Finished, Sender, check
from loadtest.send.wire import Place
from modelathe.client import Client
from modelathe.errors import MachineError, ModelatheError, RequestRejected, ServerAbsent, ServerNonsense, UsageError
from modelathe.tensors import TRITON_DTYPES, Array, Arrays, packed, unpacked

MOST_SLOTS = 256
"""The most requests of an open loop whose outputs have a place; more wait for one, and leave late."""

_ALIGNED = 64
_MOST_ASKED = 64
_PATIENCE = 10.0
_ROOM = "/dev/shm"  # noqa: S108 -- the kernel's own, not a temporary folder

Request = Callable[..., bytes]


class _Region:
    """A piece of memory that this process and the server see."""

    def __init__(self, kind: str, size: int, client: Client) -> None:
        self.kind, self.size, self.client = kind, size, client
        self.name = f"{_names()}{os.getpid()}-{secrets.token_hex(4)}"
        self._library, self._registered = _library(kind), False
        how = (self.name, size, True) if kind == "system" else (size, 0)
        try:
            self._handle = self._library.create_shared_memory_region(self.name, *how)
        except Exception as error:  # each of the two libraries has its own class, and CUDA more of them
            fix = "needs an NVIDIA GPU and cuda-python; use system" if kind == "cuda" else f"look after {_ROOM}"
            raise MachineError(f"no {kind} shared memory: {error}", fix=fix) from error

    def register(self) -> None:
        """Make it known to the server."""
        where: tuple[Any, ...] = (self.name, self.size)
        if self.kind == "cuda":
            where = (self._library.get_raw_handle(self._handle), 0, self.size)
        try:
            self.client.order(f"register_{self.kind}_shared_memory", self.name, *where)
        except ServerAbsent:
            raise
        except ServerNonsense as error:  # it answered other questions before
            what = "the server has no shared memory, which is an extension of Triton's"
            raise RequestRejected(what, where=self.client.url, fix="leave --shared-memory away") from error
        except ModelatheError as error:
            raise RequestRejected(
                f"the server does not take shared memory: {error.what}",
                where=self.client.url,
                fix="it must run on this machine; one that `serve up` started wants the secret of its state file as "
                "--header 'admin-key: SECRET', over gRPC 'triton-grpc-protocol-admin-key: SECRET'",
            ) from error
        self._registered = True

    def write(self, data: bytes) -> None:
        self._library.set_shared_memory_region(self._handle, [np.frombuffer(data, np.uint8)])

    def read(self) -> bytes:
        return bytes(self._library.get_contents_as_numpy(self._handle, np.uint8, [self.size]))

    def remove(self, deadline: float) -> None:
        """Take it back from the server, if that still answers, and give it free.

        Until `deadline` on the monotonic clock it waits for requests that are still at work on it.
        """
        while self._registered:
            try:
                self.client.order(f"unregister_{self.kind}_shared_memory", self.name)
                self._registered = False
            except ModelatheError as error:
                if "in use" not in error.what or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        self._library.destroy_shared_memory_region(self._handle)


def _names() -> str:
    """Return how the names of regions begin: with the namespace in which the process id after it means something."""
    return f"modelathe-load-{Path('/proc/self/ns/pid').stat().st_ino}-"


def _sweep() -> None:
    """Remove the regions of dead processes, which were killed together with what would have removed them."""
    for path in Path(_ROOM).glob(f"{_names()}*-*"):
        owner = path.name.split("-")[-2]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            with suppress(FileNotFoundError, PermissionError):  # another sweeps too, or it is another user's
                path.unlink()


def _library(kind: str) -> Any:
    if kind == "system":
        from tritonclient.utils import shared_memory

        return shared_memory
    try:
        from tritonclient.utils import cuda_shared_memory
    except (RuntimeError, ImportError) as error:
        raise MachineError(f"no cuda shared memory: {error}", fix="pip install cuda-python, or use system") from error
    return cuda_shared_memory


class Regions:
    """The regions of a run, and the requests that name them.

    Args:
        encode: makes a request from the flight and the slot of its outputs.
        slots: the output regions.
        outputs: by payload number where its outputs lie in a slot, for those that the idle server was asked for.
    """

    def __init__(self, encode: Callable[[Flight, int], bytes], slots: list[_Region], outputs: dict[int, list[Place]]):
        self._encode, self._slots, self._outputs = encode, slots, outputs
        self._empty = bytes(slots[0].size)
        self._free = deque(range(len(slots)))
        self._taken: dict[int, int] = {}

    def encode(self, flight: Flight) -> bytes:
        """Return the request of a flight that has a slot."""
        return self._encode(flight, self._taken[flight.n])

    def take(self, flight: Flight) -> bool:
        """Give the flight a slot, emptied so that no earlier answer is taken for this one; False if there is none."""
        if not self._free:
            return False
        slot = self._taken[flight.n] = self._free.pop()
        self._slots[slot].write(self._empty)
        return True

    def check(self, flight: Flight, answers: Answers) -> None:
        """Give the flight its verdict by what lies in its slot."""
        places = self._outputs.get(flight.payload)
        if places is None:
            return
        raw = self._slots[self._taken[flight.n]].read()[: places[-1].offset + places[-1].size]

        def decode() -> dict[str, Array]:
            return {
                place.name: unpacked(place.datatype, place.shape, raw[place.offset : place.offset + place.size])
                for place in places
            }

        check(answers, flight, raw, "", decode)

    def give_back(self, flight: Flight) -> None:
        """Take the slot back; one that the server may still write into is used again last."""
        slot = self._taken.pop(flight.n)
        if flight.verdict == TIMEOUT or flight.gone:
            self._free.appendleft(slot)
        else:
            self._free.append(slot)


class SharedSender:
    """Another sender's requests, their outputs checked where the server put them.

    Args:
        inner: sends `regions.encode` and leaves outputs unchecked.
        regions: where the tensors are.
        answers: what to compare the outputs with; None leaves them unchecked.
    """

    def __init__(self, inner: Sender, regions: Regions, answers: Answers | None) -> None:
        self.inner, self.regions, self.answers = inner, regions, answers
        self.finished: Finished = lambda flight: None
        self._waiting: deque[Flight] = deque()

    async def open(self, connections: int) -> None:
        """Connect."""
        self.inner.finished = self._finished
        await self.inner.open(connections)

    def start(self, zero: float) -> None:
        """Take `zero` as the start of the run."""
        self.inner.start(zero)

    def send(self, flight: Flight) -> None:
        """Send, or wait for a slot; `sent` says when it left."""
        if self.regions.take(flight):
            self.inner.send(flight)
        else:
            self._waiting.append(flight)

    async def close(self) -> None:
        """Drop all connections."""
        await self.inner.close()

    def _finished(self, flight: Flight) -> None:
        if flight.verdict == OK and self.answers:
            self.regions.check(flight, self.answers)
        self.regions.give_back(flight)
        if self._waiting:
            self.send(self._waiting.popleft())
        self.finished(flight)


@contextmanager
def shared(plan: Plan, client: Client, parts: Sequence[Part], request: Request) -> Iterator[Regions]:
    """Put all inputs into shared memory for the block, and make room for the outputs.

    Args:
        plan: says which kind, and how many requests are in flight.
        client: asks the idle server how large the outputs are, and registers the regions.
        parts: what is sent.
        request: makes the bytes from model, input places, output places, version and turn.

    Raises:
        UsageError: values that are new for each request are not there yet to be put anywhere.
        RequestRejected: the server does not take it.
        MachineError: this machine has no such memory, or too little.
    """
    if any(part.fresh for part in parts):
        raise UsageError("new values for each request do not go with shared memory", fix="leave one of the two away")
    kind = plan.connection.shared_memory or "system"
    data, inputs = _inputs(parts)
    outputs = _outputs(client, parts, bool(plan.sequence))
    size = max(places[-1].offset + places[-1].size for places in outputs.values())
    slots = min(plan.share(plan.concurrency, 0) if plan.concurrency else plan.in_flight, MOST_SLOTS)
    if kind == "system":
        _sweep()
        _check_room(len(data) + slots * size)
    regions: list[_Region] = []
    try:
        for needed in [len(data)] + [size] * slots:
            regions.append(_Region(kind, max(needed, 1), client))
            regions[-1].register()
        regions[0].write(data)
        yield Regions(_encoder(parts, regions, inputs, outputs, request), regions[1:], outputs)
    finally:
        deadline = time.monotonic() + _PATIENCE
        for region in regions:
            region.remove(deadline)


def _check_room(needed: int) -> None:
    # A region larger than what is left is made all the same; writing to it would kill this process.
    left = os.statvfs(_ROOM).f_bavail * os.statvfs(_ROOM).f_frsize
    if needed > left:
        raise MachineError(
            f"{needed:,} bytes of shared memory are needed, {left:,} are left",
            where=_ROOM,
            fix="send fewer or smaller payloads, or give the container more with --shm-size",
        )


def _laid_out(tensors: Arrays, at: int = 0) -> list[Place]:
    places = []
    for name, array in tensors.items():
        size = len(packed(array))
        places.append(Place(name, TRITON_DTYPES[array.dtype.name], array.shape, "", at, size))
        at += -(-size // _ALIGNED) * _ALIGNED
    return places


def _inputs(parts: Sequence[Part]) -> tuple[bytes, list[list[Place]]]:
    """Return the bytes of all inputs, and for each payload where they lie."""
    data, found = bytearray(), []
    for payload in (payload for part in parts for payload in part.payloads):
        places = _laid_out(payload, len(data))
        for place, array in zip(places, payload.values(), strict=True):
            data.extend(bytes(place.offset - len(data)) + packed(array))
        data.extend(bytes(-len(data) % _ALIGNED))
        found.append(places)
    return bytes(data), found


def _outputs(client: Client, parts: Sequence[Part], remembers: bool) -> dict[int, list[Place]]:
    """Return by payload where its outputs will lie in a slot, as large as the idle server's answers to it are."""
    found = {}
    for first, part in zip(firsts(parts), parts, strict=True):
        for place, payload in enumerate(part.payloads[:_MOST_ASKED]):
            answer = client.infer(part.model, payload, part.version, sequence=1 if remembers else 0)
            found[first + place] = _laid_out(answer)
    return found


def _encoder(
    parts: Sequence[Part],
    regions: Sequence[_Region],
    inputs: list[list[Place]],
    outputs: dict[int, list[Place]],
    request: Request,
) -> Callable[[Flight, int], bytes]:
    whose = [(part, first) for first, part in zip(firsts(parts), parts, strict=True) for _ in part.payloads]

    def make(payload: int, slot: int, turn: Any) -> bytes:
        part, first = whose[payload]
        sent = [place._replace(region=regions[0].name) for place in inputs[payload]]
        # A payload that was not asked for gets the places of the part's first; too little room is the server's to say.
        wanted = outputs.get(payload, outputs[first])
        placed = [place._replace(region=regions[1 + slot].name) for place in wanted]
        return request(part.model, sent, placed, version=part.version, turn=turn)

    ready = lru_cache(maxsize=16384)(lambda payload, slot: make(payload, slot, None))
    return lambda flight, slot: make(flight.payload, slot, flight.turn) if flight.turn else ready(flight.payload, slot)
