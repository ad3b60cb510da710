"""Micrometers per pixel (mpp): the value of a slide, and the level to read for a requested value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from fmtrain.rng import choose
from fmtrain.slides.info import Region, SlideInfo


def choose_mpp(
    u: float,
    mpps: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    continuous_mpp: bool = False,
    finest: float = 0.0,
    coarsest: float = math.inf,
) -> float | None:
    """Magnification drawn from those that a slide can serve: finest ≤ mpp ≤ coarsest. None if it serves none.

    Args:
        u: Uniform number in [0, 1).
        mpps: Set of magnifications; with `continuous_mpp`, its smallest and largest are the range.
        weights: Weight of each magnification; None for equal weights.
        continuous_mpp: Whether to draw from the whole range, uniformly in the logarithm.
        finest: Finest mpp of the slide's pixels.
        coarsest: Coarsest mpp at which a patch is not larger than the slide.

    Example:
        >>> choose_mpp(0.9, [0.25, 0.5, 1.0, 2.0], finest=0.45)
        2.0
        >>> choose_mpp(0.5, [0.25, 1.0], continuous_mpp=True)
        0.5
    """
    if continuous_mpp:
        low, high = max(min(mpps), finest), min(max(mpps), coarsest)
        return low * (high / low) ** u if low <= high else None
    served = [k for k, mpp in enumerate(mpps) if finest <= mpp <= coarsest and (weights is None or weights[k] > 0)]
    if not served:
        return None
    ends = list(accumulate(1.0 if weights is None else weights[k] for k in served))
    return mpps[served[choose(ends, u)]]


# No scanner of tissue is finer or coarser at full resolution. Print resolutions (96 dpi = 264 µm) and wrong units
# (0.005 for 0.5) fall outside.
PLAUSIBLE_MPP = (0.05, 10.0)
LEVEL_TOLERANCE = 0.01  # a level coarser than requested by this fraction is still fine enough
UPSAMPLING_TOLERANCE = 0.1  # scanners called 40× have mpp .23 to .27; larger gaps are not bridged
SAME_OBJECTIVE = 1.3  # factor between the mpp of scanners whose objectives have one nominal power
INCH_PER_CM = 2.54
_USUAL_MPP = (0.25, 0.5, 1.0)  # nominal, of objectives 40, 20, 10
_MPP_KEYS = (
    ("ome.PhysicalSizeX", "ome.PhysicalSizeY"),
    ("openslide.mpp-x", "openslide.mpp-y"),
    ("aperio.MPP", "aperio.MPP"),
)


class GivenMpp(NamedTuple):
    """The user's micrometers per pixel of one slide."""

    value: float | None = None
    source: str = "given"
    replaces: bool = False  # whether it wins over the file, or only fills a gap


NO_MPP = GivenMpp()


def resolve_mpp(properties: Mapping[str, str], *, given: GivenMpp = NO_MPP) -> tuple[float, str]:
    """Micrometers per pixel at level 0, and the source of the number.

    Sources in order: the user's value if it replaces the file's; OME's physical size; OpenSlide's mpp (from the
    vendor's keys, or the TIFF resolution); the vendor's own key; the objective (10 / magnification: nominal); the
    user's value if it only fills gaps. A value outside 0.05 … 10 is rejected.

    Args:
        properties: OpenSlide's properties.
        given: User's value.

    Example:
        >>> resolve_mpp({"openslide.mpp-x": "0.4990", "openslide.mpp-y": "0.4990"})
        (0.499, 'openslide.mpp-x')
        >>> resolve_mpp({"openslide.mpp-x": "264.58", "openslide.mpp-y": "264.58"}, given=GivenMpp(0.5))
        (0.5, 'given')
        >>> resolve_mpp({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5"}, given=GivenMpp(0.25, "table", True))
        (0.25, 'table')
    """
    if given.value is not None and given.replaces:
        return given.value, given.source
    rejected = []
    for key_x, key_y in _MPP_KEYS:
        x, y = _number(properties.get(key_x)), _number(properties.get(key_y))
        if x is None or y is None:
            continue
        if not (is_plausible_mpp(x) and is_plausible_mpp(y)):
            rejected.append(f"{key_x} is {x:.6g}")
        elif abs(x - y) > 0.05 * max(x, y):
            raise ValueError(f"pixels are not square: mpp {x:.4g} × {y:.4g}; such slides are not supported")
        else:
            return (x + y) / 2, key_x
    power = _number(properties.get("openslide.objective-power"))
    if power is not None and power > 0 and is_plausible_mpp(10 / power):
        return 10 / power, "openslide.objective-power (nominal)"
    if given.value is not None:
        return given.value, given.source
    problem = f"no plausible mpp ({'; '.join(rejected)})" if rejected else "no mpp"
    raise ValueError(f"{problem}: give the true micrometers per pixel with --mpp")


def mpp_contradictions(properties: Mapping[str, str], mpp: float, source: str) -> tuple[str, ...]:
    """What else the file says of its resolution, where it contradicts the mpp taken from it.

    Example:
        >>> mpp_contradictions({"openslide.objective-power": "40"}, 0.5, "openslide.mpp-x")
        ('its objective 40 suggests mpp 0.25, not 0.5',)
    """
    lines = []
    power = _number(properties.get("openslide.objective-power"))
    if power is not None and power > 0 and not _close(mpp, 10 / power, SAME_OBJECTIVE):
        lines.append(f"its objective {power:g} suggests mpp {10 / power:.4g}, not {mpp:.4g}")
    per_unit = _number(properties.get("tiff.XResolution"))
    unit_um = {"inch": 1e4 * INCH_PER_CM, "centimeter": 1e4}.get(properties.get("tiff.ResolutionUnit", ""))
    if per_unit is None or per_unit <= 0 or unit_um is None:
        return tuple(lines)
    tag, from_tag = unit_um / per_unit, source == "openslide.mpp-x"
    other = tag / INCH_PER_CM if unit_um > 1e4 else tag * INCH_PER_CM
    usual = any(_close(other, value, 1.05) for value in _USUAL_MPP)
    if from_tag and _close(mpp, tag, 1.01) and usual and not any(_close(mpp, v, 1.15) for v in _USUAL_MPP):
        lines.append(f"its mpp {mpp:.4g} would be {other:.4g} if an inch and a centimeter were confused (factor 2.54)")
    elif not from_tag and is_plausible_mpp(tag) and not _close(mpp, tag, SAME_OBJECTIVE):
        lines.append(f"its resolution tag says mpp {tag:.4g}, not {mpp:.4g}")
    return tuple(lines)


def _close(a: float, b: float, factor: float) -> bool:
    return max(a, b) <= factor * min(a, b)


def is_plausible_mpp(mpp: float) -> bool:
    """Whether micrometers per pixel can be those of a scan."""
    return PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and np.isfinite(value) else None


def region(info: SlideInfo, location: tuple[int, int], *, size_px: int, mpp: float) -> Region:
    """Region to read for a patch: at the coarsest level that is fine enough, snapped to that level's own grid.

    OpenSlide interpolates a region that is not snapped; its pixels differ by tens of gray levels.

    Args:
        info: Facts about the slide.
        location: (x, y) of the upper left corner at level 0.
        size_px: Side of the resulting patch.
        mpp: Resolution of the patch.

    Example:
        >>> slide = SlideInfo("a", 0.25, "", ((4000, 4000), (1000, 1000)), "", "tiles", "", "")
        >>> region(slide, (401, 800), size_px=256, mpp=1.0)
        Region(level=1, x=100, y=200, side=256)
        >>> region(slide, (401, 800), size_px=256, mpp=0.5)
        Region(level=0, x=401, y=800, side=512)
    """
    if info.mpp > mpp * (1 + UPSAMPLING_TOLERANCE):
        raise ValueError(f"{info.name} has mpp {info.mpp:.4g}: too coarse for patches of mpp {mpp:.4g}")
    level = coarsest_level(info, mpp)
    downsample = info.downsample(level)
    side = max(1, round(size_px * mpp / (info.mpp * downsample)))
    w, h = info.levels[level]
    if side > min(w, h):
        raise ValueError(
            f"{info.name} is smaller than a patch: {info.size[0]}×{info.size[1]} pixels of mpp {info.mpp:.4g}, "
            f"requested {size_px} of mpp {mpp:.4g}"
        )
    # Rounding may push a patch over the border by one pixel of the level: shift it back inside.
    x, y = (round(value / downsample) for value in location)
    return Region(level, min(max(x, 0), w - side), min(max(y, 0), h - side), side)


def coarsest_level(info: SlideInfo, mpp: float) -> int:
    """Coarsest level that is fine enough for a requested mpp; level 0 if none is."""
    levels = range(len(info.levels))
    return max((k for k in levels if info.mpp * info.downsample(k) <= mpp * (1 + LEVEL_TOLERANCE)), default=0)


def mpp_range(info: SlideInfo, *, size_px: int) -> tuple[float, float]:
    """Finest and coarsest mpp at which a slide contains patches of a size."""
    return info.mpp / (1 + UPSAMPLING_TOLERANCE), min(info.size) * info.mpp / size_px * (1 + 1e-9)
