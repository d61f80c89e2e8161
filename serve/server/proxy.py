"""Proxy: an nginx before the HTTP port, for what tritonserver does not do: TLS, a limit for bodies, and buffering.

nginx reads a request whole before it passes it on with its length. That closes the flood of one-byte chunks that ends
an old tritonserver, and keeps slow clients from holding its connections.

It also passes on no more than `MOST_IN_FLIGHT` requests at a time. A thread of Triton 24.10's HTTP front end is told of
finished answers through a socket that holds about 280 messages; one that does not fit is thrown away, and its client
waits for ever (seen as EAGAIN in that thread's `sendto`, one for each lost answer). gRPC has no such socket.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

from modelathe import files
from modelathe.errors import UsageError
from serve.config.address import parse_url
from serve.server import control
from serve.server.options import Tls

CONF = "nginx.conf"
NAME = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
PASSED = (
    r"/v2/?",
    r"/v2/health/(live|ready)",
    rf"/v2/models/{NAME}(/versions/[0-9]+)?(/(infer|generate|generate_stream|ready|config|stats))?",
)
"""The paths that the proxy passes on, as they stand in the request: metadata, health and inference, and nothing else.

nginx chooses a `location` by the decoded path and passes the raw one on; what tritonserver decodes again could be
another path (`x%2F..%2F..`). So the raw path decides, and one with a `%` is none of these.
"""

MOST_IN_FLIGHT = 256
"""Requests that tritonserver has at a time; nginx answers 502 to the next one."""

TEMPLATE = """\
# Before tritonserver at {url}. Check it with: nginx -p {folder} -c {conf} -t
# Start it with:                             nginx -p {folder} -c {conf}
worker_processes auto;
pid nginx.pid;
error_log error.log;
events {{
    worker_connections 4096;
}}
http {{
    access_log off;
    map $request_uri $passed {{
        default 0;
        "~^({passed})(\\?|$)" 1;
    }}
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;

    # A body is read whole, within these limits, before tritonserver sees any of it.
    client_max_body_size {limit};
    client_body_timeout 30s;
    client_header_timeout 10s;
    proxy_request_buffering on;
    proxy_read_timeout {timeout}s;

    upstream triton {{
        zone triton 64k;
        # With more at once, tritonserver can lose answers.
        server {upstream} max_conns={most} max_fails=0;
        keepalive 64;
    }}
    server {{
        listen {listen} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.2 TLSv1.3;
{clients}
        if ($passed = 0) {{
            return 403;
        }}
        location / {{
            proxy_pass http://triton;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            # What the secret opens is for this machine.
            proxy_set_header {key_header} "";
        }}
    }}
}}
"""
CLIENTS = """\
        ssl_client_certificate {clients};
        ssl_verify_client on;
"""


def write(
    folder: Path,
    url: str,
    listen: str,
    tls: Tls,
    *,
    limit: str = "64m",
    timeout: int = 60,
) -> Path:
    """Write `nginx.conf` into `folder`, which nginx also uses for its files, and return it.

    Args:
        folder: made if it is not there.
        url: of tritonserver's HTTP port, `http://HOST:PORT`.
        listen: where nginx listens, as in `0.0.0.0:8443`.
        tls: what it encrypts with.
        limit: largest body, as nginx writes it; 64m is what images from 25.07 on allow.
        timeout: seconds that an answer may take.

    Raises:
        UsageError: `url`, `listen` or `limit` is not of that form.
        BadRepository: a file is not there.
    """
    if parse_url(url)[0] != "http":
        raise UsageError("nginx stands before the HTTP port", where=url, fix="give http://HOST:PORT")
    if not re.fullmatch(r"(?:[\w.:\[\]-]+:)?\d{1,5}", listen):
        raise UsageError(f"--listen {listen} is no address", fix="write HOST:PORT, as in 0.0.0.0:8443")
    if not re.fullmatch(r"\d+[kmg]?", limit):
        raise UsageError(f"--body-limit {limit} is no size", fix="write it as in 64m")
    tls.files()
    folder.mkdir(parents=True, exist_ok=True)
    conf = folder / CONF
    text = TEMPLATE.format(
        url=url,
        folder=folder.absolute(),
        conf=CONF,
        limit=limit,
        timeout=timeout,
        upstream=urlsplit(url).netloc,
        most=MOST_IN_FLIGHT,
        listen=listen,
        certificate=_quoted(tls.certificate),
        key=_quoted(tls.key),
        clients=CLIENTS.format(clients=_quoted(tls.clients)) if tls.clients else "",
        passed="|".join(PASSED),
        key_header=control.ADMIN_KEY,
    )
    return files.write(conf, text)


def _quoted(path: Path) -> str:
    """Return a path as nginx takes it, whatever characters it has."""
    text = str(path.absolute()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
