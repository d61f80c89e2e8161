"""The list of the `loadtest` commands, nothing else."""

import click

from loadtest.commandline import CommandGroup, version
from loadtest.commands.manifest import manifest
from loadtest.commands.merge import merge
from loadtest.commands.report import report
from loadtest.commands.run import run


@click.group(cls=CommandGroup)
@click.version_option(version())
def main() -> None:
    """Drive a Triton endpoint and tell honestly what it holds."""


main.add_command(run)
main.add_command(report)
main.add_command(merge)
main.add_command(manifest)
