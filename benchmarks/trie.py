"""The trie at catalogues of 10^4 to 10^7 items: build, memory, opening, and the cost of a step.

Codes are random: three codes of 256 levels, and a fourth that separates the items whose three are equal. Every size is
measured in a fresh process, which gets the codes from a file, so that its peak memory is its own.

What is measured, one build a process:
- build: `build_trie` on the codes in memory; the peak is the whole process's, the rise is over what it held at the
  start of the build (interpreter, torch and codes). Catalogues of 10^7 items must build within 60 s and 2 GB.
- write and open: `write_trie`, and `read_trie` memory-mapped, with the files in the page cache.
- a step: `children`, `allowed` (with the vocabulary given) and `advance` for 1,024 states of one depth, the median over
  batches that are all different. A larger catalogue has more children under a node, so two rows compare like with like:
  the root (256 children in every catalogue), and random nodes of depth 3 with exactly one child. Every batch is
  new to the processor's caches, where the smallest trie fits and the largest does not: that is all that may grow, and
  four times is the limit from 10^4 to 10^7 items. The rows of depth 1 and 2 are as they fall; read them by the time
  per child listed.

The slow peer is the index that MiniOneRec and its kin constrain Hugging Face with: a dictionary from every prefix to
the list of its allowed tokens. Here its keys are tuples (MiniOneRec joins strings), and its input is tuples already.

    python benchmarks/trie.py --out trie.json
"""

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sagerec.actions.trie import Trie, build_trie, read_trie, write_trie
from sagerec.artifacts import package_versions
from sagerec.config import require, to_json
from sagerec.files import write_json

CODEBOOK_SIZE = 256
LIMIT_ITEMS, LIMIT_SECONDS, LIMIT_GB = 10_000_000, 60.0, 2.0
LIMIT_GROWTH = 4.0
"""A step's time at `LIMIT_ITEMS` items over that at the smallest catalogue, with as many children."""
GB, MB = 1e9, 1e6


@dataclass(frozen=True)
class TrieSettings:
    """What is measured."""

    items: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    """Catalogue sizes for the trie."""
    dictionary_items: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Catalogue sizes for the dictionary of prefixes; 10^7 would need tens of GB."""
    states: int = 1024
    """States in the batch of a step."""
    batches: int = 200
    """Batches of a step, of which the median counts."""
    threads: int = 1
    """Threads of torch in a step; building takes one."""
    seed: int = 0
    """Seed of the codes and of the states."""
    quick: bool = False
    """Only see that it runs: one tiny catalogue, few batches, no limits; replaces those settings."""
    out: Path | None = None
    """Write the results as JSON to this file too."""

    def __post_init__(self) -> None:
        require(min(self.items + self.dictionary_items, default=1) >= 1, "every catalogue needs at least one item")
        require(len(self.items) >= 1, "items is empty; expected at least one catalogue size")
        require(min(self.states, self.batches, self.threads) >= 1, "states, batches and threads: expected at least 1")


def main() -> int:
    """Measure, print, write; 1 where a limit is missed."""
    settings = tyro.cli(TrieSettings, description=__doc__)
    if settings.quick:
        settings = replace(settings, items=(2_000,), dictionary_items=(2_000,), batches=5)
    torch.set_num_threads(settings.threads)
    record = describe_run("trie", settings)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for size in sorted({*settings.items, *settings.dictionary_items}):
            np.save(folder / f"{size}.npy", draw_codes(size, np.random.default_rng(settings.seed)))
        trie = [in_fresh_process(measure_trie, folder, size, settings) for size in sorted(settings.items)]
        dictionary = [
            in_fresh_process(measure_dictionary, folder, size, settings) for size in sorted(settings.dictionary_items)
        ]
    limits = check_limits(trie)
    record |= {
        "results": {"trie": trie, "dictionary": dictionary},
        "limits": limits,
        "ok": all(limit["ok"] for limit in limits) if limits else None,
    }
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 1 if record["ok"] is False else 0


def draw_codes(n_items: int, generator: np.random.Generator) -> np.ndarray:
    """Distinct codes (N, 4) int16: three at random, the fourth the rank among the items whose three are equal."""
    key = generator.integers(0, CODEBOOK_SIZE**3, n_items, dtype=np.int32)
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    place = np.arange(n_items)
    begins = np.ones(n_items, dtype=bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    codes = np.empty((n_items, 4), dtype=np.int16)
    for column, shift in enumerate((16, 8, 0)):
        codes[:, column] = (key >> shift) & (CODEBOOK_SIZE - 1)
    codes[order, 3] = place - np.maximum.accumulate(np.where(begins, place, 0))
    return codes


def measure_trie(codes_file: Path, settings: TrieSettings) -> dict[str, Any]:
    """Build, write, open and step through the trie of one catalogue."""
    codes = np.load(codes_file)
    at_start = resident_bytes()
    trie, build_seconds = timed(partial(build_trie, codes))
    peak = peak_bytes()
    folder = codes_file.with_suffix(".trie")
    _, write_seconds = timed(partial(write_trie, folder, trie))
    opened, open_seconds = timed(partial(read_trie, folder))
    assert opened.n_nodes == trie.n_nodes
    return {
        "items": len(codes),
        "nodes": trie.n_nodes,
        "build_seconds": build_seconds,
        "peak_gb": peak / GB,
        "rise_gb": (peak - at_start) / GB,
        "trie_mb": trie.n_bytes / MB,
        "write_seconds": write_seconds,
        "open_seconds": open_seconds,
        "steps": [measure_step(trie, depth, single, settings) for depth, single in STEPS],
    }


STEPS = ((0, False), (1, False), (2, False), (3, True))
"""The depth of the states, and whether only those with one child are taken."""


def measure_step(trie: Trie, depth: int, single: bool, settings: TrieSettings) -> dict[str, Any]:
    """Median microseconds of `children`, `allowed` and `advance` for batches of states at `depth`."""
    torch.set_num_threads(settings.threads)
    # Freeing 16 MB stops glibc from handing every freed tensor back to the system, which a large build does too.
    torch.empty(16_000_000, dtype=torch.uint8)
    begin, end = 0, 1
    for _ in range(depth):
        begin, end = int(trie.first_child[begin]), int(trie.first_child[end])
    fan_out = trie.first_child[begin + 1 : end + 1] - trie.first_child[begin:end]
    nodes = begin + ((fan_out == 1) if single else (fan_out >= 1)).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(settings.seed)
    batches = []
    listed = 0
    for _ in range(settings.batches):
        states = nodes[torch.randint(len(nodes), (settings.states,), generator=generator)]
        counts = trie.first_child[states + 1] - trie.first_child[states]
        child = trie.first_child[states] + (torch.rand(len(states), generator=generator) * counts).long()
        batches.append((states, trie.token[child].long()))
        listed += int(counts.sum())
    # Call by call over all batches, so that none finds in the processor's cache what another has just read.
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "children": lambda states, _: trie.children(states),
        "allowed": lambda states, _: trie.allowed(states, vocabulary=CODEBOOK_SIZE),
        "advance": trie.advance,
    }
    median = {}
    for name, call in calls.items():
        call(*batches[0])
        median[name] = float(np.median([timed(partial(call, *batch))[1] for batch in batches])) * 1e6
    per_batch = listed / settings.batches
    return {
        "depth": depth,
        "one_child": single,
        "states_to_choose_from": len(nodes),
        "children_per_state": per_batch / settings.states,
        **{f"{name}_microseconds": value for name, value in median.items()},
        "children_nanoseconds_per_child": median["children"] * 1e3 / per_batch,
    }


def measure_dictionary(codes_file: Path, settings: TrieSettings) -> dict[str, Any]:
    """Build the dictionary of prefixes of one catalogue, and look up a batch of prefixes of depth 3."""
    codes = np.load(codes_file)
    rows = [tuple(row) for row in codes.tolist()]
    at_start = resident_bytes()
    allowed, build_seconds = timed(partial(prefix_dictionary, rows))
    peak = peak_bytes()
    generator = np.random.default_rng(settings.seed)
    seconds = []
    for _ in range(settings.batches):
        prefixes = torch.from_numpy(codes[generator.integers(0, len(codes), settings.states), :3])
        seconds.append(timed(partial(look_up, allowed, prefixes))[1])
    return {
        "items": len(codes),
        "prefixes": len(allowed),
        "build_seconds": build_seconds,
        "peak_gb": peak / GB,
        "rise_gb": (peak - at_start) / GB,
        "look_up_microseconds": float(np.median(seconds)) * 1e6,
    }


def prefix_dictionary(rows: list[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """The tokens that may follow each prefix of the rows."""
    allowed: dict[tuple[int, ...], set[int]] = {}
    for row in rows:
        for length in range(len(row)):
            allowed.setdefault(row[:length], set()).add(row[length])
    return {prefix: list(tokens) for prefix, tokens in allowed.items()}


def look_up(allowed: dict[tuple[int, ...], list[int]], prefixes: Tensor) -> list[list[int]]:
    """Allowed tokens of prefixes (B, depth), as `prefix_allowed_tokens_fn` finds them."""
    return [allowed[tuple(prefix)] for prefix in prefixes.tolist()]


def check_limits(trie: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The limits asked for, where their catalogue was measured."""
    smallest, largest = trie[0], trie[-1]
    if largest["items"] != LIMIT_ITEMS:
        return []
    measured = [
        (f"build seconds of {LIMIT_ITEMS:,} items", largest["build_seconds"], LIMIT_SECONDS),
        (f"peak GB of {LIMIT_ITEMS:,} items", largest["peak_gb"], LIMIT_GB),
    ]
    for number in (0, len(STEPS) - 1):
        for name in ("children", "allowed", "advance"):
            small, large = (row["steps"][number][f"{name}_microseconds"] for row in (smallest, largest))
            title = f"{name} at depth {STEPS[number][0]}, {LIMIT_ITEMS:,} items over {smallest['items']:,}"
            measured.append((title, large / small, LIMIT_GROWTH))
    return [
        {"name": name, "measured": value, "bound": "at most", "limit": limit, "ok": value <= limit}
        for name, value, limit in measured
    ]


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    console.print(machine_line(record))
    builds = table("Build", ["items", "index", "build s", "peak GB", "rise GB", "MB", "write s", "open s"])
    for row in record["results"]["trie"]:
        times = f"{row['trie_mb']:.1f}", f"{row['write_seconds']:.3f}", f"{row['open_seconds']:.4f}"
        memory = f"{row['peak_gb']:.2f}", f"{row['rise_gb']:.2f}"
        builds.add_row(f"{row['items']:,}", "trie", f"{row['build_seconds']:.3f}", *memory, *times)
    for row in record["results"]["dictionary"]:
        memory = f"{row['peak_gb']:.2f}", f"{row['rise_gb']:.2f}"
        builds.add_row(f"{row['items']:,}", "dictionary", f"{row['build_seconds']:.3f}", *memory, "", "", "")
    console.print(builds)
    head = ["states", "items", "children/state", "children us", "allowed us", "advance us", "children ns/child"]
    steps = table(f"A step of {record['settings']['states']:,} states", head)
    for number, (depth, single) in enumerate(STEPS):
        for row in record["results"]["trie"]:
            step = row["steps"][number]
            steps.add_row(
                f"depth {depth}, one child" if single else f"depth {depth}",
                f"{row['items']:,}",
                f"{step['children_per_state']:.1f}",
                *(f"{step[f'{name}_microseconds']:.0f}" for name in ("children", "allowed", "advance")),
                f"{step['children_nanoseconds_per_child']:.1f}",
            )
        steps.add_section()
    for row in record["results"]["dictionary"]:
        steps.add_row("depth 3, dictionary", f"{row['items']:,}", "", f"{row['look_up_microseconds']:.0f}", "", "", "")
    console.print(steps)
    show_limits(console, record)


# What follows is shared with decode.py.


def describe_run(benchmark: str, settings: Any) -> dict[str, Any]:
    """What a figure needs beside it: the date, the command, the machine, the versions, the seed, the settings."""
    processors = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": {
            "cpu": processors[0].split(":", 1)[1].strip() if processors else "unknown",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB,
            "load_average_at_start": os.getloadavg()[0],
        },
        "versions": package_versions(),
        "seed": settings.seed,
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in to_json(settings).items()},
    }


def in_fresh_process(measure: Callable[..., dict[str, Any]], folder: Path, size: int, settings: Any) -> dict[str, Any]:
    """Run `measure` on the codes of one catalogue in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, folder / f"{size}.npy", settings).result()


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` returns, and the seconds it took."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def peak_bytes() -> int:
    """Largest memory this process has held; unlike ru_maxrss, not inherited from the process that started it."""
    return _memory("VmHWM")


def resident_bytes() -> int:
    """Memory that this process holds."""
    return _memory("VmRSS")


def reset_peak() -> None:
    """Let `peak_bytes` begin anew from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; these benchmarks measure memory on Linux only")


def machine_line(record: dict[str, Any]) -> str:
    """Date, machine and versions."""
    hardware, versions = record["hardware"], record["versions"]
    return (
        f"{record['date']}, {hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, load "
        f"{hardware['load_average_at_start']:.1f} at the start, torch {versions['torch']}, seed {record['seed']}"
    )


def table(title: str, columns: list[str]) -> Table:
    """A table whose first column is text and whose others are figures."""
    empty = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        empty.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return empty


def show_limits(console: Console, record: dict[str, Any]) -> None:
    """Print each limit with ok or failed."""
    for limit in record["limits"]:
        verdict = "[green]ok[/]" if limit["ok"] else "[red]failed[/]"
        console.print(f"{verdict}  {limit['name']}: {limit['measured']:.4g}, {limit['bound']} {limit['limit']:.4g}")
    if not record["limits"]:
        console.print("no limit checked: this run does not measure the sizes that the limits are for")


if __name__ == "__main__":
    sys.exit(main())
