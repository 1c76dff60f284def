"""The record of an evaluation as a page of Markdown tables, what others published first."""

from collections.abc import Mapping, Sequence
from typing import Any

from sagerec.recif.layout import LABEL, RECOMMENDATION, TASKS

HEADLINE = {**dict.fromkeys(RECOMMENDATION, "recall@32"), LABEL: "auc"}
"""Task -> the metric that is published of it."""
COLUMNS = tuple(HEADLINE)
PUBLISHED = {
    "SASRec": (0.0119, 0.0293, 0.0175, 0.0140, None, 0.6244),
    "TIGER": (0.0132, 0.0581, 0.0283, 0.0123, None, 0.6675),
    "LC-Rec": (0.0180, 0.0723, 0.0416, 0.0170, 0.2394, 0.6139),
    "OneRec-1.7B": (0.0272, 0.0707, 0.0360, 0.0184, 0.1941, 0.6184),
    "OneRec-8B": (0.0355, 0.0877, 0.0470, 0.0228, 0.3032, 0.6615),
    "OneRec-8B-Pro": (0.0369, 0.0964, 0.0538, 0.0235, 0.3458, 0.6912),
    "SAGE": (None, None, None, None, None, None),
}
"""System -> its figures in the order of COLUMNS."""
SOURCE = (
    "Rows marked *published* are of OpenOneRec's technical report (arXiv 2512.24762), on the benchmark's own files and "
    "by unconstrained decoding; they are not measured here, and compare with no figure on other files. SAGE's paper "
    "(arXiv 2601.21452) measures RecIF-Bench too; its Recall@32 is not at hand."
)


def benchmark_markdown(record: Mapping[str, Any]) -> str:
    """The page of a record."""
    systems: Mapping[str, Any] = record.get("systems") or {record["system"]: record}
    lines = [f"# RecIF-Bench: {record['benchmark']}", "", SOURCE, "", *_headline(systems), ""]
    for name, why in record["left_out"].items():
        lines += [f"- {name} is left out: {why}"]
    for name, system in systems.items():
        lines += [f"- {name}: {_about(system)}"]
        lines += [f"- {name}: {count:,} {fault}" for fault, count in system["faults"].items()]
    lines.append("")
    for task in TASKS:
        of_task = {name: system["tasks"][task] for name, system in systems.items() if task in system["tasks"]}
        if of_task:
            lines += [f"## {task}", "", *_of_task(of_task), ""]
    if record.get("differences"):
        lines += ["## Differences", "", *_differences(record["differences"]), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def _headline(systems: Mapping[str, Any]) -> list[str]:
    """What is published of each task, beside ours."""
    lines = _header(["Recall@32; label_pred: AUC", *COLUMNS])
    for name, values in PUBLISHED.items():
        lines.append(_row([f"{name}, *published*", *("–" if v is None else f"{v:.4f}" for v in values)]))
    for name, system in systems.items():
        cells = []
        for task, metric in HEADLINE.items():
            value = system["tasks"].get(task, {}).get("metrics", {}).get(metric)
            cells.append("–" if value is None else f"**{value:.4f}**")
        lines.append(_row([f"**{name}**", *cells]))
    return lines


def _about(system: Mapping[str, Any]) -> str:
    """How a system's predictions were made."""
    said = [f"decoding {system['decoding']}", f"cold by {system['cold_by']}"]
    return ", ".join(said) + "".join(f"; {note}" for note in system.get("about", []))


def _of_task(systems: Mapping[str, Any]) -> list[str]:
    """All metrics of a task, each over its interval, and what is to be known of its rows."""
    names = list(dict.fromkeys(name for found in systems.values() for name in found["metrics"]))
    lines = _header(["metric", *systems]) if names else []
    for name in names:
        lines.append(_row([name, *(_cell(found, name) for found in systems.values())]))
    lines.append("")
    for system, found in systems.items():
        reasons = ", ".join(f"{count:,}: {reason}" for reason, count in found["skipped_by_reason"].items())
        said = f"{found['samples']:,} samples, {found['skipped']:,} skipped{f' ({reasons})' if reasons else ''}"
        lines.append(f"- {system}: {'; '.join([said, *found['notes']])}")
    return lines


def _cell(found: Mapping[str, Any], name: str) -> str:
    value = found["metrics"].get(name)
    if value is None:
        return "–"
    ends = found["intervals"].get(name)
    return f"{value:.4f}" + (f" [{ends[0]:.4f} – {ends[1]:.4f}]" if ends else "")


def _differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a pair of systems and task; of metrics, those that the published tables or the paper speak of."""
    shown = ("recall@32", "entropy@10", "cold_recall@10")
    lines = _header(["system", "against", "task", *shown])
    for row in rows:
        cells = []
        for name in shown:
            found = row["metrics"].get(name)
            cells.append(
                f"{found['value']:+.4f} [{found['low']:+.4f} – {found['high']:+.4f}]" if found is not None else "–"
            )
        lines.append(_row([row["system"], row["against"], row["task"], *cells]))
    return [*lines, "", "95 % intervals over users, on the same rows in pairs."]
