"""What a table of results says, cell by cell: labels, numbers, verdicts, notes. The renderers only lay it out.

A cell is text without markup. `docs/metrics.md` defines the metrics and the tests.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagerec.evaluation.tests import NO_DIFFERENCE, ONE_SEED
from sagerec.run.folder import ALL_AT_ONCE
from sagerec.study.design import CONTROL, OURS

LABELS = {
    "recall": "Recall",
    "ndcg": "NDCG",
    "mrr": "MRR",
    "cold_recall": "Cold-Recall",
    "entropy": "Entropy",
    "coarse_entropy": "coarse Entropy",
    "watch_seconds": "seconds watched",
}
"""Metric without its cut -> what it is called, where that is not its own name."""
THREE_DECIMALS = ("entropy", "coarse_entropy", "novelty", "clicks", "likes", "dislikes", "watch_seconds")
"""Metrics that are no shares."""
Table = tuple[list[str], list[list[str]]]
"""Headers, and the cells of each row."""


def label(metric: str) -> str:
    """`coarse_entropy@10` as `coarse Entropy@10`."""
    name, at, cut = metric.partition("@")
    return f"{LABELS.get(name, name.replace('_', ' '))}{at}{cut}"


def number(metric: str, value: float) -> str:
    """Shares with four decimals, bits, counts and seconds with three."""
    return f"{value:.3f}" if metric.partition("@")[0] in THREE_DECIMALS else f"{value:.4f}"


def value_parts(metric: str, found: Mapping[str, Any] | None) -> tuple[str, str]:
    """A value, and its interval in brackets; both empty where it was not measured."""
    if not found:
        return "", ""
    low, high = (number(metric, found[end]) for end in ("low", "high"))
    return number(metric, found["value"]), f"[{low} – {high}]"


def p_text(p: float) -> str:
    """`p 0.004`, and `p < 0.001` below that."""
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def difference_text(metric: str, test: Mapping[str, Any] | None, base: float) -> str:
    """What a comparison says: the difference relative to the rival's value `base`, with Holm's p, or why there is none.

    A difference of one seed stands with its interval over users alone; one to a rival of 0 is not relative.
    """
    if not test:
        return ""
    if test["verdict"] == NO_DIFFERENCE:
        return NO_DIFFERENCE

    def change(value: float) -> str:
        return f"{value / base:+.1%}" if base else f"{'+' if value >= 0 else ''}{number(metric, value)}"

    if test["verdict"] == ONE_SEED:
        return f"{ONE_SEED}: {change(test['difference'])} [{change(test['low'])} – {change(test['high'])}]"
    return f"{change(test['difference'])} ({p_text(test['p_holm'])})"


def shown_metrics(record: Mapping[str, Any]) -> list[str]:
    """The columns: every metric that some row has, in the order in which they were measured."""
    return list(dict.fromkeys(metric for row in record["rows"] for metric in row["metrics"]))


def notes(record: Mapping[str, Any]) -> dict[str, int]:
    """Note -> its number, in the order of the rows."""
    found = dict.fromkeys(row["note"] for row in record["rows"] if row.get("note"))
    return {note: i for i, note in enumerate(found, start=1)}


def row_name(record: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The row's name, with the number of its note where it has one: `sasrec (1)`."""
    return f"{row['name']} ({notes(record)[row['note']]})" if row.get("note") else str(row["name"])


def value_table(record: Mapping[str, Any], between: str = " ") -> Table:
    """The rows of a study: seeds, metrics with intervals (after `between`), criterion on test, minutes a seed."""
    metrics = shown_metrics(record)
    body = []
    for row in record["rows"]:
        cells = [row_name(record, row), str(len(row["seeds"]))]
        cells += [between.join(filter(None, value_parts(m, row["metrics"].get(m)))) for m in metrics]
        cells.append(f"{row['criterion']['value']:.3f}" if row.get("criterion") else "")
        cells.append(f"{sum(row['seconds']) / len(row['seconds']) / 60:.1f}" if row.get("seconds") else "")
        body.append(cells)
    return ["row", "seeds", *map(label, metrics), "criterion", "minutes"], body


def difference_table(record: Mapping[str, Any]) -> Table:
    """A line a comparison: what it says of each metric."""
    metrics = shown_metrics(record)
    rows = {row["name"]: row for row in record["rows"]}
    body = [
        [
            row_name(record, row),
            rival,
            *(difference_text(m, tests.get(m), rows[rival]["metrics"].get(m, {}).get("value", 0.0)) for m in metrics),
        ]
        for row in record["rows"]
        for rival, tests in row["against"].items()
    ]
    return ["row", "against", *map(label, metrics)], body


def note_lines(record: Mapping[str, Any]) -> list[str]:
    """`(1) under-tuned: …`."""
    return [f"({i}) {note}." for note, i in notes(record).items()]


def how_computed(record: Mapping[str, Any]) -> list[str]:
    """What intervals cover, what is tested and how, sentence by sentence."""
    against = [row.get("against") or {} for row in record["rows"]]
    tests = [test for rivals in against for rival in rivals.values() for test in rival.values()]
    judged = sum(test.get("p_holm") is not None for test in tests)
    pairs = sum(map(len, against))
    references = " and ".join(name for name in (CONTROL, ALL_AT_ONCE) if any(name in rivals for rivals in against))
    study = record.get("settings", {}).get("study", {})
    own_starts = study.get("share_start") is False
    seeds = (
        "Each seed has Semantic IDs, a supervised policy and alignments of its own. Between trained rows it is a block."
        if own_starts
        else "Seeds are those of the alignment."
    )
    other = study.get("beside")
    namesakes = (
        f"; beside it, each row with its namesake of {Path(other).resolve().name}, whose seeds are others"
        if other
        else ""
    )
    return [
        "Values are means over seeds, entropies in bits. Their 95 % intervals cover the choice of test users alone, "
        "all cases of a user drawn together: bootstrap, for coverage the jackknife over groups of users.",
        f"Compared were {pairs} pairs of rows, named before the study ran: each row with {references or CONTROL}, "
        f"{OURS} with its rivals, each ablation with {OURS}{namesakes}. A difference is of the same cases in pairs; "
        "its error joins that over users and that over seeds (pooled over the rows that have several), with Student's "
        f"t and Satterthwaite's degrees of freedom. {seeds}",
        f"{judged} differences have a p, corrected by Holm over all {judged}; a verdict is one below .05.",
        f'"{ONE_SEED}": {len(tests) - judged} differences involve a trained row of one seed, which cannot say how much '
        "another seed would change: they get no p and no verdict, and their interval covers users alone.",
    ]


def by_criterion(record: Mapping[str, Any]) -> str:
    """Where the aligned rows stand by the criterion on test; empty where none was measured."""
    named = record.get("settings", {}).get("align", {}).get("criterion")
    aligned = [row for row in record["rows"] if row.get("criterion") and "settings" in row]
    if not named or not aligned:
        return ""
    ordered = sorted(aligned, key=lambda row: -row["criterion"]["value"])
    order = ", ".join(
        f"{row['name']} {row['criterion']['value']:.3f}{'' if len(row['seeds']) > 1 else f' ({ONE_SEED})'}"
        for row in ordered
    )
    best = ordered[0]["name"]
    place = next((i for i, row in enumerate(ordered, start=1) if row["name"] == OURS), None)
    stands = "" if place is None else f" {OURS} {'wins' if best == OURS else f'is number {place}'} by it."
    return (
        f"By the criterion that chose on validation ({', '.join(named)}, each relative to the start), on test: {order}."
        f"{stands} No test was made of it."
    )
