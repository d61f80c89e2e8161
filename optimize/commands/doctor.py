"""`optimize doctor`: what this machine has, what it lacks, and the command that installs it."""

from dataclasses import asdict

import click

from loadtest.commandline import document, emit, json_option


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check what lathe works with: packages, ONNX Runtime's providers, the server, the CPU, GPU and TensorRT.

    Ends with 0 where nothing is missing for work on a CPU, else with 5.

    \b
    Example:
      optimize doctor
    """
    from loadtest.errors import MachineError
    from optimize import doctor as doctors
    from serve import releases

    found = doctors.checks()
    faults = doctors.broken(found)
    result = {"checks": [asdict(check) for check in found], "images": releases.TENSORRT}
    if not as_json:
        for check in found:
            mark = "ok     " if check.ok else "BROKEN " if check.required else "absent "
            click.echo(f"{mark} {check.name:24} {check.found or '-'}")
            if not check.ok:
                click.echo(f"{'':33}{check.wanted}" + (f"; {check.fix}" if check.fix else ""))
    elif not faults:
        emit(document(**result))
    if faults:
        error = MachineError(
            f"{len(faults)} things that work on a CPU needs: {', '.join(check.name for check in faults)}",
            fix=faults[0].fix,
        )
        error.partial = result
        raise error
