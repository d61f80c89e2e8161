"""`serve stub`."""

from pathlib import Path

import click

from loadtest.plan.options import Duration
from modelathe.commandline import PATH, document, emit, json_option
from serve.commands.up import PORT


@click.command()
@click.argument("repository", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--http-port", type=PORT, default=8000, show_default=True, help="0 picks a free one.")
@click.option("--grpc-port", type=PORT, default=8001, show_default=True, help="0 picks a free one.")
@click.option(
    "--answers",
    "kind",
    type=click.Choice(["zeros", "random"]),
    default="zeros",
    show_default=True,
    help="What outputs hold; random: the same values at every start and in every answer.",
)
@click.option("--latency", type=Duration(), default="0ms", show_default=True, help="How long an answer takes.")
@click.option("--fail-every", type=click.IntRange(1), metavar="N", help="Let one of N inferences fail.")
@json_option
def stub(
    repository: Path,
    host: str,
    http_port: int,
    grpc_port: int,
    kind: str,
    latency: float,
    fail_every: int | None,
    as_json: bool,
) -> None:
    """Answer for REPOSITORY's models as a Triton server would, but without running them: for an application's own CI.

    Outputs have the right names, dtypes and shapes; requests that the server would refuse are refused. Of a model it
    needs config.pbtxt alone; with a lineage.json, outputs are as long as the inputs are whose dims they share. It
    speaks KServe V2 over HTTP, with binary tensors, and gRPC, without streams.

    \b
    Example:
      serve stub build/model_repository --latency 5ms
    """
    from threading import Event
    from typing import cast

    from serve.clients.standin.answers import Answers, load
    from serve.clients.standin.running import running

    loaded = load(repository, cast(Answers, kind), latency, fail_every or 0)
    with running(loaded, host=host, http_port=http_port, grpc_port=grpc_port) as place:
        if as_json:
            emit(document(http=place.http, grpc=place.grpc, models=place.models))
        else:
            click.echo(f"ready, without models: {', '.join(place.models)}, at {place.grpc} and {place.http}")
        Event().wait()
