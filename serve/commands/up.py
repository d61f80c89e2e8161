"""`serve up`, `status` and `down`: a server's life on this machine."""

import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelathe.commandline import PATH, document, emit, json_option, say
from modelathe.errors import MachineError, ModelatheError, UsageError
from modelathe.interpreter import program
from serve.commands.versions import load_timeout_option

if TYPE_CHECKING:
    from serve.server.options import Listen
    from serve.server.state import Running

PORT = click.IntRange(0, 65535)
LEVEL = click.Choice(["error", "warning", "info", "verbose"])


@click.command()
@click.argument("repository", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; with TLS, gRPC alone does.")
@click.option("--http-port", type=PORT, default=8000, show_default=True, help="0 picks a free one.")
@click.option("--grpc-port", type=PORT, default=8001, show_default=True, help="0 picks a free one.")
@click.option("--metrics-port", type=PORT, default=8002, show_default=True, help="0 picks a free one.")
@click.option("--tls-cert", type=PATH, help="Certificate in PEM, with which gRPC is encrypted.")
@click.option("--tls-key", type=PATH, help="Its private key.")
@click.option("--tls-clients", type=PATH, help="Authority whose certificates clients must show (mutual TLS).")
@click.option("--accept-open-cves", is_flag=True, help="Listen beyond loopback, with holes that `serve doctor` lists.")
@click.option("--probe/--no-probe", default=True, help="Watch the models and replace dead backend processes.")
@click.option("--log", type=PATH, help="File for the server's output, overwritten.")
@click.option("--log-level", type=LEVEL, default="info", show_default=True, help="How much the server prints.")
@load_timeout_option
@click.option("--detach", is_flag=True, help="Return once the models are ready; serve status and down see to it.")
@click.option("--container", metavar="RELEASE", help="Use NVIDIA's image of this release, as in 26.07, by docker.")
@click.option("--print", "only_print", is_flag=True, help="With --container: print the command, run nothing.")
@json_option
def up(
    repository: Path,
    probe: bool,
    load_timeout: float,
    detach: bool,
    container: str | None,
    only_print: bool,
    as_json: bool,
    **listening: Any,
) -> None:
    """Serve every model of REPOSITORY on this machine until Ctrl-C.

    Verifies the digests of the published versions, starts a Triton server, on loopback addresses unless told otherwise,
    and prints one line per model when all are ready. Requests in flight are finished before it ends.

    \b
    Example:
      serve up build/model_repository --http-port 8000
    """
    from serve.calls import up as calls
    from serve.config import releases
    from serve.server import state
    from serve.server import tritonserver as server

    # The holes are those of the server's release.
    listen = calls.listen(release=container or releases.CARRIED, **listening)
    if container:
        if detach or listen.log or as_json:
            raise UsageError("--container goes with none of --detach, --log and --json", fix="leave them out")
        _container(repository, container, listen, only_print)
        return
    if only_print:
        raise UsageError("--print goes with --container", fix="leave it out, or say --container 26.07")
    if detach:
        calls.alone(repository)
        from serve.server import detach as detached

        ready = detached.start(repository, listen, probe, load_timeout)
        _announce(ready, as_json, "`serve down` stops the server")
        return
    with calls.serving(repository, listen, probe, load_timeout) as endpoint:
        _announce(state.describe(endpoint, repository), as_json, "Ctrl-C stops the server")
        server.wait(endpoint)


def _container(repository: Path, release: str, listen: "Listen", only_print: bool) -> None:
    import os
    import shlex
    import shutil

    from serve.server import container

    command = container.command(repository, release, listen)
    if only_print:
        click.echo(shlex.join(command))
        return
    docker = shutil.which(command[0])
    if docker is None:
        raise MachineError("docker is not installed", fix="install it, or print the command with --print")
    os.execv(docker, command)  # noqa: S606 - it takes this command's place, so that Ctrl-C is its own


def _announce(ready: dict[str, Any], as_json: bool, end: str) -> None:
    if as_json:
        emit(document(**ready))
        return
    for model in ready["models"]:
        name, versions = model["name"], ", ".join(map(str, model["versions"]))
        say(f"ready: {name}, version {versions}, at {ready['grpc']} and {ready['http']}")
        if not ready["tls"]:
            repository = ready["repository"]
            where = f"--url {ready['grpc']} --repository {shlex.quote(repository)}"
            click.echo(f"  {program('loadtest')} run {name} {where} --duration 10s")
    say(f"metrics: {ready['metrics']}; log: {ready['log']}; {end}")


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Ask every model of every `serve up` of yours for an answer, and say which give one.

    A server is starting, live or silent. Ends with 5 where none is live, or a model does not answer.

    \b
    Example:
      serve status
    """
    from serve.server import state

    found = [_asked(running) for running in state.everything()]
    if not as_json:
        for server in found:
            click.echo(f"{server['http'] or 'no address yet'}  {server['repository']}  {server['state']}")
            for model in server["models"]:
                click.echo(f"  {model['name']} {', '.join(map(str, model['versions']))}  {model['health']}")
    if error := _fault(found):
        error.partial = {"servers": found}
        raise error
    if as_json:
        emit(document(servers=found))


def _fault(found: list[dict[str, Any]]) -> MachineError | None:
    if not found:
        return MachineError("no server runs", fix="start one with: serve up REPOSITORY")
    for server in found:
        if server["state"] == "starting":
            return MachineError("its server is being started", where=server["repository"], fix="ask again in a while")
        if server["state"] == "silent":
            return MachineError("the server does not answer", where=server["http"], fix="read the server's log")
    dead = [model for server in found for model in server["models"] if model["health"] != "answers"]
    if dead:
        words = f"{dead[0]['name']} does not answer: {dead[0]['health']}"
        return MachineError(words, fix="read the server's log")
    return None


def _asked(running: "Running") -> dict[str, Any]:
    from serve.rollout import rollout
    from serve.server import state
    from serve.watch import probe

    condition = running.condition
    if running.endpoint is None:
        return {"state": condition, "http": None, "repository": str(running.repository), "models": []}
    described = state.describe(running.endpoint, running.repository)
    if condition == "silent":
        return {"state": condition, **described, "models": []}
    health = probe.health(running.endpoint, running.repository)
    models = []
    for model in described["models"]:
        with suppress(ModelatheError):
            # The repository may say another version than the one that this server has.
            model["versions"] = rollout.serving(running.repository, model["name"], running.endpoint)
        models.append({**model, "health": health[model["name"]]})
    return {"state": condition, **described, "models": models}


@click.command()
@click.option("--http-port", type=PORT, help="Which server, where several run.")
@json_option
def down(http_port: int | None, as_json: bool) -> None:
    """Stop a `serve up` of yours; requests in flight are finished first.

    \b
    Example:
      serve down
    """
    from serve.server import detach, state

    found = state.everything()
    chosen = [running for running in found if http_port in (None, running.port)]
    if len(chosen) != 1:
        urls = ", ".join(running.name for running in found)
        raise MachineError(
            "several servers run" if chosen else "no such server runs",
            fix=f"say --http-port; there are {urls}" if urls else "serve status lists them",
        )
    detach.stop(chosen[0])
    if as_json:
        emit(document(stopped=chosen[0].name))
    else:
        click.echo(f"stopped: {chosen[0].name}")
