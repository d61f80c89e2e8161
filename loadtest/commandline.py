"""What all three commands share: exit codes, one line per failure, and `--json` that prints one document.

A command of ours is a Click command below a `CommandGroup`. It prints its result with `emit`; everything that goes
wrong travels up as an exception and is turned into an exit code here and nowhere else.
"""

import errno
import importlib.metadata
import json
import math
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console

from loadtest.errors import BadInput, LatheError, MachineError, Stopped, UsageError

FORMAT = 1
INTERRUPTED = 130

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout, nothing else.")


def version() -> str:
    """Return the version of lathe that is installed, or `unknown` in a tree that was never installed."""
    try:
        return importlib.metadata.version("lathe")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def document(**values: Any) -> dict[str, Any]:
    """Return a JSON document: `format` and `lathe` (version) first, then `values`."""
    return {"format": FORMAT, "lathe": version(), **values}


def emit(values: dict[str, Any]) -> None:
    """Print a document to standard output as JSON; NaN and infinity are not JSON and become null."""
    click.echo(json.dumps(_finite(values), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def reporting() -> Iterator[Callable[[str, float], None]]:
    """Yield a function `(text, fraction)` that shows on standard error what goes on.

    On a terminal the current text stands beside a spinner and a finished one leaves a line with its seconds; elsewhere
    every text is a plain line. The part of a text before its first colon names the stage.
    """
    console = Console(stderr=True, highlight=False)
    current, begun = "", 0.0

    def finish() -> None:
        if current and console.is_terminal:
            console.print(f"[green]done[/] {current} [dim]{time.monotonic() - begun:.1f} s[/]")

    with console.status("") if console.is_terminal else nullcontext() as status:

        def report(text: str, fraction: float) -> None:
            nonlocal current, begun
            stage = text.partition(":")[0]
            if stage != current:
                finish()
                current, begun = stage, time.monotonic()
            if status is None:
                console.print(text, markup=False, soft_wrap=True)
            else:
                status.update(f"{text} [dim]{fraction:.0%}[/]" if 0 < fraction < 1 else text)

        yield report
        finish()


class CommandGroup(click.Group):
    """A Click group that ends with the exit codes of `loadtest.errors`, never with a traceback on the terminal."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **_: Any
    ) -> NoReturn:
        """Run the command that `args` (default: the process's own) names and exit."""
        args = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in args
        signal.signal(signal.SIGTERM, _stop)
        try:
            code = super().main(args, prog_name=prog_name, standalone_mode=False)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            code = INTERRUPTED
        except BaseException as error:
            if isinstance(error, SystemExit):
                raise
            code = _report(error, as_json)
        sys.exit(code if isinstance(code, int) else 0)


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    # A second SIGTERM must not cut the clean-up that the first one started.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped("stopped by SIGTERM")


def _report(error: BaseException, as_json: bool) -> int:
    failure = _translate(error)
    if as_json:
        emit({**document(**failure.partial), "error": failure.document()})
    failure.show()
    return failure.exit_code


def _translate(error: BaseException) -> LatheError:
    """Turn any exception into one of ours; what nobody foresaw is a bug, its traceback kept in a named file."""
    if isinstance(error, LatheError):
        return error
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message(), fix="run the command with --help")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError("the disk is full", where=str(error.filename or ""), fix="free some space and run it again")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BadInput("cannot be written or read", where=str(error.filename or ""), fix="check its permissions")
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return MachineError(f"the package {package} is not installed", fix="pip install 'lathe[all]'")
    return LatheError(
        f"a bug in lathe: {type(error).__name__}: {error}",
        fix=f"please report it with the traceback in {_keep_traceback(error)}",
    )


def _keep_traceback(error: BaseException) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="lathe-traceback-", suffix=".txt", delete=False) as file:
        file.writelines(traceback.format_exception(error))
    return file.name
