"""Slides of several files that OpenSlide opens, as small as their formats allow: MIRAX and Hamamatsu VMS."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

TILE_PX = 256


def write_mrxs(path: Path, pixels: npt.NDArray[np.uint8], *, mpp: float = 0.5) -> Path:
    """A MIRAX slide of one level: PNG tiles, alternately in two data files."""
    h, w = pixels.shape[:2]
    columns, rows = w // TILE_PX, h // TILE_PX
    data = [io.BytesIO(), io.BytesIO()]
    entries = []
    for index in range(columns * rows):
        x, y = index % columns * TILE_PX, index // columns * TILE_PX
        start = data[index % 2].tell()
        Image.fromarray(pixels[y : y + TILE_PX, x : x + TILE_PX]).save(data[index % 2], format="PNG")
        entries.append((index, start, data[index % 2].tell() - start, index % 2))
    identifier = "0123456789ABCDEF"
    root = len("01.02") + len(identifier) + 8  # the pointers to the two roots are the last of the head
    page = root + 12
    index_file = b"01.02" + identifier.encode()
    index_file += struct.pack("<5i", root, 0, root + 4, 0, page)  # roots; level 0; its first page
    index_file += struct.pack("<2i", len(entries), 0) + b"".join(struct.pack("<4i", *entry) for entry in entries)
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    path.write_bytes(b"")
    (folder / "Index.dat").write_bytes(index_file)
    for number, part in enumerate(data):
        (folder / f"Data000{number}.dat").write_bytes(part.getvalue())
    (folder / "Slidedat.ini").write_text(
        f"[GENERAL]\nSLIDE_ID = {identifier}\nIMAGENUMBER_X = {columns}\nIMAGENUMBER_Y = {rows}\n"
        "[HIERARCHICAL]\nHIER_COUNT = 1\nNONHIER_COUNT = 0\nINDEXFILE = Index.dat\n"
        "HIER_0_NAME = Slide zoom level\nHIER_0_COUNT = 1\nHIER_0_VAL_0_SECTION = LEVEL_0\n"
        "[DATAFILE]\nFILE_COUNT = 2\nFILE_0 = Data0000.dat\nFILE_1 = Data0001.dat\n"
        "[LEVEL_0]\nOVERLAP_X = 0\nOVERLAP_Y = 0\nIMAGE_FILL_COLOR_BGR = 16777215\nIMAGE_FORMAT = PNG\n"
        f"MICROMETER_PER_PIXEL_X = {mpp}\nMICROMETER_PER_PIXEL_Y = {mpp}\n"
        f"DIGITIZER_WIDTH = {TILE_PX}\nDIGITIZER_HEIGHT = {TILE_PX}\nIMAGE_CONCAT_FACTOR = 0\n",
        encoding="utf-8-sig",
    )
    return path


def write_vms(path: Path, pixels: npt.NDArray[np.uint8], *, mpp: float = 0.5) -> Path:
    """A Hamamatsu VMS slide: a key file that names two halves and a map, all JPEG with restart markers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    h, w = pixels.shape[:2]
    names = {"ImageFile": f"{path.stem}.jpg", "ImageFile(1,0)": f"{path.stem}_1.jpg", "MapFile": f"{path.stem}_map.jpg"}
    pictures = (pixels[:, : w // 2], pixels[:, w // 2 :], pixels[::4, ::4])
    for name, picture in zip(names.values(), pictures, strict=True):
        options = {"quality": 95, "subsampling": 0, "restart_marker_blocks": picture.shape[1] // 8}
        Image.fromarray(picture).save(path.parent / name, **options)
    lines = [f"{key}={name}" for key, name in names.items()]
    path.write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=2\nNoJpegRows=1\n"
        + "\n".join(lines)
        + f"\nPhysicalWidth={round(w * mpp * 1000)}\nPhysicalHeight={round(h * mpp * 1000)}\nReference={path.stem}\n"
    )
    return path
