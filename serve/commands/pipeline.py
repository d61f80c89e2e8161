"""`serve pipeline text` and `serve pipeline image`."""

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from loadtest.plan.options import Number
from modelathe.commandline import PATH, CommandGroup, document, emit, json_option, quiet_option, reporting
from modelathe.errors import UsageError
from modelathe.interpreter import program
from serve.commands.versions import repository_option

if TYPE_CHECKING:
    from serve.repository.staging import Version

name_option = click.option("--name", help="The pipeline's name.  [default: MODEL_text or MODEL_image]")
check_option = click.option("--check/--no-check", default=True, help="Let a throw-away server answer through it first.")


@click.group(cls=CommandGroup)
def pipeline() -> None:
    """Put models before and behind a published model, so that applications send text or image files.

    \b
    The parts run in Triton's Python backend. `serve install` brings what they need;
    in NVIDIA's container that takes: pip install tokenizers pillow

    \b
    Example:
      serve pipeline text embedder --tokenizer tokenizer.json
    """


@pipeline.command()
@click.argument("model")
@click.option("--tokenizer", type=PATH, required=True, help="The tokenizer.json that belongs to MODEL.")
@name_option
@repository_option
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help="Where a text is cut.  [default: 128, or what MODEL or its buckets say]",
)
@click.option(
    "--style",
    type=click.Choice(["ensemble", "bls"]),
    default="ensemble",
    show_default=True,
    help="An ensemble with a tokenizer model, or one model that calls MODEL.",
)
@check_option
@quiet_option
@json_option
def text(model: str, as_json: bool, **options: Any) -> None:
    """Text in, the outputs of MODEL out: strings `text` [batch, 1] are tokenized and padded on the way.

    Rows are padded to few lengths, so that texts of similar lengths share a batch: the buckets in MODEL's settings,
    else powers of two from 16 on. In NVIDIA's container: pip install tokenizers.

    \b
    Example:
      serve pipeline text embedder --tokenizer tokenizer.json --max-tokens 256
    """
    from serve.pipelines.text import text as build

    _publish(build, model, options, as_json)


@pipeline.command()
@click.argument("model")
@name_option
@repository_option
@click.option("--size", help="HEIGHTxWIDTH in pixels, as in 28x28.  [default: MODEL's own]")
@click.option("--mode", type=click.Choice(["gray", "rgb"]), help="What it sees.  [default: by its channels]")
@click.option("--mean", default="0", show_default=True, help="Of the scaled pixels; one value, or one a channel.")
@click.option("--std", default="1", show_default=True, help="Likewise, as in 0.229,0.224,0.225.")
@click.option(
    "--scale",
    type=Number(min=0, min_open=True),
    help="What pixels are divided by first.  [default: 255, or 1 for uint8]",
)
@click.option(
    "--scores",
    type=click.Choice(["logits", "probabilities"]),
    help="What MODEL answers with.  [default: probabilities if its last operator is a softmax or sigmoid, else logits]",
)
@click.option("--labels", type=PATH, help="Text file with the name of a class a line.  [default: their indices]")
@check_option
@quiet_option
@json_option
def image(model: str, size: str | None, mean: str, std: str, as_json: bool, **options: Any) -> None:
    """JPEG and PNG files in, `label` and `score` of MODEL out: each is decoded, turned upright, resized and normalized.

    MODEL answers with logits [batch, classes], whose softmax is the score, or with probabilities, which stay as they
    are. In NVIDIA's container: pip install pillow.

    \b
    Example:
      serve pipeline image digits_cnn --labels labels.txt
    """
    from serve.pipelines.image import Pixels
    from serve.pipelines.image import image as build

    mode, scale = options.pop("mode"), options.pop("scale")
    pixels = Pixels(_size(size), mode, _numbers("--mean", mean), _numbers("--std", std), scale)
    _publish(build, model, options | {"pixels": pixels}, as_json)


def _size(text: str | None) -> tuple[int, int] | None:
    try:
        height, width = map(int, text.split("x")) if text else (1, 1)
    except ValueError:
        raise UsageError(f"--size {text}: not a height and a width", fix="write it as in --size 28x28") from None
    return (height, width) if text else None


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise UsageError(f"{option} {text}: not numbers", fix=f"write it as in {option} 0.5,0.5,0.5") from None


def _publish(build: "Callable[..., list[Version]]", model: str, options: dict[str, Any], as_json: bool) -> None:
    from serve.pipelines.publish import called
    from serve.repository import tree as repositories
    from serve.rollout import rollout

    place = options.pop("repository")
    with reporting() as report:
        if options["check"]:
            report("answering through it in a throw-away server", 0.0)
        versions = build(called(place, model), **options)
    whole = versions[-1]
    live = whole.number in repositories.live(place, whole.model)
    url = rollout.promote(place, whole.model, whole.number).url if live else None
    if as_json:
        parts = [{"model": part.model, "number": part.number, "digest": part.digest} for part in versions]
        kind = "live" if live else "staged"
        emit(document(model=whole.model, calls=model, state=kind, parts=parts, url=url))
        return
    for part in versions:
        loaded = f", loaded at {url}" if url else ""
        click.echo(f"{'live' if live else 'staged'}: {part.model} version {part.number}{loaded}")
    if not live:
        where = shlex.quote(str(place))
        click.echo(f"  {program('serve')} promote {whole.model} {whole.number} --repository {where}")
