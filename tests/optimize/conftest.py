from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime.transformers  # noqa: F401  It adds a folder to sys.path once, which a test's own undoing would lose.
import pytest

from loadtest.judge import validity
from optimize.cli import main
from optimize.judge import ruler
from optimize.judge.ruler import Speeds
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


@pytest.fixture(scope="module")
def each_step_faster() -> Iterator[None]:
    """Let every file be a tenth faster than the one before, for tests of what a run does with speeds.

    Files are opened and timed all the same. How far models as small as the tests' differ in truth, and on a machine
    that is busy, is not theirs to say; nor is whether that machine leaves a client time.
    """

    def rounds(visit: ruler.Visit, names: Sequence[str], *, baseline: str, **_how: object) -> Speeds:
        seconds = {
            name: {batch: [1e-3 * batch * 0.9**place] * 9 for batch in visit(name)} for place, name in enumerate(names)
        }
        return Speeds({**seconds, ruler.CONTROL: seconds[baseline]}, baseline, took=1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ruler, "alternate", rounds)
        patch.setattr(validity, "LARGEST_LAG_MS", 1e3)
        yield


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
