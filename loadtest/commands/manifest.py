"""`loadtest manifest`: a Kubernetes Job whose pods share a load."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from loadtest.plan.options import Duration
from modelathe.commandline import PATH, document, emit, json_option
from modelathe.errors import UsageError


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("load", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- MODEL --url URL ...")
@click.option("--image", required=True, help="An image with modelathe in it.")
@click.option("--claim", required=True, help="A PersistentVolumeClaim that all pods can write to, for the results.")
@click.option("--pods", type=click.IntRange(1, 64), default=2, show_default=True, help="Each is one worker.")
@click.option("--begin-in", type=Duration(), default="3m", show_default=True, help="Every pod must be ready by then.")
@click.option("--name", default="loadtest", show_default=True, help="Of the Job.")
@click.option("--output", type=PATH, metavar="FILE", help="Write it there instead of to standard output.")
@json_option
def manifest(
    load: tuple[str, ...],
    image: str,
    claim: str,
    pods: int,
    begin_in: float,
    name: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Print a Kubernetes Job with indexed completion: each pod sends its share of the load from the same moment on.

    What stands behind -- are the arguments of `loadtest run`. A pod that is ready too late fails, and the Job with it.
    Each leaves INDEX.jsonl in the claim; `loadtest merge` makes one file of them. The Job was checked against
    Kubernetes's schema, not run in a cluster.

    \b
    Example:
      loadtest manifest --image registry/modelathe --claim results --pods 4 \\
          -- digits --url grpc://triton:8001 --rate 8000 --duration 60s | kubectl apply -f -
    """
    from loadtest.load.deploy import job
    from modelathe import files

    _check(load, pods)
    begin = datetime.now(UTC) + timedelta(seconds=begin_in)
    written = job(load, image=image, claim=claim, pods=pods, begin=begin, name=name)
    if output:
        files.write(output, written)
    if as_json:
        emit(document(manifest=written, begins=begin.isoformat(timespec="seconds")))
    elif not output:
        click.echo(written, nl=False)


def _check(load: tuple[str, ...], pods: int) -> None:
    """Find a mistake in the load here and not in a pod.

    Raises:
        UsageError: `loadtest run` would refuse it.
    """
    from loadtest.commands.run import run
    from loadtest.plan.options import plan_of

    for option in ("--index", "--workers", "--begin-at", "--output", "--ray"):
        if any(argument.partition("=")[0] == option for argument in load):
            raise UsageError(f"{option} is set by the manifest", fix=f"leave {option} away")
    with run.make_context("run", [*load, "--workers", str(pods)]) as context:
        plan_of(context.params)
