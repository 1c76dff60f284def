"""Recall by the popularity of the target: how often it was interacted with in training."""

from typing import Any

from sagerec.report.cells import label
from sagerec.report.drawing import Line, canvas, draw_lines, legend, to_svg
from sagerec.report.material import Material
from sagerec.report.records import Cell, Figure, Table
from sagerec.report.results import value_cell


def bucket_section(material: Material) -> dict[str, object] | None:
    """Recall by the target's training interactions."""
    groups = {policy.name.removeprefix("policy-"): policy.group for policy in material.aligned}
    reports = {name: r["buckets"] for name, r in material.reports.items() if r.get("buckets")}
    for row in material.rows:
        if row.kind == "other":  # learned from other events
            reports.pop(row.name, None)
    of_series: dict[str, str] = {}
    for name in reports:
        of_series.setdefault(groups.get(name, name), name)
    of_series = {series: name for series, name in of_series.items() if series in material.styles}
    if not of_series:
        return None
    names = list(of_series.values())
    first = reports[names[0]]
    key = next((k for row in first for k in row if k.startswith("recall@")), None)
    if key is None:
        return None
    filled = [i for i, row in enumerate(first) if row.get("cases")]
    places = [bucket_label(first[i]) for i in filled]
    lines: list[Line] = []
    body: list[list[str | Cell]] = []
    for place, (series, name) in enumerate(of_series.items()):
        values = [reports[name][i][key] for i in filled]
        x = [i + (place - (len(names) - 1) / 2) * 0.09 for i in range(len(filled))]
        y, low, high = ([value[end] for value in values] for end in ("value", "low", "high"))
        lines.append(Line(name, x, y, material.style(series), marked=True, low=low, high=high))
        body.append([name, *(value_cell(key, value) for value in values)])
    title, words = f"{label(key)} by popularity", "training interactions of the target"
    with canvas(title, words, label(key), width=6.6, height=3.2) as axes:
        draw_lines(axes, lines)
        axes.set_xticks(range(len(places)), places)
        svg = to_svg(axes, "buckets", label=f"{label(key)} by {words}, for {', '.join(names)}")
    cases = ["cases", *(f"{first[i]['cases']:,}" for i in filled)]
    data = Table(f"{title}: data", ["row", *places], [cases, *body], "results")
    said = "Test; bars are 95 % intervals over the cases of a bucket."
    if left := [name for name in reports if name not in names]:
        said += f" Left out, for want of a colour or as another seed: {', '.join(left)}."
    styles = {series: material.style(series) for series in of_series}
    return {"legend": legend(styles, kind="marker", name="buckets"), "figures": [Figure(svg, data, said)]}


def bucket_label(row: dict[str, Any]) -> str:
    """0 to 5; 51+."""
    low, high = row.get("train_count_from"), row.get("train_count_to")
    return f"{low}+" if high is None else f"{low} to {high}"
