"""`serve install`."""

from pathlib import Path

import click

from modelathe.commandline import PATH, document, emit, json_option, quiet, quiet_option


@click.command()
@click.option("--prefix", type=PATH, help="Folder of the environment (default: $MODELATHE_SERVER).")
@click.option("--gpu", is_flag=True, help="Install onnxruntime with its CUDA provider.")
@click.option("--with", "also", multiple=True, type=click.Choice(["openvino"]), help="Install this runtime too.")
@quiet_option
@json_option
def install(prefix: Path | None, gpu: bool, also: tuple[str, ...], as_json: bool) -> None:
    """Install the Triton server into an environment of its own; does nothing when it is there.

    \b
    Example:
      serve install
    """
    import serve.server.install

    place = serve.server.install.install(
        prefix,
        progress=lambda line: None if quiet() else click.echo(line, err=True),
        gpu=gpu,
        openvino="openvino" in also,
    )
    if as_json:
        made = serve.server.install.environment(place)
        emit(document(prefix=place, gpu=made.gpu, openvino=made.openvino))
    else:
        click.echo(f"server ready to run: {place}")
