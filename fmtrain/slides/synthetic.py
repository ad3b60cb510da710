"""Procedural H&E slides with tissue classes known by construction: the data of demos and tests.

Each slide is a tiled pyramidal TIFF with its mpp in the resolution tags. A table lists squares of known class and
number of nuclei. The images follow the Beer-Lambert law: amounts of hematoxylin and eosin become color through the
optical densities of the two stains (Ruifrok and Johnston 2001). These differ between sites and, less, between slides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from scipy.spatial import cKDTree
from tifffile import TiffWriter

from fmtrain.rng import generator
from repmetrics.atomic_write import atomic_path, write_csv

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CLASSES = ("tumour", "gland", "stroma", "fat", "lymphocytes", "necrosis")
TUMOR, GLAND, STROMA, FAT, LYMPHOCYTES, NECROSIS = range(len(CLASSES))
BACKGROUND = len(CLASSES)

COLUMNS = ("file", "x", "y", "size", "patient", "label", "n_nuclei")  # of labels.csv
LABEL_UM = 128.0  # side of a labeled square
TILE_PX = 256
REGION_UM = 260.0  # typical distance between the centers of two regions
GLAND_UM = 92.0
FAT_CELL_UM = 52.0
UNEVEN_UM = 110.0  # length scale of the variation in stain strength
ANGLES, VARIANTS = 12, 6  # stamps of nuclei per class
COARSE = 8  # pixels per cell of the coarse map of classes

# Amount of stain per class, and its amplitude along the fibers, the grain and the clouds.
#                     tumor  gland stroma fat  lymph necrosis background
_EOSIN = np.array([0.50, 0.54, 0.56, 0.60, 0.48, 0.62, 0.0], np.float32)
_EOSIN_FIBERS = np.array([0.05, 0.18, 0.26, 0.0, 0.04, 0.03, 0.0], np.float32)
_EOSIN_GRAIN = np.array([0.05, 0.04, 0.03, 0.02, 0.04, 0.14, 0.0], np.float32)
_EOSIN_CLOUDS = np.array([0.08, 0.07, 0.10, 0.03, 0.05, 0.16, 0.0], np.float32)
_HEMATOXYLIN = np.array([0.12, 0.10, 0.10, 0.06, 0.10, 0.16, 0.0], np.float32)

# Hematoxylin as measured by Ruifrok & Johnston; their eosin is far more magenta than in scans.
_STAINS = np.array([[0.650, 0.704, 0.286], [0.150, 0.860, 0.420]])


class _Nucleus(NamedTuple):
    """Shape and stain of the nuclei of one class, in micrometers."""

    spacing_um: float
    radius_um: float
    spread: float  # relative spread of the radius
    elongation: float
    depth: float  # amount of hematoxylin
    texture: float  # unevenness of the chromatin


_NUCLEI = {
    TUMOR: _Nucleus(10.0, 4.3, 0.22, 1.25, 1.00, 0.45),
    GLAND: _Nucleus(7.0, 3.2, 0.10, 1.55, 0.95, 0.25),
    STROMA: _Nucleus(24.0, 2.6, 0.20, 3.20, 0.95, 0.20),
    FAT: _Nucleus(70.0, 2.0, 0.20, 2.60, 0.90, 0.10),
    LYMPHOCYTES: _Nucleus(7.6, 2.7, 0.08, 1.05, 1.45, 0.20),
    NECROSIS: _Nucleus(17.0, 1.3, 0.45, 1.20, 0.95, 0.10),
}


class Drawing(NamedTuple):
    """A drawn slide in memory: pixels, their classes and the nuclei."""

    pixels: npt.NDArray[np.uint8]  # (H, W, 3)
    classes: npt.NDArray[np.uint8]  # (H // COARSE, W // COARSE), index into CLASSES, or BACKGROUND
    nuclei: Ints  # (M, 2), x and y of the centers


def draw(*, size_px: int, mpp: float, seed: int, site: int = 0) -> Drawing:
    """Draw one slide in memory.

    Args:
        size_px: Side of the square slide at level 0.
        mpp: Micrometers per pixel. Half the mpp draws structures twice as large in pixels.
        seed: Seed of the tissue, and of the slide's deviation in stain.
        site: Number of the site, which decides scanner and stains: slides of one site share their colors.

    Returns:
        Pixels (H, W, 3), the coarse map of classes, and the centers of all nuclei.
    """
    rng = generator(seed, 0x5EED)
    classes = _class_map(rng, size_px, mpp)
    fine = _upsample_classes(rng, classes, size_px)
    eosin, hematoxylin = _ground(rng, fine, mpp)
    lumen, gland_nuclei = _glands(rng, fine, mpp)
    lumen *= _fat(rng, fine, mpp)
    eosin *= lumen
    hematoxylin *= lumen
    nuclei = _nuclei(rng, fine, hematoxylin, mpp, gland_nuclei)
    _uneven(rng, hematoxylin, eosin, mpp)
    return Drawing(_stain(rng, hematoxylin, eosin, site), classes, nuclei)


def write_slides(
    out: Path, *, count: int, size_px: int, mpp: float, seed: int, on_slide: Callable[[Path], None] | None = None
) -> list[Path]:
    """Write procedural slides, and `labels.csv` with squares of known class, into a folder.

    The names are barcodes in TCGA's form. The first twelve characters are the patient. The sixth and seventh are the
    site, which decides the stain. Every third patient has two slides.

    Args:
        out: Output folder; created if missing.
        count: Number of slides.
        size_px: Side of each slide at level 0.
        mpp: Micrometers per pixel at level 0.
        seed: Seed; two calls with equal arguments write equal pixels.
        on_slide: Callback after each slide, with its path.

    Returns:
        Paths of the slides, in the order of writing.
    """
    if count < 1 or size_px < TILE_PX or not mpp > 0:
        raise ValueError(f"count must be ≥ 1, size_px ≥ {TILE_PX} and mpp > 0, got {count}, {size_px} and {mpp}")
    paths, rows = [], []
    for number, name in enumerate(_barcodes(count)):
        path = out / f"{name}.tiff"
        drawing = draw(size_px=size_px, mpp=mpp, seed=seed * 100_003 + number, site=_SITES.index(name[5:7]))
        write_pyramid(path, drawing.pixels, mpp=mpp)
        rows += _label_rows(path.name, drawing, mpp)
        paths.append(path)
        if on_slide is not None:
            on_slide(path)
    write_csv(out / "labels.csv", COLUMNS, rows)
    return paths


def write_pyramid(path: Path, pixels: npt.NDArray[np.uint8], *, mpp: float, factor: int = 4, quality: int = 88) -> None:
    """Write pixels (H, W, 3) as a generic tiled pyramidal TIFF with JPEG tiles of 256 px, which OpenSlide opens.

    Each level is coarser by `factor` (box filter), until the longer side is at most two tiles.
    """
    image = Image.fromarray(pixels)
    downsample = 1
    with atomic_path(path) as temporary, TiffWriter(temporary, bigtiff=False) as tif:
        while True:
            tif.write(
                np.asarray(image),
                photometric="rgb",
                tile=(TILE_PX, TILE_PX),
                compression="jpeg",
                compressionargs={"level": quality},
                subfiletype=int(downsample > 1),
                resolution=(1e4 / (mpp * downsample), 1e4 / (mpp * downsample)),
                resolutionunit="CENTIMETER",
                metadata=None,
                software="fmtrain.slides.synthetic",
            )
            if max(image.size) <= 2 * TILE_PX:
                break
            image = image.reduce(factor)
            downsample *= factor


_SITES = ("A1", "B2", "C3", "D4")


def _barcodes(count: int) -> list[str]:
    """Barcodes in TCGA's form: project-site-patient-sample-portion-slide."""
    names: list[str] = []
    patient = 0
    while len(names) < count:
        case = f"TCGA-{_SITES[patient % len(_SITES)]}-{1000 + patient:04d}"
        names += [f"{case}-01Z-00-DX{slide}" for slide in range(1, 3 if patient % 3 == 2 else 2)]
        patient += 1
    return names[:count]


def _noise(rng: np.random.Generator, size: tuple[int, int], scale_px: float) -> Floats:
    """Smooth noise of about unit variance, (H, W), varying over `scale_px`."""
    h, w = size
    knots = rng.standard_normal((max(2, int(h / scale_px) + 2), max(2, int(w / scale_px) + 2)), dtype=np.float32)
    image = Image.fromarray(knots).resize((w, h), Image.Resampling.BICUBIC)
    return np.asarray(image) * np.float32(1.4)


def _class_map(rng: np.random.Generator, size_px: int, mpp: float) -> npt.NDArray[np.uint8]:
    """Irregular regions on irregular tissue: the nearest seed in warped coordinates."""
    n = size_px // COARSE
    pitch = REGION_UM / (mpp * COARSE)
    y, x = np.mgrid[:n, :n].astype(np.float32)
    warped = [c + pitch * (0.35 * _noise(rng, (n, n), pitch) + 0.08 * _noise(rng, (n, n), pitch / 5)) for c in (x, y)]
    side = int(np.ceil(n / pitch)) + 2
    seeds = (np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) - 0.5).astype(np.float32)
    seeds = ((seeds + rng.uniform(-0.45, 0.45, seeds.shape)) * pitch).astype(np.float32)
    # Classes in turn, shuffled: every slide that is large enough contains each class.
    kinds = rng.permutation(np.arange(len(seeds)) % len(CLASSES)).astype(np.uint8)
    nearest = cKDTree(seeds).query(np.stack(warped, -1).reshape(-1, 2))[1]
    classes: npt.NDArray[np.uint8] = kinds[nearest].reshape(n, n)
    radius = np.hypot((x / n - 0.5) / rng.uniform(0.44, 0.50), (y / n - 0.5) / rng.uniform(0.44, 0.50))
    outline = radius**3 + 0.10 * _noise(rng, (n, n), n / 4) + 0.04 * _noise(rng, (n, n), n / 24)
    classes[outline > 0.95] = BACKGROUND
    return classes


def _upsample_classes(rng: np.random.Generator, classes: npt.NDArray[np.uint8], size_px: int) -> npt.NDArray[np.uint8]:
    """Class of every pixel, with rough borders that hide the steps of the coarse grid."""
    n = len(classes)
    ramp = (np.arange(size_px, dtype=np.float32) + 0.5) / COARSE
    rows, columns = (
        np.clip(grid + 0.8 * _noise(rng, (size_px, size_px), 12), 0, n - 1).astype(np.int32)
        for grid in (ramp[:, None], ramp[None, :])
    )
    return classes[rows, columns]


def _ground(rng: np.random.Generator, fine: npt.NDArray[np.uint8], mpp: float) -> tuple[Floats, Floats]:
    """Eosin and hematoxylin between the nuclei: cytoplasm, fibers, debris."""
    h, w = fine.shape
    y, x = np.ogrid[:h, :w]
    bend = _noise(rng, (h, w), 90 / mpp)
    angle = rng.uniform(0, np.pi)
    period = 9.0 / mpp
    phase = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))).astype(np.float32) * np.float32(
        6.28 / period
    )
    clouds = _noise(rng, (h, w), 45 / mpp)
    # The clouds bend the fibers and modulate their strength: a pure sine would look like corduroy.
    fibers = np.sin(phase + 8 * bend + 4 * clouds + 1.6 * _noise(rng, (h, w), 11 / mpp)) * (0.6 - 0.5 * bend)
    grain = _noise(rng, (h, w), max(2.0, 1.6 / mpp))
    eosin = _EOSIN[fine] + _EOSIN_FIBERS[fine] * fibers + _EOSIN_GRAIN[fine] * grain + _EOSIN_CLOUDS[fine] * clouds
    hematoxylin = _HEMATOXYLIN[fine] * (1 + 0.15 * clouds + 0.2 * grain)
    return np.maximum(eosin, 0, out=eosin), np.maximum(hematoxylin, 0, out=hematoxylin)


def _scattered(
    rng: np.random.Generator, size: tuple[int, int], spacing_px: float, jitter: float
) -> npt.NDArray[np.float64]:
    """Points (x, y) on a jittered grid: irregular, and rarely on top of each other."""
    h, w = size
    grid = np.stack(np.meshgrid(np.arange(0.5, w / spacing_px), np.arange(0.5, h / spacing_px)), -1).reshape(-1, 2)
    return (grid + rng.uniform(-jitter, jitter, grid.shape)) * spacing_px


def _at(fine: npt.NDArray[np.uint8], points: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Class at each point (x, y)."""
    h, w = fine.shape
    kinds: npt.NDArray[np.uint8] = fine[
        np.clip(points[:, 1].astype(int), 0, h - 1), np.clip(points[:, 0].astype(int), 0, w - 1)
    ]
    return kinds


def _distances(points: npt.NDArray[np.float64], mask: npt.NDArray[np.bool_], k: int) -> Floats:
    """Distances to the k nearest points, (k, H, W). Computed within `mask` on a grid coarser by 4, then enlarged."""
    h, w = mask.shape
    coarse = mask[::4, ::4]
    result = np.full((k, *coarse.shape), 1e4, np.float32)
    if coarse.any() and len(points) >= k:
        ys, xs = np.nonzero(coarse)
        result[:, ys, xs] = cKDTree(points).query(np.stack([xs, ys], -1) * 4.0, k=k)[0].reshape(-1, k).T
    return np.stack([np.asarray(Image.fromarray(d).resize((w, h), Image.Resampling.BILINEAR)) for d in result])


def _glands(
    rng: np.random.Generator, fine: npt.NDArray[np.uint8], mpp: float
) -> tuple[Floats, npt.NDArray[np.float64]]:
    """Glands: an empty lumen within a rim of nuclei. Returns a map (1 on tissue) and the nuclei as (x, y, angle)."""
    h, w = fine.shape
    centers = _scattered(rng, (h, w), GLAND_UM / mpp, 0.14)
    centers = centers[_at(fine, centers) == GLAND]
    wobble = 1 + 0.13 * _noise(rng, (h, w), 30 / mpp)
    distance = _distances(centers, fine == GLAND, 1)[0] * mpp * wobble
    size = 14.0 + 4.0 * np.abs(_noise(rng, (h, w), GLAND_UM / mpp))
    lumen = 1 / (1 + np.exp(np.clip((size - distance) / 0.7, -30, 30)))
    tissue = np.where(fine == GLAND, 0.03 + 0.97 * lumen, 1).astype(np.float32)
    per_gland = 34
    turn = (np.arange(per_gland) + rng.uniform(-0.2, 0.2, (len(centers), per_gland))) * (2 * np.pi / per_gland)
    ring = 30.0 + rng.uniform(-2.5, 4.0, turn.shape)
    nuclei = centers[:, None, :] + (ring / mpp)[..., None] * np.stack([np.cos(turn), np.sin(turn)], -1)
    nuclei = nuclei.reshape(-1, 2)
    inside = (nuclei >= 0).all(1) & (nuclei < [w, h]).all(1)
    nuclei, angle = nuclei[inside], turn.reshape(-1)[inside]
    xs, ys = nuclei[:, 0].astype(int), nuclei[:, 1].astype(int)
    keep = (fine[ys, xs] == GLAND) & (distance[ys, xs] > 22)  # inside the region and outside the lumen
    return tissue, np.column_stack([nuclei, angle])[keep]


def _fat(rng: np.random.Generator, fine: npt.NDArray[np.uint8], mpp: float) -> Floats:
    """Fat: large empty cells, with thin membranes at equal distance to the two nearest centers."""
    points = _scattered(rng, (fine.shape[0], fine.shape[1]), FAT_CELL_UM / mpp, 0.36)
    fat = fine == FAT
    first, second = _distances(points, fat, 2)
    membrane = 1 / (1 + np.exp(np.clip(((second - first) * mpp - 2.4) / 0.6, -30, 30)))
    return np.where(fat, 0.02 + 0.98 * membrane, 1).astype(np.float32)


def _stamps(rng: np.random.Generator, nucleus: _Nucleus, mpp: float) -> list[list[Floats]]:
    """Bank of small images of nuclei, by direction: [angle][variant] → (side, side) hematoxylin."""
    reach = int(np.ceil(nucleus.radius_um * nucleus.elongation**0.5 * (1 + 2 * nucleus.spread) / mpp)) + 2
    v, u = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    bank = []
    for k in range(ANGLES):
        c, s = np.cos(np.pi * k / ANGLES), np.sin(np.pi * k / ANGLES)
        row = []
        for _ in range(VARIANTS):
            radius = nucleus.radius_um / mpp * (1 + nucleus.spread * np.clip(rng.standard_normal(), -2, 2))
            long, wide = radius * nucleus.elongation**0.5, radius / nucleus.elongation**0.5
            border = 1 + 0.4 * nucleus.spread * _noise(rng, u.shape, max(2, reach / 2))
            r = np.hypot((c * u + s * v) / long, (c * v - s * u) / wide) * border
            edge = np.clip((1 - r) * radius / 1.2 + 0.5, 0, 1)
            chromatin = 1 + nucleus.texture * (0.5 * _noise(rng, u.shape, max(2, reach / 3)) - 0.35 * (r < 0.75))
            row.append(
                (nucleus.depth * edge * np.clip(chromatin, 0.3, 1.6) * rng.uniform(0.8, 1.15)).astype(np.float32)
            )
        bank.append(row)
    return bank


def _nuclei(
    rng: np.random.Generator,
    fine: npt.NDArray[np.uint8],
    hematoxylin: Floats,
    mpp: float,
    gland: npt.NDArray[np.float64],
) -> Ints:
    """Stamp the nuclei of every class into the map of hematoxylin, and return their centers (x, y)."""
    h, w = fine.shape
    centers = []
    for kind, nucleus in _NUCLEI.items():
        if kind == GLAND:
            points, angle = gland[:, :2], gland[:, 2]
        else:
            points = _scattered(rng, (h, w), nucleus.spacing_um / mpp, 0.42)
            points = points[_at(fine, points) == kind]
            angle = rng.uniform(0, np.pi, len(points))
            if kind == FAT:
                continue  # flat nuclei of fat cells do not show in the membranes at these magnifications
        bank = _stamps(rng, nucleus, mpp)
        reach = bank[0][0].shape[0] // 2
        inside = ((points >= reach) & (points < [w - reach, h - reach])).all(1)
        positions = points[inside].astype(np.int64)
        direction = (np.round(angle[inside] / np.pi * ANGLES).astype(int) % ANGLES).tolist()
        variant = rng.integers(0, VARIANTS, len(positions)).tolist()
        for (x, y), k, j in zip(positions.tolist(), direction, variant, strict=True):
            view = hematoxylin[y - reach : y + reach + 1, x - reach : x + reach + 1]
            np.maximum(view, bank[k][j], out=view)
        centers.append(positions)
    return np.concatenate(centers)


def _uneven(rng: np.random.Generator, hematoxylin: Floats, eosin: Floats, mpp: float) -> None:
    """Vary the thickness of the section and the strength of the stains: color alone does not identify the tissue."""
    h, w = hematoxylin.shape
    thickness, balance = (0.25 * _noise(rng, (h, w), UNEVEN_UM / mpp) for _ in range(2))
    hematoxylin *= np.exp(thickness + balance)
    eosin *= np.exp(thickness - balance)


def _stain(rng: np.random.Generator, hematoxylin: Floats, eosin: Floats, site: int) -> npt.NDArray[np.uint8]:
    """Amounts of stain → 8-bit color, with the stains and the scanner of a site."""
    site_rng = generator(site, 0x517E)
    stains = _STAINS + site_rng.normal(0, 0.04, (2, 3)) + rng.normal(0, 0.015, (2, 3))
    stains = np.clip(stains, 0.01, None)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    amount = site_rng.uniform(0.75, 1.25, 2) * rng.uniform(0.88, 1.14, 2)
    density = (stains * amount[:, None] * [[1.0], [0.95]]).astype(np.float32)
    light = (site_rng.uniform(238, 248) + site_rng.uniform(-3, 3, 3) + rng.normal(0, 1, 3)).astype(np.float32)
    grain = rng.standard_normal(hematoxylin.shape, dtype=np.float32) * np.float32(0.012)
    pixels = np.empty((*hematoxylin.shape, 3), np.uint8)
    for channel in range(3):
        od = hematoxylin * density[0, channel] + eosin * density[1, channel] + grain
        np.exp(-od, out=od)
        pixels[..., channel] = np.clip(od * light[channel], 0, 255)
    return pixels


def _label_rows(file: str, drawing: Drawing, mpp: float) -> list[dict[str, str | int]]:
    """Rows of labels.csv: squares of LABEL_UM, overlapping by three quarters, of which at least 3/4 is one class."""
    step = max(1, round(LABEL_UM / (4 * mpp * COARSE)))
    size = 4 * step
    if len(drawing.classes) < size:
        return []
    squares = sliding_window_view(drawing.classes, (size, size))[::step, ::step]
    shares = np.stack([(squares == kind).mean((2, 3)) for kind in range(len(CLASSES))])
    side = step * COARSE
    n = len(drawing.classes) // step
    edges = np.arange(n + 1) * side
    counts = np.histogram2d(drawing.nuclei[:, 1], drawing.nuclei[:, 0], bins=(edges, edges))[0]
    nuclei = sliding_window_view(counts, (4, 4)).sum((2, 3)).astype(int)
    return [
        dict(
            zip(COLUMNS, (file, x * side, y * side, 4 * side, file[:12], CLASSES[kind], int(nuclei[y, x])), strict=True)
        )
        for y, x in np.argwhere(shares.max(0) >= 0.75).tolist()
        for kind in [int(shares[:, y, x].argmax())]
    ]
