"""The errors that a user can meet, and the exit code that each carries.

Every room has an `errors.py` that hangs its own classes below these::

    ModelatheError                 never raised itself
    ├── UsageError       2     a wrong option, recipe, plan or scenario
    ├── Refused          3     a gate or a threshold said no, or a run that proves nothing
    ├── BadInput         4     a file, model, data set or repository that cannot be used
    │   ├── ModelMissing           the server does not have this model or version
    │   └── RequestRejected        the server calls a request wrong, in its own words
    ├── MachineError     5     the machine or the server: port taken, disk full, server absent or dying
    │   ├── ServerAbsent           nothing answers at the address, or it stopped answering
    │   ├── ServerFault            the server says that it failed
    │   └── ServerNonsense         what answers there is not what a V2 server says
    ├── Interrupted      130   Ctrl-C
    └── Stopped          143   SIGTERM asked the command to end

Of these rooms only this module and `commandline.py` know Click.
"""

import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import IO, Any

import click

_COMMAND = re.compile(r"(^|: |with |; )(pip|sudo|serve|optimize|loadtest|make|python\S*) [a-z-]")


def closest(name: str, known: Sequence[str]) -> str:
    """Return `did you mean 'NAME'? ` for the name of those that is nearest to what was said, or an empty text."""
    return "".join(f"did you mean {near!r}? " for near in difflib.get_close_matches(name, known, 1))


def fitted(text: str, stream: IO[str], indent: str = "  ") -> str:
    """Return a text whose lines break between words where `stream` is a terminal, but for those with a command."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if _COMMAND.search(line) else wrapper.fill(line) for line in text.split("\n"))


class ModelatheError(click.ClickException):
    """A failure with one clear line and the way out.

    Args:
        what: what is wrong, one line, no trailing full stop needed.
        where: the file, layer, model or address that it was found at; empty when `what` says it all.
        fix: what the user can do next, as an instruction.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        self.partial: dict[str, Any] = {}
        """What was found before the failure; stands beside `error` in the `--json` document."""
        super().__init__(what)

    def format_message(self) -> str:
        """Return the place, what is wrong, and the way out in a line of its own."""
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}" + (f"\n  fix: {self.fix}" if self.fix else "")

    __str__ = format_message

    def attribute(self, places: Sequence[str]) -> None:
        """Say that it is about what stands at these places."""
        self.where = ", ".join([*places, *filter(None, (self.where,))])

    def document(self) -> dict[str, Any]:
        """Return the value of `error` in a `--json` document."""
        return {
            "kind": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "fix": self.fix,
            "exit": self.exit_code,
        }

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message to standard error, where Click would print its own."""
        stream = file or sys.stderr
        click.echo(fitted(f"error: {self.format_message()}", stream), file=stream)


class UsageError(ModelatheError):
    """A wrong option, recipe, plan or scenario."""

    exit_code = 2


class Refused(ModelatheError):
    """A gate or threshold said no, or the run is invalid."""

    exit_code = 3


class BadInput(ModelatheError):
    """A file, model, data set or repository cannot be used as it is."""

    exit_code = 4


class MachineError(ModelatheError):
    """The machine or the server failed: port taken, disk full, server absent, dying or answering nonsense."""

    exit_code = 5


class ModelMissing(BadInput):
    """The server does not have this model or this version of it."""


class RequestRejected(BadInput):
    """The server calls a request wrong; `what` holds its own words."""


class ServerAbsent(MachineError):
    """Nothing answers at the address, or it stopped answering."""


class ServerFault(MachineError):
    """The server says that it failed; `what` holds its own words."""


class ServerNonsense(MachineError):
    """Something answers, but not what a V2 server says."""


class Interrupted(ModelatheError):
    """The user pressed Ctrl-C."""

    exit_code = 130

    def show(self, file: IO[Any] | None = None) -> None:
        """Print one word: nothing is wrong."""
        click.echo(self.what, file=file, err=file is None)


class Stopped(ModelatheError):
    """SIGTERM asked this command to end."""

    exit_code = 143
