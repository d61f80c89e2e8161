"""The list of serve's commands."""

import click

from modelathe.commandline import CommandGroup, version
from serve.commands.add import add
from serve.commands.canary import canary
from serve.commands.check import check
from serve.commands.clients import clients
from serve.commands.doctor import doctor
from serve.commands.fleet.deploy import deploy
from serve.commands.fleet.plan import plan
from serve.commands.fleet.tune import tune
from serve.commands.install import install
from serve.commands.monitoring import monitoring
from serve.commands.pipeline import pipeline
from serve.commands.proxy import proxy
from serve.commands.stub import stub
from serve.commands.up import down, status, up
from serve.commands.versions import list_, promote, remove, rollback, show
from serve.commands.watch import watch
from serve.commands.why import why


@click.group("serve", cls=CommandGroup)
@click.version_option(version(), prog_name="modelathe serve")
def main() -> None:
    """Install and run a real Triton server over a model repository."""


for command in (
    install,
    doctor,
    up,
    status,
    down,
    watch,
    monitoring,
    proxy,
    deploy,
    clients,
    stub,
    add,
    pipeline,
    check,
    tune,
    plan,
    list_,
    show,
    why,
    canary,
    promote,
    rollback,
    remove,
):
    main.add_command(command)
