"""The quantisers beside each other: what the Semantic IDs are like, and what the policy makes of them.

For each dataset and each way to quantise, one run folder: the same split, the same item vectors, the same policy
and training (validated once, after the last epoch), every list proven exact. What differs is the codes alone. Beauty
gets fewer epochs than the default 20, to keep the comparison short, so its figures are to be read beside each other
only. Amazon Industrial brings the IDs of MiniOneRec (3 levels of 256), which are compared as they are (items may share
one, and then accuracy has three views), with a last code that separates them, and beside our residual k-means in the
same shape.

- collide: items whose codes some other item has too, before the last code is added;
- in use, perplexity: codes that some item has, and exp of the entropy of their use, level by level;
- error: squared length of what the codes leave over of the item vectors, over that of the vectors, after each level.
  That of given IDs is with codebooks fitted to them (the mean of what each code stands for); that of the RQ-VAE is of
  the decoder's output;
- Recall@10, NDCG@10, Cold-Recall@10 (targets with at most 5 training interactions): on the test part, 95 % intervals.

A run that is there and fits is not made again, so that a killed comparison goes on, and `--only` does a part of it.

    python benchmarks/semantic_ids.py --runs FOLDER --out semantic_ids.json --page docs/semantic-ids.md
"""

import logging
import os
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from trie import describe_run, machine_line, show_limits, table

from sagerec.actions.semantic_ids.build import SemanticIdSettings, read_semantic_ids
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.simulated_store import StoreSettings, write_store
from sagerec.catalogue.splits import SplitSettings
from sagerec.config import require
from sagerec.errors import SettingsError
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.files import write_json
from sagerec.policies.lazy_decoder import LazyDecoderSettings
from sagerec.run.stages import evaluate, make_actions, prepare, train
from sagerec.training.settings import TrainSettings

OURS: dict[str, dict[str, Any]] = {
    "residual-kmeans": {},
    "balanced-kmeans": {"quantiser": "balanced-kmeans"},
    "rq-vae": {"quantiser": "rq-vae"},
}
THEIRS: dict[str, dict[str, Any]] = {
    "residual-kmeans-3x256": {"levels": 3, "codebook_size": 256},
    "minionerec": {"quantiser": "existing"},
    "minionerec-shared": {"quantiser": "existing", "unique": False},
}
COMPARED = {"amazon-beauty": OURS, "amazon-industrial": OURS | THEIRS}
"""Dataset -> row -> settings of its Semantic IDs."""
QUICK = {"quick": {name: values | {"levels": 1, "codebook_size": 8} for name, values in OURS.items()}}
K = 10
PAGE_FLAGS = ("beauty_epochs", "industrial_epochs", "threads", "seed")
"""Settings that the page names in its command."""
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


@dataclass(frozen=True)
class CompareSettings:
    """What is compared."""

    data: Path = field(default_factory=lambda: Path(os.environ.get("SAGEREC_DATA", "../shared/data")))
    """Folder that holds the datasets amazon-beauty and amazon-industrial."""
    runs: Path | None = None
    """Folder for the run folders; a temporary one if not given."""
    only: tuple[str, ...] = ()
    """Rows to do, such as amazon-beauty/rq-vae; all if not given."""
    beauty_epochs: int = 6
    """Epochs of the policy on Amazon Beauty, alike for all rows."""
    industrial_epochs: int = 20
    """Epochs of the policy on Amazon Industrial, alike for all rows."""
    threads: int = field(default_factory=torch.get_num_threads)
    """Threads of torch."""
    seed: int = 0
    """Seed of the quantisers and of the policy."""
    quick: bool = False
    """Only see that it runs: a tiny simulated store in place of the datasets, and an epoch."""
    out: Path | None = None
    """Write the results as JSON to this file too."""
    page: Path | None = None
    """Write the tables between the marks of this page."""

    def __post_init__(self) -> None:
        least = min(self.beauty_epochs, self.industrial_epochs, self.threads)
        require(least >= 1, "epochs and threads: expected at least 1")
        known = [f"{dataset}/{name}" for dataset, rows in COMPARED.items() for name in rows]
        unknown = sorted(set(self.only) - set(known))
        require(not unknown, f"only: unknown row {unknown[:1]}; expected some of {', '.join(known)}")


def main() -> int:
    """Compare, print, write."""
    settings = tyro.cli(CompareSettings, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(settings.threads)
    record = describe_run("semantic_ids", settings)
    with tempfile.TemporaryDirectory() as scratch:
        runs, data, compared = settings.runs or Path(scratch) / "runs", settings.data, COMPARED
        if settings.quick:
            data, compared = Path(scratch) / "data", QUICK
            write_store(data / "quick", simulate(StoreSettings(users=60, items=200, seed=settings.seed)))
        rows = [
            measure(data / dataset, runs / f"{dataset}-{name}", name, values, settings)
            for dataset, by_name in compared.items()
            for name, values in by_name.items()
            if not settings.only or f"{dataset}/{name}" in settings.only
        ]
    record |= {"results": {"rows": rows}, "limits": [], "ok": None}
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    if settings.page is not None:
        write_page(settings.page, record)
    return 0


def measure(dataset: Path, out: Path, name: str, values: dict[str, Any], settings: CompareSettings) -> dict[str, Any]:
    """Make what is missing of one run, and its row."""
    logging.getLogger(__name__).info("%s, %s", dataset.name, name)
    ids, policy, training = SemanticIdSettings(**values, seed=settings.seed), LazyDecoderSettings(), TrainSettings()
    epochs = {"amazon-beauty": settings.beauty_epochs, "amazon-industrial": settings.industrial_epochs}
    n_epochs = epochs.get(dataset.name, 1)
    training = replace(training, epochs=n_epochs, validate_every=n_epochs, seed=settings.seed)
    measured = EvaluateSettings(k=(K,))
    if settings.quick:
        ids = replace(ids, text_weight=0.0, collaborative_dimensions=8, vae_epochs=2, vae_width=16, vae_latent=4)
        policy, measured = replace(policy, width=16, heads=2), replace(measured, bootstrap_samples=100)
    run = prepare(dataset, out, SplitSettings())
    make_actions(run, ids)
    train(run, policy, training)
    report = evaluate(run, measured)
    sizes = run.manifest("semantic_ids").sizes
    metrics = ("recall", "ndcg", "cold_recall", "coverage")
    kept = {key: value for key, value in report["metrics"].items() if key.startswith(tuple(f"{m}@" for m in metrics))}
    return {
        "dataset": dataset.name,
        "quantiser": name,
        "settings": values,
        "epochs": n_epochs,
        "codebook_size": read_semantic_ids(run.folder / "semantic_ids").codebooks.shape[1],
        **{key: sizes[key] for key in ("items", "distinct_ids", "level_sizes", "codes_in_use", "collision_rate")},
        **{key: sizes[key] for key in ("perplexity", "reconstruction_error")},
        "cases": report["cases"],
        "cold_cases": report["cold_cases"],
        "proven_exact": report["proven_exact"],
        "metrics": kept,
    }


def id_columns(row: dict[str, Any]) -> dict[str, str]:
    """What the IDs are like, cell by column."""
    levels = len(row["perplexity"])
    return {
        "quantiser": row["quantiser"],
        "codes": f"{levels} x {row['codebook_size']:,}",
        "collide": f"{row['collision_rate']:.1%}",
        "in use": ", ".join(f"{n:,}" for n in row["codes_in_use"][:levels]),
        "perplexity": ", ".join(f"{p:,.0f}" for p in row["perplexity"]),
        "error": ", ".join(f"{e:.3f}" for e in row["reconstruction_error"]),
        "last codes": f"{row['level_sizes'][levels]}" if len(row["level_sizes"]) > levels else "none",
    }


def policy_columns(row: dict[str, Any]) -> dict[str, str]:
    """What the policy makes of them, cell by column."""
    cells = {"quantiser": row["quantiser"]}
    for name, metric in (("Recall", "recall"), ("NDCG", "ndcg"), ("Cold-Recall", "cold_recall")):
        value = row["metrics"].get(f"{metric}@{K}")
        interval = "" if value is None else f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
        cells[f"{name}@{K}"] = interval
    return cells | {"coverage": f"{row['metrics'][f'coverage@{K}']['value']:.2f}"}


def views(row: dict[str, Any]) -> str | None:
    """The three views of Recall and NDCG where items share IDs."""
    if f"recall@{K}_optimistic" not in row["metrics"]:
        return None
    parts = []
    for metric in ("recall", "ndcg"):
        values = [row["metrics"][f"{metric}@{K}{tail}"]["value"] for tail in ("_optimistic", "", "_pessimistic")]
        parts.append(f"{metric}@{K} " + " / ".join(f"{value:.4f}" for value in values))
    return (
        f"{row['quantiser']}: {row['distinct_ids']:,} IDs for {row['items']:,} items; optimistic / expected / "
        f"pessimistic {', '.join(parts)}"
    )


def by_dataset(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each dataset."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in record["results"]["rows"]:
        found.setdefault(row["dataset"], []).append(row)
    return found


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    console.print(machine_line(record))
    for dataset, rows in by_dataset(record).items():
        for columns in (id_columns, policy_columns):
            printed = table(dataset, list(columns(rows[0])))
            for row in rows:
                printed.add_row(*(cell.replace("[", "\\[") for cell in columns(row).values()))
            console.print(printed)
        for line in filter(None, map(views, rows)):
            console.print(line)
    show_limits(console, record)


def markdown(record: dict[str, Any]) -> str:
    """The tables as Markdown."""
    settings = record["settings"]
    flags = " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in PAGE_FLAGS)
    lines = [f"{machine_line(record)}.", "", f"`python benchmarks/semantic_ids.py --runs FOLDER {flags}`", ""]
    for dataset, rows in by_dataset(record).items():
        first = rows[0]
        lines += [
            f"### {dataset}",
            "",
            f"{first['items']:,} items; {first['cases']:,} test cases, {first['cold_cases']:,} of them cold; "
            f"{first['epochs']} epochs of the policy.",
            "",
        ]
        for columns in (id_columns, policy_columns):
            names = list(columns(first))
            lines += ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
            lines += ["| " + " | ".join(columns(row).values()) + " |" for row in rows]
            lines.append("")
        lines += [f"{line}\n" for line in filter(None, map(views, rows))]
    return "\n".join(lines)


def write_page(page: Path, record: dict[str, Any]) -> None:
    """Put the tables between the marks of a page. Raises: SettingsError where it has no marks."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SettingsError(f"{page} has no marks {BEGIN} and {END}; put them where the tables shall stand")
    page.write_text(f"{before}{BEGIN}\n{markdown(record)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
