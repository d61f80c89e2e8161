"""The one place that writes: whole or not at all, whatever operation the writer is killed at."""

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelathe import files
from optimize.step import exchange

OPERATIONS = ("open", "fsync", "replace", "rename", "link", "unlink", "fchmod")
KILLED = """
import os, signal, sys
from pathlib import Path
from modelathe import files
from optimize.step import exchange

left = int(sys.argv[1])

def dying(function):
    def called(*values, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*values, **named)
    return called

for name in {operations}:
    setattr(os, name, dying(getattr(os, name)))
exchange._exchange = dying(exchange._exchange)
{code}
"""


def killed_at(number: int, code: str) -> bool:
    """Run the code in a process that kills itself before its n-th operation on files; whether it came to that."""
    program = KILLED.format(operations=OPERATIONS, code=code)
    return subprocess.run([sys.executable, "-c", program, str(number)], check=False).returncode != 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert files.write(path, "one\n") == path
    path.chmod(0o640)
    files.write(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(files.write(path, "", 0o600).stat().st_mode) == 0o600
    assert names(tmp_path) == ["a"]


def test_an_error_changes_nothing(tmp_path: Path) -> None:
    path = files.write(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), files.writing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_the_content_is_durable_before_the_name_and_the_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def replaced(path: Path, to: Path) -> Path:
        done.append("rename")
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    files.write(tmp_path / "a", "text")
    assert done == ["file", "rename", "folder"]
    done.clear()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "b").touch()
    files.place(tmp_path / "tree", tmp_path / "there")
    assert done == ["file", "folder", "rename", "folder"]


def test_a_device_is_written_to_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        files.write(pipe, "through")
        assert reader.communicate()[0] == b"through"
    assert pipe.is_fifo()


def test_folders_change_places_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    exchange.swap(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path / "old") == ["new"]

    def refused(one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, "no such flag")

    monkeypatch.setattr(exchange, "_exchange", refused)
    exchange.swap(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path / "old") == ["old"]
    assert names(tmp_path) == ["new", "old"]


def test_a_full_folder_is_not_replaced(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").touch()
    with pytest.raises(OSError) as failure:
        files.place(tmp_path / "one", tmp_path / "other")
    assert failure.value.errno in (errno.ENOTEMPTY, errno.EEXIST)


@pytest.mark.parametrize("verb", ["write", "swap"])
def test_a_kill_at_any_operation_leaves_old_or_new(tmp_path: Path, verb: str) -> None:
    path, ended = tmp_path / "it", False
    code = {
        "write": f"files.write(Path({str(path)!r}), 'new')",
        "swap": f"exchange.swap(Path({str(tmp_path / 'beside')!r}), Path({str(path)!r}))",
    }[verb]
    seen = set()
    for number in range(1, 30):
        if verb == "write":
            path.write_text("old")
        else:
            for folder, content in ((path, "old"), (tmp_path / "beside", "new")):
                folder.mkdir(exist_ok=True)
                (folder / "content").write_text(content)
        ended = not killed_at(number, code)
        found = path / "content" if verb == "swap" else path
        seen.add(found.read_text())
        if ended:
            break
    assert ended
    assert seen == {"old", "new"}


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    assert killed_at(3, f"files.write(Path({str(tmp_path / 'a')!r}), 'new')")
    (left,) = tmp_path.iterdir()
    files.write(tmp_path / "a", "young files may have a writer")
    assert left.exists()
    os.utime(left, (time.time() - 100,) * 2)
    (tmp_path / ".a.part-of-mine").touch()
    os.utime(tmp_path / ".a.part-of-mine", (time.time() - 100,) * 2)
    files.write(tmp_path / "a", "text")
    assert names(tmp_path) == [".a.part-of-mine", "a"]
