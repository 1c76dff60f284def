"""How the results came about: what was run, training curves, and the coefficient curves of the objectives."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sagerec.artifacts import Manifest
from sagerec.errors import ArtifactError
from sagerec.objectives.table import Objective
from sagerec.report.coefficients import OLD_PROBABILITY, RATIOS, aligned_objective, choose_objectives, coefficients
from sagerec.report.drawing import MOST_SERIES, Line, Style, canvas, draw_lines, legend, to_svg
from sagerec.report.material import Material
from sagerec.report.records import Figure, Table
from sagerec.report.training_plots import Log, draw_panel, panel_table, panels_of, smoothing
from sagerec.run.folder import ALL_AT_ONCE

STAGES = ("dataset", "split", "semantic_ids", "text", "policy", f"policy-{ALL_AT_ONCE}", "policy-refit", "sasrec")


def manifests_of(material: Material) -> dict[str, Manifest]:
    """Manifests of the run's artefacts, by name."""
    found: dict[str, Manifest] = {}
    if material.run is not None:
        for name in (*STAGES, *material.run.aligned()):
            try:
                found[name] = material.run.manifest(name)
            except ArtifactError:
                continue
    return found


def facts_section(material: Material) -> dict[str, object] | None:
    """Dataset, sizes, seeds and dates; settings, versions and hashes on demand."""
    manifests = manifests_of(material)
    aligned = alignment_tables(material)
    versions = dict(material.study.get("versions") or {})
    if not versions and manifests:
        versions = max(manifests.values(), key=lambda m: m.created).versions
    hashes = [[name, m.content_hash, "" if m.seed is None else str(m.seed), m.created] for name, m in manifests.items()]
    hashes += [[name, str(value), "", ""] for name, value in flat(material.study.get("hashes") or {}).items()]
    stages = ("split", "semantic_ids", "policy", "sasrec")
    settings = {name: manifests[name].settings for name in stages if name in manifests}
    header = ("setting", "value")
    tables = [
        *aligned[1:],
        Table("Settings of the other stages", header, texts(settings)),
        Table("Settings of the study", header, texts(material.study.get("settings") or {})),
        Table("Versions", ("what", "version"), sorted(map(list, versions.items()))),
        Table("Content hashes (SHA-256)", ("artefact", "content hash", "seed", "made (UTC)"), hashes, "hashes"),
    ]
    facts, folded = facts_of(material, manifests), [table for table in tables if table.rows]
    return {"facts": facts, "aligned": aligned[:1], "folded": folded} if facts or aligned or folded else None


def facts_of(material: Material, manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """Name -> value of what a reader asks first."""
    study, run = material.study, material.run
    facts: dict[str, str] = {}
    if study.get("dataset"):
        facts["Dataset"] = text_of(study["dataset"])
    if run is not None:
        data = run.data
        facts["Size"] = f"{data.n_users:,} users, {data.n_items:,} items, {data.n_events:,} interactions"
        parts = ", ".join(f"{count:,} {part}" for part, count in run.split.counts().items() if count)
        facts["Split"] = f"{run.split.scheme}: {parts}"
    if "semantic_ids" in manifests:
        sizes = manifests["semantic_ids"].sizes
        levels = " × ".join(f"{size:,}" for size in sizes.get("level_sizes", []))
        facts["Semantic IDs"] = f"codes {levels}; {sizes.get('distinct_ids', 0):,} distinct IDs"
    if "policy" in manifests:
        sizes = manifests["policy"].sizes
        minutes = f", {sizes['seconds'] / 60:.1f} min" if "seconds" in sizes else ""
        facts["Policy"] = f"{sizes.get('parameters', 0):,} parameters, best epoch {sizes.get('best_epoch')}{minutes}"
    for report in list(material.reports.values())[:1]:
        facts["Test"] = f"{report['cases']:,} cases, {report['cold_cases']:,} of them cold; full ranking of all items"
        exact = report.get("proven_exact")
        if exact is not None:
            facts["Lists"] = f"{exact:.1%} proven exact; the history is " + (
                "left out" if report.get("history_excluded") else "listed like other items"
            )
    seeds = study.get("seeds") or sorted({p.manifest.seed for p in material.aligned if p.manifest.seed is not None})
    if seeds:
        facts["Seeds"] = ", ".join(map(str, seeds))
    for key, name in (("objectives", "Objectives"), ("hardware", "Hardware"), ("date", "Date")):
        if study.get(key):
            facts[name] = text_of(study[key])
    if "Date" not in facts and manifests:
        facts["Date"] = max(m.created for m in manifests.values()).replace("T", " ").partition("+")[0] + " UTC"
    return facts


def text_of(value: object) -> str:
    """A JSON value as a reader would write it."""
    if isinstance(value, dict):
        return "; ".join(f"{key.replace('_', ' ')} {text_of(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(text_of, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `stage.name` -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def texts(settings: Mapping[str, Any]) -> list[list[str]]:
    """Nested settings as rows of a table."""
    return [[name, text_of(value)] for name, value in flat(settings).items()]


def alignment_tables(material: Material) -> list[Table]:
    """The aligned policies by the settings in which they differ and what became of them; the settings they share."""
    if not material.aligned:
        return []
    names = list(dict.fromkeys(key for policy in material.aligned for key in policy.settings))
    differ = [n for n in names if len({str(policy.settings.get(n)) for policy in material.aligned}) > 1]
    shown = list(dict.fromkeys(("objective", *differ)))
    body = []
    for policy in material.aligned:
        sizes = policy.manifest.sizes
        kept = f"{sizes.get('kept_round')} of {sizes.get('rounds')}"
        minutes = f"{sizes['seconds'] / 60:.1f}" if "seconds" in sizes else ""
        body.append([policy.name, *(text_of(policy.settings.get(n)) for n in shown), kept, minutes])
    header = ["policy", *(n.replace("_", " ") for n in shown), "kept round", "minutes"]
    same = [[n, text_of(material.aligned[0].settings.get(n))] for n in names if n not in shown]
    caption = "Settings that all aligned policies share" if len(material.aligned) > 1 else "Settings of the alignment"
    aligned = Table("Aligned policies: the settings in which they differ", header, body)
    return [aligned, Table(caption, ("setting", "value"), same)]


def training_section(material: Material) -> dict[str, object] | None:
    """A plot a logged quantity, a line a policy."""
    logs = [Log(p.name.removeprefix("policy-"), p.lines, material.style(p.group)) for p in material.aligned if p.lines]
    groups: dict[str, list[Figure]] = {}
    for panel in panels_of(logs):
        data = Table(f"{panel.title}: data", *panel_table(panel, logs))
        groups.setdefault(panel.group, []).append(Figure(draw_panel(panel, logs), data, keys=panel.keys))
    if not groups:
        return None
    styles = {policy.group: material.style(policy.group) for policy in material.aligned}
    return {"legend": legend(styles, kind="line", name="training"), "smoothed": smoothing(logs), "groups": groups}


def coefficient_section(material: Material) -> dict[str, object]:
    """Curves c(r), of the run's objectives first."""
    rows_of = [(policy.group, aligned_objective(policy.settings)) for policy in material.aligned]
    own = [(group, row) for group, row in rows_of if row is not None]
    rows = choose_objectives(own)
    styles = curve_styles(material, rows)
    adaptive = next((row for row in rows if row.needs_coldness or row.needs_diversity), None)
    halves = [
        ("positive", "Advantage > 0, warm slate", [(row.name, row, 1.0, 0.5, 0.0, styles[row.name]) for row in rows]),
        ("negative", "Advantage < 0, H = 0.5", [(row.name, row, -1.0, 0.5, 0.0, styles[row.name]) for row in rows]),
    ]
    if adaptive is not None and adaptive.needs_coldness:
        varied = [(f"cold share {c:g}", adaptive, 1.0, 0.5, c, Style(i + 1)) for i, c in enumerate((0.0, 0.5, 1.0))]
        halves.append(("boost", f"{adaptive.name}: advantage > 0", varied))
    if adaptive is not None and adaptive.needs_diversity:
        varied = [(f"H = {h:g}", adaptive, -1.0, h, 0.0, Style(i + 1)) for i, h in enumerate((0.0, 0.5, 1.0))]
        halves.append(("penalty", f"{adaptive.name}: advantage < 0", varied))
    return {"old_probability": OLD_PROBABILITY, "figures": [coefficient_plot(*half) for half in halves]}


def curve_styles(material: Material, rows: list[Objective]) -> dict[str, Style]:
    """The style that an objective has in the other plots where it has one, else one that no other row has."""
    groups = {policy.group for policy in material.aligned}
    found = {row.name: material.style(name) for row in rows if (name := row.name.split(", ")[0]) in groups}
    free = [Style(i) for i in range(1, MOST_SERIES) if Style(i) not in found.values()]
    return found | {row.name: free.pop(0) for row in rows if row.name not in found}


Curve = tuple[str, Objective, float, float, float, Style]
"""Label, row, advantage, diversity, coldness, style."""


def coefficient_plot(name: str, title: str, curves: list[Curve]) -> Figure:
    """One plot of c(r) with a legend inside."""
    lines = []
    for text, row, advantage, diversity, coldness, style in curves:
        values = coefficients(row, advantage=advantage, diversity=diversity, coldness=coldness)
        lines.append(Line(text, RATIOS.tolist(), values.tolist(), style))
    with canvas(title, "ratio r", "coefficient c(r)", width=5.8, height=3.3) as axes:
        draw_lines(axes, lines)
        axes.legend(axes.get_lines(), [line.name for line in lines], loc="upper left")
        top = max(max(line.y) for line in lines)
        axes.set_ylim(-0.03 * top, 1.08 * top)
        spoken = f"Coefficient c over ratio r. {title}: {', '.join(line.name for line in lines)}"
        svg = to_svg(axes, f"curve-{name}", label=spoken)
    places = [int(np.abs(RATIOS - r).argmin()) for r in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)]
    body = [[f"{RATIOS[i]:.2f}", *(f"{line.y[i]:.3f}" for line in lines)] for i in places]
    return Figure(svg, Table(f"c(r), {title}: data", ["r", *(line.name for line in lines)], body), title)
