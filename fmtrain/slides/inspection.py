"""Inspection of one slide file: mpp, levels, fingerprint, and the choice of its reader. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import openslide
from openslide.lowlevel import OpenSlideError

from fmtrain.slides.info import SlideInfo, fingerprint
from fmtrain.slides.ome import VENDOR, NotBrightFieldError, OmeImage, OmeReader, read_ome
from fmtrain.slides.resolution import NO_MPP, GivenMpp, mpp_contradictions, resolve_mpp
from fmtrain.slides.slide import rgba_to_rgb
from fmtrain.slides.tiles import SlideError, TiledLevel, TileReader, UnsupportedTiff, tiled_levels

SAMPLES, SAMPLE_PX = 5, 32  # squares along each axis in which colors are counted, and their side
SAME_ASPECT = 1.05  # ratio of the two downsamples of a level
FEW_COLORS, MANY_COLORS = 16, 256  # at most in a mask; at least in a slide
MAX_SIDE_UM = 300_000  # wider than any glass: the file is damaged, or its mpp is wrong


def inspect_slide(
    path: Path, *, given: GivenMpp = NO_MPP, name: str | None = None, files: Sequence[str] = ()
) -> SlideInfo:
    """Open a slide, determine its mpp and its levels, and choose its reader.

    The direct tile reader is chosen only if tiles of every level equal the pixels of OpenSlide, or of tifffile for an
    OME-TIFF.

    Args:
        path: Slide file.
        given: User's micrometers per pixel.
        name: Name of the slide; default that of the file.
        files: All files of a slide that has several, relative to the folder of `path`.
    """
    name = name or path.name
    try:
        digest = fingerprint(path, files)
        ome = _ome(path)
        if ome is not None:
            return _inspect_ome(path, ome, given, name, digest)
        with openslide.OpenSlide(path) as slide:
            properties = slide.properties
            vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
            levels = tuple((int(w), int(h)) for w, h in slide.level_dimensions)
            doubts: list[str] = []
            if vendor == "generic-tiff" and (count := _same_picture(slide)) < len(levels):
                doubts.append(f"level {count} shows another picture (a label or a mask) and is not used")
                levels = levels[:count]
            value, source = _mpp(properties, levels[0], given)
            reason = ""
            try:
                _compare(path, slide, tiled_levels(path, dimensions=levels, vendor=vendor))
            except UnsupportedTiff as error:
                reason = str(error)
            return SlideInfo(
                name,
                value,
                source,
                levels,
                vendor,
                "openslide" if reason else "tiles",
                reason,
                digest,
                _tile_sizes(properties, len(levels)),
                tuple(files),
                (*doubts, *(() if given.replaces else mpp_contradictions(properties, value, source))),
            )
    except PermissionError as error:
        raise SlideError(f"{name}: no permission to read the file") from error
    except openslide.OpenSlideUnsupportedFormatError:
        raise SlideError(f"{name}: not a slide in a format of OpenSlide, or truncated") from None
    except SlideError:
        raise
    except (OpenSlideError, ValueError, OSError) as error:
        raise SlideError(f"{name}: {error}") from error


def _ome(path: Path) -> OmeImage | None:
    """Facts about an OME-TIFF; None for a file that OpenSlide should try."""
    try:
        return read_ome(path)
    except (OSError, NotBrightFieldError):
        raise
    except Exception:  # a parser of broken files raises any exception; OpenSlide names the problem
        return None


def _mpp(properties: Mapping[str, str], size: tuple[int, int], given: GivenMpp) -> tuple[float, str]:
    value, source = resolve_mpp(properties, given=given)
    if max(size) * value > MAX_SIDE_UM:
        raise ValueError(
            f"{size[0]}×{size[1]} pixels of mpp {value:.4g} cannot be a slide: give the true mpp with --mpp-override"
        )
    return value, source


def _inspect_ome(path: Path, ome: OmeImage, given: GivenMpp, name: str, digest: str) -> SlideInfo:
    """Facts about an OME-TIFF. The direct reader must equal tifffile."""
    value, source = _mpp(ome.properties, ome.levels[0], given)
    reason = ""
    reference = OmeReader(path)
    try:
        levels = tiled_levels(path, dimensions=ome.levels, vendor=VENDOR)
        _compare(path, reference, levels)
    except UnsupportedTiff as error:
        reason = str(error)
    finally:
        reference.close()
    warnings = () if given.replaces else mpp_contradictions(ome.properties, value, source)
    reader = "tifffile" if reason else "tiles"
    return SlideInfo(name, value, source, ome.levels, VENDOR, reader, reason, digest, ome.tiles, (), warnings)


def _same_picture(slide: openslide.OpenSlide) -> int:
    """Number of levels that may show the picture of level 0: any tiled page of a generic TIFF passes for a level.

    A page of another shape is a label, and one of a few colors is a mask.
    """
    (w0, h0), colors = slide.dimensions, _colors(slide, 0) if slide.level_count > 1 else 0
    for level in range(1, slide.level_count):
        w, h = slide.level_dimensions[level]
        other_shape = max(w0 / w, h0 / h) > SAME_ASPECT * min(w0 / w, h0 / h) and min(w, h) > SAMPLE_PX
        if other_shape or (colors > MANY_COLORS and _colors(slide, level) <= FEW_COLORS):
            return level
    return slide.level_count


def _colors(slide: openslide.OpenSlide, level: int) -> int:
    """Number of colors in squares all over a level."""
    (w, h), downsample = slide.level_dimensions[level], slide.level_downsamples[level]
    side = min(SAMPLE_PX, w, h)
    squares = [
        np.asarray(slide.read_region((round(x * downsample), round(y * downsample)), level, (side, side)))
        for x in np.linspace(0, w - side, SAMPLES)
        for y in np.linspace(0, h - side, SAMPLES)
    ]
    return len(np.unique(np.stack(squares).reshape(-1, 4), axis=0))


def _tile_sizes(properties: Mapping[str, str], levels: int) -> tuple[tuple[int, int], ...]:
    keys = [[f"openslide.level[{level}].tile-{side}" for side in ("width", "height")] for level in range(levels)]
    if not all(key in properties for pair in keys for key in pair):
        return ()
    return tuple((int(properties[w]), int(properties[h])) for w, h in keys)


def _compare(path: Path, reference: openslide.OpenSlide | OmeReader, levels: tuple[TiledLevel, ...]) -> None:
    """Compare the first, the middle and the last tile of every level with the reference's pixels."""
    reader = TileReader(path, levels)
    try:
        for number, level in enumerate(levels):
            rows = -(-level.size[1] // level.tile[1])
            for tile in sorted({0, level.columns * rows // 2, level.columns * rows - 1}):
                corner = (tile % level.columns) * level.tile[0], (tile // level.columns) * level.tile[1]
                pixels = np.empty((level.tile[1], level.tile[0], 3), np.uint8)
                if isinstance(reference, OmeReader):
                    expected = np.empty_like(pixels)
                    reference.read(number, [corner], level.tile, outs=[expected])
                else:
                    downsample = reference.level_downsamples[number]
                    location = (round(corner[0] * downsample), round(corner[1] * downsample))
                    if max(abs(a / downsample - b) for a, b in zip(location, corner, strict=True)) > 1 / 1024:
                        continue  # OpenSlide would interpolate: no comparison is possible
                    # raises for a broken tile
                    expected = rgba_to_rgb(reference.read_region(location, number, level.tile))
                reader.read(number, [corner], level.tile, outs=[pixels])
                if not np.array_equal(pixels, expected):
                    library = "tifffile" if isinstance(reference, OmeReader) else "OpenSlide"
                    raise UnsupportedTiff(f"level {number}: tile {tile} differs from {library}'s")
    except SlideError as error:
        raise UnsupportedTiff(str(error).removeprefix(f"{path.name}: ")) from error
    finally:
        reader.close()
