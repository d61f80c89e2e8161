"""`serve clients`."""

from pathlib import Path

import click

from modelathe.commandline import PATH, document, emit, json_option
from serve.commands.versions import repository_option

HTTP, GRPC = "http://127.0.0.1:8000", "grpc://127.0.0.1:8001"
"""Triton's own ports."""


@click.command()
@click.argument("model")
@repository_option
@click.option("--url", help="The server's HTTP address.  [default: that of its `serve up`, else port 8000]")
@click.option("--grpc-url", help="Its gRPC address.  [default: that of its `serve up`, else port 8001]")
@click.option("--output", type=PATH, metavar="FOLDER", help="Where to write the files; else they are printed.")
@json_option
def clients(
    model: str, repository: Path, url: str | None, grpc_url: str | None, output: Path | None, as_json: bool
) -> None:
    """Write short clients of MODEL: client.py (HTTP), request.sh (curl) and grpc_client.py. Each runs as it is.

    They send one sample of typical size, with values in the range that the lineage states, and pad dims that the model
    is served with in buckets.

    \b
    Example:
      serve clients digits_cnn --repository build/model_repository --output build/clients
    """
    from serve.clients import generate as made
    from serve.config.errors import BadRepository
    from serve.repository import interface
    from serve.repository import tree as repositories
    from serve.rollout import rollout
    from serve.server import state

    rollout.standings(repository, model)
    live = repositories.live(repository, model)
    if not live:
        raise BadRepository("has no version that its config.pbtxt serves", where=str(repository / model))
    served = [one.endpoint for one in state.everything() if one.endpoint and one.repository == repository.resolve()]
    http, grpc = (served[0].http, served[0].grpc) if served else (HTTP, GRPC)
    texts = made.texts(interface.read(repository, model, live[-1]), url or http, grpc_url or grpc)
    paths = made.write(texts, output) if output else []
    if as_json:
        emit(document(model=model, number=live[-1], files=paths or texts))
    elif paths:
        click.echo("\n".join(f"written: {path}" for path in paths))
    else:
        click.echo("\n".join(f"# --- {name}\n{text}" for name, text in texts.items()), nl=False)
