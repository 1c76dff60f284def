"""Study folders as a page of Markdown tables, with a plot of each: what `docs/results.md` is made of."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sagerec.artifacts import read_json, write_text
from sagerec.report.drawing import MARKERS, PALETTE, STYLE
from sagerec.study import STUDY

PERCENT = ("recall@10", "ndcg@10", "cold_recall@10", "coverage@10")
NAMES = {
    "recall@10": "Recall@10",
    "ndcg@10": "NDCG@10",
    "cold_recall@10": "Cold-Recall@10",
    "coarse_entropy@10": "Entropy@10 (bits)",
    "coverage@10": "coverage@10",
    "clicks@10": "clicks",
    "likes@10": "likes",
    "dislikes@10": "dislikes",
    "watch_seconds@10": "seconds watched",
}
BY_HAND = "<!-- What follows is written by hand; `sagerec results` keeps it. -->"
PUBLISHED = """| published, not measured here | Recall@10 | NDCG@10 | Cold-Recall@10 | Entropy@10 | source |
|---|---|---|---|---|---|
| SAGE | | | .0619 | 2.551 | arXiv 2601.21452 |
| OneRec-V2 with GBPO, as SAGE's paper measures it | | | .0326 | 2.285 | arXiv 2601.21452 |
| TIGER | .0648 | .0384 | | | arXiv 2305.05065 |
| LC-Rec | .0764 | | | | arXiv 2311.09049 |
| RPG | .0809 | .0464 | | | arXiv 2506.05781 |
| SASRec, sampled softmax, by eSASRec's authors | .0921 | .0531 | | | github.com/blondered/transformer_benchmark |
| eSASRec | .0928 | .0523 | | | arXiv 2508.06450 and there |
"""


def study_markdown(record: dict[str, Any], title: str, plot: str) -> str:
    """The tables of a study's record, and a link to its plot."""
    metrics = list(record["rows"][0]["metrics"])
    picture = f"![Recall against Entropy and Cold-Recall of the rows but the ablations]({plot})"
    lines = [f"## {title}", "", _what(record), "", picture, "", _table(record, metrics), ""]
    lines += ["What the tests say (p corrected by Holm over all tests of the study):", "", _tests(record, metrics), ""]
    if record["trials"]:
        said = "Chosen on validation, each from as many trials (criterion: relative to the start; SASRec's: Recall@10):"
        lines += [said, "", _chosen(record), ""]
    return "\n".join(lines)


def write_results(out: Path, folders: dict[str, Path]) -> list[Path]:
    """Write the whole page, a study under each title and what others published, and an SVG a study beside it.

    The page ends with the mark BY_HAND; what stands after it in a page that is there is kept. Returns what was written.

    Raises: ArtifactError where a folder has no study.json.
    """
    records = {title: read_json(folder / STUDY) for title, folder in folders.items()}
    plots = {t: out.with_name(f"{out.stem}-{re.sub(r'[^a-z0-9]+', '-', t.lower()).strip('-')}.svg") for t in records}
    for title, path in plots.items():
        write_text(path, draw_study(records[title], title))
    parts = [
        "# Results",
        "",
        "Written by `sagerec results`, down to the mark. How to repeat each table: [reproduce](reproduce.md).",
        "",
        *(study_markdown(record, title, plots[title].name) for title, record in records.items()),
        "## What others published on Amazon Beauty",
        "",
        "Other preparations, other clusters, other definitions of cold: to look at, not to compare.",
        "",
        PUBLISHED,
    ]
    notes = out.read_text(encoding="utf-8").partition(BY_HAND)[2] if out.is_file() else ""
    parts.append(BY_HAND + notes)
    write_text(out, "\n".join(parts).rstrip() + "\n")
    return [out, *plots.values()]


def draw_study(record: dict[str, Any], title: str) -> str:
    """Recall against Entropy and against Cold-Recall, a mark with 95 % intervals a row, as SVG on white.

    Rows of less than half the best Recall are left out, and ablations, whose marks would hide those of the objectives.
    """
    shown = [m for m in ("coarse_entropy@10", "cold_recall@10") if m in record["rows"][0]["metrics"]]
    least = 0.5 * _best(record, "recall@10")
    rows = [r for r in record["rows"] if r["metrics"]["recall@10"]["value"] > least and r.get("kind") != "ablation"]
    with mpl.rc_context(STYLE | {"svg.hashsalt": title}):
        sheet = Figure(figsize=(4.4 * len(shown), 3.4), facecolor="white", layout="constrained")
        for metric, axes in zip(shown, np.atleast_1d(sheet.subplots(1, len(shown))), strict=True):
            for number, row in enumerate(rows):
                x, y = row["metrics"]["recall@10"], row["metrics"][metric]
                turn = number // len(PALETTE)  # a colour that comes again has another marker
                style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[(number + turn) % len(MARKERS)]}
                reach = [[[v["value"] - v["low"]], [v["high"] - v["value"]]] for v in (x, y)]
                axes.errorbar(x["value"], y["value"], xerr=reach[0], yerr=reach[1], elinewidth=0.8, capsize=0, **style)
                at = (x["value"], y["value"])
                axes.annotate(row["name"], at, (5, 4), textcoords="offset points", fontsize=7, color=style["color"])
            axes.set(xlabel=NAMES["recall@10"], ylabel=NAMES[metric])
            axes.locator_params(axis="x", nbins=5)
        sheet.suptitle(f"{title}: up and right is better", fontsize=9)
        buffer = io.StringIO()
        sheet.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def _best(record: dict[str, Any], metric: str) -> float:
    return max(float(row["metrics"][metric]["value"]) for row in record["rows"])


def _what(record: dict[str, Any]) -> str:
    sizes = record["dataset"]
    return (
        f"{sizes['users']:,} users, {sizes['items']:,} items, {sizes['interactions']:,} interactions; "
        f"{record['cases']:,} test cases, {record['cold_cases']:,} of them cold. Seeds {record['seeds']}; "
        f"{record['hardware']}; {record['date']}; PyTorch {record['versions']['torch']}. Values are means over seeds "
        "with 95 % intervals over users."
    )


def _number(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric in PERCENT else f"{value:.3f}"


def _table(record: dict[str, Any], metrics: list[str]) -> str:
    lines = ["| row | seeds | " + " | ".join(NAMES.get(m, m) for m in metrics) + " | minutes |"]
    lines.append("|---|---|" + "---|" * (len(metrics) + 1))
    for row in record["rows"]:
        cells = []
        for metric in metrics:
            found = row["metrics"].get(metric)
            if found is None:
                cells.append("")
                continue
            text = " – ".join(_number(metric, found[end]) for end in ("low", "high"))
            cells.append(f"{_number(metric, found['value'])} [{text}]")
        minutes = f"{sum(row['seconds']) / len(row['seconds']) / 60:.1f}" if row.get("seconds") else ""
        lines.append(f"| {row['name']} | {len(row['seeds'])} | " + " | ".join(cells) + f" | {minutes} |")
    return "\n".join(lines)


def _tests(record: dict[str, Any], metrics: list[str]) -> str:
    lines = ["| row | against | " + " | ".join(NAMES.get(m, m) for m in metrics) + " |"]
    lines.append("|---|---|" + "---|" * len(metrics))
    for row in record["rows"]:
        for other, tests in row["against"].items():
            base = next(r for r in record["rows"] if r["name"] == other)["metrics"]
            cells = []
            for metric in metrics:
                test = tests.get(metric)
                if test is None:
                    cells.append("")
                elif test["verdict"] == "no difference":
                    cells.append("no difference")
                else:
                    cells.append(f"{test['difference'] / base[metric]['value']:+.1%} (p {test['p_holm']:.3f})")
            lines.append(f"| {row['name']} | {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _chosen(record: dict[str, Any]) -> str:
    lines = ["| objective | trials | chosen | criterion | worst |", "|---|---|---|---|---|"]
    for objective in dict.fromkeys(trial["objective"] for trial in record["trials"]):
        trials = [trial for trial in record["trials"] if trial["objective"] == objective]
        best = next(trial for trial in trials if trial["chosen"])
        text = ", ".join(f"{name} {value:g}" for name, value in best["settings"].items())
        worst = min(trial["criterion"] for trial in trials)
        lines.append(f"| {objective} | {len(trials)} | {text} | {best['criterion']:.3f} | {worst:.3f} |")
    return "\n".join(lines)
