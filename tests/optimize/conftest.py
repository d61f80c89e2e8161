from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime.transformers  # noqa: F401  It adds a folder to sys.path once, which a test's own undoing would lose.
import pytest

from optimize.cli import main
from optimize.source.load import load_workload
from optimize.source.workload import Workload

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
    return load_workload(f"{SMALL}:workload")


@pytest.fixture(scope="session")
def encoder() -> Workload:
    return load_workload(f"{SMALL.with_name('encoder.py')}:workload")


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
