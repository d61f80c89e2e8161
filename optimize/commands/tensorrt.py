"""`optimize tensorrt`: from a bundle to what builds and serves it with TensorRT."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelathe.commandline import PATH, document, emit, json_option, say
from modelathe.errors import ModelatheError
from serve.tensorrt.capability import CAPABILITIES, USUAL

if TYPE_CHECKING:
    from optimize.tensorrt.plan import Written


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--output", required=True, type=PATH, help="The folder to write.")
@click.option("--build/--no-build", default=True, help="Build the engine where this machine can.  [default: build]")
@click.option(
    "--capability",
    "capabilities",
    multiple=True,
    type=click.Choice(list(CAPABILITIES)),
    default=USUAL,
    show_default=True,
    help="Compute capability that the compiler builds for; may be repeated. current is the GPU of this machine.",
)
@click.option("--compile/--no-compile", "ask", default=True, help="Ask NVIDIA's compiler.  [default: compile]")
@click.option(
    "--partial",
    is_flag=True,
    help="Write onnx/ alone, for a graph with operators that TensorRT lacks: ONNX Runtime computes those.",
)
@json_option
def tensorrt(
    bundle: Path,
    output: Path,
    build: bool,
    capabilities: tuple[str, ...],
    ask: bool,
    partial: bool,
    as_json: bool,
) -> None:
    """Check the ONNX file of BUNDLE against TensorRT, and write what builds and serves it.

    NVIDIA's own parser and builder are asked, those of TensorRT for RTX, which need no GPU (the
    extra tensorrt); without them, rules of ours are checked. Their engine goes to rtx/: it runs on RTX GPUs in
    TensorRT-RTX, which knows no 9.0 (H100) and no 10.0 (B200), and not in Triton. Everything that they say goes to
    OUTPUT.compiler.log.

    Into the folder go build.sh (trtexec), build.py (Polygraphy) and two Triton repositories: plan/ for the engine and
    onnx/ for ONNX Runtime with the TensorRT accelerator. Triton's engine runs only on the GPU model and TensorRT
    version that built it; where there is neither here, only the scripts are written, and nothing of them was run.

    \b
    Example:
      optimize tensorrt build/runs/digits_cnn/latest/5-quantize.static --output build/tensorrt
    """
    from optimize.step import bundle as bundles
    from optimize.tensorrt import plan

    try:
        asked = capabilities if ask else ()
        written = plan.write(bundles.load(bundle), output, build=build, capabilities=asked, partial=partial)
    except ModelatheError as error:
        for finding in error.partial.get("findings", ()) if not as_json else ():
            click.echo(f"{finding['level']}: {finding['node']}: {finding['what']}", err=True)
        raise
    if as_json:
        emit(document(**written.document()))
        return
    for finding in written.findings:
        say(f"{finding.level}: {finding.node}: {finding.what}; {finding.fix}")
    for line in _compiled(written):
        click.echo(line)
    click.echo(f"written to {output}: {', '.join(written.files)}")
    if not partial:
        click.echo("the engine was built" if written.built else f"not run here, because {written.reason}: run build.sh")


def _compiled(written: "Written") -> Iterator[str]:
    """Yield what the compiler made of the graph."""
    found = written.compiled
    if written.taken is not None:
        nodes, all_nodes, parts = written.taken
        yield f"TensorRT takes {nodes} of {all_nodes} nodes, in {parts} part{'s' * (parts != 1)}"
    elif found is None:
        yield f"not compiled, because {written.unasked}"
    if found is None:
        return
    yield found.told()
    if wide := found.wide():
        yield wide
    yield f"what the compiler said: {found.log}"
