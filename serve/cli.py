"""The list of serve's commands."""

import click

from loadtest.commandline import CommandGroup, version
from serve.commands.install import install
from serve.commands.up import up
from serve.commands.versions import list_, promote, remove, rollback, why


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version(), prog_name="serve")
def main() -> None:
    """Install and run a real Triton server over a model repository."""


main.add_command(install)
main.add_command(up)
for command in (list_, promote, rollback, remove, why):
    main.add_command(command)
