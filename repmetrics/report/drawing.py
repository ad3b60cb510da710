"""Matplotlib figures as SVG text that follows the colors of the page: light, dark, or print."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import StringIO
from typing import TYPE_CHECKING
from warnings import catch_warnings, filterwarnings
from xml.etree import ElementTree

from repmetrics.measurement.titles import name_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
# Color in the figure → name of the variable, and color on dark paper. The eight of series are Okabe and Ito's or near.
INK, SOFT, LINE, PAPER = "#1d2431", "#667085", "#d5d9e1", "#fffffe"
SERIES = ("#1f6fb5", "#c8553e", "#2f8a5b", "#8a6fb1", "#b8862b", "#3a9aa8", "#b0527f", "#6b7280")
DARK = {
    INK: "#e6e9ef", SOFT: "#9aa4b5", LINE: "#3a4250", PAPER: "#15181e",
    **dict(zip(SERIES, ("#6cb0ee", "#f08a72", "#6cc795", "#bda6e2", "#e2b860", "#75cdda", "#e490b8", "#a9b1bf"),
               strict=True)),
}  # fmt: skip
VARIABLES = {
    color: f"--{name}" for color, name in zip(DARK, ("ink", "soft", "line", "paper", *"abcdefgh"), strict=True)
}


def palette(selector: str) -> str:
    """Style rules that define the colors as variables of a selector, for light and dark paper and for print."""
    light = "".join(f"{name}:{color};" for color, name in VARIABLES.items())
    dark = "".join(f"{name}:{DARK[color]};" for color, name in VARIABLES.items())
    return (
        f"{selector}{{color-scheme:light dark;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{{selector}{{{dark}}}}}"
    )


class Drawing:
    """A figure with titles of points, which a browser shows under the pointer.

    It is a context, in which matplotlib's settings are those of the page.

    Args:
        label: Description of the figure for readers who do not see it.
        width: Width in inches.
        height: Height in inches.
        rows: Rows of axes.
        columns: Columns of axes.
    """

    def __init__(self, label: str, *, width: float, height: float, rows: int = 1, columns: int = 1) -> None:
        from matplotlib.figure import Figure

        self.label = label
        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.axes: list[Axes] = []
        self._grid = rows, columns
        self._titles: dict[str, Sequence[str]] = {}
        self._settings = ExitStack()

    def __enter__(self) -> Drawing:
        self._settings.enter_context(_style())
        self.axes = list(self.figure.subplots(*self._grid, squeeze=False).flat)
        return self

    def __exit__(self, *_: object) -> None:
        self._settings.close()

    def name_points(self, points: PathCollection, titles: Sequence[str]) -> None:
        """Give each point of a scatter plot a title."""
        gid = f"points-{len(self._titles)}"
        points.set_gid(gid)
        self._titles[gid] = titles

    def legend(self, names: Sequence[str], *, inside: bool = False) -> None:
        """A legend of the last lines of the first axes: below them, where it covers nothing, or at the lower left."""
        lines = self.axes[0].get_lines()[-len(names) :]
        numbers = [str(k) for k in range(len(names))]
        if inside:
            box = self.axes[0].legend(lines, numbers, loc="lower left")
        else:
            columns = 2 if max(map(len, names)) < 30 else 1
            self.figure.set_figheight(self.figure.get_figheight() + 0.16 * -(-len(names) // columns))
            box = self.figure.legend(lines, numbers, loc="outside lower left", ncols=columns)
        name_texts(box.get_texts(), names)

    def to_svg(self) -> str:
        """The figure as an element that a page can contain, and as a complete file."""
        buffer = StringIO()
        with catch_warnings():
            filterwarnings("ignore", message="Glyph .* missing from")  # the browser draws the text, in its fonts
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        ElementTree.register_namespace("", SVG)
        ElementTree.register_namespace("xlink", XLINK)
        root = ElementTree.fromstring(buffer.getvalue())
        for metadata in root.findall(f"{{{SVG}}}metadata"):
            root.remove(metadata)
        root.set("role", "img")
        root.set("aria-label", self.label)
        style = next(root.iter(f"{{{SVG}}}style"))
        style.text = palette("svg") + "svg *{stroke-linejoin:round;stroke-linecap:butt}"
        for element in root.iter():
            if element.tag == f"{{{SVG}}}g" and (gid := element.attrib.pop("id", None)) in self._titles:
                for mark, title in zip(_marks(element), self._titles[str(gid)], strict=True):
                    ElementTree.SubElement(mark, f"{{{SVG}}}title").text = title
            if "font" in (declarations := element.get("style", "")):
                element.set("style", re.sub(r"'[^;]*", "system-ui, sans-serif", declarations))
            if element.get("transform", "").startswith("rotate(-0 "):
                del element.attrib["transform"]
            for name in {"d", "x", "y", "transform"} & element.attrib.keys():
                element.set(name, re.sub(r"(\.\d\d)\d+", r"\1", element.attrib[name]))  # hundredths of a point
            element.tail = None
        text = ElementTree.tostring(root, encoding="unicode")
        head, end, body = text.partition("</style>")
        for color, name in VARIABLES.items():
            body = body.replace(color, f"var({name})")
        return head + end + body


def _marks(group: ElementTree.Element) -> list[ElementTree.Element]:
    """Points of a scatter plot: references to a shape, or shapes where they are few."""
    shared = {id(shape) for defs in group.iter(f"{{{SVG}}}defs") for shape in defs.iter()}
    return [e for e in group.iter() if e.tag in (f"{{{SVG}}}use", f"{{{SVG}}}path") and id(e) not in shared]


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's settings, whatever a matplotlibrc says; those of the user are restored at the end."""
    from matplotlib import rc_context, rcdefaults, rcParams

    size = 9.0
    with rc_context():
        rcdefaults()
        rcParams.update(
            {
                "svg.fonttype": "none",  # text remains text
                "svg.hashsalt": "repmetrics",  # equal figures give equal bytes
                "font.size": size,
                "axes.titlesize": size + 1,
                "axes.titleweight": "bold",
                "axes.titlelocation": "left",
                "axes.edgecolor": SOFT,
                "axes.labelcolor": SOFT,
                "axes.prop_cycle": f"cycler(color={list(SERIES)!r})",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "grid.color": LINE,
                "grid.linewidth": 0.6,
                "legend.frameon": False,
                "legend.fontsize": size - 1,
                "lines.linewidth": 1.6,
                "text.color": INK,
                "xtick.color": SOFT,
                "ytick.color": SOFT,
                "figure.facecolor": PAPER,
            }
        )
        yield
