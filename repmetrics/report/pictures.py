"""Pictures of the representation in a report: a map with images under the pointer, neighbors, tokens, outliers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmetrics.monitoring.pictures import Pictures
from repmetrics.report.page import items
from repmetrics.report.runs import Run
from repmetrics.tensorboard.sheets import group_colors, map_places, neighbors, row, tiled, token_strips

MOST_RUNS = 3
"""Runs of a report whose pictures are shown."""
SHEET_BYTES = 700_000
"""Largest size of the images of a map, before base64 adds a third."""
POINTER_PX = 96


def pictures_section(runs: Sequence[Run]) -> str:
    """Pictures of the first runs that have some; empty without any. Names of groups are not in it."""
    known = [(run, pictures) for run in runs[:MOST_RUNS] if (pictures := run.pictures()) is not None]
    if not known:
        return ""
    parts = ["<h2>Pictures</h2>"]
    for k, (run, pictures) in enumerate(known):
        parts += [f"<h3>{escape(run.name)}</h3>"] if len(runs) > 1 else []
        parts += [_map(pictures, f"map{k}"), _neighbors(pictures), _tokens(pictures), _farthest(pictures)]
    if (missing := len(runs) - len(known)) > 0:
        parts.append(items([f"{missing} more {'run has' if missing == 1 else 'runs have'} no pictures here."]))
    return "".join(parts)


def _map(pictures: Pictures, name: str) -> str:
    """The map as points of HTML: the style alone shows an image under the pointer and switches the colors."""
    shown = len(pictures.thumbnails)
    columns = int(np.ceil(np.sqrt(shown)))
    known = _known_colors(pictures)
    switches = "".join(
        f"<input type=radio name={name} id={name}-{kind} class={kind}{' checked' * (kind == known[0])}>"
        f"<label for={name}-{kind}>colors by {kind}</label>"
        for kind in (known if len(known) > 1 else [])
    )
    maps = [("first two principal components", map_places(pictures))]
    if find_spec("umap") is not None and shown > 15:
        maps.append(("UMAP", map_places(pictures, _umap(pictures.positions))))
    plots = "".join(
        f"<div class='plot {name}' role=img aria-label='Map of {shown} held-out images, {what}'>"
        f"{''.join(_points(pictures, places, columns))}</div>"
        for what, places in maps
    )
    style = (
        f".{name} i:hover::after{{background-image:url({_jpeg(tiled(pictures.thumbnails))});"
        f"background-size:{columns * POINTER_PX}px}}"
    )
    titles = " and by ".join(what for what, _ in maps)
    clouds = " One tight cloud per group means that features tell groups apart first." if "group" in known else ""
    colors = f" Colors show the {known[0]} of each image." if len(known) == 1 else ""
    caption = (
        f"Map: {shown} held-out images at the last evaluation, placed by {titles} of their features of length 1. "
        f"Point at one to see its image.{clouds}{colors}"
    )
    return (
        f"<style>{style}</style><figure class=map>{switches}<span class=line></span>{plots}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _known_colors(pictures: Pictures) -> list[str]:
    """What can color the map."""
    codes = {"group": pictures.groups, "label": pictures.labels}
    return [kind for kind, each in codes.items() if len(each) and each.max() >= 0]


def _points(pictures: Pictures, places: NDArray[Any], columns: int) -> list[str]:
    by_group, by_label = (
        [_hex(color) for color in group_colors(codes)] for codes in (pictures.groups, pictures.labels)
    )
    if _known_colors(pictures) == ["label"]:
        by_group = by_label  # the colors without a switch
    points = []
    for k, ((x, y), group, label) in enumerate(zip(places, by_group, by_label, strict=True)):
        left, top = -(k % columns) * POINTER_PX, -(k // columns) * POINTER_PX
        codes = {"group": pictures.groups[k], "label": pictures.labels[k]}
        title = ", ".join(f"{kind} {code}" for kind, code in codes.items() if code >= 0)
        style = f"left:{100 * x:.1f}%;top:{100 * (1 - y):.1f}%;--g:{group};--l:{label};--p:{left}px {top}px"
        points.append(f"<i{' class=e' if x > 0.5 else ''} title='{title}' style='{style}'></i>")
    return points


def _umap(positions: NDArray[Any]) -> NDArray[Any]:
    from umap import UMAP

    return np.asarray(UMAP(n_components=2, random_state=0, n_jobs=1).fit_transform(positions))


def _neighbors(pictures: Pictures) -> str:
    sheets = [(stage.step, neighbors(pictures, k)) for k, stage in enumerate(pictures.stages)]
    images = "".join(
        f"<div><p>Step {step:,}</p>{_image(sheet, f'Queries and their nearest images at step {step}')}</div>"
        for step, sheet in sheets
        if sheet.size
    )
    if not images:
        return ""
    grouped = len(pictures.groups) and pictures.groups.max() >= 0
    others = "its five nearest images of other groups follow" if grouped else "its five nearest images follow"
    unknown = "" if grouped else " No groups are known, so these may be of the same group as the first image."
    labeled = pictures.labels.max() >= 0
    frames = " Blue frames have the label of the first image, orange ones another." if labeled else ""
    caption = f"Neighbors: each row begins with a held-out image; {others}, by cosine similarity.{unknown}{frames}"
    return f"<figure><div class=stages>{images}</div><figcaption>{escape(caption)}</figcaption></figure>"


def _tokens(pictures: Pictures) -> str:
    strips = token_strips(pictures)
    if not strips:
        return ""
    rows = "".join(f"<p>{label.capitalize()}</p>{_image(strip, f'Tokens, {label}')}" for label, strip in strips)
    source = f"submodule {pictures.path}" if pictures.path else "the encoder"
    caption = (
        f"Tokens of {source}: their first three principal components as red, green and blue, in one basis "
        "for all steps. Colors that follow tissue or objects show local features; one color, or a pattern "
        "that is the same for every image, shows none."
    )
    return f"<figure class=tokens>{rows}<figcaption>{escape(caption)}</figcaption></figure>"


def _farthest(pictures: Pictures) -> str:
    if not len(pictures.farthest):
        return ""
    strip = row([pictures.thumbnails[k] for k in pictures.farthest])
    caption = "Farthest from the rest at the last evaluation, the farthest first. Artifacts are often among them."
    return f"<figure>{_image(strip, 'Images farthest from the rest')}<figcaption>{caption}</figcaption></figure>"


def _image(sheet: NDArray[np.uint8], text: str) -> str:
    from PIL import Image

    content = BytesIO()
    Image.fromarray(_rows(sheet)).save(content, "png", optimize=True)
    width = sheet.shape[2]
    return f"<img alt='{escape(text)}' width={width} src='{_url(content.getvalue(), 'png')}'>"


def _jpeg(sheet: NDArray[np.uint8]) -> str:
    """Data URL of a picture, in the best of some qualities that keeps it small."""
    from PIL import Image

    for quality in (85, 60, 35, 15):
        content = BytesIO()
        Image.fromarray(_rows(sheet)).save(content, "jpeg", quality=quality)
        if content.tell() <= SHEET_BYTES:
            break
    return _url(content.getvalue(), "jpeg")


def _rows(sheet: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(sheet.transpose(1, 2, 0))


def _url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
