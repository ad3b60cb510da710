"""Screenshot of a run's TensorBoard page, taken with a headless Chromium.

    python docs/screenshot.py RUN board.png

Debian's package is `chromium`; --browser names another browser of its family.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

from repmetrics.atomic_write import atomic_path
from repmetrics.tensorboard.server import launch

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


WIDTH_PX, WAIT_MS = 1750, 15000


def screenshot(address: str, picture: Path, *, browser: str, height_px: int) -> None:
    """Load an address in a headless browser and write the page as PNG, atomically."""
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch, "shot.png")
        command = [
            *[browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"],
            *[f"--user-data-dir={scratch}/profile", f"--window-size={WIDTH_PX},{height_px}"],
            *[f"--virtual-time-budget={WAIT_MS}", f"--screenshot={shot}", address],
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=180)
        if not shot.is_file():
            raise RuntimeError(f"{browser} wrote no image (exit code {result.returncode}): {result.stderr[-500:]}")
        with atomic_path(picture) as temporary:
            shutil.copyfile(shot, temporary)


def board_picture(run: Path, picture: Path, *, browser: str, height_px: int = 1500) -> None:
    """Start TensorBoard on a run, wait until it has read the layout, and take a screenshot."""
    address = launch(run, port=0)
    layout = urllib.parse.urljoin(address, "/data/plugin/custom_scalars/layout")
    for _ in range(100):
        with urllib.request.urlopen(layout, timeout=10) as answer:
            if len(answer.read()) > 2:
                break
        time.sleep(0.2)
    else:
        raise RuntimeError(f"the runs under {run} have no layout: record them with RepresentationMonitor")
    screenshot(address, picture, browser=browser, height_px=height_px)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory with TensorBoard event files")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--browser", default=next(filter(shutil.which, BROWSERS), None), help="a Chromium")
    parser.add_argument("--height-px", type=int, default=1500)
    options = parser.parse_args()
    if options.browser is None or shutil.which(options.browser) is None:
        print(f"no browser found: install one of {', '.join(BROWSERS)}, or name one with --browser", file=sys.stderr)
        return 1
    try:
        board_picture(options.run, options.picture, browser=options.browser, height_px=options.height_px)
    except (OSError, RuntimeError, ImportError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return 1
    print(options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
