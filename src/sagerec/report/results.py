"""The results of the page: in short, the table, differences, published figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from sagerec.evaluation.tests import ONE_SEED
from sagerec.report.cells import how_computed, label, number, p_text
from sagerec.report.material import Material, Row
from sagerec.report.records import Cell, Table

SHOWN = ("recall", "ndcg", "cold_recall", "coarse_entropy", "entropy", "coverage")
KINDS = {"other": "not comparable: trained on other events"}
OF_A_RUN = (
    "Differences are of the same users in pairs, their intervals over users alone.",
    f'"{ONE_SEED}": a run has one seed of each policy, which cannot say how much another would change, so nothing is '
    "tested; sagerec compare does, with several seeds and a correction.",
)
"""What a run's differences are."""
VERDICTS = {v: f"{v} in" for v in ("higher", "lower", "no difference")} | {ONE_SEED: f"not tested ({ONE_SEED}) in"}
"""Verdict -> how a sentence of metrics begins."""


def value_cell(metric: str, found: Mapping[str, Any] | None, verdict: str = "", rival: str = "") -> Cell:
    """A value over its interval and deviation, and what the comparison says."""
    if not found or found.get("value") is None:
        return Cell(lines=("not measured",))
    lines = []
    if found.get("low") is not None and found.get("high") is not None:
        lines.append(f"{number(metric, found['low'])} to {number(metric, found['high'])}")
    if found.get("seed_std") is not None:
        lines.append(f"seeds ± {number(metric, found['seed_std'])}")
    return Cell(number(metric, found["value"]), tuple(lines), verdict, rival)


def difference_cell(found: Mapping[str, Any] | None, rival: str) -> Cell:
    """A difference over its interval and p-value, where it has them, and what they say."""
    if not found or found.get("difference") is None:
        return Cell()
    lines = []
    if found.get("low") is not None and found.get("high") is not None:
        lines.append(f"{found['low']:+.4f} to {found['high']:+.4f}")
    p = found.get("p_holm", found.get("p_value"))
    if p is not None:
        lines.append(p_text(p))
    return Cell(f"{found['difference']:+.4f}", tuple(lines), str(found.get("verdict") or ""), rival)


def rivals(rows: Sequence[Row]) -> list[str]:
    """What rows are compared with, in the order in which it appears."""
    return list(dict.fromkeys(rival for row in rows for rival in row.against))


def notes_of(material: Material) -> dict[str, str]:
    """Row -> its note, such as that it was tuned less than others; rows without one are absent."""
    return {row.name: row.note for row in material.rows if row.note}


def short_section(material: Material) -> list[tuple[str, str, str]] | None:
    """One line a compared row: its name, its rival, and where it is higher, lower, no different, or not tested."""
    notes, said = notes_of(material), []
    for row in material.rows:
        if row.kind in ("ablation", "baseline", "other"):
            continue
        for rival, tests in row.against.items():
            by: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
            for metric, values in tests.items():
                if metric.endswith(f"@{material.k}") and values.get("verdict") in by:
                    by[values["verdict"]].append(label(metric))
            parts = [f"{VERDICTS[verdict]} {', '.join(metrics)}" for verdict, metrics in by.items() if metrics]
            if parts:
                name = f"{row.name} ({notes[row.name]})" if row.name in notes else row.name
                said.append((name, rival, "; ".join(parts)))
    verdicts = {
        test.get("verdict") for row in material.rows for tests in row.against.values() for test in tests.values()
    }
    return said if said and verdicts - {ONE_SEED} else None  # a run has one seed of each: nothing to say in short


def table_section(material: Material) -> dict[str, object] | None:
    """The table of rows, the differences, everything measured, and what others published."""
    rows, found, notes = material.rows, rivals(material.rows), notes_of(material)
    if not rows:
        return None
    main = found[0] if found else ""
    shown = [f"{name}@{material.k}" for name in SHOWN]
    shown = [name for name in shown if any(name in row.metrics for row in rows)]
    has_kinds, has_seeds = any(row.kind for row in rows), any(row.seeds for row in rows)
    body: list[list[str | Cell]] = []
    for row in rows:
        cells: list[str | Cell] = [Cell(row.name, (notes[row.name],)) if row.name in notes else row.name]
        cells += [KINDS.get(row.kind, row.kind)] if has_kinds else []
        cells += [", ".join(map(str, row.seeds)) or "–"] if has_seeds else []
        said = {metric: str(test.get("verdict") or "") for metric, test in row.against.get(main, {}).items()}
        cells += [value_cell(metric, row.metrics.get(metric), said.get(metric, ""), main) for metric in shown]
        body.append(cells)
    header = ["row", *(["kind"] if has_kinds else []), *(["seeds"] if has_seeds else []), *map(label, shown)]
    caption = "Test metrics with 95 % intervals over users"
    caption += f"; the last line of a cell compares with {main}" if main else ""
    differences = [table for rival in found if (table := difference_table(material, rival)) is not None]
    names = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    every: list[list[str | Cell]] = [[label(n), *(value_cell(n, row.metrics.get(n)) for row in rows)] for n in names]
    return {
        "main": Table(caption, header, body, "results"),
        "differences": differences,
        "computed": how_computed(material.study) if material.study.get("rows") else OF_A_RUN,
        "every": Table("Every metric measured", ["metric", *(row.name for row in rows)], every, "results"),
        "published": published_table(material),
    }


def difference_table(material: Material, rival: str) -> Table | None:
    """Differences of all rows to one rival."""
    rows = [row for row in material.rows if row.against.get(rival)]
    metrics = list(dict.fromkeys(m for row in rows for m in row.against[rival] if m.endswith(f"@{material.k}")))
    body: list[list[str | Cell]] = [
        [r.name, *(difference_cell(r.against[rival].get(m), rival) for m in metrics)] for r in rows
    ]
    header = ["row", *map(label, metrics)]
    return Table(f"Differences to {rival}, user by user", header, body, "results") if metrics else None


def published_table(material: Material) -> Table | None:
    """Figures of other papers, which nothing here has measured."""
    published = [row for row in material.study.get("published", []) if isinstance(row, dict) and "name" in row]
    names = list(dict.fromkeys(key for row in published for key in row if key not in ("name", "source")))
    body = [
        [
            str(row["name"]),
            *(number(name, row[name]) if isinstance(row.get(name), (int, float)) else "" for name in names),
            str(row.get("source") or ""),
        ]
        for row in published
    ]
    caption = "Published figures, not measured here: other preparations of the data, other harnesses"
    return Table(caption, ["system", *map(label, names), "source"], body) if body else None
