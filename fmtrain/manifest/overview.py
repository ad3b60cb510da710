"""Overview of a collection: a CSV table of every file, and one HTML page with every slide and its tissue."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fmtrain.manifest.manifest import Manifest, SlideEntry, asset, assets_dir
from fmtrain.manifest.page import collection_page
from fmtrain.manifest.scan import ScanResult
from fmtrain.manifest.search import OtherFile
from repmetrics.atomic_write import write_csv, write_text

COLUMNS = (
    *("file", "patient", "site", "split", "mpp", "mpp_source", "width", "height", "levels"),
    *("tissue_mm2", "held_out_patches", "reader", "reader_reason", "problem", "state", "warnings", "mask_quality"),
)


def write_collection(manifest: Manifest, examined: Sequence[ScanResult], others: Sequence[OtherFile]) -> None:
    """Write `slides.csv`, with a row for every file of the folder, and `index.html`."""
    folder = assets_dir(manifest.path)
    by_name = {entry.info.name: entry for entry in manifest.slides}
    patches = Counter(patch.slide for patch in manifest.held_out)
    rows = [_row(result, manifest.excluded, by_name.get(result.name), patches) for result in examined]
    rest = [{"file": other.relative, "state": other.state, "problem": other.reason} for other in others]
    write_csv(folder / "slides.csv", COLUMNS, [*rows, *rest])
    sizes = {row["file"]: _size(asset(folder / "thumbnails", row["file"], ".jpg")) for row in rows}
    names = {row["file"]: asset(Path(), row["file"], ".jpg").as_posix() for row in rows}
    write_text(folder / "index.html", collection_page(rows, manifest.warnings, names, sizes, others=len(rest)))


def _size(path: Path) -> tuple[int, int] | None:
    """(width, height) of a thumbnail; None if there is none."""
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        return None


def _row(
    result: ScanResult, excluded: dict[str, str], entry: SlideEntry | None, patches: Counter[str]
) -> dict[str, str]:
    """One row of the table; unknown values stay empty."""
    problem = excluded.get(result.name, "")
    row = dict.fromkeys(COLUMNS, "")
    row |= {"file": result.name, "problem": problem, "state": "excluded" if problem else "used"}
    if result.info is not None:
        info = result.info
        row |= {
            "mpp": f"{info.mpp:.6g}",
            "mpp_source": info.mpp_source,
            "width": str(info.size[0]),
            "height": str(info.size[1]),
            "levels": " ".join(f"{w}x{h}" for w, h in info.levels),
            "tissue_mm2": f"{result.tissue_mm2:.4g}",
            "reader": info.reader,
            "reader_reason": info.reader_reason,
            "warnings": "; ".join(info.warnings),
            "mask_quality": "" if math.isnan(result.mask_quality) else f"{result.mask_quality:.2f}",
        }
    if entry is not None:
        count = str(patches[entry.info.name])
        row |= {"patient": entry.patient, "site": entry.site, "split": entry.split, "held_out_patches": count}
    return row
