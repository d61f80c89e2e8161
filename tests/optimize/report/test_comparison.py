"""A candidate beside the live version, on the page and on the terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from optimize.report import table
from tests.optimize.report.test_page import published, read

FOUND = {
    "number": 2,
    "told": ["accuracy 0.9800, live 0.9900: -0.0100 [-0.0150, -0.0050], worse", "1.02× smaller"],
    "better": ["its accuracy is 0.9900, the candidate's 0.9800"],
}


def test_the_page_says_in_what_the_live_version_is_better(tmp_path: Path) -> None:
    shown = read({**published(), "comparison": FOUND}, tmp_path).text
    assert "Beside version 2, which was live" in shown
    assert "Version 2 is better: its accuracy is 0.9900" in shown
    assert "1.02× smaller" in shown
    assert "Beside version" not in read({**published(), "comparison": None}, tmp_path).text


def test_the_terminal_says_so_in_red() -> None:
    text = io.StringIO()
    table._comparison(Console(file=text, force_terminal=True, width=200, highlight=False), FOUND)
    [line] = [line for line in text.getvalue().splitlines() if "is better" in line]
    assert line.startswith("\x1b[31mversion 2 is better: its accuracy")
    assert "[-0.0150, -0.0050], worse" in text.getvalue()


def test_a_candidate_is_told_with_the_line_that_promotes_it(capsys: pytest.CaptureFixture[str]) -> None:
    document = {**published(), "comparison": FOUND, "places": {"onnx": published()["result"]["quality"]}}
    document["version"] = {**document["version"], "state": "staged"}
    table.run(document)
    said = capsys.readouterr().out
    assert "candidate: digits_cnn version 3" in said
    assert "promote digits_cnn 3 --repository 'model repository'" in said
