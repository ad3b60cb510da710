"""Two hundred slides, truncated or with flipped bits: no crash, no hang, and every problem under its slide's name."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from coded_slides import write_coded

from fmtrain.manifest.scan import Job, scan_slides
from fmtrain.manifest.search import search
from fmtrain.slides.synthetic import write_slides
from repmetrics.executor import Processes

READ_ALL = """
import sys
from pathlib import Path
from fmtrain.slides.inspection import inspect_slide
from fmtrain.slides.slide import Slide
from fmtrain.slides.tiles import SlideError
for name in sys.argv[1:]:
    path = Path(name)
    try:
        with Slide(path, inspect_slide(path)) as slide:
            for level, (w, h) in enumerate(slide.info.levels):
                slide.read(level, 0, 0, (min(w, 1000), min(h, 1000)))
        print("read")
    except SlideError as error:
        assert str(error).startswith(path.name + ": "), error
        print("named")
"""


def damaged(folder: Path, count: int) -> Path:
    """Slides of three kinds, each truncated or with 1 to 200 flipped bits, half of them in its directories."""
    rng = random.Random(0)
    sources = write_slides(folder / "sound", count=1, size_px=512, mpp=0.5, seed=0)
    sources += [
        write_coded(folder / "sound" / f"{kind}.svs", [(400, 300), (200, 150)], lossless=kind)
        for kind in ("jpeg2000", "deflate")
    ]
    out = folder / "damaged"
    out.mkdir()
    for k in range(count):
        source = sources[k % 3]
        data = bytearray(source.read_bytes())
        if k % 5 == 0:
            data = data[: rng.randrange(1, len(data))]
        else:
            for _ in range(rng.choice((1, 4, 32, 200))):
                edge = rng.randrange(1024)
                at = rng.choice((rng.randrange(len(data)), rng.randrange(len(data)), edge, len(data) - 1 - edge))
                data[at] ^= 1 << rng.randrange(8)
        (out / f"{k:03d}{source.suffix}").write_bytes(data)
    return out


@pytest.mark.slow
def test_damaged_slides_are_named_and_take_nothing_down(tmp_path: Path) -> None:
    paths = [slide.path for slide in search(damaged(tmp_path, 200)).slides]
    for folder in ("masks", "thumbnails"):
        (tmp_path / folder).mkdir()
    jobs = [Job(p, None, tmp_path / "masks", tmp_path / "thumbnails") for p in paths]
    with Processes(2) as executor:
        results = scan_slides(jobs, executor=executor)
    assert [result.path for result in results] == paths
    assert not [result for result in results if "crashed or hung" in result.problem]
    problems = Counter(bool(result.problem) for result in results)
    assert problems[True] > 100  # the damage was real
    assert problems[False] > 20  # and some of it harmless, or in tiles that the scan does not read
    accepted = [str(result.path) for result in results if not result.problem]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READ_ALL, *accepted], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(accepted)
    assert done.stderr == ""
