"""`serve proxy`."""

from pathlib import Path

import click

from modelathe.commandline import PATH, document, emit, json_option


@click.command()
@click.argument("folder", type=PATH)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server's HTTP address.")
@click.option("--listen", default="127.0.0.1:8443", show_default=True, help="Where nginx listens.")
@click.option("--tls-cert", type=PATH, required=True, help="Certificate in PEM.")
@click.option("--tls-key", type=PATH, required=True, help="Its private key.")
@click.option("--tls-clients", type=PATH, help="Authority whose certificates clients must show (mutual TLS).")
@click.option("--body-limit", default="64m", show_default=True, help="Largest body of a request.")
@click.option("--timeout", type=click.IntRange(1), default=60, show_default=True, help="Seconds for an answer.")
@json_option
def proxy(
    folder: Path,
    url: str,
    listen: str,
    tls_cert: Path,
    tls_key: Path,
    tls_clients: Path | None,
    body_limit: str,
    timeout: int,
    as_json: bool,
) -> None:
    """Write FOLDER/nginx.conf: an nginx with TLS before the server's HTTP port.

    It limits and buffers bodies, and passes on inference, metadata and health alone.

    \b
    Example:
      serve proxy build/nginx --tls-cert server.crt --tls-key server.key
    """
    from serve.server import proxy as proxies
    from serve.server.options import Tls

    tls = Tls(tls_cert, tls_key, tls_clients)
    conf = proxies.write(folder, url, listen, tls, limit=body_limit, timeout=timeout)
    if as_json:
        emit(document(conf=str(conf), url=url, listen=listen))
    else:
        click.echo(f"written: {conf}\n  nginx -p {folder.absolute()} -c {conf.name}")
