"""What the command line prints: tables on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sagerec.evaluation.diagnose import Diagnosis
from sagerec.evaluation.evaluate import BUCKET_EDGES
from sagerec.recommend import Recommender
from sagerec.report import cells
from sagerec.run.folder import Run
from sagerec.training.tracking import read_metrics

console = Console(markup=False)  # titles and ids are text, whatever brackets they hold


def print_description(name: str, figures: dict[str, Any]) -> None:
    """A table of figures, one a row."""
    table = Table("figure", "value", title=name)
    for key, value in figures.items():
        if isinstance(value, dict):
            text = "  ".join(f"{k} {v:,.0f}" for k, v in value.items())
        elif isinstance(value, list):
            text = ", ".join(value) or "none"
        elif isinstance(value, float):
            text = f"{value:.2%}" if key.endswith("share") else f"{value:.3g}"
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(key.replace("_", " "), text)
    console.print(table)


def print_ids(run: Run) -> None:
    """How good the Semantic IDs are, or what titles were made of."""
    sizes = run.manifest(run.actions).sizes
    if run.actions != "semantic_ids":
        console.print(
            f"titles: {sizes['items']:,} of {sizes['tokens_per_title']:.1f} tokens on average, at most "
            f"{sizes['longest']}; {sizes['empty_replaced']:,} without a title, {sizes['cut']:,} cut, "
            f"{sizes['numbered']:,} numbered to be told apart; "
            f"trie {sizes['trie_bytes'] / 1e6:.1f} MB",
            highlight=False,
        )
        return
    console.print(
        f"Semantic IDs: {sizes['distinct_ids']:,} for {sizes['items']:,} items, level sizes {sizes['level_sizes']}; "
        f"before the last code {sizes['collision_rate']:.1%} of items collide, perplexity "
        f"{', '.join(f'{p:.0f}' for p in sizes['perplexity'])}, reconstruction error "
        f"{', '.join(f'{e:.3f}' for e in sizes['reconstruction_error'])}; trie {sizes['trie_bytes'] / 1e6:.1f} MB",
        highlight=False,
    )


def print_alignment(run: Run, name: str) -> None:
    """What alignment did to the validation metrics, and how to measure it on test."""
    sizes = run.manifest(name).sizes
    validated = [values for values in read_metrics(run.folder / name) if "criterion" in values]
    if validated:
        kept = next(values for values in validated if values["round"] == sizes["kept_round"])
        table = Table("validation", "before", f"after (round {kept['round']} of {sizes['rounds']})", title=name)
        for key in [k for k in validated[0] if k not in ("step", "round", "seconds")]:
            table.add_row(key.removeprefix("valid_"), f"{validated[0][key]:.4f}", f"{kept[key]:.4f}")
        console.print(table)
    console.print(f"next: sagerec evaluate {run.folder} --policy {name}", highlight=False)


def print_study(record: dict[str, Any]) -> None:
    """The tables of a study: values with intervals, differences with what the tests say of them, and notes."""
    title = f"{record['cases']:,} cases, {record['cold_cases']:,} of them cold"
    for name, (header, rows) in (
        (title, cells.value_table(record, "\n")),
        ("differences relative to the rival's value", cells.difference_table(record)),
    ):
        table = Table(*header, title=name)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for text in (*cells.note_lines(record), cells.by_criterion(record), *cells.how_computed(record)):
        if text:
            console.print(text, highlight=False, markup=False)


def print_reports(reports: dict[str, dict[str, Any]]) -> None:
    """Metrics with 95 % intervals: of one report at every K, of several at one K; and Recall by popularity."""
    first = next(iter(reports.values()))
    ks = first["settings"]["k"]
    if len(reports) > 1:
        ks = [10 if 10 in ks else ks[-1]]
    columns = [(name, k) for name in reports for k in ks]
    title = (
        f"{first['split']}: {first['users']:,} users, {first['cases']:,} cases, {first['cold_cases']:,} of them cold"
    )
    table = Table("metric", title=title)
    for name, k in columns:
        table.add_column(f"{name} @{k}" if len(reports) > 1 else f"@{k}", justify="right")
    for metric in dict.fromkeys(key.partition("@")[0] for key in first["metrics"]):
        suffixes = dict.fromkeys(
            key.partition("@")[2].partition("_")[2] for key in first["metrics"] if key.startswith(metric + "@")
        )
        for suffix in suffixes:
            tail = f"_{suffix}" if suffix else ""
            keys = [(name, f"{metric}@{k}{tail}") for name, k in columns]
            found = [_cell(key, reports[name]["metrics"].get(key)) for name, key in keys]
            table.add_row(f"{cells.label(metric)} {suffix}".strip(), *found)
    console.print(table)
    key = next(key for row in first["buckets"] for key in row if key.startswith("recall@"))
    by = Table("target's training interactions", "cases", title=f"{cells.label(key)} by popularity")
    for name in reports:
        by.add_column(name, justify="right")
    for number, row in enumerate(first["buckets"]):
        if row["cases"]:
            high = "" if row["train_count_to"] is None else row["train_count_to"]
            found = [_cell(key, report["buckets"][number].get(key)) for report in reports.values()]
            by.add_row(f"{row['train_count_from']}–{high}", f"{row['cases']:,}", *found)
    console.print(by)


def _cell(metric: str, found: dict[str, float] | None) -> Text:
    """A value over its interval."""
    value, ends = cells.value_parts(metric, found)
    return Text.assemble(value, (f"\n{ends}" if ends else "", "dim"))


def print_diagnoses(found: dict[str, Diagnosis], k: int) -> None:
    """Outcomes, and Recall by popularity with what each bucket adds to the difference from the first system."""
    first, *others = found.values()
    table = Table("share of the cases", *found, title="what became of the targets")
    for outcome in dict.fromkeys(outcome for diagnosis in found.values() for outcome in diagnosis.outcomes):
        table.add_row(outcome, *(f"{diagnosis.outcomes.get(outcome, 0.0):.4f}" for diagnosis in found.values()))
    console.print(table)
    by = Table("target's training interactions", "cases", *found, title=f"Recall@{k}; (what adds to the difference)")
    ends = [*map(str, BUCKET_EDGES), ""]
    for b, (low, high) in enumerate(zip((0, *(edge + 1 for edge in BUCKET_EDGES)), ends, strict=True)):
        if not first.cases[b]:
            continue
        texts = [f"{first.by_popularity[b]:.4f}"]
        for other in others:
            gap = (other.by_popularity[b] - first.by_popularity[b]) * first.cases[b] / first.cases.sum()
            texts.append(f"{other.by_popularity[b]:.4f} ({gap:+.4f})")
        by.add_row(f"{low}–{high}", f"{first.cases[b]:,}", *texts)
    console.print(by)


def print_examples(run: Run, recommender: Recommender, users: int = 3, k: int = 5) -> None:
    """Readable slates: what some test users had, what is recommended, and what they took next."""
    cases = run.split.cases(run.data, "test")
    step = max(1, len(cases) // users)
    for case in range(0, step * users, step)[: len(cases)]:
        first, row = int(cases.starts[case]), int(cases.rows[case])
        history = run.data.event_items[max(first, row - 5) : row]
        target = int(cases.targets[case])
        found = recommender.recommend(run.data.item_ids.external(run.data.event_items[first:row]), k=k)
        table = Table("", "item_id", "title", title=f"user {run.data.user_ids.external([cases.users[case]])[0]}")
        for item in history:
            table.add_row("had", run.data.item_ids.external([item])[0], recommender.titles[item])
        table.add_section()
        for rank, item_id, title, _ in found.iter_rows():
            mark = " <- taken" if item_id == run.data.item_ids.external([target])[0] else ""
            table.add_row(f"{rank}", item_id, title + mark)
        table.add_section()
        table.add_row("took", run.data.item_ids.external([target])[0], recommender.titles[target])
        console.print(table)
