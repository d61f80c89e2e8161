"""`optimize tensorrt`: from a bundle to what builds and serves it with TensorRT."""

from pathlib import Path

import click

from loadtest.commandline import PATH, document, emit, json_option
from loadtest.errors import LatheError


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--output", required=True, type=PATH, help="The folder to write.")
@click.option("--build/--no-build", default=True, help="Build the engine where this machine can.  [default: build]")
@json_option
def tensorrt(bundle: Path, output: Path, build: bool, as_json: bool) -> None:
    """Check the ONNX file of BUNDLE against TensorRT's rules, and write what builds and serves it.

    Into the folder go build.sh (trtexec), build.py (Polygraphy) and two Triton repositories: plan/ for the engine and
    onnx/ for ONNX Runtime with the TensorRT accelerator. An engine runs only on the GPU model and TensorRT version that
    built it; where there is neither here, only the scripts are written, and nothing of them was run.

    \b
    Example:
      optimize tensorrt build/runs/digits_cnn/4-quantize.static --output build/tensorrt
    """
    from optimize import bundle as bundles
    from optimize.tensorrt import plan

    try:
        written = plan.write(bundles.load(bundle), output, build=build)
    except LatheError as error:
        for finding in error.partial.get("findings", ()) if not as_json else ():
            click.echo(f"{finding['level']}: {finding['node']}: {finding['what']}", err=True)
        raise
    if as_json:
        emit(document(**written.document()))
    else:
        for finding in written.findings:
            click.echo(f"{finding.level}: {finding.node}: {finding.what}; {finding.fix}")
        click.echo(f"written to {output}: {', '.join(written.files)}")
        click.echo("the engine was built" if written.built else f"not run here, because {written.reason}: run build.sh")
