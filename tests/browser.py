"""A page in a real browser, where one is installed: how wide it is, which texts collide, what a print holds."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

# In a frame, because a window has a least width.
FRAME = """<!doctype html><body style="margin:0"><iframe src="PAGE" width="WIDTH" height="900" frameborder="0"></iframe>
<script>addEventListener("message", (event) => { document.title = event.data; });</script></body>"""
MEASURE = """<script>addEventListener("load", () => setTimeout(() => {
  const box = (one) => one.getBoundingClientRect(), collided = [], clipped = [], broken = [];
  for (const cell of document.querySelectorAll("th, td")) {
    for (const text of [...cell.childNodes].filter((one) => one.nodeType === 3)) {
      for (const word of text.data.matchAll(/(?<!\\S)\\S{2,15}(?!\\S)/g)) {
        const range = document.createRange();
        range.setStart(text, word.index);
        range.setEnd(text, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map((one) => Math.round(one.top))).size > 1) broken.push(word[0]);
      }
    }
  }
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const edge = box(plot.querySelector(".main-svg"));
    const shown = (one) => one.textContent.trim() && box(one).width;
    const texts = [...plot.querySelectorAll(".main-svg text")].filter(shown);
    texts.forEach((one, at) => {
      const a = box(one);
      const inside = a.left > edge.left - 1 && a.right < edge.right + 1 && a.bottom < edge.bottom + 1;
      if (!inside) clipped.push(one.textContent);
      for (const other of texts.slice(at + 1)) {
        const b = box(other);
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        if (wide > 2 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
          collided.push(one.textContent + " / " + other.textContent);
      }
    });
  }
  const root = document.documentElement, ink = getComputedStyle(document.body).backgroundColor;
  const found = { width: root.scrollWidth, room: root.clientWidth, collided, clipped, broken, paper: ink };
  parent.postMessage(JSON.stringify(found), "*");
}, 1500));</script>"""


def chromium(*options: str) -> str:
    """Run the browser without a window, and return what it prints."""
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=6000", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measured(page: Path, folder: Path, width: int = 400, *options: str) -> dict[str, Any]:
    """Return what a page says of itself at so many pixels.

    That is its `width`, the `room` for it, texts `collided` and `clipped`, words of tables `broken`, and its `paper`.
    """
    copy, frame = folder / "measured.html", folder / "frame.html"
    copy.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    frame.write_text(FRAME.replace("PAGE", copy.name).replace("WIDTH", str(width)))
    title = re.search(r"<title>(.*?)</title>", chromium("--dump-dom", *options, frame.as_uri()))
    assert title, "the page did not answer"
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


def assert_fits(page: Path, folder: Path) -> None:
    """Assert that a page holds at 400 pixels what it holds at 1280, and that nothing on it is clipped or collides."""
    for width in (400, 1280):
        found = measured(page, folder, width)
        assert found["width"] <= found["room"], f"the page is wider than {width} pixels"
        assert (found["collided"], found["clipped"], found["broken"]) == ([], [], []), f"{width}: {found}"
