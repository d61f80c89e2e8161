"""The command `optimize`: the list of its commands, nothing else."""

import logging

import click

from modelathe.commandline import CommandGroup, version
from optimize.commands import (
    check,
    compare,
    doctor,
    evaluate,
    init,
    inspect,
    method,
    methods,
    run,
    schema,
    sensitivity,
    show,
    tensorrt,
)


@click.group("optimize", cls=CommandGroup)
@click.version_option(version(), prog_name="modelathe optimize")
def main() -> None:
    """Turn a trained PyTorch model into a smaller, faster one behind a Triton endpoint, with proof."""
    # Loading torchao, as transformers does, warns of kernels for other GPUs and of torch's future.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


main.add_command(run.run)
for family in method.FAMILIES:
    main.add_command(method.command(family))
for command in (
    init.init,
    check.check,
    evaluate.evaluate,
    compare.compare,
    show.show,
    show.runs,
    sensitivity.sensitivity,
    inspect.inspect,
    tensorrt.tensorrt,
    methods.methods,
    methods.presets,
    schema.schema,
    doctor.doctor,
):
    main.add_command(command)
