"""Choice: which sender a plan asks for."""

from collections.abc import Iterator
from contextlib import contextmanager

from loadtest.plan.data.answers import Answers
from loadtest.plan.load import Load
from loadtest.plan.plan import Plan
from loadtest.send import wire
from loadtest.send.grpc import GrpcSender
from loadtest.send.http import HttpSender
from loadtest.send.sender import Encode, Sender, encoder
from loadtest.send.sharedmemory import SharedSender, shared
from loadtest.send.stream import StreamSender
from modelathe.client import Client
from modelathe.connection import address, base


@contextmanager
def sending(load: Load, client: Client) -> Iterator[Sender]:
    """Yield the sender of a load, not yet open; what it keeps on the machine and in the server ends with the block."""
    plan, parts, answers = load.plan, load.parts, load.answers
    protocol, place, _ = address(plan.url)
    http = wire.HttpRequests(place, plan.connection, base(plan.url))
    if plan.connection.shared_memory is None:
        request = http.request if protocol == "http" else wire.grpc_request
        yield _sender(plan, encoder(request, parts, plan.sequence), answers)
        return
    named = http.shared_request if protocol == "http" else wire.grpc_shared_request
    with shared(plan, client, parts, named) as regions:
        yield SharedSender(_sender(plan, regions.encode, None), regions, answers)


def _sender(plan: Plan, encode: Encode, answers: Answers | None) -> Sender:
    (protocol, place, encrypted), connection = address(plan.url), plan.connection
    if protocol == "http":
        tls = connection.tls() if encrypted else None
        return HttpSender(place, encode, plan.timeout, answers, tls, elsewhere=connection.shared_memory is not None)
    kind = StreamSender if connection.streams else GrpcSender
    return kind(plan.url, encode, plan.timeout, answers, connection)
