"""What the templates lay out: tables, plots and legends as plain records. Text is text, and escaped by the template."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of a table with what is said under it."""

    value: str = ""
    """In the first line."""
    lines: tuple[str, ...] = ()
    """Quieter lines: an interval, a deviation, a p-value, a note."""
    verdict: str = ""
    """What a comparison says; empty where there is none."""
    rival: str = ""
    """What it compares with."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    """What it holds."""
    header: Sequence[str]
    """A name a column."""
    rows: Sequence[Sequence[str | Cell]]
    """A cell a column."""
    style: str = ""
    """results or hashes, for page.css."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot with its data."""

    svg: str
    """Markup, which the page takes as it is: of `drawing.to_svg` alone."""
    data: Table
    """The same in numbers."""
    caption: str = ""
    """Under the plot."""
    keys: tuple[str, ...] = ()
    """Names of the logged quantities, in the place of a caption."""


@dataclass(frozen=True, slots=True)
class Series:
    """An entry of a legend: a box that hides a series in the plots of the same part."""

    name: str
    """In words."""
    number: int
    """Of its style."""
    swatch: str
    """Markup of `drawing.to_svg`."""
