"""What a catalogue costs: seconds and peak memory of Semantic IDs and of item-kNN, by the number of items.

Made-up items with a title of a few words, and a log of twenty events a user whose items follow a power law, half of
them around one of the user's own; as many users as items, at most `users`. Each size runs in a process of its own, part
by part as the stage does: text (hashed TF-IDF, SVD), co-occurrence (PPMI, SVD), residual k-means, the separating code
and the trie; then item-kNN's similarities, which the collaborative reward reads.

    OMP_NUM_THREADS=2 python benchmarks/catalogue.py --out catalogue.json
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from text import draw_titles
from trie import GB, describe_run, machine_line, peak_bytes, reset_peak, show_limits, table, timed

from sagerec.actions.semantic_ids.build import chosen_codebook_size
from sagerec.actions.semantic_ids.embedders import embed_collaborative, embed_text
from sagerec.actions.semantic_ids.quantisers import residual_kmeans, separate
from sagerec.actions.trie import build_trie
from sagerec.catalogue.similarity import item_similarities
from sagerec.catalogue.splits import Sequences
from sagerec.files import write_json

LIMIT_ITEMS, LIMIT_SECONDS, LIMIT_GB = 10**6, 900.0, 8.0
EVENTS = 20


@dataclass(frozen=True)
class CatalogueSettings:
    """What is measured."""

    items: tuple[int, ...] = (10**4, 10**5, 10**6)
    """Items of the catalogues."""
    users: int = 10**6
    """Users of the log, at most; else as many as items."""
    threads: int = 2
    """Threads of torch; set OMP_NUM_THREADS to as many for the rest."""
    seed: int = 0
    """Seed of catalogue, log, SVD and k-means."""
    quick: bool = False
    """Only see that it runs: a tiny catalogue, no limit."""
    out: Path | None = None
    """Write the results as JSON to this file too."""


def draw_log(n_items: int, n_users: int, seed: int) -> Sequences:
    """Twenty items a user: half from the neighbourhood of one, half by popularity alone."""
    rng = np.random.default_rng(seed)
    home = (n_items * rng.random(n_users) ** 2).astype(np.int64)
    near = home[:, None] + rng.integers(0, 50, (n_users, EVENTS))
    popular = (n_items * rng.random((n_users, EVENTS)) ** 3).astype(np.int64)
    items = np.where(rng.random((n_users, EVENTS)) < 0.5, near, popular) % n_items
    offsets = np.arange(n_users + 1, dtype=np.int64) * EVENTS
    return Sequences(items.astype(np.int32).ravel(), offsets, np.arange(n_users), np.arange(n_users * EVENTS))


def measure(n_items: int, settings: CatalogueSettings) -> dict[str, Any]:
    """A row: seconds of each part, and the peak of the process at each."""
    torch.set_num_threads(settings.threads)
    log = draw_log(n_items, min(n_items, settings.users), settings.seed)
    titles = draw_titles(n_items, settings.seed)
    row: dict[str, Any] = {"items": n_items, "events": len(log.items), "seconds": {}, "peak_gb": {}}

    def part(name: str, call: Callable[[], Any]) -> Any:
        reset_peak()
        found, row["seconds"][name] = timed(call)
        row["peak_gb"][name] = peak_bytes() / GB
        return found

    seed, size = settings.seed, chosen_codebook_size(n_items)
    text = part("text", lambda: embed_text(titles, dimensions=192, seed=seed).vectors)
    taken = {"dimensions": 128, "window": 5, "seed": seed}
    together = part("co-occurrence", lambda: embed_collaborative(log, n_items, **taken))
    vectors = np.concatenate([0.7 * text, together], axis=1)
    codes = part("k-means", lambda: residual_kmeans(vectors, levels=2, codebook_size=size, seed=seed).codes)
    counts = np.bincount(log.items, minlength=n_items)
    part("codes, trie", lambda: build_trie(separate(codes, counts)))
    row["semantic_ids_seconds"] = sum(row["seconds"].values())
    row["semantic_ids_gb"] = max(row["peak_gb"].values())
    part("item-kNN", lambda: item_similarities(log, n_items, neighbours=200, shrinkage=5.0))
    return row


def main() -> int:
    """Measure, print, write; 1 where a limit is missed."""
    settings = tyro.cli(CatalogueSettings, description=__doc__)
    if settings.quick:
        settings = replace(settings, items=(400,))
    record = describe_run("catalogue", settings)
    rows = []
    for n_items in settings.items:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure, n_items, settings).result())
    limits = [
        {
            "name": f"Semantic IDs of {LIMIT_ITEMS:,} items: {what}",
            "measured": row[key],
            "bound": "at most",
            "limit": most,
        }
        | {"ok": row[key] <= most}
        for row in rows
        if row["items"] == LIMIT_ITEMS
        for what, key, most in (("s", "semantic_ids_seconds", LIMIT_SECONDS), ("GB", "semantic_ids_gb", LIMIT_GB))
    ]
    record |= {"results": rows, "limits": limits, "ok": all(x["ok"] for x in limits) if limits else None}
    console = Console(width=140)
    console.print(machine_line(record))
    names = list(rows[0]["seconds"])
    shown = table("Seconds (peak GB)", ["items", "events", *names, "Semantic IDs"])
    for row in rows:
        cells = (f"{row['seconds'][name]:,.1f} ({row['peak_gb'][name]:.1f})" for name in names)
        whole = f"{row['semantic_ids_seconds']:,.1f} ({row['semantic_ids_gb']:.1f})"
        shown.add_row(f"{row['items']:,}", f"{row['events']:,}", *cells, whole)
    console.print(shown)
    show_limits(console, record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 1 if record["ok"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
