"""On a narrow terminal words stay whole, in tables and in messages; what programs read is never broken."""

import re
import sys

import pytest

from tests.terminal import on_a_terminal

LINE = re.compile(r"[─-╿]+")
"""The lines of a table."""

PROGRAMS = {
    "a proof": """
        from optimize.report import table
        from tests.optimize.report.test_page import published
        table.run({**published(), "places": {}})
    """,
    "a load": """
        from loadtest.report.terminal import text
        from rich.console import Console
        from tests.optimize.report.test_page import load_report
        model = {"model": "sentence_embedding_small", "done": 12000, "failed": 3, "rate": 1234.5}
        told = {"models": [{**model, "latency_ms": {"p50": 12.3, "p99": 45.6}}] * 2}
        told["errors"] = [{"count": 3, "text": "the server says: exceeds the maximum queue size of this model"}]
        Console().print(text({**load_report(), **told}))
    """,
    "several loads": """
        from loadtest.report.terminal import several
        from rich.console import Console
        from tests.optimize.report.test_page import load_report
        Console().print(several([("digits-20261127.jsonl", load_report()), ("b.jsonl", load_report())]))
    """,
    "a self-test": """
        from loadtest.selftest.measure import text
        from rich.console import Console
        ceiling = {"rate": 23400.0, "at_least": True, "limit": "null server"}
        found = {"ceiling": ceiling, "per_core": 12345.0, "added_ms": {"p50": 0.1, "p99": 0.5}}
        found["open"] = {"asked": 10000.0, "lag_ms": {"p99": 0.3}}
        Console().print(text({"protocols": [{**found, "protocol": name} for name in ("http", "grpc", "shared")]}))
    """,
    "methods": "import sys; from optimize.cli import main; main(['methods'])",
    "a method": "import sys; from optimize.cli import main; main(['methods', 'quantize.static'])",
    "scenarios": "from loadtest.cli import main; main(['scenario', 'list'])",
    "an error": """
        from loadtest.cli import main
        main(["run", "digits", "--url", "grpc://127.0.0.1:9", "--in-flight", "5", "--concurrency", "8"])
    """,
    "another error": """
        from modelathe.errors import MachineError
        what = "the machine is so busy that the same file counts as slower or faster than itself"
        MachineError(what, where="build/runs/digits_cnn", fix="run it again when nothing else runs on it").show()
    """,
}


@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_word_is_broken(name: str, columns: int) -> None:
    lines = [line.removeprefix("        ") for line in PROGRAMS[name].split("\n")]
    program = (sys.executable, "-c", "\n".join(lines))
    wide, narrow = (LINE.sub(" ", on_a_terminal(width, *program)) for width in (400, columns))
    assert "Traceback" not in wide
    assert len(wide.split()) > 10
    assert set(narrow.split()) <= set(wide.split())
    for line in narrow.splitlines():
        assert len(line) <= columns or line.split(":")[0] in ("bundle", "serve it with", "proof page"), line


def test_a_line_to_paste_stays_whole() -> None:
    code = (
        "from modelathe.errors import MachineError\n"
        "fix = \"pip install 'modelathe[optimize] @ file:///a/path/that/is/long/enough/to/be/wider/than/sixty'\"\n"
        "MachineError('the package torch is not installed', fix=fix).show()\n"
    )
    said = on_a_terminal(60, sys.executable, "-c", code)
    assert "'modelathe[optimize] @ file:///a/path/that/is/long/enough/to/be/wider/than/sixty'\n" in said
