"""Tissue masks of the user: a picture, or annotations in GeoJSON as QuPath exports them. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, UnidentifiedImageError

from fmtrain.slides.tiles import SlideError
from fmtrain.slides.tissue import CELL_UM, Mask

SUFFIXES = (".png", ".geojson", ".json")
FINE = 4  # pixels per cell and axis while polygons are drawn
SAME_SHAPE = 0.03  # relative difference of the aspect ratios of a picture and its slide


@contextmanager
def mask_errors(name: str) -> Iterator[None]:
    """Raise a SlideError, without the name of the mask's file, if the mask of a slide cannot be read."""
    try:
        yield
    except Exception as error:  # parsers of broken files raise any exception
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        reason = (error.strerror or reason) if isinstance(error, OSError) else reason
        raise SlideError(f"{name}: its mask cannot be read ({reason})") from error


def given_mask(path: Path, *, size: tuple[int, int], mpp: float) -> Mask:
    """Tissue cells of a slide from a file of the user: true where at least half of a cell is tissue.

    Args:
        path: PNG of the whole slide at any resolution (all but black is tissue), or GeoJSON in pixels of level 0.
        size: (width, height) of the slide at level 0.
        mpp: Micrometers per pixel at level 0.
    """
    columns, rows = (max(1, round(side * mpp / CELL_UM)) for side in size)
    fine = _picture(path, size) if path.suffix.lower() == ".png" else _polygons(path, size, (columns, rows))
    mask: Mask = np.asarray(fine.resize((columns, rows), Image.Resampling.BOX)) >= 128
    return mask


def _picture(path: Path, size: tuple[int, int]) -> Image.Image:
    with Image.open(path) as image:
        ratio = image.size[0] / image.size[1] / (size[0] / size[1])
        pixels = np.asarray(image.convert("RGB") if image.mode not in ("1", "L", "P", "I;16", "I") else image)
    if abs(ratio - 1) > SAME_SHAPE:
        raise ValueError(f"{pixels.shape[1]}×{pixels.shape[0]} pixels have not the shape of {size[0]}×{size[1]}")
    tissue = pixels.any(-1) if pixels.ndim == 3 else pixels > 0
    return Image.fromarray(tissue.astype(np.uint8) * 255)


def _polygons(path: Path, size: tuple[int, int], cells: tuple[int, int]) -> Image.Image:
    document = json.loads(path.read_text(encoding="utf-8"))
    image = Image.new("L", (cells[0] * FINE, cells[1] * FINE))
    scale = image.size[0] / size[0], image.size[1] / size[1]
    for rings in _rings(document):
        scaled = [[(x * scale[0], y * scale[1]) for x, y, *_ in ring] for ring in rings]
        left, top = (math.floor(min(point[axis] for point in scaled[0])) for axis in (0, 1))
        right, bottom = (math.ceil(max(point[axis] for point in scaled[0])) + 1 for axis in (0, 1))
        layer = Image.new("L", (right - left, bottom - top))
        for number, ring in enumerate(scaled):  # the first is the outline, the others are holes
            points = [(x - left, y - top) for x, y in ring]
            ImageDraw.Draw(layer).polygon(points, fill=0 if number else 255)
        # The lighter of both: a hole cuts into no other polygon.
        box = left, top, right, bottom
        image.paste(ImageChops.lighter(image.crop(box), layer), box)
    return image


def _rings(node: Any) -> Iterator[list[list[list[float]]]]:
    """Rings of all polygons of a GeoJSON document, or of a list of features."""
    if isinstance(node, list):
        for part in node:
            yield from _rings(part)
    elif node is None:  # a feature may have no geometry
        return
    elif node["type"] == "FeatureCollection":
        yield from _rings(node["features"])
    elif node["type"] == "Feature":
        yield from _rings(node["geometry"])
    elif node["type"] == "GeometryCollection":
        yield from _rings(node["geometries"])
    elif node["type"] == "Polygon":
        yield node["coordinates"]
    elif node["type"] == "MultiPolygon":
        yield from node["coordinates"]
