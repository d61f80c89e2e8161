"""`optimize doctor`: what this machine has, what it lacks, and the command that installs it."""

import click

from modelathe.commandline import json_option
from serve.commands.doctor import report


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check what modelathe works with: packages, ONNX Runtime's providers, the server, the CPU, GPU and TensorRT.

    Ends with 0 where nothing is missing for work on a CPU, else with 5.

    \b
    Example:
      optimize doctor
    """
    from optimize.machine import doctor as doctors
    from serve.config import releases

    error = report(doctors.checks(), as_json, images=releases.TENSORRT)
    if error:
        raise error
