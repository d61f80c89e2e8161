"""`optimize prune`, `distill`, `quantize` and `export`: one step alone, its options read from the method's config."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click
from pydantic.fields import FieldInfo

from modelathe.commandline import PATH, document, emit, json_option, quiet_option, reporting
from optimize.commands.options import overlap_option
from optimize.methods.table import METHODS, NAMES
from serve.config.target import Device, Runtime

if TYPE_CHECKING:
    from optimize.runs.recipe import Recipe
    from serve.config.target import Target

FAMILIES = tuple(dict.fromkeys(method.name.partition(".")[0] for method in METHODS.values()))
BATCHES = "1,32"
DEFAULTS = {"quantize": "dynamic"}
"""The method of a family that asks least of the workload, where the family has several."""
EXAMPLES = {"quantize": " --method static"}
"""What the example that comes with modelathe needs: most of its weights are those of convolutions."""


def command(family: str) -> click.Command:
    """Return the command of one family of methods."""
    names = [name.partition(".")[2] for name in NAMES if name.startswith(f"{family}.")]
    default = DEFAULTS.get(family, names[0])

    def call(
        source: str,
        method: str,
        output: Path,
        seed: int,
        batch: str,
        device: str,
        runtime: str,
        allow_overlap: bool,
        as_json: bool,
        **values: Any,
    ) -> None:
        from optimize.runs import follower
        from optimize.train import processes

        if processes.rank():
            return follower.follow()
        given = {key: value for key, value in values.items() if value not in (None, ())}
        recipe = _recipe(f"{family}.{method}", given, seed, _target(batch, device, runtime))
        _run(recipe, source, output, allow_overlap, as_json)

    call.__doc__ = f"""Run one {family} step on SOURCE and save the result as a bundle.

    SOURCE is a workload (path/to/file.py:function) or a bundle. Options that a method does not take are refused.

    \b
    Example:
      optimize {family} digits_cnn.py{EXAMPLES.get(family, "")} --output build/{family}
    """
    decorated: Callable[..., None] = quiet_option(json_option(call))
    for decorator in reversed([*_common(names, default), *_options(family)]):
        decorated = decorator(decorated)
    return click.command(family)(click.argument("source")(decorated))


def _common(names: list[str], default: str) -> list[Callable[[Any], Any]]:
    return [
        click.option("--method", type=click.Choice(names), default=default, show_default=True, help="The method."),
        click.option("--output", required=True, type=PATH, help="The bundle to write."),
        click.option(
            "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seeds every random choice."
        ),
        click.option("--batch", default=BATCHES, show_default=True, help="Batch sizes to measure at."),
        click.option(
            "--device", type=click.Choice(get_args(Device)), default="cpu", show_default=True, help="Where it will run."
        ),
        click.option(
            "--runtime",
            type=click.Choice(get_args(Runtime)),
            default="onnxruntime",
            show_default=True,
            help="What will run it there.",
        ),
        overlap_option,
    ]


def _options(family: str) -> list[Callable[[Any], Any]]:
    """Return one option for each field of the family's methods, with the choices and explanations of all of them."""
    methods = {name.partition(".")[2]: config for name, config in NAMES.items() if name.startswith(f"{family}.")}
    hints: dict[str, Any] = {}
    texts: dict[str, dict[str, list[str]]] = {}
    for method, config in methods.items():
        for entry in fields(config):
            hint = get_type_hints(config)[entry.name]
            if get_origin(hint) is Literal:
                hint = Literal[(*get_args(hints.get(entry.name)), *get_args(hint))]
            hints[entry.name] = hint
            texts.setdefault(entry.name, {}).setdefault(_explained(entry.default), []).append(method)
    return [_option(name, hint, _joined(texts[name], list(methods))) for name, hint in hints.items()]


def _explained(default: Any) -> str:
    information = default if isinstance(default, FieldInfo) else None
    description = (information.description if information else "") or ""
    value = information.default if information else default
    return f"{description}  [default: {value}]" if value not in ("", (), None) else description


def _joined(texts: dict[str, list[str]], methods: list[str]) -> str:
    """Return one explanation, which says whose it is unless it is that of every method."""
    if list(texts.values()) == [methods]:
        return next(iter(texts))
    return " ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())


def _option(name: str, hint: Any, text: str) -> Callable[[Any], Any]:
    flag = f"--{name.replace('_', '-')}"
    if hint is bool or bool in get_args(hint):
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    if get_origin(hint) is Literal:
        return click.option(flag, name, type=click.Choice(get_args(hint)), help=text)
    if get_origin(hint) is tuple:
        return click.option(flag, name, multiple=True, help=f"{text} May be given again.")
    kind = next((kind for kind in (int, float) if hint is kind or kind in get_args(hint)), str)
    return click.option(flag, name, type=kind, help=text)


def _target(batch: str, device: str, runtime: str) -> "Target":
    from optimize.runs.recipe import build
    from serve.config.target import Target

    sizes = [int(size) if size.strip().isdigit() else size for size in batch.split(",")]
    made: Target = build(Target, {"device": device, "runtime": runtime, "batch": sizes}, "--device, --runtime, --batch")
    return made


def _recipe(name: str, values: dict[str, Any], seed: int, target: "Target") -> "Recipe":
    """Return the recipe of one step."""
    from optimize.runs.recipe import Recipe, build

    return Recipe((build(NAMES[name], values, name),), seed, target=target)


def _run(recipe: "Recipe", source: str, output: Path, allow_overlap: bool, as_json: bool) -> None:
    from optimize.report import table
    from optimize.runs import follower, pipeline
    from optimize.runs import open as sources
    from optimize.runs.run import Terms

    with follower.leading(), reporting() as progress:
        loaded = sources.load(source)
        terms = Terms(allow_overlap=allow_overlap)
        element = pipeline.apply_one(recipe, loaded, output, terms=terms, progress=progress)
    if as_json:
        emit(document(**element, bundle=str(output)))
    else:
        table.step(element, str(output))
