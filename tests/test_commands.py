"""The three commands as programs: help, light imports, a base install, and one clear end for whatever goes wrong."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import click
import pytest
from pydantic import ValidationError

from loadtest import cli as loadtest_cli
from modelathe.commandline import CommandGroup, document, emit, install_line, json_option
from modelathe.errors import BadInput
from optimize import cli as optimize_cli
from optimize.commands.method import FAMILIES
from optimize.methods.table import NAMES
from serve import cli as serve_cli

GROUPS = {"optimize": optimize_cli.main, "serve": serve_cli.main, "loadtest": loadtest_cli.main}
HEAVY = ("torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "safetensors", "torch_pruning", "plotly")
EXTRA = ("torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "safetensors", "torch_pruning", "tomli_w")


@pytest.mark.parametrize(("room", "name"), [(room, name) for room, group in GROUPS.items() for name in group.commands])
def test_every_command_has_help_with_an_example(room: str, name: str) -> None:
    command = GROUPS[room].commands[name]
    with click.Context(command, info_name=f"{room} {name}") as context:
        text = command.get_help(context)
    assert "Example" in text
    assert f"{room} {name} " in text.partition("Example")[2].replace("\n", " ") + " "
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, f"{option.name} has no help"


def commands(group: click.Command) -> Iterator[click.Command]:
    """Yield a command and all commands below it."""
    yield group
    for command in getattr(group, "commands", {}).values():
        yield from commands(command)


@pytest.mark.parametrize("room", GROUPS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_option_that_takes_a_number_takes_what_is_none(room: str, value: str) -> None:
    asked = 0
    for command in commands(GROUPS[room]):
        for option in command.params if command.name not in FAMILIES else ():  # their methods' fields refuse them
            with contextlib.suppress(click.BadParameter):
                if isinstance(option.type.convert("0.5", option, None), float):
                    asked += 1
                    with pytest.raises(click.BadParameter):
                        print(command.name, option.name, option.type.convert(value, option, None))
    assert asked


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_field_of_a_method_takes_a_number_that_is_none(value: float) -> None:
    asked = 0
    for config in NAMES.values():
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            if float in (hints[field.name], *get_args(hints[field.name])):
                asked += 1
                with pytest.raises(ValidationError):
                    print(config, field.name, config(**{field.name: value}))
    assert asked


@pytest.mark.parametrize("room", GROUPS)
def test_help_imports_nothing_heavy(room: str) -> None:
    code = (
        "import sys, contextlib, io\n"
        f"from {room}.cli import main\n"
        "for name in [None, *main.commands]:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main([name, '--help'] if name else ['--help'])\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("room", GROUPS)
def test_python_m_works(room: str) -> None:
    done = subprocess.run([sys.executable, "-m", room, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: python -m {room} ")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("optimize", "run", "x.py:w", "--recipe", "r.toml"), 5, install_line("optimize")),
        (("optimize", "evaluate", "x.py:w"), 5, install_line("optimize")),
        (("serve", "up", "no/such/repository"), 4, "does not exist"),
        (("loadtest", "report", "no-such-file.jsonl"), 4, "no such file"),
    ],
)
def test_a_base_install_names_the_extra(args: tuple[str, ...], code: int, said: str) -> None:
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({EXTRA}))\n"
        f"from {args[0]}.cli import main\n"
        f"main({[*args[1:], '--json']})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    error = json.loads(done.stdout)["error"]
    assert said in error["what"] + error["fix"]
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_a_command_is_imported() -> None:
    code = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'optimize.commands':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from optimize.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def terminated_inside_a_library() -> None:
    """As exporters do: every exception is caught and becomes another one."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("SIGTERM was not raised")
    except Exception as error:
        raise BadInput("the library failed") from error


def interrupted_inside_a_library() -> None:
    try:
        raise KeyboardInterrupt
    except BaseException as error:
        raise RuntimeError("the library was interrupted") from error


def fail_in_the_clean_up() -> None:
    try:
        raise KeyboardInterrupt
    finally:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")


FAILURES: dict[str, tuple[Callable[[], None], int, str, str]] = {
    "ours": (raising(BadInput("is bad", where="here", fix="mend it")), 4, "BadInput", "is bad"),
    "disk full": (raising(OSError(errno.ENOSPC, "No space left", "/data/x")), 5, "MachineError", "disk is full"),
    "read-only": (raising(OSError(errno.EROFS, "Read-only", "/data/x")), 4, "BadInput", "cannot be written or read"),
    "no permission": (raising(PermissionError(errno.EACCES, "no", "/data/x")), 4, "BadInput", "cannot be written"),
    "a folder": (raising(IsADirectoryError(errno.EISDIR, "Is a directory", "/data")), 4, "BadInput", "Is a directory"),
    "a long name": (raising(OSError(errno.ENAMETOOLONG, "File name too long", "x")), 4, "BadInput", "too long"),
    "too many files": (raising(OSError(errno.EMFILE, "Too many open files", "x")), 5, "MachineError", "Too many open"),
    "memory": (raising(MemoryError()), 5, "MachineError", "not enough memory"),
    "missing": (raising(ModuleNotFoundError("no", name="torch.nn")), 5, "MachineError", "torch is not installed"),
    "broken": (raising(ImportError("libx.so", name="onnx")), 5, "MachineError", "onnx cannot be imported: libx.so"),
    "Ctrl-C": (raising(KeyboardInterrupt()), 130, "Interrupted", "interrupted"),
    "Ctrl-C in a library": (interrupted_inside_a_library, 130, "Interrupted", "interrupted"),
    "Ctrl-C, then a failing clean-up": (fail_in_the_clean_up, 130, "Interrupted", "interrupted"),
    "SIGTERM": (terminated_inside_a_library, 143, "Stopped", "SIGTERM"),
    "a bug": (raising(ZeroDivisionError("by zero")), 1, "ModelatheError", "ZeroDivisionError: by zero"),
    "end of file": (raising(EOFError("cut off")), 1, "ModelatheError", "EOFError: cut off"),
}


@pytest.fixture
def sigterm() -> Iterator[None]:
    """The command line takes over SIGTERM; the test runner gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def group() -> CommandGroup:
    @click.group(cls=CommandGroup)
    def main() -> None:
        """A program of the tests."""

    @main.command()
    @click.argument("name")
    @json_option
    def fail(name: str, as_json: bool) -> None:
        """Print as a user's code might, then fail."""
        print("a print of the user's")
        os.system("echo a print of a child")  # noqa: S605
        FAILURES[name][0]()

    @main.command()
    @json_option
    def announce(as_json: bool) -> None:
        """Emit a document, as `serve up` does, and end by Ctrl-C."""
        emit(document(ready=True))
        raise KeyboardInterrupt

    return main


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_document_and_one_line(
    name: str, group: CommandGroup, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, code, kind, said = FAILURES[name]
    for flags in ((), ("--json",)):
        with pytest.raises(SystemExit) as ended:
            group.main(["fail", name, *flags])
        out, err = capsys.readouterr()
        assert ended.value.code == code
        assert said in err
        assert "Traceback" not in err
        if flags:
            error = json.loads(out)["error"]
            assert (error["kind"], error["exit"]) == (kind, code)
            assert set(error) == {"kind", "what", "where", "fix", "exit"}
            assert "a print of the user's" in err
    assert len(list(tmp_path.glob("modelathe-traceback-*"))) == (2 if code == 1 else 0)


def test_what_a_child_process_prints_stays_out_of_the_document() -> None:
    code = (
        "import os, click\n"
        "from modelathe.commandline import CommandGroup, emit, json_option\n"
        "@click.group(cls=CommandGroup)\n"
        "def main(): ...\n"
        "@main.command()\n"
        "@json_option\n"
        "def one(as_json):\n"
        "    os.system('echo a print of a child')\n"
        "    emit({'format': 1})\n"
        "main(['one', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == {"format": 1}
    assert done.stderr == "a print of a child\n"


@pytest.mark.usefixtures("sigterm")
def test_a_command_that_has_said_its_document_says_no_other(
    group: CommandGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        group.main(["announce", "--json"])
    out, err = capsys.readouterr()
    assert ended.value.code == 130
    assert json.loads(out)["ready"] is True
    assert err.strip() == "interrupted"


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize("args", [[], ["nope"], ["fail"], ["fail", "x", "--nope"], ["--json"]])
def test_a_wrong_call(args: list[str], group: CommandGroup, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        group.main(args)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert err.startswith("error: ")
    assert "--help" in err
    assert not out or json.loads(out)["error"]["exit"] == 2


def test_nothing_is_said_of_kernels_that_torchao_has_for_gpus() -> None:
    """It reaches a user through transformers, whose import loads it, before a word of ours."""
    code = (
        "import contextlib, optimize.cli\n"
        "with contextlib.suppress(SystemExit):\n"
        "    optimize.cli.main(['show', '--help'])\n"
        "import torchao.quantization\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("room", GROUPS)
def test_h_is_help(room: str) -> None:
    for arguments in (["-h"], [next(iter(GROUPS[room].commands)), "-h"]):
        done = subprocess.run([sys.executable, "-m", room, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.startswith("Usage: "), done.stderr


def completed(room: str, shell: str, script: str, **variables: str) -> list[str]:
    """Return what a real shell offers, after it has read what the command itself writes for it."""
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    source = f'eval "$(_{room.upper()}_COMPLETE={shell}_source {room})"'
    command = [shell, *(["--norc"] if shell == "bash" else ["-f"]), "-c", script.format(source=source, room=room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("room", GROUPS)
def test_bash_completes_commands(room: str) -> None:
    script = '{source}; COMP_WORDS=({room} r); COMP_CWORD=1; _{room}_completion {room}; echo "${{COMPREPLY[@]}}"'
    assert completed(room, "bash", script) == sorted(name for name in GROUPS[room].commands if name.startswith("r"))


@pytest.mark.parametrize("room", GROUPS)
def test_zsh_completes_commands(room: str, tmp_path: Path) -> None:
    # Zsh offers what it is given only where somebody types; what it is given stands in between.
    # Its list of functions is moved over the file that -d names, so that has to be a file of the test's own.
    script = (
        "autoload -Uz compinit; compinit -u -d $ZDOTDIR/functions; {source};"
        "_describe() {{ eval 'print -l ${{'$3'}}' }}; compadd() {{ }}; words=({room} r); CURRENT=2; _{room}_completion"
    )
    said = completed(room, "zsh", script, ZDOTDIR=str(tmp_path))
    assert {word.partition(":")[0] for word in said} >= {name for name in GROUPS[room].commands if name.startswith("r")}
