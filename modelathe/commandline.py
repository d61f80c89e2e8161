"""What all three commands share: exit codes, one line per failure, and `--json` that prints one document.

A command of ours is a Click command below a `CommandGroup`. It prints its result with `emit`; everything that goes
wrong travels up as an exception and is turned into an exit code here and nowhere else.
"""

import errno
import importlib.metadata
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn, cast

import click
from rich.console import Console
from rich.markup import escape

from modelathe import defaults, notebook
from modelathe.errors import BadInput, Interrupted, MachineError, ModelatheError, Stopped, UsageError, fitted

FORMAT = 1
_ROOMS = ("modelathe", "optimize", "serve", "loadtest")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)

# Click would call a file that may not be read a wrong option; opening it says what it is.
PATH = click.Path(path_type=Path, readable=False)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    allow_from_autoenv=False,  # it is looked for before the options are read
    help="Print one JSON document to stdout, nothing else.",
)


_QUIET = "modelathe.quiet"


quiet_option = click.option(
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=lambda context, _option, value: context.meta.update({_QUIET: value}),
    help="Print no progress; results and errors still.",
)


def quiet() -> bool:
    """Return whether the command that runs was told to print no progress."""
    return bool((context := click.get_current_context(silent=True)) and context.meta.get(_QUIET))


def say(text: str, indent: str = "  ", err: bool = False) -> None:
    """Print a text, on a terminal broken between words."""
    click.echo(fitted(text, sys.stderr if err else sys.stdout, indent), err=err)


def version() -> str:
    """Return the version of modelathe that is installed, or `unknown` in a tree that was never installed."""
    try:
        return importlib.metadata.version("modelathe")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def install_line(extra: str) -> str:
    """Return the line that installs an extra from where modelathe itself was installed from."""
    try:
        told = importlib.metadata.distribution("modelathe").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return f"pip install -e '.[{extra}]'"
    place = f" @ {json.loads(told)['url']}" if told else ""
    return f"pip install 'modelathe[{extra}]{place}'"


def document(**values: Any) -> dict[str, Any]:
    """Return a JSON document: `format` and `modelathe` (version) first, then `values`."""
    return {"format": FORMAT, "modelathe": version(), **values}


def emit(values: dict[str, Any]) -> None:
    """Print a document to standard output as JSON; NaN and infinity are not JSON and become null."""
    text = json.dumps(finite(values), indent=2, default=str, allow_nan=False)
    if isinstance(sys.stdout, _Aside):
        sys.stdout.emitted = True
        click.echo(text, file=sys.stdout.output)
    else:
        click.echo(text)


class _Aside:
    """Standard output while one JSON document is owed: what a user's code prints goes to standard error instead."""

    def __init__(self, output: IO[str]) -> None:
        self.output, self.emitted = output, False

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def finite(value: Any) -> Any:
    """Return a document as JSON can hold it: NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def reporting(silent: bool = False) -> Iterator[Callable[[str, float], None]]:
    """Yield a function `(text, fraction)` that shows on standard error what goes on, unless `silent` or `quiet`.

    On a terminal the current text stands beside a spinner and a finished one leaves a line with its seconds; a
    notebook's cell shows the same, redrawn; elsewhere every text is a plain line. The part of a text before its first
    colon names the stage. A fraction between 0 and 1 is what is done of it; it is shown with the time that the rest
    takes at the speed so far.
    """
    if silent or quiet():
        yield lambda _text, _fraction: None
        return
    if redraw := notebook.redrawn():
        stages = notebook.Stages(redraw)
        yield stages.report
        stages.finish()
        return
    console = Console(stderr=True, highlight=False)
    current, begun, first = "", 0.0, 0.0

    def finish() -> None:
        if current and console.is_terminal:
            console.print(f"[green]done[/] {current} [dim]{time.monotonic() - begun:.1f} s[/]")

    with console.status("") if console.is_terminal else nullcontext() as status:

        def report(text: str, fraction: float) -> None:
            nonlocal current, begun, first
            stage = text.partition(":")[0]
            if stage != current:
                finish()
                current, begun, first = stage, time.monotonic(), fraction
            done = f" ({how_far(fraction, first, time.monotonic() - begun)})" if 0 < fraction < 1 else ""
            if status is None:
                console.print(f"{text}{done}", markup=False, soft_wrap=True)
            else:
                status.update(f"{escape(text)}[dim]{done}[/]")

        yield report
        finish()


def how_far(fraction: float, first: float, seconds: float) -> str:
    """Return `40 %, 12 s left`: what is done, `first` of it before these seconds, and the time of the rest."""
    share = f"{fraction:.0%}".replace("%", " %")
    if fraction <= first:
        return share
    left = seconds * (1 - fraction) / (fraction - first)
    return f"{share}, {left:.0f} s left" if left < 120 else f"{share}, {left / 60:.0f} min left"


@contextmanager
def _one_document() -> Iterator[_Aside]:
    """Keep everything but `emit` from standard output, also what libraries and child processes print."""
    try:
        number = sys.stdout.fileno()
    except OSError:  # a notebook's or a test's stand-in, which has no descriptor
        aside = _Aside(sys.stdout)
        with redirect_stdout(cast(IO[str], aside)):
            yield aside
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(number), "w", encoding="utf-8") as output:
        os.dup2(2, number)
        try:
            aside = _Aside(output)
            with redirect_stdout(cast(IO[str], aside)):
                yield aside
        finally:
            output.flush()
            os.dup2(output.fileno(), number)


class CommandGroup(click.Group):
    """A Click group that ends with the exit codes of `modelathe.errors`, never with a traceback on the terminal."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.setdefault("context_settings", {"help_option_names": ["-h", "--help"], "max_content_width": 100})
        super().__init__(*args, **settings)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **_: Any
    ) -> NoReturn:
        """Run the command that `args` (default: the process's own) names and exit."""
        args = list(sys.argv[1:] if args is None else args)
        signal.signal(signal.SIGTERM, _stop)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A terminal that has no × is not worth a failure.
                stream.reconfigure(errors="replace")
        with _one_document() if "--json" in args else nullcontext() as aside:
            try:
                defaults.guard(self)
                defaults.attribute(self)
                stated: dict[str, Any] = {"default_map": defaults.read(self)}
                stated["auto_envvar_prefix"] = (self.name or "").upper()
                code = super().main(args, prog_name=prog_name, standalone_mode=False, **stated)
            except SystemExit:
                raise
            except BaseException as error:
                failure = _translate(error)
                if aside and not aside.emitted:
                    emit({**document(**failure.partial), "error": failure.document()})
                failure.show()
                code = failure.exit_code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; one whose reader has left, as in `| head`, ends as if by SIGPIPE."""
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, SystemExit) as error:
            # Click and Rich would both make a 1 of it, which is a bug of ours.
            if not any(isinstance(link, BrokenPipeError) for link in _chain(error)):
                raise
            output = sys.stdout.output if isinstance(sys.stdout, _Aside) else sys.stdout
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), output.fileno())
            sys.exit(128 + signal.SIGPIPE)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse to be called without a command, unless a shell only asks which there are."""
        if not args and not ctx.resilient_parsing:
            raise UsageError("no command was given", fix=f"{ctx.command_path} --help lists them")
        return super().parse_args(ctx, args)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which unwinds everything as Ctrl-C does: no `except Exception` on the way may swallow it."""


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    # A second SIGTERM must not cut the clean-up that the first one started.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def _translate(error: BaseException) -> ModelatheError:
    """Turn any exception into one of ours; what nobody foresaw is a bug, its traceback kept in a named file."""
    for link in _chain(error):
        # Whatever a library or a clean-up made of it, the user's wish was the cause.
        if isinstance(link, _Terminated):
            return Stopped("stopped by SIGTERM", fix="run it again")
        if isinstance(link, KeyboardInterrupt):
            return Interrupted("interrupted", fix="run it again")
    if isinstance(error, click.Abort) and error.__cause__ is not None:
        error = error.__cause__  # Click makes this of an EOFError
    if isinstance(error, ModelatheError):
        return error
    if isinstance(error, click.ClickException):
        known = isinstance(error, click.BadParameter) and error.ctx and error.param
        place = defaults.origin(error.ctx, error.param) if known else ""  # type: ignore[attr-defined]
        return UsageError(error.format_message(), where=place, fix="run the command with --help")
    if isinstance(error, OSError) and (foreseen := _translate_os(error)):
        return foreseen
    if isinstance(error, MemoryError):
        return MachineError("there is not enough memory", fix="use smaller batches or inputs")
    if isinstance(error, ImportError) and (package := (error.name or "").partition(".")[0]) not in ("", *_ROOMS):
        missing = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error}"
        return MachineError(f"the package {package} {missing}", fix=install_line("optimize"))
    return ModelatheError(f"a bug in modelathe: {type(error).__name__}: {error}", fix=_keep_traceback(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _translate_os(error: OSError) -> ModelatheError | None:
    where, reason = str(error.filename or ""), error.strerror or str(error)
    if error.errno in _FULL:
        return MachineError("the disk is full", where=where, fix="free some space and run it again")
    if error.errno in _EXHAUSTED:
        return MachineError(f"the machine says: {reason}", where=where, fix="look after the machine and run it again")
    if error.errno in _FORBIDDEN:
        return BadInput("cannot be written or read", where=where, fix="check its permissions")
    return BadInput(f"cannot be used: {reason}", where=where, fix="check the path") if where else None


def _keep_traceback(error: BaseException) -> str:
    """Write the traceback to a file and return what to do with it."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="modelathe-traceback-", suffix=".txt", delete=False) as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return f"please report it; it was raised at {traceback.extract_tb(error.__traceback__)[-1]}"
    return f"please report it with the traceback in {file.name}"
