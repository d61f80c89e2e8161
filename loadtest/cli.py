"""The list of the `loadtest` commands, nothing else."""

import click

from loadtest.commands.capacity import capacity
from loadtest.commands.compare import compare
from loadtest.commands.manifest import manifest
from loadtest.commands.merge import merge
from loadtest.commands.mlperf import mlperf
from loadtest.commands.report import report
from loadtest.commands.run import run
from loadtest.commands.scenario import scenario
from loadtest.commands.selftest import selftest
from modelathe.commandline import CommandGroup, version


@click.group("loadtest", cls=CommandGroup)
@click.version_option(version(), prog_name="modelathe loadtest")
def main() -> None:
    """Drive a Triton endpoint and tell honestly what it holds."""


main.add_command(run)
main.add_command(report)
main.add_command(scenario)
main.add_command(mlperf)
main.add_command(selftest)
main.add_command(compare)
main.add_command(capacity)
main.add_command(merge)
main.add_command(manifest)
