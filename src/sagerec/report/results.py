"""The results of the page: in short, the table, differences, trade-offs, popularity, published figures."""

from collections.abc import Sequence
from typing import Any

from sagerec.report.drawing import MOST_SERIES, Line, canvas, draw_lines, swatch, to_svg
from sagerec.report.markup import Html, details, figure, join, table, tag
from sagerec.report.material import START, Material, Row
from sagerec.report.tradeoffs import Point, draw_tradeoff, within_frame

LABELS = {
    "recall": "Recall",
    "ndcg": "NDCG",
    "cold_recall": "Cold-Recall",
    "coarse_entropy": "Coarse entropy (bits)",
    "entropy": "Entropy (bits)",
    "coverage": "Coverage",
    "gini": "Gini",
    "novelty": "Novelty (bits)",
    "mrr": "MRR",
}
SHOWN = ("recall", "ndcg", "cold_recall", "coarse_entropy", "entropy", "coverage")
TRADEOFFS = (
    ("coarse_entropy", "Accuracy and diversity"),
    ("cold_recall", "Accuracy and cold start"),
    ("coverage", "Accuracy and coverage"),
)
KINDS = {
    "start": "start",
    "aligned": "aligned",
    "other": "not comparable: trained on other events",
}
MARKS = {"higher": "▲ higher", "lower": "▼ lower"}
Interval = dict[str, Any]


def label(metric: str) -> str:
    """`cold_recall@10` as `Cold-Recall@10`; the unit last."""
    name, _, k = metric.partition("@")
    words, bracket, unit = LABELS.get(name, name.replace("_", " ")).partition(" (")
    return f"{words}@{k}{bracket}{unit}" if k else f"{words}{bracket}{unit}"


def number(value: float) -> str:
    """Four decimals, three above 1."""
    return f"{value:.3f}" if abs(value) >= 1 else f"{value:.4f}"


def shown_metrics(material: Material) -> list[str]:
    """The columns of the table: those that some row has."""
    names = [f"{name}@{material.k}" for name in SHOWN]
    return [name for name in names if any(name in row.metrics for row in material.rows)]


def rivals(rows: Sequence[Row]) -> list[str]:
    """What rows are compared with, in the order in which it appears."""
    return list(dict.fromkeys(rival for row in rows for rival in row.against))


def value_cell(value: Interval | None, verdict: str | None, rival: str) -> Html:
    """A value over its interval, and what the comparison says."""
    if not value or value.get("value") is None:
        return tag("span", "not measured", class_="quiet")
    parts = [tag("span", number(value["value"]), class_="value")]
    if value.get("low") is not None and value.get("high") is not None:
        parts.append(tag("span", f"{number(value['low'])} to {number(value['high'])}", class_="range"))
    if value.get("seed_std") is not None:
        parts.append(tag("span", f"seeds ± {number(value['seed_std'])}", class_="range"))
    if verdict:
        kind = verdict if verdict in MARKS else "same"
        parts.append(tag("span", f"{MARKS.get(verdict, verdict)}", class_=f"verdict {kind}", title=f"against {rival}"))
    return join(parts)


def verdict_of(row: Row, rival: str | None, metric: str) -> str | None:
    """What a row's comparison says, None where there is none."""
    found = row.against.get(rival or "", {}).get(metric)
    return None if not found else str(found.get("verdict", "")) or None


def short_section(material: Material) -> Html | None:
    """One line a compared row: where it is higher, lower, or no different."""
    found = rivals(material.rows)
    if not found:
        return None
    lines = []
    for row in material.rows:
        if row.kind in ("ablation", "baseline", "other"):
            continue
        for rival in found:
            by: dict[str, list[str]] = {}
            for metric, values in row.against.get(rival, {}).items():
                if metric.endswith(f"@{material.k}"):
                    by.setdefault(str(values.get("verdict")), []).append(label(metric).partition(" (")[0])
            said = [f"{verdict} in {', '.join(by[verdict])}" for verdict in ("higher", "lower") if verdict in by]
            if "no difference" in by:
                said.append(f"no difference in {', '.join(by['no difference'])}")
            if said:
                lines.append(tag("li", tag("b", row.name), f" against {rival}: ", "; ".join(said), "."))
    return tag("ul", *lines, class_="short") if lines else None


def table_section(material: Material) -> Html | None:
    """The table of rows, the differences, everything measured, and what others published."""
    if not material.rows:
        return None
    metrics, found = shown_metrics(material), rivals(material.rows)
    main = found[0] if found else None
    has_kinds = any(row.kind for row in material.rows)
    has_seeds = any(row.seeds for row in material.rows)
    rows = []
    for row in material.rows:
        cells: list[object] = [row.name]
        cells += [KINDS.get(row.kind, row.kind)] if has_kinds else []
        cells += [", ".join(map(str, row.seeds)) or "–"] if has_seeds else []
        cells += [value_cell(row.metrics.get(m), verdict_of(row, main, m), main or "") for m in metrics]
        rows.append(cells)
    header = ["row", *(["kind"] if has_kinds else []), *(["seeds"] if has_seeds else []), *map(label, metrics)]
    said = "Test metrics with 95 % intervals over users"
    said += f"; the last line of a cell compares with {main}" if main else ""
    parts: list[object] = [table(said, header, rows, class_="results")]
    parts += [difference_table(material, rival) for rival in found]
    if found:
        corrected = any(
            "p_holm" in values
            for row in material.rows
            for by_metric in row.against.values()
            for values in by_metric.values()
        )
        said = "Differences are of the same users in pairs (bootstrap). "
        if corrected:
            said += "Verdicts take p-values with Holm's correction over the table."
        else:
            said += (
                "A verdict here says whether the 95 % interval of that one difference leaves 0 out: it is not "
                "corrected for the number of comparisons, nor does it know other seeds: sagerec compare does both."
            )
        parts.append(tag("p", said, class_="quiet"))
    parts.append(all_metrics(material))
    parts.append(published_table(material))
    return join(parts)


def difference_table(material: Material, rival: str) -> Html | None:
    """Differences of all rows to one rival."""
    rows = [row for row in material.rows if row.against.get(rival)]
    metrics = list(dict.fromkeys(m for row in rows for m in row.against[rival] if m.endswith(f"@{material.k}")))
    if not rows or not metrics:
        return None

    def cell(values: Interval | None) -> Html | str:
        if not values or values.get("difference") is None:
            return ""
        ends = ""
        if values.get("low") is not None and values.get("high") is not None:
            ends = f"{values['low']:+.4f} to {values['high']:+.4f}"
        p = values.get("p_holm", values.get("p_value"))
        verdict = str(values.get("verdict", ""))
        return join(
            (
                tag("span", f"{values['difference']:+.4f}", class_="value"),
                tag("span", ends, class_="range"),
                None if p is None else tag("span", f"p {p:.3f}".replace("p 0.", "p ."), class_="range"),
                tag("span", MARKS.get(verdict, verdict), class_=f"verdict {verdict if verdict in MARKS else 'same'}"),
            )
        )

    body = [[row.name, *(cell(row.against[rival].get(metric)) for metric in metrics)] for row in rows]
    filled = table(f"Differences to {rival}, user by user", ["row", *map(label, metrics)], body, class_="results")
    return details(f"Differences to {rival}, user by user", filled)


def all_metrics(material: Material) -> Html:
    """Every metric of every row."""
    names = list(dict.fromkeys(metric for row in material.rows for metric in row.metrics))
    body = [[label(name), *(value_cell(row.metrics.get(name), None, "") for row in material.rows)] for name in names]
    filled = table("Every metric measured", ["metric", *(row.name for row in material.rows)], body, class_="results")
    return details("Every metric measured", filled)


def published_table(material: Material) -> Html | None:
    """Figures of other papers, which nothing here has measured."""
    published = [row for row in material.study.get("published", []) if isinstance(row, dict) and "name" in row]
    if not published:
        return None
    names = list(dict.fromkeys(key for row in published for key in row if key not in ("name", "source")))
    body = [
        [
            row["name"],
            *(number(row[n]) if isinstance(row.get(n), (int, float)) else "" for n in names),
            row.get("source"),
        ]
        for row in published
    ]
    caption = "Published figures, not measured here: other preparations of the data, other harnesses"
    return join((tag("h3", "Published"), table(caption, ["system", *map(label, names), "source"], body)))


def tradeoff_section(material: Material) -> Html | None:
    """Rows on test, and a study's trials on validation."""
    parts = [*row_tradeoffs(material), *trial_tradeoffs(material)]
    return join(parts) if parts else None


def row_tradeoffs(material: Material) -> list[Html]:
    """Plots over the rows."""
    accuracy = f"recall@{material.k}"
    plots = []
    for name, title in TRADEOFFS:
        metric = f"{name}@{material.k}"
        rows = [r for r in material.rows if has_value(r, accuracy) and has_value(r, metric) and r.kind != "other"]
        if len(rows) < 2:
            continue
        points = [
            Point(
                row.name,
                row.metrics[accuracy]["value"],
                row.metrics[metric]["value"],
                material.style(row.name),
                ends(row.metrics[accuracy]),
                ends(row.metrics[metric]),
            )
            for row in rows
        ]
        inside, outside = within_frame(points)
        svg = draw_tradeoff(
            inside, name=f"rows-{name}", title=title, x_label=label(accuracy), y_label=label(metric), labels=True
        )
        said = "Test; bars are 95 % intervals over users, the dashed line joins the Pareto front."
        if outside:
            left = ", ".join(f"{p.name} ({number(p.x)}, {number(p.y)})" for p in outside)
            said += f" Outside the frame: {left}."
        data = table(
            f"{title}: data",
            ["row", label(accuracy), label(metric)],
            [[p.name, number(p.x), number(p.y)] for p in points],
        )
        spoken = f"{title}: {label(metric)} over {label(accuracy)} of {len(points)} rows on test"
        plots.append(figure(svg, spoken, said, data))
    return [join((tag("h3", "Rows, on test"), tag("div", *plots, class_="plots wide")))] if plots else []


def has_value(row: Row, metric: str) -> bool:
    """Whether a row has a metric."""
    return (row.metrics.get(metric) or {}).get("value") is not None


def ends(value: Interval) -> tuple[float, float] | None:
    """Ends of an interval, where it has some."""
    low, high = value.get("low"), value.get("high")
    return None if low is None or high is None else (float(low), float(high))


def trial_tradeoffs(material: Material) -> list[Html]:
    """Plots over the settings that a study tried."""
    accuracy = f"recall@{material.k}"
    trials = [t for t in material.study.get("trials", []) if isinstance(t, dict) and isinstance(t.get("metrics"), dict)]
    plots = []
    drawn: dict[str, None] = {}
    for name, title in TRADEOFFS:
        metric = f"{name}@{material.k}"
        chosen = [t for t in trials if t["metrics"].get(accuracy) is not None and t["metrics"].get(metric) is not None]
        if len(chosen) < 2:
            continue
        drawn |= dict.fromkeys(str(t.get("objective")) for t in chosen)
        points = [
            Point(
                str(t.get("objective")),
                float(t["metrics"][accuracy]),
                float(t["metrics"][metric]),
                material.style(str(t.get("objective"))),
                chosen=bool(t.get("chosen")),
            )
            for t in chosen
        ]
        svg = draw_tradeoff(
            points, name=f"trials-{name}", title=title, x_label=label(accuracy), y_label=label(metric), labels=False
        )
        body = [
            [
                f"{t.get('objective')}{' (chosen)' if t.get('chosen') else ''}",
                number(float(t["metrics"][accuracy])),
                number(float(t["metrics"][metric])),
                settings_text(t.get("settings")),
            ]
            for t in chosen
        ]
        data = table(f"{title}: trials", ["objective", label(accuracy), label(metric), "settings"], body)
        said = "Validation; a ring marks the setting chosen for an objective, the dashed line the Pareto front."
        spoken = f"{title}: {label(metric)} over {label(accuracy)} of {len(points)} trials on validation"
        plots.append(figure(svg, spoken, said, data))
    if not plots:
        return []
    legend = legend_of(material, list(drawn), kind="marker", name="trials")
    return [tag("div", tag("h3", "Settings tried, on validation"), legend, tag("div", *plots, class_="plots wide"))]


def settings_text(settings: object) -> str:
    """Settings of a trial in a line."""
    if not isinstance(settings, dict):
        return ""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def legend_of(material: Material, names: Sequence[str], *, kind: str, name: str) -> Html:
    """A box for each series, by which it can be hidden in the plots beside it."""
    boxes = []
    for series in names:
        style = material.style(series)
        box = tag("input", type="checkbox", checked=True, class_=f"show{style.number}", name=f"{name}-{style.number}")
        boxes.append(tag("label", box, swatch(style, kind=kind, name=f"legend-{name}"), series))
    return tag("fieldset", tag("legend", "Shown"), *boxes, class_="legend")


def bucket_section(material: Material) -> Html | None:
    """Recall by the target's training interactions."""
    reports = {name: report for name, report in material.reports.items() if report.get("buckets")}
    names = bucket_names(material, list(reports))
    if not names:
        return None
    first = reports[names[0]]["buckets"]
    key = next((k for row in first for k in row if k.startswith("recall@")), None)
    if key is None:
        return None
    filled = [i for i, row in enumerate(first) if row.get("cases")]
    places = [bucket_label(first[i]) for i in filled]
    lines, body = [], []
    for name in names:
        rows = [reports[name]["buckets"][i] for i in filled]
        shift = (names.index(name) - (len(names) - 1) / 2) * 0.09
        values = [row[key] for row in rows]
        lines.append(
            Line(
                name,
                [i + shift for i in range(len(rows))],
                [value["value"] for value in values],
                material.style(series_of(material, name)),
                marked=True,
                low=[value["low"] for value in values],
                high=[value["high"] for value in values],
            )
        )
        body.append([name, *(value_cell(value, None, "") for value in values)])
    with canvas(
        f"{label(key)} by popularity", "training interactions of the target", label(key), width=6.6, height=3.2
    ) as axes:
        draw_lines(axes, lines)
        axes.set_xticks(range(len(places)), places)
        svg = to_svg(axes, "buckets")
    cases = ["cases", *(f"{first[i]['cases']:,}" for i in filled)]
    data = table(f"{label(key)} by popularity: data", ["row", *places], [cases, *body], class_="results")
    said = "Test; bars are 95 % intervals over the cases of a bucket."
    if left := [name for name in reports if name not in names and name not in not_comparable(material)]:
        said += f" Left out, for want of a colour or as another seed: {', '.join(left)}."
    spoken = f"{label(key)} by training interactions of the target, for {', '.join(names)}"
    legend = legend_of(material, [series_of(material, name) for name in names], kind="marker", name="buckets")
    return tag("div", legend, tag("div", figure(svg, spoken, said, data), class_="plots single"))


def bucket_names(material: Material, names: Sequence[str]) -> list[str]:
    """The reports that the plot holds: one a series, as many as there are colours."""
    found: dict[str, str] = {}
    for name in names:
        if name not in not_comparable(material):
            found.setdefault(series_of(material, name), name)
    return [name for series, name in found.items() if series in material.styles][:MOST_SERIES]


def not_comparable(material: Material) -> set[str]:
    """Rows that learned from other events, and so stand in no plot."""
    return {row.name for row in material.rows if row.kind == "other"}


def series_of(material: Material, name: str) -> str:
    """The group whose style a report has."""
    groups = {policy.name.removeprefix("policy-"): policy.group for policy in material.aligned}
    return name if name == START else groups.get(name, name)


def bucket_label(row: dict[str, Any]) -> str:
    """0 to 5; 51+."""
    low, high = row.get("train_count_from"), row.get("train_count_to")
    return f"{low}+" if high is None else f"{low} to {high}"
