"""`serve up`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loadtest.commandline import PATH, document, emit, json_option

if TYPE_CHECKING:
    from serve.server import Endpoint

PORT = click.IntRange(0, 65535)


@click.command()
@click.argument("repository", type=PATH)
@click.option("--http-port", type=PORT, default=8000, show_default=True, help="0 picks a free one.")
@click.option("--grpc-port", type=PORT, default=8001, show_default=True, help="0 picks a free one.")
@click.option("--metrics-port", type=PORT, default=8002, show_default=True, help="0 picks a free one.")
@click.option("--probe/--no-probe", default=True, help="Watch the models and replace dead backend processes.")
@click.option("--log", type=PATH, help="File for the server's output, overwritten.")
@json_option
def up(
    repository: Path,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    probe: bool,
    log: Path | None,
    as_json: bool,
) -> None:
    """Serve every model of REPOSITORY on this machine until Ctrl-C.

    Verifies the digests of the published versions, starts a Triton server on loopback addresses, and prints one line
    per model when all are ready. Requests in flight are finished before it ends.

    \b
    Example:
      serve up build/model_repository --http-port 8000
    """
    from serve import server, state

    with (
        server.running(
            repository, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, log=log, probe=probe
        ) as endpoint,
        state.recorded(endpoint, repository),
    ):
        _announce(endpoint, repository, as_json)
        server.wait(endpoint)


def _announce(endpoint: "Endpoint", repository: Path, as_json: bool) -> None:
    from serve.repository import live

    versions = {model: live(repository, model) for model in endpoint.models}
    if as_json:
        models = [{"name": model, "versions": numbers} for model, numbers in versions.items()]
        addresses = {"http": endpoint.http, "grpc": endpoint.grpc, "metrics": f"{endpoint.metrics}/metrics"}
        emit(document(models=models, **addresses, pid=endpoint.pid, log=str(endpoint.log)))
        return
    for model, numbers in versions.items():
        click.echo(f"ready: {model}, version {', '.join(map(str, numbers))}, at {endpoint.grpc} and {endpoint.http}")
        click.echo(f"  loadtest run {model} --url {endpoint.grpc} --repository {repository} --duration 10s")
    click.echo(f"metrics: {endpoint.metrics}/metrics; log: {endpoint.log}; Ctrl-C stops the server")
