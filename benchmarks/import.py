"""Ten million synthetic reviews in the form of Amazon 2023: `sagerec import` against pandas' `read_json(lines=True)`.

The file is written first, and is not timed: one JSON object a line with every field of the release (rating, title,
text, images, asin, parent_asin, user_id, timestamp, helpful_vote, verified_purchase), gzip. Titles and texts are drawn
for some hundred thousand bodies, about 490 bytes a review, much as in the real files; users and items are skewed as in
a real log. Ten million rows take about 1.9 GB in the folder for temporary files (`TMPDIR`).

- Ours: `import_dataset`, all of it: reading, checking, ids to numbers, canonical order, duplicates, writing Parquet and
  the hash of the source. The peak is the whole process's; Python and the package are some 0.4 GB of it.
- pandas: `read_json(lines=True)` alone, on the first rows, since it holds every field in memory; once before ours and
  once after, and the faster counts. Nothing is sorted or written.

Each runs in a process of its own. Ours uses two threads and pandas one: on a machine that is busy with other work the
ratio falls towards that of the CPU seconds, which the table shows too.

    python benchmarks/import.py --out import.json      (needs the extra: pip install "sagerec[bench]")
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
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from isal import igzip
from rich.console import Console
from trie import GB, MB, describe_run, machine_line, peak_bytes, resident_bytes, show_limits, table, timed

from sagerec.catalogue.formats.importer import import_dataset
from sagerec.config import require
from sagerec.errors import MissingExtraError
from sagerec.files import write_json

LIMIT_ROWS, LIMIT_GB, LIMIT_RATIO = 10_000_000, 2.0, 5.0
WRITTEN_AT_ONCE = 100_000
Measure = Callable[[Path, "ImportBenchmarkSettings"], dict[str, Any]]
START_MILLISECONDS, SPAN_MILLISECONDS = 1_300_000_000_000, 390_000_000_000


@dataclass(frozen=True)
class ImportBenchmarkSettings:
    """What is measured."""

    rows: int = LIMIT_ROWS
    """Reviews that are imported."""
    pandas_rows: int = 1_000_000
    """Reviews that pandas reads, the first of the same file."""
    users: int = 4_000_000
    """Users that reviews are drawn from."""
    items: int = 500_000
    """Items that reviews are drawn from."""
    bodies: int = 200_000
    """Different titles and texts."""
    threads: int = 2
    """Threads of polars; one more reads ahead."""
    seed: int = 0
    """Seed of the file."""
    quick: bool = False
    """Only see that it runs: a small file, no limits; replaces those settings."""
    out: Path | None = None
    """Write the results as JSON to this file too."""

    def __post_init__(self) -> None:
        require(1 <= self.pandas_rows <= self.rows, f"pandas_rows is {self.pandas_rows}; expected 1 to rows")
        counts = (self.users, self.items, self.bodies, self.threads)
        require(min(counts) >= 1, f"users, items, bodies, threads are {counts}; expected at least 1")


def main() -> int:
    """Measure, print, write; 1 where a limit is missed."""
    settings = tyro.cli(ImportBenchmarkSettings, description=__doc__)
    if settings.quick:
        settings = replace(settings, rows=3_000, pandas_rows=1_000, users=500, items=200, bodies=300)
    os.environ["POLARS_MAX_THREADS"] = str(settings.threads)  # read when the measuring processes start polars
    record = describe_run("import", settings)
    record["hardware"]["threads"] = settings.threads
    record["versions"]["pandas"] = pandas_version()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = write_reviews(folder, settings)
        before = in_own_process(measure_pandas, folder, settings)
        ours = in_own_process(measure_import, folder, settings)
        after = in_own_process(measure_pandas, folder, settings)
    pandas = max((before, after), key=lambda row: float(row["rows_per_second"]))
    pandas["rows_per_second_of_rounds"] = [before["rows_per_second"], after["rows_per_second"]]
    results = {"file": file, "import": ours, "pandas": pandas}
    results["ratio"] = ours["rows_per_second"] / pandas["rows_per_second"]
    limits = check_limits(results)
    record |= {
        "results": results,
        "limits": limits,
        "ok": all(limit["ok"] for limit in limits) if limits else None,
    }
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 1 if record["ok"] is False else 0


def pandas_version() -> str:
    """The version of the peer. Raises: MissingExtraError."""
    try:
        return metadata.version("pandas")
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError('pandas is not installed; install it with: pip install "sagerec[bench]"') from error


def in_own_process(measure: Measure, folder: Path, settings: ImportBenchmarkSettings) -> dict[str, Any]:
    """Run `measure` in a process of its own, or, to see only that it runs, in this one."""
    if settings.quick:
        return measure(folder, settings)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, folder, settings).result()


def write_reviews(folder: Path, settings: ImportBenchmarkSettings) -> dict[str, Any]:
    """Write the files of ours and of pandas; returns their sizes."""
    generator = np.random.default_rng(settings.seed)
    users = [f'"user_id": "{user}", "timestamp": ' for user in draw_ids(settings.users, "A", 28, generator)]
    items = [f'"asin": "{item}", "parent_asin": "{item}", ' for item in draw_ids(settings.items, "B0", 10, generator)]
    heads, tails = draw_bodies(settings.bodies, generator)
    unpacked = 0
    with (
        igzip.open(folder / "reviews.jsonl.gz", "wb", compresslevel=2) as whole,
        igzip.open(folder / "pandas.jsonl.gz", "wb", compresslevel=2) as first,
    ):
        for start in range(0, settings.rows, WRITTEN_AT_ONCE):
            count = min(WRITTEN_AT_ONCE, settings.rows - start)
            skewed = (settings.users * generator.random(count) ** 1.5).astype(int).tolist()
            popular = (settings.items * generator.random(count) ** 3).astype(int).tolist()
            bodies = generator.integers(0, settings.bodies, count).tolist()
            times = (START_MILLISECONDS + generator.integers(0, SPAN_MILLISECONDS, count)).tolist()
            rows = zip(skewed, popular, bodies, times, strict=True)
            lines = [f"{heads[b]}{items[i]}{users[u]}{t}{tails[b]}" for u, i, b, t in rows]
            text = "".join(lines).encode()
            unpacked += len(text)
            whole.write(text)
            if start < settings.pandas_rows:
                first.write("".join(lines[: settings.pandas_rows - start]).encode())
    packed = (folder / "reviews.jsonl.gz").stat().st_size
    return {"rows": settings.rows, "gzip_gb": packed / GB, "json_gb": unpacked / GB}


def draw_ids(count: int, begin: str, length: int, generator: np.random.Generator) -> list[str]:
    """Ids of random capitals and digits; of so many letters, some may be equal."""
    letters = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", dtype=np.uint8)
    width = length - len(begin)
    text = letters[generator.integers(0, 32, (count, width), dtype=np.uint8)].tobytes().decode()
    return [begin + text[start : start + width] for start in range(0, count * width, width)]


def draw_bodies(count: int, generator: np.random.Generator) -> tuple[list[str], list[str]]:
    """What stands before and behind the ids of a review: 30 words of text on average, an image in one of ten."""
    words = np.array([f"{'great'[: 1 + number % 5]}{number}" for number in range(5000)])
    heads, tails = [], []
    lengths = generator.geometric(1 / 30, count)
    for length in lengths.tolist():
        drawn = words[(5000 * generator.random(length + 5) ** 2).astype(int)].tolist()
        url = "https://m.media-amazon.com/images/I/71g1lP0pMbL._SL256_.jpg"
        images = [{"small_image_url": url, "attachment_type": "IMAGE"}] if generator.random() < 0.1 else []
        rating, votes = float(generator.integers(1, 6)), int(generator.geometric(0.5)) - 1
        head = {"rating": rating, "title": " ".join(drawn[:5]), "text": " ".join(drawn[5:]), "images": images}
        heads.append(json.dumps(head)[:-1] + ", ")
        verified = "true" if generator.random() < 0.9 else "false"
        tails.append(f', "helpful_vote": {votes}, "verified_purchase": {verified}}}\n')
    return heads, tails


def measure_import(folder: Path, settings: ImportBenchmarkSettings) -> dict[str, Any]:
    """Import the whole file."""
    at_start = resident_bytes()
    call = partial(import_dataset, "amazon-2023", [folder / "reviews.jsonl.gz"], folder / "dataset")
    begin = time.process_time()
    figures, seconds = timed(call)
    assert figures["rows_read"] == settings.rows
    written = sum(path.stat().st_size for path in (folder / "dataset").iterdir())
    return {
        "rows": figures["rows_read"],
        "users": figures["users"],
        "items": figures["items"],
        "seconds": seconds,
        "cpu_seconds": time.process_time() - begin,
        "rows_per_second": settings.rows / seconds,
        "peak_gb": peak_bytes() / GB,
        "rise_gb": (peak_bytes() - at_start) / GB,
        "dataset_mb": written / MB,
    }


def measure_pandas(folder: Path, settings: ImportBenchmarkSettings) -> dict[str, Any]:
    """Read the first rows with pandas."""
    import pandas

    begin = time.process_time()
    frame, seconds = timed(partial(pandas.read_json, folder / "pandas.jsonl.gz", lines=True))
    cpu_seconds = time.process_time() - begin
    rows = len(frame)
    assert rows == settings.pandas_rows
    return {
        "rows": rows,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rows_per_second": rows / seconds,
        "peak_gb": peak_bytes() / GB,
    }


def check_limits(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The limits asked for, where as many rows were measured."""
    if results["import"]["rows"] < LIMIT_ROWS:
        return []
    peak, ratio = results["import"]["peak_gb"], results["ratio"]
    of_rows = f"{results['import']['rows']:,} reviews"
    return [
        {
            "name": f"peak GB of {of_rows}",
            "measured": peak,
            "bound": "at most",
            "limit": LIMIT_GB,
            "ok": peak <= LIMIT_GB,
        },
        {
            "name": f"times the rows per second of pandas, {of_rows}",
            "measured": ratio,
            "bound": "at least",
            "limit": LIMIT_RATIO,
            "ok": ratio >= LIMIT_RATIO,
        },
    ]


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    console.print(machine_line(record))
    results = record["results"]
    file = results["file"]
    title = f"{file['rows']:,} reviews, {file['json_gb']:.2f} GB of JSON, {file['gzip_gb']:.2f} GB as gzip"
    rows = table(title, ["reader", "rows", "seconds", "CPU s", "rows/s", "peak GB", "ratio"])
    for name, ratio in (("import", results["ratio"]), ("pandas", 1.0)):
        row = results[name]
        cells = [f"{row['rows']:,}", f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"]
        cells += [f"{row['rows_per_second']:,.0f}", f"{row['peak_gb']:.2f}", f"{ratio:.1f}"]
        rows.add_row("sagerec import" if name == "import" else "pandas read_json", *cells)
    console.print(rows)
    show_limits(console, record)


if __name__ == "__main__":
    sys.exit(main())
