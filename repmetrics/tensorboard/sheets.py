"""Pictures of held-out images as RGB arrays (3, H, W), for boards, loggers and reports."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.monitoring.pictures import Pictures, as_rgb, thumbnails

Picture = NDArray[np.uint8]

SPRITE_PX = 32
"""Side of an image in the projector."""
MAP_PX, MARK_PX = 540, 24
"""Sides of the map and of an image on it. No picture takes more than 1 MB, even uncompressed."""
SAME, OTHER = (31, 111, 181), (200, 85, 62)
"""Frames of neighbors: blue if they have the label of the query, orange if another."""
GROUND = 255


def sheets(pictures: Pictures) -> dict[str, Picture]:
    """Pictures of a run by the name of their log key; none of neighbors or tokens where there are none."""
    parts = {
        "neighbors": side_by_side([neighbors(pictures, k) for k in range(len(pictures.stages))], gap=12),
        "tokens": stacked([strip for _, strip in token_strips(pictures)]),
        "map": thumbnail_map(pictures),
        "farthest": row([pictures.thumbnails[k] for k in pictures.farthest]),
    }
    return {name: part for name, part in parts.items() if part.size}


def neighbors(pictures: Pictures, stage: int) -> Picture:
    """Queries and their neighbors of other groups at one stage: a row per query, the query first."""
    stage_rows = pictures.stages[stage].neighbors
    if not (stage_rows >= 0).any():
        return np.empty((3, 0, 0), np.uint8)
    rows = []
    for query, nearest in zip(pictures.queries, stage_rows, strict=True):
        shown = [_framed(pictures, int(k), like=int(query)) for k in nearest]
        rows.append(side_by_side([pictures.thumbnails[query], row(shown)], gap=6))
    return stacked(rows)


def _framed(pictures: Pictures, k: int, *, like: int) -> Picture:
    if k < 0:
        return np.full_like(pictures.thumbnails[0], GROUND)
    tile, labels = pictures.thumbnails[k].copy(), pictures.labels
    if min(labels[k], labels[like]) >= 0:
        tile = frame(tile, SAME if labels[k] == labels[like] else OTHER)
    return tile


def token_strips(pictures: Pictures) -> list[tuple[str, Picture]]:
    """Rows of the picture of tokens with their names: the images, and their tokens at each stage as colors."""
    colors = pictures.token_colors()
    if not colors:
        return []
    steps = [stage.step for stage in pictures.stages if stage.scores.size]
    side = 2 * pictures.thumbnails.shape[-1]
    strips = [("image", row([enlarge(pictures.thumbnails[k], side) for k in pictures.token_rows]))]
    for step, tokens in zip(steps, colors, strict=True):
        strips.append((f"step {step:,}", row([enlarge(each.transpose(2, 0, 1), side) for each in tokens])))
    return strips


def thumbnail_map(pictures: Pictures) -> Picture:
    """Images at their first two principal components, in frames of their group's color."""
    canvas = np.full((3, MAP_PX, MAP_PX), GROUND, np.uint8)
    if not len(pictures.thumbnails):
        return np.empty((3, 0, 0), np.uint8)
    small = as_rgb(resize(pictures.thumbnails, MARK_PX))
    colors = group_colors(pictures.groups)
    for tile, (x, y), color in zip(small, map_places(pictures), colors, strict=True):
        left, top = round(x * (MAP_PX - MARK_PX)), round((1 - y) * (MAP_PX - MARK_PX))
        canvas[:, top : top + MARK_PX, left : left + MARK_PX] = frame(tile.copy(), color)
    return canvas


def map_places(pictures: Pictures, positions: NDArray[Any] | None = None) -> NDArray[Any]:
    """Places (M, 2) in 0 … 1 of the images on the map; both axes have one scale.

    ``positions`` are others than the first two principal components, such as those of UMAP.
    """
    places = pictures.positions[:, :2] if positions is None else positions
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    low, high = places.min(0), places.max(0)
    reach = float((high - low).max()) or 1.0
    scaled: NDArray[Any] = ((places - (low + high) / 2) / reach + 0.5).clip(0, 1)
    return scaled


def group_colors(codes: NDArray[Any]) -> list[tuple[int, int, int]]:
    """A color of each row by its code, −1 gray: hues at the golden angle, so that near codes differ."""
    import colorsys

    colors = []
    for code in codes:
        hue, light = (0.58 + code * 0.381966) % 1, (0.45, 0.62, 0.34)[int(code) % 3]
        red, green, blue = colorsys.hls_to_rgb(hue, light, 0.6 if code >= 0 else 0.0)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def frame(tile: Picture, color: tuple[int, int, int], *, width: int = 2) -> Picture:
    """The tile with a frame of a color, drawn into it."""
    inner = tile[:, width:-width, width:-width].copy()
    tile[:] = np.array(color, np.uint8)[:, None, None]
    tile[:, width:-width, width:-width] = inner
    return tile


def row(tiles: list[Picture]) -> Picture:
    """Tiles of one size side by side."""
    return side_by_side(tiles, gap=2)


def side_by_side(parts: list[Picture], *, gap: int) -> Picture:
    """Pictures of one height with gaps between them."""
    parts = [part for part in parts if part.size]
    if not parts:
        return np.empty((3, 0, 0), np.uint8)
    space = np.full((3, parts[0].shape[1], gap), GROUND, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, space)][:-1], axis=2)


def stacked(parts: list[Picture], *, gap: int = 2) -> Picture:
    """Pictures of one width, one below another."""
    return side_by_side([part.transpose(0, 2, 1) for part in parts], gap=gap).transpose(0, 2, 1)


def enlarge(tile: Picture, side: int) -> Picture:
    """A tile (3, h, w) as (3, side, side), by the nearest pixels."""
    down, across = (np.arange(side) * length // side for length in tile.shape[1:])
    return tile[:, down][:, :, across]


def resize(images: NDArray[Any], side: int) -> NDArray[Any]:
    """RGB images (N, 3, S, S) as (N, 3, side, side)."""
    import torch

    return thumbnails(torch.from_numpy(images), side=side).numpy()


def sprite_images(images: Tensor) -> Picture | None:
    """Images (N, C, H, W) of any scale as RGB (N, 3, 32, 32); None if they are no pictures."""
    if images.ndim != 4 or not len(images):
        return None
    return as_rgb(thumbnails(images, side=SPRITE_PX).numpy())


def contact_sheet(images: Tensor) -> Picture | None:
    """Thumbnails of images side by side, an RGB picture (3, H, W); None if they are no pictures.

    Example:
        >>> import torch
        >>> contact_sheet(torch.rand(5, 3, 8, 8)).shape  # 2 rows of 3
        (3, 64, 96)
    """
    small = sprite_images(images)
    return None if small is None else tiled(small)


def tiled(images: Picture) -> Picture:
    """Images (N, 3, S, S) as the tiles of a square, row by row."""
    side, columns = images.shape[-1], math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cells = np.zeros((rows * columns, 3, side, side), np.uint8)
    cells[: len(images)] = images
    grid = cells.reshape(rows, columns, 3, side, side).transpose(2, 0, 3, 1, 4)
    return grid.reshape(3, rows * side, columns * side)
