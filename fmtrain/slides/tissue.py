"""Tissue of a slide: thumbnail → mask → the cells a patch may be centered on. No torch."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin
from scipy import ndimage

from fmtrain.slides.ink import glass_color, ink_mask, roughness, saturation
from repmetrics.atomic_write import atomic_path

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

CELL_UM = 16.0  # side of a cell of the mask: a quarter of the smallest patch in use (256 px of 0.25)
SAMPLING = 2  # version of the rule that draws patches, of new manifests
MIN_TISSUE = 0.4  # minimum share of tissue in a patch (arXiv 2404.15217)
# Bounds of Otsu's threshold on saturation. Without them it would split the noise of a blank slide, or the tissue of a
# slide full of tissue.
SATURATION_BOUNDS = (0.05, 0.12)
INK_MARGIN_PX = 2  # soft edge of a pen's stroke
SPECK_UM = 60.0  # smaller islands are dust
CLOSE_UM = 32.0


def tissue_mask(thumbnail: Pixels) -> Mask:
    """Tissue by saturation: Otsu's threshold within bounds, without ink and specks, with gaps closed.

    Saturation is relative to the color of the glass, which may be tinted.

    Gaps narrower than twice CLOSE_UM count as tissue: the lumina of glands and of fat cells.

    Args:
        thumbnail: RGB (H, W, 3), pixels of CELL_UM / 2.

    Returns:
        Cells of CELL_UM, (⌈H/2⌉, ⌈W/2⌉), true where at least half of the cell is tissue.

    Example:
        >>> glass = np.full((50, 50, 3), 240, np.uint8)
        >>> glass[10:30, 10:30] = 200, 120, 180
        >>> int(tissue_mask(glass).sum())
        100
    """
    pixel_um = CELL_UM / 2
    rough = roughness(thumbnail)
    ink = ink_mask(thumbnail, rough)
    colors = balanced_saturation(thumbnail, rough)
    mask = (colors > np.clip(otsu(colors), *SATURATION_BOUNDS)) & ~ink
    # Close by distances: grow by the radius, then shrink by it. The border counts as tissue while shrinking, or tissue
    # that touches the border would be eroded there.
    radius = CLOSE_UM / pixel_um
    if mask.any():
        grown = ndimage.distance_transform_edt(~mask) <= radius
        mask |= (ndimage.distance_transform_edt(grown) > radius) if not grown.all() else grown
    mask &= ~ndimage.binary_dilation(ink, iterations=INK_MARGIN_PX)
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    # On a slide smaller than a few specks, a speck may be the only tissue.
    kept = sizes >= min((SPECK_UM / pixel_um) ** 2, mask.size / 8)
    kept[0] = False
    h, w = mask.shape
    even = np.pad(kept[labels], ((0, h % 2), (0, w % 2)), mode="edge")
    result: Mask = even.reshape((h + 1) // 2, 2, (w + 1) // 2, 2).mean((1, 3)) >= 0.5
    return result


def balanced_saturation(picture: Pixels, rough: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Saturation of each pixel after the glass is made white."""
    balanced = np.minimum(picture * (255 / np.maximum(glass_color(picture, rough), 1)), 255).astype(np.uint8)
    return saturation(balanced)


def separability(picture: Pixels, mask: Mask) -> float:
    """How well a mask separates saturated pixels from others, 0 … 1: between-class over total variance (Otsu 1979).

    NaN if all cells are on one side.

    Args:
        picture: RGB (H, W, 3), pixels of CELL_UM / 2.
        mask: Cells of CELL_UM.
    """
    rough = roughness(picture)
    colors = balanced_saturation(picture, rough).astype(np.float64)
    colors[ink_mask(picture, rough)] = 0
    fine = np.kron(mask, np.ones((2, 2), np.bool_))[: colors.shape[0], : colors.shape[1]]
    if fine.shape != colors.shape or fine.all() or not fine.any():
        return float("nan")
    share, total = fine.mean(), colors.var()
    between = share * (1 - share) * (colors[fine].mean() - colors[~fine].mean()) ** 2
    return float(between / total) if total > 0 else float("nan")


def otsu(values: npt.NDArray[np.float32]) -> float:
    """Otsu's threshold of values in 0 … 1: the cut with the least variance within both sides.

    Example:
        >>> round(otsu(np.array([0.1] * 50 + [0.7] * 50, np.float32)), 2)
        0.4
    """
    counts, edges = np.histogram(values, bins=256, range=(0, 1))
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centers)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    between = np.nan_to_num(between)
    best = np.flatnonzero(between == between.max())  # all cuts within a gap are equal: take its middle
    return float((centers[best[0]] + centers[best[-1]]) / 2)


class EligibleCells:
    """Cells of one slide on which a patch of one size may be centered. One bit per cell, so many slides fit in memory.

    A cell at the border of the slide, where a part of it is too near to the border for a center, has the weight of the
    other part: patches are as dense there as inside.

    Args:
        mask: Tissue of the slide, (rows, columns).
        size: (width, height) of the slide at level 0.
        extent_px: Side of the patch in pixels of level 0.
        min_tissue: Minimum share of tissue in a patch centered on the cell.
        sampling: Version of the rule; version 1 gives all cells one weight.
    """

    def __init__(
        self,
        mask: Mask,
        *,
        size: tuple[int, int],
        extent_px: float,
        min_tissue: float = MIN_TISSUE,
        sampling: int = SAMPLING,
    ) -> None:
        self.size = size
        self.extent_px = extent_px
        self.shape = mask.shape
        self.cell_px = (size[0] / mask.shape[1], size[1] / mask.shape[0])
        self._weights = [self._axis_weights(axis, sampling) for axis in (0, 1)]  # of columns, of rows
        eligible = self._eligible(mask, min_tissue, sampling)
        self._bits = np.packbits(eligible, axis=1)
        self._counts: list[int] = np.cumsum(eligible.sum(1)).tolist()
        self._ends: list[float] = np.cumsum(self._weights[1] * (eligible @ self._weights[0])).tolist()

    def __len__(self) -> int:
        return self._counts[-1]

    def _axis_weights(self, axis: int, sampling: int) -> npt.NDArray[np.float64]:
        """Share of each column (axis 0) or row in which the center of a patch may lie."""
        n = self.shape[1 - axis]
        last = self.size[axis] - self.extent_px
        if sampling == 1 or last <= 0:
            return np.ones(n)
        edges = np.clip(np.arange(n + 1) * self.cell_px[axis] - self.extent_px / 2, 0, last)
        shares: npt.NDArray[np.float64] = np.diff(edges) / self.cell_px[axis]
        return shares

    def _eligible(self, mask: Mask, min_tissue: float, sampling: int) -> Mask:
        """Tissue cells whose patch lies inside the slide and contains enough tissue."""
        half = self.extent_px / 2
        if self.extent_px > min(self.size):
            return np.zeros_like(mask)
        allowed, weights = [], []
        for axis, n in enumerate((mask.shape[1], mask.shape[0])):
            cell, length = self.cell_px[axis], self.size[axis]
            centers = (np.arange(n) + 0.5) * cell
            # With one possible center, on the edge of two cells, both may have it.
            slack = 1e-6 if sampling > 1 and length - self.extent_px < 1e-6 else 0.0
            inside = (centers + cell / 2 > half - slack) & (centers - cell / 2 < length - half + slack) | (n == 1)
            allowed.append(inside & (self._weights[axis] > 0))
            at = np.clip(centers, half, length - half)
            # Edges of the patch in cells, along this axis: the share of each cell that it covers would be (n, n).
            weights.append(((at - half) / cell, (at + half) / cell))
        share = _box_sums(mask, *weights) / (self.extent_px**2 / (self.cell_px[0] * self.cell_px[1]))
        eligible: Mask = mask & (share >= min_tissue - 1e-6) & allowed[0][None, :] & allowed[1][:, None]
        return eligible

    def location(self, u: float, v: float, w: float) -> tuple[int, int]:
        """Three uniform numbers → (x, y) of the upper left corner at level 0: a cell, then a position in it."""
        at = u * self._ends[-1]
        row = min(bisect_right(self._ends, at), len(self._ends) - 1)
        while self._counts[row] == (self._counts[row - 1] if row else 0):
            row -= 1  # rounding past the last cell
        columns = self._columns(row)
        ends = self._weights[0][columns].cumsum() * self._weights[1][row]
        within = at - (self._ends[row - 1] if row else 0.0)
        column = int(columns[min(int(ends.searchsorted(within, side="right")), len(columns) - 1)])
        return self.corner(column, row, v, w)

    def _columns(self, row: int) -> npt.NDArray[np.int64]:
        columns: npt.NDArray[np.int64] = np.unpackbits(self._bits[row]).nonzero()[0]
        return columns

    def cell(self, rank: int) -> tuple[int, int]:
        """(column, row) of the eligible cell number `rank`."""
        row = bisect_right(self._counts, rank)
        return int(self._columns(row)[rank - (self._counts[row - 1] if row else 0)]), row

    def weights(self) -> npt.NDArray[np.float64]:
        """Weights of all eligible cells, in the order of their ranks."""
        parts = [self._weights[0][self._columns(row)] * self._weights[1][row] for row in range(self.shape[0])]
        return np.concatenate(parts)

    def weights_at(self, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Weights of cells (M, 2), as (column, row)."""
        result: npt.NDArray[np.float64] = self._weights[0][cells[:, 0]] * self._weights[1][cells[:, 1]]
        return result

    def corner(self, column: int, row: int, v: float, w: float) -> tuple[int, int]:
        """Upper left corner of a patch centered in a cell, at (v, w) ∈ [0, 1)² of the range that the border allows."""
        corner = []
        for cell, index, length, at in zip(self.cell_px, (column, row), self.size, (v, w), strict=True):
            last = length - self.extent_px
            low, high = (min(max((index + end) * cell - self.extent_px / 2, 0.0), last) for end in (0, 1))
            corner.append(int(low + at * (high - low)))
        return corner[0], corner[1]

    def within(self, x: float, y: float, width: float, height: float) -> npt.NDArray[np.int64]:
        """Eligible cells, (M, 2) as (column, row), whose center lies in a rectangle of level 0."""
        rows = self._inside(y, height, self.cell_px[1], self.shape[0])
        columns = self._inside(x, width, self.cell_px[0], self.shape[1])
        window = np.unpackbits(self._bits[rows], axis=1, count=self.shape[1])[:, columns]
        return np.argwhere(window)[:, ::-1] + np.array([columns.start, rows.start])

    @staticmethod
    def _inside(start: float, length: float, cell: float, n: int) -> slice:
        first = max(0, int(np.ceil(start / cell - 0.5)))
        return slice(first, max(first, min(n, int(np.floor((start + length) / cell - 0.5)) + 1)))


def _box_sums(
    mask: Mask,
    horizontal: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    vertical: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
) -> npt.NDArray[np.float64]:
    """Sums of the mask over boxes with fractional edges, one per column and row: (rows, columns)."""
    running = np.cumsum(np.cumsum(np.pad(mask, ((1, 0), (1, 0))), axis=0, dtype=np.float64), axis=1)

    def at(edges: npt.NDArray[np.float64], table: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
        low = np.clip(np.floor(edges).astype(int), 0, table.shape[axis] - 2)
        part = np.expand_dims(edges - low, 1 - axis)
        result: npt.NDArray[np.float64] = np.take(table, low, axis) * (1 - part) + np.take(table, low + 1, axis) * part
        return result

    columns = at(horizontal[1], running, 1) - at(horizontal[0], running, 1)
    return at(vertical[1], columns, 0) - at(vertical[0], columns, 0)


def save_mask(path: Path, mask: Mask, *, note: str) -> None:
    """Write a mask as a 1-bit PNG, with a note on its source in a text field."""
    text = PngImagePlugin.PngInfo()
    text.add_text("fmtrain", note)
    with atomic_path(path) as temporary:
        Image.fromarray(mask).save(temporary, format="PNG", pnginfo=text)


def load_mask(path: Path) -> tuple[Mask, str]:
    """Mask and note from a file of `save_mask`."""
    with Image.open(path) as image:
        note = str(image.info.get("fmtrain", ""))
        return np.asarray(image).astype(bool), note


def stained_share(patch: Pixels) -> float:
    """Share of pixels in H&E's range of hue, saturation and value: the filter of several pathology models.

    The range on OpenCV's scale is H 90 … 180, S 8 … 255, V 103 … 255. These models keep patches with a share ≥ 0.6.

    Example:
        >>> stained_share(np.full((4, 4, 3), (200, 120, 180), np.uint8))
        1.0
        >>> stained_share(np.full((4, 4, 3), 240, np.uint8))
        0.0
    """
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(patch).convert("HSV")), -1, 0)
    # Pillow's hue spans 0 … 255, OpenCV's 0 … 180: 90 on OpenCV's scale is 127.5 on Pillow's.
    return float(((hue >= 128) & (saturation >= 8) & (value >= 103)).mean())


def is_blank(patch: Pixels) -> bool:
    """Whether all pixels are one gray, as where pixels are lost. Such a patch cannot lie on tissue, which has a color.

    Example:
        >>> is_blank(np.full((4, 4, 3), 255, np.uint8)), is_blank(np.full((4, 4, 3), (200, 120, 180), np.uint8))
        (True, False)
    """
    first, green, blue = patch[0, 0].tolist()
    return first == green == blue and bool((patch[::16, ::16] == first).all() and (patch == first).all())
