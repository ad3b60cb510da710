"""What is no tissue although it has a color: ink of pens, dark surroundings, tinted glass. No torch.

Ink and glass are smooth, stained tissue is not: over windows of 40 µm, the standard deviation of the gray levels of
tissue is 7 or more in 95 % of all places of 21 real slides, and below 4 in none. So color and smoothness decide
together, and stains of any hue (Alcian blue, Giemsa, Luxol, light green) stay.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

WINDOW_PX = 5  # of the local standard deviation
SMOOTH = 4.5  # gray levels; ink and glass lie below
BLUE_GREEN = 20  # gray levels by which green exceeds red in a blue or green pen
DARK = 45  # red and green of a dark pen; averages over 8 µm of stained tissue are brighter
BLACK = (100, 25)  # maximum of the brightest channel, and of its distance to the darkest, in a black pen
VIVID = 0.75  # saturation of a red or purple pen
LIGHTLESS = 40  # brightest channel of what is too dark to have a color
GLASS_BRIGHT, GLASS_SATURATION = 150, 0.25  # least mean and largest saturation of tinted glass
LEAST_GLASS = 0.01  # share of the slide


def roughness(picture: Pixels) -> Floats:
    """Standard deviation of the gray levels in a window around each pixel."""
    gray = _sum(picture).astype(np.float32) / np.float32(3)
    mean = ndimage.uniform_filter(gray, WINDOW_PX)
    variance = ndimage.uniform_filter(gray * gray, WINDOW_PX) - mean * mean
    result: Floats = np.sqrt(np.maximum(variance, 0))
    return result


def saturation(picture: Pixels) -> Floats:
    """Saturation of each pixel, 0 … 1: (largest − smallest channel) / largest."""
    high, low = _extremes(picture)
    result: Floats = ((high - low) / np.maximum(high, 1)).astype(np.float32)
    return result


def _extremes(picture: Pixels) -> tuple[Pixels, Pixels]:
    """Largest and smallest channel of each pixel; much faster than a maximum over an axis of three."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def _sum(picture: Pixels) -> npt.NDArray[np.int16]:
    """Sum of the channels of each pixel."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    total: npt.NDArray[np.int16] = red.astype(np.int16) + green + blue
    return total


def ink_mask(picture: Pixels, rough: Floats) -> Mask:
    """Ink and darkness: connected pixels of an ink's color, if they are smooth by the median of their roughness.

    Args:
        picture: RGB (H, W, 3), pixels of 8 µm.
        rough: Result of `roughness`.

    Example:
        >>> glass = np.full((40, 40, 3), 240, np.uint8)
        >>> glass[5:35, 5:35] = 30, 60, 160
        >>> int(ink_mask(glass, roughness(glass)).sum())
        900
    """
    red, green, blue = np.moveaxis(picture.astype(np.int16), -1, 0)
    high, low = (extreme.astype(np.int16) for extreme in _extremes(picture))
    vivid = (saturation(picture) > VIVID) & ((blue >= green) | (low < high // 10))
    colors = (
        green - red >= BLUE_GREEN,
        (red < DARK) & (green < DARK),
        vivid,
        (high < BLACK[0]) & (high - low < BLACK[1]),
    )
    ink: Mask = high < LIGHTLESS
    bright = ~ink
    for color in colors:
        labels, count = ndimage.label(color & bright, structure=np.ones((3, 3)))
        if count:
            smooth, inside = np.zeros(count + 1, np.bool_), labels > 0  # most pixels have no such color
            smooth[1:] = ndimage.median(rough[inside], labels[inside], np.arange(1, count + 1)) < SMOOTH
            ink |= smooth[labels]
    return ink


def glass_color(picture: Pixels, rough: Floats) -> npt.NDArray[np.float64]:
    """Color of the glass: the median of smooth, bright, pale pixels; white if there are hardly any."""
    pale = (rough < SMOOTH) & (_sum(picture) > 3 * GLASS_BRIGHT) & (saturation(picture) < GLASS_SATURATION)
    if pale.mean() < LEAST_GLASS:
        return np.full(3, 255.0)
    color: npt.NDArray[np.float64] = np.median(picture[pale], axis=0)
    return color


def not_bright_field(picture: Pixels) -> str:
    """Why a picture is no bright-field slide; empty if it may be one."""
    brightest = int(picture.max())
    if brightest < 64:
        return f"its brightest pixel is {brightest} of 255: a label mask or fluorescence, not a bright-field slide"
    return ""
