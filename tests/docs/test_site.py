"""The documentation is built strictly, every link and anchor checked, and fetches nothing from anywhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, pages

FETCHING = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?(https?:)?//[^"'>\s]+""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


def test_every_page_is_built(site: Path) -> None:
    for page in pages()[:-1]:
        assert (site / Path(page).relative_to("docs").with_suffix(".html")).exists(), page
    for made in ("optimize", "serve", "loadtest", "recipe", "methods", "python"):
        assert (site / "reference" / f"{made}.html").exists(), made
    assert not (site / "generate.py").exists()


def test_the_site_needs_no_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not (found := FETCHING.search(page.read_text())), f"{page.name}: {found and found[0]}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s)[\"']?(https?:)?//", style.read_text()), style


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "proof.png").stat().st_size <= 200 * 1024
