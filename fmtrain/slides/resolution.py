"""Micrometres per pixel: what a slide states, and which level serves a requested value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

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
    """A magnification from those that a slide can serve: finest ≤ mpp ≤ coarsest. None if it serves none.

    Args:
        u: uniform in [0, 1).
        mpps: the set; for `continuous_mpp` its smallest and largest are the range.
        weights: how often each of the set; equal by default.
        continuous: draw from the whole range, uniformly in the logarithm, instead.
        finest: below this the slide has no pixels.
        coarsest: above this a patch is larger than the slide.

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


# Nothing that scans tissue is finer or coarser at its full resolution. Print resolutions (96 dpi = 264 µm) and
# slips of unit (0.005 for 0.5) fall outside.
PLAUSIBLE_MPP = (0.05, 10.0)


LEVEL_TOLERANCE = 0.01  # a level this much coarser than asked for is still fine enough


UPSAMPLING_TOLERANCE = 0.1  # scanners called 40× have mpp .23 to .27: such gaps are bridged, larger ones are not


_MPP_KEYS = (("openslide.mpp-x", "openslide.mpp-y"), ("aperio.MPP", "aperio.MPP"))


def resolve_mpp(properties: Mapping[str, str], *, fallback: float | None = None) -> tuple[float, str]:
    """Micrometres per pixel at level 0, and where the number comes from.

    Tried in turn: OpenSlide's mpp (from the vendor's keys, or the TIFF resolution), the vendor's own key, the
    objective (10 / magnification: nominal), the fallback. A value outside 0.05 … 10 is not believed.

    Args:
        properties: OpenSlide's.
        fallback: the user's word, for slides that do not say it themselves.

    Raises:
        ValueError: nothing believable, or pixels that are not square.

    Example:
        >>> resolve_mpp({"openslide.mpp-x": "0.4990", "openslide.mpp-y": "0.4990"})
        (0.499, 'openslide.mpp-x')
        >>> resolve_mpp({"openslide.mpp-x": "264.58", "openslide.mpp-y": "264.58"}, fallback=0.5)
        (0.5, 'given')
    """
    absurd = []
    for key_x, key_y in _MPP_KEYS:
        x, y = _number(properties.get(key_x)), _number(properties.get(key_y))
        if x is None or y is None:
            continue
        if not (is_plausible_mpp(x) and is_plausible_mpp(y)):
            absurd.append(f"{key_x} says {x:.6g}")
        elif abs(x - y) > 0.05 * max(x, y):
            raise ValueError(f"its pixels are not square: mpp {x:.4g} × {y:.4g}; such slides are not supported")
        else:
            return (x + y) / 2, key_x
    power = _number(properties.get("openslide.objective-power"))
    if power is not None and power > 0 and is_plausible_mpp(10 / power):
        return 10 / power, "openslide.objective-power (nominal)"
    if fallback is not None:
        return fallback, "given"
    why = f"no believable mpp ({'; '.join(absurd)})" if absurd else "no mpp"
    raise ValueError(f"it has {why}: give the true micrometres per pixel with --mpp")


def is_plausible_mpp(mpp: float) -> bool:
    """Whether micrometres per pixel can be those of a scan."""
    return PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and np.isfinite(value) else None


def region(info: SlideInfo, location: tuple[int, int], *, size_px: int, mpp: float) -> Region:
    """Where to read a patch: the coarsest level that is fine enough, snapped to that level's own grid.

    A read that is not snapped is interpolated by OpenSlide, and differs by tens of grey levels.

    Args:
        info: the slide.
        location: (x, y) of the upper left corner at level 0.
        size_px: side of the patch that will come out.
        mpp: resolution of the patch.

    Raises:
        ValueError: the slide is too coarse, or smaller than the patch.

    Example:
        >>> slide = SlideInfo("a", 0.25, "", ((4000, 4000), (1000, 1000)), "", "tiles", "", "")
        >>> region(slide, (401, 800), size_px=256, mpp=1.0)
        Region(level=1, x=100, y=200, side=256)
        >>> region(slide, (401, 800), size_px=256, mpp=0.5)
        Region(level=0, x=401, y=800, side=512)
    """
    if info.mpp > mpp * (1 + UPSAMPLING_TOLERANCE):
        raise ValueError(f"{info.name} has mpp {info.mpp:.4g}: too coarse for patches of mpp {mpp:.4g}")
    fine_enough = [k for k in range(len(info.levels)) if info.mpp * info.downsample(k) <= mpp * (1 + LEVEL_TOLERANCE)]
    level = fine_enough[-1] if fine_enough else 0
    downsample = info.downsample(level)
    side = max(1, round(size_px * mpp / (info.mpp * downsample)))
    w, h = info.levels[level]
    if side > min(w, h):
        raise ValueError(
            f"{info.name} is smaller than a patch: {info.size[0]}×{info.size[1]} pixels of mpp {info.mpp:.4g}, "
            f"asked for {size_px} of mpp {mpp:.4g}"
        )
    # Rounding may push a patch at the border over it by a pixel of the level: move it back in.
    x, y = (round(value / downsample) for value in location)
    return Region(level, min(max(x, 0), w - side), min(max(y, 0), h - side), side)


def mpp_range(info: SlideInfo, *, size_px: int) -> tuple[float, float]:
    """The finest and the coarsest mpp at which a slide holds patches of a size."""
    return info.mpp / (1 + UPSAMPLING_TOLERANCE), min(info.size) * info.mpp / size_px * (1 + 1e-9)
