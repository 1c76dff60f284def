"""Study folders as a page of Markdown tables, with a plot of each: what `docs/results.md` is made of."""

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sagerec.errors import ArtifactError
from sagerec.files import read_record, refuse_other, write_text
from sagerec.report import cells
from sagerec.report.drawing import MARKERS, PALETTE, STYLE
from sagerec.study import STUDY
from sagerec.study.folder import stale_study

DRAWN = "<!-- Drawn by `sagerec results`. -->\n"
"""At the end of a plot, by which it is known."""
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
    """The tables of a study's record, what was computed, and a link to its plot."""
    picture = f"![Recall against both Entropies and Cold-Recall of the rows but the ablations]({plot})"
    lines = [
        f"## {html.escape(title, quote=False)}",
        "",
        _what(record),
        "",
        picture,
        "",
        _layout(cells.value_table(record)),
        "",
    ]
    for text in (*cells.note_lines(record), cells.by_criterion(record)):
        lines += [text, ""] if text else []
    lines += ["What the tests say, differences relative to the rival's value:", ""]
    lines += [_layout(cells.difference_table(record)), "", *(f"- {text}" for text in cells.how_computed(record)), ""]
    if record["trials"]:
        said = "Chosen on validation, each from as many trials (criterion: relative to the start; SASRec's: Recall@10):"
        lines += [said, "", _chosen(record), ""]
    return "\n".join(lines)


def write_results(out: Path, folders: dict[str, Path]) -> list[Path]:
    """Write the whole page, a study under each title and what others published, and an SVG a study beside it.

    The page ends with the mark BY_HAND; what stands after it in a page that is there is kept. Returns what was written.

    Raises: ArtifactError where a folder has no study.json, or a stale one, or `out` is something else.
    """
    refuse_other(out, BY_HAND, "a page of results")
    records = {title: read_record(folder / STUDY) for title, folder in folders.items()}
    for stale in filter(None, map(stale_study, folders.values())):
        raise ArtifactError(f"stale: {stale}")
    plots = plot_paths(out, list(records))
    for path in plots.values():
        refuse_other(path, DRAWN, "a plot of results")
    for title, path in plots.items():
        write_text(path, draw_study(records[title], title) + DRAWN)
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


def plot_paths(out: Path, titles: Sequence[str]) -> dict[str, Path]:
    """Title -> where its plot goes, beside the page; titles of the same letters are numbered."""
    found: dict[str, Path] = {}
    for title in titles:
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "study"
        names = [f"{out.stem}-{slug}", *(f"{out.stem}-{slug}-{number}" for number in range(2, len(titles) + 2))]
        path = next(p for name in names if (p := out.with_name(f"{name}.svg")) not in found.values())
        found[title] = path
    return found


def draw_study(record: dict[str, Any], title: str) -> str:
    """Recall against both Entropies and against Cold-Recall, a mark with 95 % intervals a row, as SVG on white.

    Rows of less than half the best Recall are left out, and ablations, whose marks would hide those of the objectives.
    """
    shown = [m for m in ("entropy@10", "coarse_entropy@10", "cold_recall@10") if m in record["rows"][0]["metrics"]]
    least = 0.5 * _best(record, "recall@10")
    rows = [r for r in record["rows"] if r["metrics"]["recall@10"]["value"] > least and r.get("kind") != "ablation"]
    with mpl.rc_context(STYLE | {"svg.hashsalt": title}):
        sheet = Figure(figsize=(4.4 * len(shown), 3.4), facecolor="white", layout="constrained")
        for metric, axes in zip(shown, np.atleast_1d(sheet.subplots(1, len(shown))), strict=True):
            for number, row in enumerate(rows):
                x, y = row["metrics"]["recall@10"], row["metrics"][metric]
                turn = number // len(PALETTE)  # a colour that comes again has another marker
                style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[(number + turn) % len(MARKERS)]}
                # A percentile interval may leave the value out, by rounding where all values are equal.
                reach = [[[max(v["value"] - v["low"], 0)], [max(v["high"] - v["value"], 0)]] for v in (x, y)]
                axes.errorbar(x["value"], y["value"], xerr=reach[0], yerr=reach[1], elinewidth=0.8, capsize=0, **style)
                at = (x["value"], y["value"])
                axes.annotate(row["name"], at, (5, 4), textcoords="offset points", fontsize=7, color=style["color"])
            axes.set(xlabel=cells.label("recall@10"), ylabel=cells.label(metric))
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
        f"{record['hardware']}; {record['date']}; PyTorch {record['versions']['torch']}."
    )


def _layout(table: cells.Table) -> str:
    header, rows = table
    rule = "|" + "---|" * len(header)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def _chosen(record: dict[str, Any]) -> str:
    rows = []
    for objective in dict.fromkeys(trial["objective"] for trial in record["trials"]):
        trials = [trial for trial in record["trials"] if trial["objective"] == objective]
        best = next(trial for trial in trials if trial["chosen"])
        text = ", ".join(f"{name} {value:g}" for name, value in best["settings"].items())
        worst = min(trial["criterion"] for trial in trials)
        rows.append([objective, str(len(trials)), text, f"{best['criterion']:.3f}", f"{worst:.3f}"])
    return _layout((["objective", "trials", "chosen", "criterion", "worst"], rows))
