"""A picture of a run's board, drawn by TensorBoard and photographed by a headless Chromium.

    python docs/screenshot.py RUN docs/board.png

Debian's package `chromium` serves; another browser of its family is named with --browser.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from repmetrics.tensorboard.server import launch

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def photograph(
    address: str, picture: Path, *, browser: str, width_px: int = 1750, height_px: int = 1500, wait_ms: int = 15000
) -> None:
    """Load an address in a headless browser and write what it shows as PNG, under its final name when complete."""
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch, "shot.png")
        command = [
            *[browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"],
            *[f"--user-data-dir={scratch}/profile", f"--window-size={width_px},{height_px}"],
            *[f"--virtual-time-budget={wait_ms}", f"--screenshot={shot}", address],
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        if not shot.is_file():
            raise RuntimeError(f"{browser} drew nothing (exit code {done.returncode}): {done.stderr[-500:]}")
        partial = picture.with_name(picture.name + ".part")
        shutil.copyfile(shot, partial)
        os.replace(partial, picture)


def board_picture(run: Path, picture: Path, *, browser: str, height_px: int = 1500) -> None:
    """Start the board on a run, wait until TensorBoard has read the layout, and photograph it."""
    address = launch(run, port=0)
    layout = address.partition("#")[0] + "data/plugin/custom_scalars/layout"
    for _ in range(100):
        with urllib.request.urlopen(layout, timeout=10) as answer:
            if len(answer.read()) > 2:
                break
        time.sleep(0.2)
    else:
        raise RuntimeError(f"the runs under {run} hold no layout: were they watched by RepresentationMonitor?")
    photograph(address, picture, browser=browser, height_px=height_px)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory with TensorBoard event files")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--browser", default=next(filter(shutil.which, BROWSERS), None), help="a Chromium")
    parser.add_argument("--height-px", type=int, default=1500)
    options = parser.parse_args()
    if options.browser is None or shutil.which(options.browser) is None:
        print(f"no browser found: install one of {', '.join(BROWSERS)}, or name it with --browser", file=sys.stderr)
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
