"""Trade-offs: accuracy against diversity, cold start and coverage, and the Pareto front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sagerec.report.cells import label, number
from sagerec.report.drawing import INK, MUTED, SURFACE, Style, canvas, legend, to_svg
from sagerec.report.material import Material
from sagerec.report.records import Figure, Table

TRADEOFFS = (
    ("coarse_entropy", "Accuracy and diversity"),
    ("cold_recall", "Accuracy and cold start"),
    ("coverage", "Accuracy and coverage"),
)
LETTER, HEIGHT = 4.6, 10.0
"""Width and height of a letter of a label, in points."""


@dataclass(frozen=True, slots=True)
class Point:
    """A system or a setting in two metrics."""

    name: str
    """Label, and name of its style."""
    x: float
    """First metric; higher is better."""
    y: float
    """Second metric; higher is better."""
    style: Style
    """Colour and marker."""
    x_range: tuple[float, float] | None = None
    """Interval of x."""
    y_range: tuple[float, float] | None = None
    """Interval of y."""
    chosen: bool = False
    """Ringed."""
    settings: str = ""
    """Of a trial, in a line."""


def tradeoff_section(material: Material) -> dict[str, object] | None:
    """Rows on test, and a study's trials on validation: a plot for each of TRADEOFFS that at least two of them have."""
    tried = [t for t in material.study.get("trials", []) if isinstance(t, dict) and isinstance(t.get("metrics"), dict)]
    rows, trials, drawn = [], [], dict[str, Style]()
    for name, title in TRADEOFFS:
        pair = (f"recall@{material.k}", f"{name}@{material.k}")
        names = (label(pair[0]), label(pair[1]))
        found = [(row.name, row.metrics) for row in material.rows if row.kind != "other"]
        points = [point for row in found if (point := point_of(material, *row, pair)) is not None]
        if len(points) > 1:
            inside, outside = within_frame(points)
            svg = draw_tradeoff(inside, name=f"rows-{name}", title=title, axes_of=names, labels=True)
            said = "Test; bars are 95 % intervals over users, the dashed line joins the Pareto front."
            if outside:
                left = ", ".join(f"{p.name} ({number(pair[0], p.x)}, {number(pair[1], p.y)})" for p in outside)
                said += f" Outside the frame: {left}."
            body = [[p.name, number(pair[0], p.x), number(pair[1], p.y)] for p in points]
            rows.append(Figure(svg, Table(f"{title}: data", ["row", *names], body), said))
        points = [point for trial in tried if (point := trial_point(material, trial, pair)) is not None]
        if len(points) > 1:
            drawn |= {point.name: point.style for point in points}
            svg = draw_tradeoff(points, name=f"trials-{name}", title=title, axes_of=names, labels=False)
            said = "Validation; a ring marks the setting chosen for an objective, the dashed line the Pareto front."
            body = [
                [p.name + " (chosen)" * p.chosen, number(pair[0], p.x), number(pair[1], p.y), p.settings]
                for p in points
            ]
            trials.append(Figure(svg, Table(f"{title}: trials", ["objective", *names, "settings"], body), said))
    found_any = {"rows": rows, "trials": trials, "legend": legend(drawn, kind="marker", name="trials")}
    return found_any if rows or trials else None


def point_of(
    material: Material, name: str, metrics: Mapping[str, Mapping[str, Any]], pair: tuple[str, str]
) -> Point | None:
    """Where a system stands in two metrics; None where it lacks one."""
    x, y = (metrics.get(metric) or {} for metric in pair)
    if x.get("value") is None or y.get("value") is None:
        return None
    ends = [None if v.get("low") is None or v.get("high") is None else (v["low"], v["high"]) for v in (x, y)]
    return Point(name, float(x["value"]), float(y["value"]), material.style(name), ends[0], ends[1])


def trial_point(material: Material, trial: Mapping[str, Any], pair: tuple[str, str]) -> Point | None:
    """Where a trial stands."""
    metrics = {metric: {"value": value} for metric, value in trial["metrics"].items()}
    point = point_of(material, str(trial.get("objective")), metrics, pair)
    settings = ", ".join(f"{name} {value}" for name, value in (trial.get("settings") or {}).items())
    return None if point is None else replace(point, chosen=bool(trial.get("chosen")), settings=settings)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one equals or beats in both metrics and beats in one, by falling x.

    Of equal points the first is kept.
    """
    front: list[int] = []
    best = -np.inf
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front


def within_frame(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Points that share a frame, and those that would squeeze it: with less than half of the best x."""
    best = max((point.x for point in points), default=0.0)
    inside = [point for point in points if point.x >= best / 2]
    return inside, [point for point in points if point.x < best / 2]


def draw_tradeoff(points: Sequence[Point], *, name: str, title: str, axes_of: tuple[str, str], labels: bool) -> str:
    """Points with intervals, a dashed Pareto front, and labels where they are few."""
    x_label, y_label = axes_of
    with canvas(title, x_label, y_label, height=3.1) as axes:
        front = [points[i] for i in pareto_front([(point.x, point.y) for point in points])]
        axes.plot([p.x for p in front], [p.y for p in front], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0)
        for number, point in enumerate(points):
            color, gid = point.style.color, f"series-{point.style.number}-{number}"
            for place, ends in enumerate((point.x_range, point.y_range)):
                if ends is not None:
                    across = axes.hlines if place == 0 else axes.vlines
                    bar = across(point.y if place == 0 else point.x, *ends, color=color, linewidth=0.9, alpha=0.65)
                    bar.set_gid(f"{gid}-range{place}")
            if point.chosen:
                axes.plot(point.x, point.y, "o", markersize=11, markerfacecolor="none", markeredgecolor=INK)
            size = 6.5 if labels else 5
            drawn = axes.plot(point.x, point.y, marker=point.style.marker, markersize=size, color=color)
            drawn[0].set(markeredgecolor=SURFACE, markeredgewidth=0.8, gid=gid, zorder=3)
        axes.margins(0.12, 0.14)
        if labels:
            place_labels(axes, points)
        spoken = (
            f"{title}: {y_label} over {x_label} of {len(points)} {'rows on test' if labels else 'trials on validation'}"
        )
        return to_svg(axes, name, label=spoken)


def place_labels(axes: Axes, points: Sequence[Point]) -> None:
    """Names beside their points, each at the first of twelve places that covers no other name or point."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.get_xlim(), axes.get_ylim()  # settles the limits, which places hang on
    scale = 72 / figure.dpi
    at = axes.transData.transform([(point.x, point.y) for point in points]) * scale
    frame = axes.get_window_extent()
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    for (x, y), point in zip(at, points, strict=True):
        width = LETTER * len(point.name)
        offsets = [(dx, dy) for dy in (4, -4 - HEIGHT, 14, -24) for dx in (6, -6 - width, -width / 2)]

        def cost(offset: tuple[float, float], x: float = x, y: float = y, width: float = width) -> float:
            left, low = x + offset[0], y + offset[1]
            box = (left, low, left + width, low + HEIGHT)
            outside = max(0.0, frame.x0 * scale - left) + max(0.0, left + width - frame.x1 * scale - 4)
            return float(10 * outside + sum(overlap(box, other) for other in taken))

        dx, dy = min(offsets, key=cost)
        taken.append((x + dx, y + dy, x + dx + width, y + dy + HEIGHT))
        axes.annotate(
            point.name, (point.x, point.y), (dx, dy), textcoords="offset points", fontsize=8, color=point.style.color
        )


def overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two boxes (left, low, right, high) share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    return max(0.0, width) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
