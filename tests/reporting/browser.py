"""Debian's chromium without a window: opens a page, looks at it from within, prints it."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

CHROMIUM = shutil.which("chromium")
WIDTH, HEIGHT = 1280, 900
TIMEOUT_SECONDS = 60.0

# Opens what is folded, then says how every image and text looks and what sticks out. All before the load event ends,
# since the page is dumped then; so images are decoded by drawing them, which waits.
PROBE = """
<script>
function channels(colour) { return colour.match(/[0-9.]+/g).map(Number); }
function luminance(colour) {
  const [r, g, b] = channels(colour).slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ground(element) {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor, parts = channels(colour);
    if (parts.length < 4 || parts[3] > 0) return colour;
  }
  return "rgb(255, 255, 255)";
}
function contrast(element) {
  const lights = [luminance(getComputedStyle(element).color), luminance(ground(element))].sort((a, b) => b - a);
  return (lights[0] + 0.05) / (lights[1] + 0.05);
}
function decoded(image) {
  const canvas = document.createElement("canvas"), brush = canvas.getContext("2d");
  canvas.width = canvas.height = 64;
  try { brush.drawImage(image, 0, 0, 64, 64); } catch { return false; }
  return new Set(brush.getImageData(0, 0, 64, 64).data).size > 8;
}
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const images = [...document.images].map(image => ({alt: image.alt, decoded: decoded(image),
    natural: image.naturalWidth, shown: image.getBoundingClientRect().width}));
  const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (walker.currentNode.data.trim() && element.getClientRects().length && element.tagName != "SCRIPT")
      texts.push({text: walker.currentNode.data.trim().slice(0, 40), contrast: contrast(element),
                  size: parseFloat(getComputedStyle(element).fontSize)});
  }
  const wide = [...document.body.querySelectorAll("*")].filter(element =>
      element.getBoundingClientRect().right > innerWidth
      || element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).overflowX != "visible")
    .map(element => element.tagName + ": " + element.textContent.trim().slice(0, 40));
  const found = {width: innerWidth, pageWidth: document.documentElement.scrollWidth, images, texts, wide};
  document.documentElement.innerHTML = "<body></body>";
  document.body.textContent = "FOUND" + btoa(encodeURIComponent(JSON.stringify(found))) + "END";
});
</script>
"""


def look_at(page: Path, scratch: Path) -> dict[str, Any]:
    """What the page is like in a window 1,280 pixels wide.

    Returns:
        `images`, `texts`, `wide` (what sticks out or is cut), `width` of the window, `pageWidth`, and the lines of the
        `console`. Units: CSS pixels.
    """
    probed = scratch / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    output, log = _chromium(scratch, "--dump-dom", probed.as_uri())
    told = re.search("FOUND([A-Za-z0-9+/=]+)END", output)
    assert told, f"the probe said nothing: {output[:300]!r}, {log[-2000:]}"
    found = json.loads(unquote(base64.b64decode(told[1]).decode()))
    found["console"] = [line for line in log.splitlines() if ":CONSOLE" in line]
    return found


def printed_pages(page: Path, scratch: Path) -> int:
    """How many sheets the page takes."""
    printed = scratch / "printed.pdf"
    _chromium(scratch, "--no-pdf-header-footer", f"--print-to-pdf={printed}", page.as_uri())
    return len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes()))


def _chromium(scratch: Path, *arguments: str) -> tuple[str, str]:
    """Standard output and standard error. A browser that hangs is killed with all that it started."""
    assert CHROMIUM is not None
    flags = ["--headless", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += [f"--window-size={WIDTH},{HEIGHT}", f"--user-data-dir={scratch / 'profile'}"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [CHROMIUM, *flags, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, log = process.communicate(timeout=TIMEOUT_SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, log[-2000:]
    return output, log
