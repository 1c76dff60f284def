"""Plots as SVG: matplotlib draws, and what it draws follows the page's colours, light or dark.

Matplotlib is given literal colours; inside a page they become CSS variables (`--ink`, `--s0` …), in a file of its
own they stay. Text stays text, so that a reader can select and search it.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sagerec.report.records import Series

INK, MUTED, GRID, SURFACE = "#16191d", "#5b6169", "#dfe2e6", "#fffffe"
PALETTE = ("#4f5862", "#0067a5", "#c44e00", "#00805f", "#9c3587", "#8a6d00", "#a0303b", "#3d6fd1")
"""Of series; the first is for the policy that others start from. Each has a contrast of at least 3 to white."""
DASHES = ("-", "-", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.5, 1.4, 1.5)), (0, (3, 1)), (0, (8, 2)), (0, (2, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
MOST_SERIES = len(PALETTE)
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", SURFACE: "var(--surface)"} | {
    color: f"var(--s{i})" for i, color in enumerate(PALETTE)
}
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
REFERENCE = re.compile(r"url\(#([^)]+)\)")
"""To an id, in a style or a presentation attribute."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.xmargin": 0.02,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True, slots=True)
class Style:
    """How a series looks everywhere on the page."""

    number: int
    """Place in the palette."""

    @property
    def color(self) -> str:
        return PALETTE[self.number % MOST_SERIES]

    @property
    def dash(self) -> Any:
        return DASHES[self.number % MOST_SERIES]

    @property
    def marker(self) -> str:
        return MARKERS[self.number % MOST_SERIES]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a plot."""

    name: str
    """What it shows; one name, one style."""
    x: Sequence[float]
    """Places."""
    y: Sequence[float]
    """Values."""
    style: Style
    """Colour, dash and marker."""
    thin: bool = False
    """Drawn finer, as the edge of a range."""
    marked: bool = False
    """Each value with a marker."""
    low: Sequence[float] = field(default=())
    """Lower ends of the intervals, if there are any."""
    high: Sequence[float] = field(default=())
    """Upper ends."""


@contextmanager
def canvas(title: str, x_label: str, y_label: str, *, width: float = 4.3, height: float = 2.7) -> Iterator[Axes]:
    """Axes of a new plot, in inches of 72 points; hand them to `to_svg` inside the block."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        # Fixed margins in inches: plots line up beside each other, and nothing is drawn twice to find them.
        axes = figure.add_subplot()
        figure.subplots_adjust(0.76 / width, 0.5 / height, 1 - 0.16 / width, 1 - 0.3 / height)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        yield axes


def draw_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Lines, their intervals, and the class by which the page can hide a series."""
    for number, line in enumerate(lines):
        style = line.style
        width, alpha = (0.8, 0.75) if line.thin else (1.6, 1.0)
        gid = f"series-{style.number}-{number}"
        drawn = axes.plot(line.x, line.y, color=style.color, linestyle=style.dash, linewidth=width, alpha=alpha)
        drawn[0].set_gid(gid)
        if line.marked:
            drawn[0].set(marker=style.marker, markersize=5, markeredgecolor=SURFACE, markeredgewidth=0.8)
        if len(line.low):
            bars = axes.vlines(line.x, line.low, line.high, color=style.color, linewidth=1.0)
            bars.set_gid(f"{gid}-range")


def to_svg(axes: Axes, name: str, *, label: str = "", themed: bool = True) -> str:
    """The plot as SVG; `name` (letters, digits, hyphens) keeps its ids apart from those of other plots of a page.

    Themed, it is part of a page (see `adapt`), read out as `label`.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    buffer = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=themed)
    return adapt(buffer.getvalue(), name, label) if themed else buffer.getvalue()


def adapt(svg: str, name: str, label: str = "") -> str:
    """SVG of matplotlib as an element of an HTML page: no size of its own, colours by CSS variables, a series by class.

    Ids that something refers to get the prefix `name`, the others go; coordinates are cut to a hundredth of a point.
    Without a label it is decoration, which screen readers pass over.
    """
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in (f"{SVG}metadata", f"{SVG}style")]:
            parent.remove(child)
    values = [(key.removeprefix(XLINK), value) for element in root.iter() for key, value in element.attrib.items()]
    used = {value[1:] for key, value in values if key == "href"}
    used |= {found for _, value in values for found in REFERENCE.findall(value)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.attrib = _adapt_attributes(element.attrib, name, used)
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": label, "focusable": "false"} if label else {"aria-hidden": "true"}
    return ET.tostring(root, encoding="unicode")


def _adapt_attributes(given: Mapping[str, str], name: str, used: set[str]) -> dict[str, str]:
    """Attributes of an element of `adapt`; `used` are the ids that something refers to."""
    found = {}
    for key, value in given.items():
        if key == "id":
            if value.startswith("series-"):
                found["class"] = f"series s{value.split('-')[1]}"
            elif value in used:
                found["id"] = f"{name}-{value}"
        elif key == "style":
            rules = [[part.strip() for part in rule.split(":", 1)] for rule in value.split(";") if ":" in rule]
            found[key] = "; ".join(f"{w}: {VARIABLES.get(how, how)}" for w, how in rules if w != "font-family")
        elif key in ("d", "x", "y", "transform"):
            if not value.startswith("rotate(-0 "):
                found[key] = " ".join(re.sub(r"(\.\d\d)\d+", r"\1", value).split()).replace(" L ", "L")
        elif key in ("href", f"{XLINK}href"):
            found["href"] = value.replace("#", f"#{name}-", 1)
        else:
            found[key] = VARIABLES.get(value, value)
    return {key: REFERENCE.sub(rf"url(#{name}-\1)", value) for key, value in found.items()}


def legend(styles: Mapping[str, Style], *, kind: str, name: str) -> list[Series]:
    """The legend `name` of a page: for each series its line or its marker (`kind`)."""
    return [Series(n, style.number, swatch(style, kind=kind, name=f"legend-{name}")) for n, style in styles.items()]


def swatch(style: Style, *, kind: str, name: str) -> str:
    """The line or the marker of a series, for the legend `name` of the page."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.42, 0.16))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        if kind == "line":
            axes.plot((0, 1), (0, 0), color=style.color, linestyle=style.dash, linewidth=2.0)
        else:
            axes.plot((0.5,), (0,), color=style.color, marker=style.marker, markersize=7)
        axes.set(xlim=(0, 1), ylim=(-1, 1))
        return to_svg(axes, f"{name}-{style.number}")
