"""RecIF-Bench at its size: predictions of 40,000 rows with 32 beams each, and the import of 162,074 users.

All files are random, of the published layout, and written first, which is not timed.

- Evaluation: one task of 40,000 rows, prompts of 100 items, answers of 10, a map of a million Semantic IDs, JSON lines
  of predictions of which one in ten hits. Measured is all of `sagerec recif evaluate`: reading, scoring, both kinds of
  metrics, intervals, hashes of the files, record and table.
- Import: the wide table in one row group, as pandas writes it, which is the hardest to stream: videos with five masks,
  ads, products; then `import_dataset`, all of it.

Each runs in a process of its own with two threads. Peaks are the whole process's; Python and the package are 0.4 GB.

    python benchmarks/recif.py --out recif.json
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tyro
from rich.console import Console
from trie import GB, describe_run, machine_line, peak_bytes, show_limits, table, timed

from sagerec.catalogue.formats import recif
from sagerec.catalogue.formats.importer import import_dataset
from sagerec.config import require
from sagerec.files import write_json
from sagerec.recif.evaluate import PredictionsFile, evaluate_systems
from sagerec.recif.items import codes_of, itemic_text
from sagerec.recif.tasks import read_benchmark

LIMIT_ROWS, LIMIT_BEAMS, LIMIT_SECONDS, LIMIT_GB = 40_000, 32, 20.0, 1.0
LIMIT_USERS, LIMIT_IMPORT_GB = 162_074, 2.0
Measure = Callable[[Path, "RecifBenchmarkSettings"], dict[str, Any]]


@dataclass(frozen=True)
class RecifBenchmarkSettings:
    """What is measured."""

    rows: int = LIMIT_ROWS
    """Rows of the task."""
    beams: int = LIMIT_BEAMS
    """Predictions of each."""
    ids: int = 1_000_000
    """Semantic IDs of the map."""
    users: int = LIMIT_USERS
    """Users of the wide table."""
    history: int = 250
    """Videos of each history on average; of ads and products there are a tenth as many."""
    threads: int = 2
    """Threads of polars."""
    seed: int = 0
    """Seed of the files."""
    quick: bool = False
    """Only see that it runs: small files, no limits; replaces those settings."""
    out: Path | None = None
    """Write the results as JSON to this file too."""

    def __post_init__(self) -> None:
        counts = (self.rows, self.beams, self.ids, self.users, self.history, self.threads)
        require(min(counts) >= 1, f"rows, beams, ids, users, history, threads are {counts}; expected at least 1")


def main() -> int:
    """Measure, print, write; 1 where a limit is missed."""
    settings = tyro.cli(RecifBenchmarkSettings, description=__doc__)
    if settings.quick:
        settings = replace(settings, rows=200, beams=8, ids=300, users=300, history=20)
    os.environ["POLARS_MAX_THREADS"] = str(settings.threads)  # read when the measuring processes start polars
    record = describe_run("recif", settings)
    record["hardware"]["threads"] = settings.threads
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results = {}
        for name, write, measure in (
            ("evaluate", write_benchmark, measure_evaluation),
            ("import", write_table, measure_import),
        ):
            in_own_process(write, folder, settings)
            results[name] = in_own_process(measure, folder, settings)
    limits = check_limits(results)
    record |= {"results": results, "limits": limits, "ok": all(x["ok"] for x in limits) if limits else None}
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 1 if record["ok"] is False else 0


def in_own_process(measure: Measure, folder: Path, settings: RecifBenchmarkSettings) -> dict[str, Any]:
    """Run `measure` in a process of its own, or, to see only that it runs, in this one."""
    if settings.quick:
        return measure(folder, settings)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, folder, settings).result()


def write_benchmark(folder: Path, settings: RecifBenchmarkSettings) -> dict[str, Any]:
    """Write a task, its map and its predictions."""
    rng = np.random.default_rng(settings.seed)
    keys = np.unique(rng.integers(0, 8192**3, settings.ids))
    texts = [itemic_text(codes_of(key)) for key in keys.tolist()]
    entry = '"{}": [{{"pid": {}, "count": 4, "count_after_downsample": 2}}]'
    held = ", ".join(entry.format(key, i + 1) for i, key in enumerate(keys.tolist()))
    (folder / "benchmark_data").mkdir()
    (folder / "benchmark_data" / "sid2pid.json").write_text("{" + held + "}", encoding="utf-8")
    rows: dict[str, list[str]] = {"messages": [], "metadata": []}
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for row in range(settings.rows):
            shown, asked = rng.integers(0, len(keys), 100).tolist(), rng.integers(0, len(keys), 10)
            message = {"role": "user", "content": "".join(texts[i] for i in shown)}
            answer = "".join(texts[i] for i in asked.tolist())
            rows["messages"].append(json.dumps([message]))
            rows["metadata"].append(json.dumps({"uid": row, "answer": answer, "answer_pid": (asked + 1).tolist()}))
            said = rng.integers(0, len(keys), settings.beams)
            if rng.random() < 0.1:
                said[-1] = asked[0]
            line = {"task": "video", "row": row, "predictions": [texts[i] for i in said.tolist()]}
            file.write(json.dumps(line) + "\n")
    path = folder / "benchmark_data" / "video" / "video_test.parquet"
    path.parent.mkdir()
    pl.DataFrame(rows).write_parquet(path)
    return {}


def measure_evaluation(folder: Path, settings: RecifBenchmarkSettings) -> dict[str, Any]:
    """Evaluate the predictions."""

    def call() -> dict[str, Any]:
        benchmark = read_benchmark(folder / "benchmark_data")
        return evaluate_systems(benchmark, [PredictionsFile(folder / "predictions.jsonl")], folder / "out")

    begin = time.process_time()
    found, seconds = timed(call)
    task = found["tasks"]["video"]
    assert (task["samples"], task["missing"]) == (settings.rows, 0)
    assert task["metrics"]["pid_recall@32"] == task["metrics"]["recall@32"] > 0
    return {
        "rows": settings.rows,
        "beams": settings.beams,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - begin,
        "peak_gb": peak_bytes() / GB,
        "predictions_mb": (folder / "predictions.jsonl").stat().st_size / 1e6,
    }


def write_table(folder: Path, settings: RecifBenchmarkSettings) -> dict[str, Any]:
    """Write a wide table, in one row group, and its maps."""
    rng = np.random.default_rng(settings.seed)
    source, items = folder / "source", max(settings.ids, 100)
    source.mkdir()
    columns: dict[str, Any] = {"uid": np.arange(settings.users), "split": np.arange(settings.users) % 5 // 4}

    def lists(lengths: np.ndarray, most: int) -> pl.Series:
        values = pl.DataFrame(
            {
                "row": np.repeat(np.arange(settings.users), lengths),
                "v": (rng.random(lengths.sum()) ** 2 * most).astype(int),
            }
        )
        found = values.group_by("row", maintain_order=True).agg("v")
        every = pl.DataFrame({"row": np.arange(settings.users)})
        return every.join(found, on="row", how="left", maintain_order="left")["v"]

    for side, share in (("hist", 1.0), ("target", 0.04)):
        for name, mean in (
            ("video", settings.history),
            ("ad", settings.history // 10),
            ("goods", settings.history // 10),
        ):
            lengths = rng.poisson(max(mean * share, 1), settings.users) + 1
            columns[f"{side}_{name}_pid"] = lists(lengths, items)
            for mask in ("longview", "like", "follow", "forward", "not_interested") if name == "video" else ():
                columns[f"{side}_video_{mask}"] = lists(lengths, 2).cast(pl.List(pl.Int8))
    pl.DataFrame(columns).write_parquet(source / recif.WIDE, row_group_size=settings.users)
    sids = rng.integers(0, 8192, (items, 3)).tolist()
    for name in (recif.VIDEO_MAP, recif.PRODUCT_MAP):
        pl.DataFrame({"pid": np.arange(items), "sid": sids}).write_parquet(source / name)
    return {}


def measure_import(folder: Path, settings: RecifBenchmarkSettings) -> dict[str, Any]:
    """Import the table."""
    begin = time.process_time()
    figures, seconds = timed(partial(import_dataset, "recif", [folder / "source"], folder / "dataset"))
    assert figures["users"] > 0
    return {
        "users": settings.users,
        "events": figures["interactions"],
        "items": figures["items"],
        "seconds": seconds,
        "cpu_seconds": time.process_time() - begin,
        "peak_gb": peak_bytes() / GB,
    }


def check_limits(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The limits asked for, where as much was measured."""
    evaluated, imported = results["evaluate"], results["import"]
    limits = []
    if evaluated["rows"] >= LIMIT_ROWS and evaluated["beams"] >= LIMIT_BEAMS:
        what = f"of {evaluated['rows']:,} rows with {evaluated['beams']} beams"
        limits += [
            ("seconds", what, evaluated["seconds"], LIMIT_SECONDS),
            ("peak GB", what, evaluated["peak_gb"], LIMIT_GB),
        ]
    if imported["users"] >= LIMIT_USERS:
        limits.append(("peak GB", f"of {imported['users']:,} users", imported["peak_gb"], LIMIT_IMPORT_GB))
    return [
        {"name": f"{name} {what}", "measured": value, "bound": "at most", "limit": limit, "ok": value <= limit}
        for name, what, value, limit in limits
    ]


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    console = Console()
    console.print(machine_line(record))
    rows = table("RecIF-Bench", ["what", "size", "seconds", "CPU s", "peak GB"])
    evaluated, imported = record["results"]["evaluate"], record["results"]["import"]
    sizes = (
        ("evaluation", f"{evaluated['rows']:,} rows x {evaluated['beams']}", evaluated),
        ("import", f"{imported['users']:,} users, {imported['events']:,} events", imported),
    )
    for name, size, row in sizes:
        rows.add_row(name, size, f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['peak_gb']:.2f}")
    console.print(rows)
    show_limits(console, record)


if __name__ == "__main__":
    sys.exit(main())
