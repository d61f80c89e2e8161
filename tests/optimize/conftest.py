from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from optimize import workload as workloads
from optimize.cli import main
from optimize.workload import Workload

SMALL = Path(__file__).with_name("small.py")


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Optimize = Callable[..., Ended]


@pytest.fixture
def optimize(capsys: pytest.CaptureFixture[str]) -> Optimize:
    """Run the command `optimize` in this process, as its user would."""

    def call(*args: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def small() -> Workload:
    return workloads.load(f"{SMALL}:workload")


@pytest.fixture(scope="session")
def encoder() -> Workload:
    return workloads.load(f"{SMALL.with_name('encoder.py')}:workload")


@pytest.fixture
def user_file(tmp_path: Path) -> Callable[..., str]:
    """Write a copy of the small workload with some text replaced, and return its SOURCE."""

    def write(*changes: tuple[str, str], append: str = "") -> str:
        text = SMALL.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "user.py"
        path.write_text(f"{text}\n{append}")
        return f"{path}:workload"

    return write
