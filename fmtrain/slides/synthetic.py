"""Procedural H&E slides with tissue classes known by construction: the data that ships with the package.

Each slide is a real tiled pyramidal TIFF with its mpp in the resolution tags, and beside the slides lies a
table of squares whose class, and number of nuclei, is known. The pictures follow the Beer-Lambert law:
maps of the amount of haematoxylin and eosin become colour through the optical densities of the two stains
(Ruifrok and Johnston 2001), which differ from site to site and, less, from slide to slide.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from scipy.spatial import cKDTree
from tifffile import TiffWriter

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CLASSES = ("tumour", "gland", "stroma", "fat", "lymphocytes", "necrosis")
TUMOUR, GLAND, STROMA, FAT, LYMPHOCYTES, NECROSIS = range(len(CLASSES))
BACKGROUND = len(CLASSES)

LABEL_UM = 128.0  # side of a labelled square
TILE_PX = 256
REGION_UM = 260.0  # typical distance between the centres of two regions
GLAND_UM = 92.0
FAT_CELL_UM = 52.0
UNEVEN_UM = 110.0  # over which the strength of the stains varies
COARSE = 8  # regions are laid out on a grid coarser by this factor

# How much stain each class holds, and how much of it follows the fibres, the grain and the clouds.
#                     tumour gland stroma fat  lymph necrosis background
_EOSIN = np.array([0.50, 0.54, 0.56, 0.60, 0.48, 0.62, 0.0], np.float32)
_EOSIN_FIBRES = np.array([0.05, 0.18, 0.26, 0.0, 0.04, 0.03, 0.0], np.float32)
_EOSIN_GRAIN = np.array([0.05, 0.04, 0.03, 0.02, 0.04, 0.14, 0.0], np.float32)
_EOSIN_CLOUDS = np.array([0.08, 0.07, 0.10, 0.03, 0.05, 0.16, 0.0], np.float32)
_HAEMATOXYLIN = np.array([0.12, 0.10, 0.10, 0.06, 0.10, 0.16, 0.0], np.float32)

# Haematoxylin as Ruifrok & Johnston measured it; their eosin is far more magenta than scanners show it.
_STAINS = np.array([[0.650, 0.704, 0.286], [0.150, 0.860, 0.420]])


class _Nucleus(NamedTuple):
    """What nuclei of one class look like, in micrometres."""

    spacing_um: float
    radius_um: float
    spread: float  # relative spread of the radius
    elongation: float
    depth: float  # haematoxylin
    texture: float  # unevenness of the chromatin


_NUCLEI = {
    TUMOUR: _Nucleus(10.0, 4.3, 0.22, 1.25, 1.00, 0.45),
    GLAND: _Nucleus(7.0, 3.2, 0.10, 1.55, 0.95, 0.25),
    STROMA: _Nucleus(24.0, 2.6, 0.20, 3.20, 0.95, 0.20),
    FAT: _Nucleus(70.0, 2.0, 0.20, 2.60, 0.90, 0.10),
    LYMPHOCYTES: _Nucleus(7.6, 2.7, 0.08, 1.05, 1.45, 0.20),
    NECROSIS: _Nucleus(17.0, 1.3, 0.45, 1.20, 0.95, 0.10),
}


class Drawing(NamedTuple):
    """A slide before it is stained and written: pixels and what they are by construction."""

    pixels: npt.NDArray[np.uint8]  # (H, W, 3)
    classes: npt.NDArray[np.uint8]  # (H // COARSE, W // COARSE), index into CLASSES, or BACKGROUND
    nuclei: Ints  # (M, 2), x and y of the centres


def draw(*, size_px: int, mpp: float, seed: int, site: int = 0) -> Drawing:
    """Draw one slide in memory.

    Args:
        size_px: side of the square slide at level 0.
        mpp: micrometres per pixel: the same seed at half the mpp shows structures twice as large in pixels.
        seed: what is on the slide, and its own deviation in stain.
        site: whose scanner and stains: slides of one site share their colours.

    Returns:
        The pixels (H, W, 3), the coarse map of classes, and the centres of all nuclei.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    classes = _class_map(rng, size_px, mpp)
    fine = _upsample_classes(rng, classes, size_px)
    eosin, haematoxylin = _ground(rng, fine, mpp)
    lumen, gland_nuclei = _glands(rng, fine, mpp)
    lumen *= _fat(rng, fine, mpp)
    eosin *= lumen
    haematoxylin *= lumen
    nuclei = _nuclei(rng, fine, haematoxylin, mpp, gland_nuclei)
    _uneven(rng, haematoxylin, eosin, mpp)
    return Drawing(_stain(rng, haematoxylin, eosin, site), classes, nuclei)


def write_slides(
    out: Path, *, count: int, size_px: int, mpp: float, seed: int, on_slide: Callable[[Path], None] | None = None
) -> list[Path]:
    """Write procedural slides, and `labels.csv` with squares of known class, into a folder.

    The names are barcodes in the form of TCGA's: the first twelve characters are the patient, the fifth and
    sixth the site, which decides the stain. Every third patient has two slides.

    Args:
        out: the folder, made if missing.
        count: number of slides.
        size_px: side of each slide at level 0.
        mpp: micrometres per pixel at level 0.
        seed: two calls with the same arguments write the same pixels.
        on_slide: called after each slide with its path, to show progress.

    Returns:
        The paths of the slides, in the order of writing.

    Raises:
        ValueError: if a slide would be smaller than one tile, or mpp is not positive.
    """
    if count < 1 or size_px < TILE_PX or not mpp > 0:
        raise ValueError(f"count must be ≥ 1, size_px ≥ {TILE_PX} and mpp > 0, got {count}, {size_px} and {mpp}")
    out.mkdir(parents=True, exist_ok=True)
    paths, rows = [], []
    for number, name in enumerate(_barcodes(count)):
        path = out / f"{name}.tiff"
        drawing = draw(size_px=size_px, mpp=mpp, seed=seed * 100_003 + number, site=_SITES.index(name[5:7]))
        write_pyramid(path, drawing.pixels, mpp=mpp)
        rows += _label_rows(path.name, drawing, mpp)
        paths.append(path)
        if on_slide is not None:
            on_slide(path)
    temporary = out / "labels.csv.part"
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "x", "y", "size", "patient", "label", "n_nuclei"])
        writer.writerows(rows)
    temporary.replace(out / "labels.csv")
    return paths


def write_pyramid(path: Path, pixels: npt.NDArray[np.uint8], *, mpp: float, factor: int = 4, quality: int = 88) -> None:
    """Write pixels (H, W, 3) as a generic tiled pyramidal TIFF, JPEG tiles of 256, that OpenSlide opens.

    Levels follow one another by `factor` (box filter) while their longer side is above two tiles.
    """
    temporary = path.with_name(path.name + ".part")
    image = Image.fromarray(pixels)
    downsample = 1
    with TiffWriter(temporary, bigtiff=False) as tif:
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
    temporary.replace(path)


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
    """Irregular regions on irregular tissue: nearest seed, seen through warped coordinates."""
    n = size_px // COARSE
    pitch = REGION_UM / (mpp * COARSE)
    y, x = np.mgrid[:n, :n].astype(np.float32)
    warped = [c + pitch * (0.35 * _noise(rng, (n, n), pitch) + 0.08 * _noise(rng, (n, n), pitch / 5)) for c in (x, y)]
    side = int(np.ceil(n / pitch)) + 2
    seeds = (np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) - 0.5).astype(np.float32)
    seeds = ((seeds + rng.uniform(-0.45, 0.45, seeds.shape)) * pitch).astype(np.float32)
    # Every class in turn, shuffled: each is on every slide that has room for it.
    kinds = rng.permutation(np.arange(len(seeds)) % len(CLASSES)).astype(np.uint8)
    nearest = cKDTree(seeds).query(np.stack(warped, -1).reshape(-1, 2))[1]
    classes: npt.NDArray[np.uint8] = kinds[nearest].reshape(n, n)
    radius = np.hypot((x / n - 0.5) / rng.uniform(0.44, 0.50), (y / n - 0.5) / rng.uniform(0.44, 0.50))
    outline = radius**3 + 0.10 * _noise(rng, (n, n), n / 4) + 0.04 * _noise(rng, (n, n), n / 24)
    classes[outline > 0.95] = BACKGROUND
    return classes


def _upsample_classes(rng: np.random.Generator, classes: npt.NDArray[np.uint8], size_px: int) -> npt.NDArray[np.uint8]:
    """The class of every pixel: borders are roughened, so that no stairs of the coarse grid remain."""
    n = len(classes)
    ramp = (np.arange(size_px, dtype=np.float32) + 0.5) / COARSE
    rows, columns = (
        np.clip(grid + 0.8 * _noise(rng, (size_px, size_px), 12), 0, n - 1).astype(np.int32)
        for grid in (ramp[:, None], ramp[None, :])
    )
    return classes[rows, columns]


def _ground(rng: np.random.Generator, fine: npt.NDArray[np.uint8], mpp: float) -> tuple[Floats, Floats]:
    """Eosin and haematoxylin of what lies between the nuclei: cytoplasm, fibres, debris."""
    h, w = fine.shape
    y, x = np.ogrid[:h, :w]
    bend = _noise(rng, (h, w), 90 / mpp)
    angle = rng.uniform(0, np.pi)
    period = 9.0 / mpp
    phase = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))).astype(np.float32) * np.float32(
        6.28 / period
    )
    clouds = _noise(rng, (h, w), 45 / mpp)
    # The clouds bend the fibres too, and let them fade: a pure sine would look like corduroy.
    fibres = np.sin(phase + 8 * bend + 4 * clouds + 1.6 * _noise(rng, (h, w), 11 / mpp)) * (0.6 - 0.5 * bend)
    grain = _noise(rng, (h, w), max(2.0, 1.6 / mpp))
    eosin = _EOSIN[fine] + _EOSIN_FIBRES[fine] * fibres + _EOSIN_GRAIN[fine] * grain + _EOSIN_CLOUDS[fine] * clouds
    haematoxylin = _HAEMATOXYLIN[fine] * (1 + 0.15 * clouds + 0.2 * grain)
    return np.maximum(eosin, 0, out=eosin), np.maximum(haematoxylin, 0, out=haematoxylin)


def _scattered(
    rng: np.random.Generator, size: tuple[int, int], spacing_px: float, jitter: float
) -> npt.NDArray[np.float64]:
    """Points (x, y) on a jittered grid: irregular, yet seldom on top of each other."""
    h, w = size
    grid = np.stack(np.meshgrid(np.arange(0.5, w / spacing_px), np.arange(0.5, h / spacing_px)), -1).reshape(-1, 2)
    return (grid + rng.uniform(-jitter, jitter, grid.shape)) * spacing_px


def _at(fine: npt.NDArray[np.uint8], points: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """The class under each point (x, y)."""
    h, w = fine.shape
    kinds: npt.NDArray[np.uint8] = fine[
        np.clip(points[:, 1].astype(int), 0, h - 1), np.clip(points[:, 0].astype(int), 0, w - 1)
    ]
    return kinds


def _distances(points: npt.NDArray[np.float64], wanted: npt.NDArray[np.bool_], k: int) -> Floats:
    """Distances to the k nearest points, (k, H, W), smooth; computed on a quarter of the grid, where wanted."""
    h, w = wanted.shape
    coarse = wanted[::4, ::4]
    result = np.full((k, *coarse.shape), 1e4, np.float32)
    if coarse.any() and len(points) >= k:
        ys, xs = np.nonzero(coarse)
        found = cKDTree(points).query(np.stack([xs, ys], -1) * 4.0, k=k)[0].reshape(-1, k)
        result[:, ys, xs] = found.T
    return np.stack([np.asarray(Image.fromarray(d).resize((w, h), Image.Resampling.BILINEAR)) for d in result])


def _glands(
    rng: np.random.Generator, fine: npt.NDArray[np.uint8], mpp: float
) -> tuple[Floats, npt.NDArray[np.float64]]:
    """Glands: an empty lumen, and a rim of nuclei around it. Returns a map (1 where tissue) and the nuclei."""
    h, w = fine.shape
    centres = _scattered(rng, (h, w), GLAND_UM / mpp, 0.14)
    centres = centres[_at(fine, centres) == GLAND]
    wobble = 1 + 0.13 * _noise(rng, (h, w), 30 / mpp)
    distance = _distances(centres, fine == GLAND, 1)[0] * mpp * wobble
    size = 14.0 + 4.0 * np.abs(_noise(rng, (h, w), GLAND_UM / mpp))
    lumen = 1 / (1 + np.exp(np.clip((size - distance) / 0.7, -30, 30)))
    tissue = np.where(fine == GLAND, 0.03 + 0.97 * lumen, 1).astype(np.float32)
    per_gland = 34
    turn = (np.arange(per_gland) + rng.uniform(-0.2, 0.2, (len(centres), per_gland))) * (2 * np.pi / per_gland)
    ring = 30.0 + rng.uniform(-2.5, 4.0, turn.shape)
    nuclei = centres[:, None, :] + (ring / mpp)[..., None] * np.stack([np.cos(turn), np.sin(turn)], -1)
    nuclei = nuclei.reshape(-1, 2)
    inside = (nuclei >= 0).all(1) & (nuclei < [w, h]).all(1)
    nuclei, angle = nuclei[inside], turn.reshape(-1)[inside]
    xs, ys = nuclei[:, 0].astype(int), nuclei[:, 1].astype(int)
    keep = (fine[ys, xs] == GLAND) & (distance[ys, xs] > 22)  # not beyond the region, nor in a lumen
    return tissue, np.column_stack([nuclei, angle])[keep]


def _fat(rng: np.random.Generator, fine: npt.NDArray[np.uint8], mpp: float) -> Floats:
    """Fat: large empty cells, thin membranes where the two nearest centres are equally far."""
    points = _scattered(rng, (fine.shape[0], fine.shape[1]), FAT_CELL_UM / mpp, 0.36)
    fat = fine == FAT
    first, second = _distances(points, fat, 2)
    membrane = 1 / (1 + np.exp(np.clip(((second - first) * mpp - 2.4) / 0.6, -30, 30)))
    return np.where(fat, 0.02 + 0.98 * membrane, 1).astype(np.float32)


def _stamps(
    rng: np.random.Generator, look: _Nucleus, mpp: float, angles: int = 12, per_angle: int = 6
) -> list[list[Floats]]:
    """A bank of small pictures of nuclei, by direction: [angle][variant] → (side, side) haematoxylin."""
    reach = int(np.ceil(look.radius_um * look.elongation**0.5 * (1 + 2 * look.spread) / mpp)) + 2
    v, u = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    bank = []
    for k in range(angles):
        c, s = np.cos(np.pi * k / angles), np.sin(np.pi * k / angles)
        row = []
        for _ in range(per_angle):
            radius = look.radius_um / mpp * (1 + look.spread * np.clip(rng.standard_normal(), -2, 2))
            long, wide = radius * look.elongation**0.5, radius / look.elongation**0.5
            border = 1 + 0.4 * look.spread * _noise(rng, u.shape, max(2, reach / 2))
            r = np.hypot((c * u + s * v) / long, (c * v - s * u) / wide) * border
            edge = np.clip((1 - r) * radius / 1.2 + 0.5, 0, 1)
            chromatin = 1 + look.texture * (0.5 * _noise(rng, u.shape, max(2, reach / 3)) - 0.35 * (r < 0.75))
            row.append((look.depth * edge * np.clip(chromatin, 0.3, 1.6) * rng.uniform(0.8, 1.15)).astype(np.float32))
        bank.append(row)
    return bank


def _nuclei(
    rng: np.random.Generator,
    fine: npt.NDArray[np.uint8],
    haematoxylin: Floats,
    mpp: float,
    gland: npt.NDArray[np.float64],
) -> Ints:
    """Stamp the nuclei of every class into the map of haematoxylin, and return their centres (x, y)."""
    h, w = fine.shape
    centres = []
    for kind, look in _NUCLEI.items():
        if kind == GLAND:
            points, angle = gland[:, :2], gland[:, 2]
        else:
            points = _scattered(rng, (h, w), look.spacing_um / mpp, 0.42)
            points = points[_at(fine, points) == kind]
            angle = rng.uniform(0, np.pi, len(points))
            if kind == FAT:
                continue  # their flat nuclei are lost in the membranes at these magnifications
        bank = _stamps(rng, look, mpp)
        reach = bank[0][0].shape[0] // 2
        inside = ((points >= reach) & (points < [w - reach, h - reach])).all(1)
        where = points[inside].astype(np.int64)
        direction = (np.round(angle[inside] / np.pi * len(bank)).astype(int) % len(bank)).tolist()
        variant = rng.integers(0, len(bank[0]), len(where)).tolist()
        for (x, y), k, j in zip(where.tolist(), direction, variant, strict=True):
            view = haematoxylin[y - reach : y + reach + 1, x - reach : x + reach + 1]
            np.maximum(view, bank[k][j], out=view)
        centres.append(where)
    return np.concatenate(centres)


def _uneven(rng: np.random.Generator, haematoxylin: Floats, eosin: Floats, mpp: float) -> None:
    """Sections vary in thickness and stains in strength from place to place: colour alone does not tell the tissue."""
    h, w = haematoxylin.shape
    thickness, balance = (0.25 * _noise(rng, (h, w), UNEVEN_UM / mpp) for _ in range(2))
    haematoxylin *= np.exp(thickness + balance)
    eosin *= np.exp(thickness - balance)


def _stain(rng: np.random.Generator, haematoxylin: Floats, eosin: Floats, site: int) -> npt.NDArray[np.uint8]:
    """Amounts of stain → 8-bit colour, as this site's stains and scanner would show them."""
    of_site = np.random.default_rng([site, 0x517E])
    stains = _STAINS + of_site.normal(0, 0.04, (2, 3)) + rng.normal(0, 0.015, (2, 3))
    stains = np.clip(stains, 0.01, None)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    amount = of_site.uniform(0.75, 1.25, 2) * rng.uniform(0.88, 1.14, 2)
    density = (stains * amount[:, None] * [[1.0], [0.95]]).astype(np.float32)
    light = (of_site.uniform(238, 248) + of_site.uniform(-3, 3, 3) + rng.normal(0, 1, 3)).astype(np.float32)
    grain = rng.standard_normal(haematoxylin.shape, dtype=np.float32) * np.float32(0.012)
    pixels = np.empty((*haematoxylin.shape, 3), np.uint8)
    for channel in range(3):
        od = haematoxylin * density[0, channel] + eosin * density[1, channel] + grain
        np.exp(-od, out=od)
        pixels[..., channel] = np.clip(od * light[channel], 0, 255)
    return pixels


def _label_rows(file: str, drawing: Drawing, mpp: float) -> list[list[str | int]]:
    """Squares of LABEL_UM, overlapping by three quarters, that are at least 3/4 of one class.

    Each as file, x, y, size, patient, class, number of nuclei.
    """
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
        [file, x * side, y * side, 4 * side, file[:12], CLASSES[int(shares[:, y, x].argmax())], int(nuclei[y, x])]
        for y, x in np.argwhere(shares.max(0) >= 0.75).tolist()
    ]
