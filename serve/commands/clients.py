"""`serve clients`."""

from pathlib import Path

import click

from modelathe.commandline import PATH, document, emit, json_option
from serve.commands.versions import repository_option


@click.command()
@click.argument("model")
@repository_option
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server's HTTP address.")
@click.option("--grpc-url", default="grpc://127.0.0.1:8001", show_default=True, help="Its gRPC address.")
@click.option("--output", type=PATH, metavar="FOLDER", help="Where to write the files; else they are printed.")
@json_option
def clients(model: str, repository: Path, url: str, grpc_url: str, output: Path | None, as_json: bool) -> None:
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

    rollout.standings(repository, model)
    live = repositories.live(repository, model)
    if not live:
        raise BadRepository("has no version that its config.pbtxt serves", where=str(repository / model))
    texts = made.texts(interface.read(repository, model, live[-1]), url, grpc_url)
    paths = made.write(texts, output) if output else []
    if as_json:
        emit(document(model=model, number=live[-1], files=paths or texts))
    elif paths:
        click.echo("\n".join(f"written: {path}" for path in paths))
    else:
        click.echo("\n".join(f"# --- {name}\n{text}" for name, text in texts.items()), nl=False)
