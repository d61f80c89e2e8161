"""`loadtest selftest`: the generator's own ceiling."""

from typing import Any

import click

from loadtest.plan.options import Duration
from modelathe.commandline import emit, json_option, quiet_option, reporting
from modelathe.errors import UsageError


@click.command()
@click.argument("model", required=False)
@click.option("--url", help="With MODEL: the server whose model's shapes are sent.")
@click.option(
    "--service", type=Duration(), default="0s", help="The null server holds a request so long.  [default: 0s]"
)
@click.option("--stall", type=Duration(), default="0s", help="It holds some requests so much longer.  [default: 0s]")
@click.option("--each", type=int, default=0, help="Which requests: each so many-th.  [default: none]")
@quiet_option
@json_option
def selftest(model: str | None, url: str | None, service: float, stall: float, each: int, as_json: bool) -> None:
    """Measure what this generator reaches here, against a built-in server that answers at once.

    A load run near these rates measures the generator. MODEL and --url take the shapes of a real model; that server is
    only asked for them. Takes about 20 seconds.

    \b
    Examples:
      loadtest selftest
      loadtest selftest digits --url grpc://127.0.0.1:8001
      loadtest selftest --service 5ms --stall 1s --each 100
    """
    from rich.console import Console

    from loadtest.selftest.measure import measure, text
    from modelathe import client

    if bool(model) != bool(url):
        raise UsageError("MODEL and --url go together", fix="give both, or neither")
    shapes: dict[str, Any] = {}
    if model and url:
        with client.connect(url) as server:
            shapes["inputs"], shapes["outputs"] = server.metadata(model)
    with reporting() as report:
        values = measure(service, stall, each, report=report, **shapes)
    if as_json:
        emit(values)
    else:
        Console().print(text(values))
