"""What `sagerec serve` bears: capacity, latency at half of it, behaviour at twice, reloads and a killed worker.

The server runs in processes of its own on this machine, and is asked over loopback alone. Histories are those of users
of the run, whole. In this order:

- `exact_lists` without HTTP, at the batch size of the server, on the same policy and histories: the fastest of a few
  rounds, by one thread and by one for each core; the server is compared with the faster.
- capacity of the server, a worker for each core: as many connections as two batches of each worker, each asking again
  as soon as it is answered.
- half of that, open loop (Poisson arrivals, latency from when a request was due): no error, p50 and p99.
- twice that, open loop: every request answered or refused with 429, and the memory of the server before and after.
- reloads under load: the run is a link that turns between two runs, which differ in all titles and, by a little, in all
  weights; each answer must be, whole, that of the version that it names.
- a worker of two killed under load: what was under way in it is lost, and all else is answered.

    python benchmarks/serve.py --run RUN --out serve.json      (needs the extra: pip install "sagerec[serve]")
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import tyro
from load import Client, closed_loop, open_loop
from rich.console import Console
from safetensors.torch import load_file, save_file
from trie import describe_run, machine_line, show_limits, table, timed

from sagerec.artifacts import read_manifest, write_artifact
from sagerec.catalogue.grow import grow_dataset
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.simulated_store import StoreSettings, write_store
from sagerec.decoding.beam import exact_lists
from sagerec.files import write_json
from sagerec.policies.registry import WEIGHTS, PolicySettings
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import RunSettings, run_all
from sagerec.serving.rows import Row, list_rows
from sagerec.training.settings import TrainSettings

HOST, TOKEN = "127.0.0.1", "benchmark"


@dataclass(frozen=True)
class ServeBenchmarkSettings:
    """What is measured."""

    run: Path | None = None
    """Run folder; a small simulated one if not given."""
    batch: int = 128
    """Queries that the server decodes at a time."""
    k: int = 10
    """Items of each list."""
    users: int = 2048
    """Histories."""
    capacity_seconds: float = 30.0
    """Time at capacity."""
    half_seconds: float = 300.0
    """Time at half of it."""
    twice_seconds: float = 60.0
    """Time at twice of it."""
    reloads: int = 100
    """Reloads under load, at half of the capacity."""
    rounds: int = 5
    """Rounds of `exact_lists`."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes of the server, and most threads of `exact_lists` without it; the cores of this machine by default."""
    threads: int = 1
    """Threads of torch of each worker."""
    seed: int = 0
    """Seed of users and arrivals."""
    quick: bool = False
    """Only see that it runs: a second each, no limit; replaces all settings of size."""
    out: Path | None = None
    """Write the results as JSON to this file too."""


QUICK: dict[str, Any] = {
    "run": None,
    "batch": 8,
    "users": 32,
    "capacity_seconds": 1.0,
    "half_seconds": 1.0,
    "twice_seconds": 1.0,
    "reloads": 2,
    "rounds": 1,
}


def main() -> int:
    """Measure, print, write; 1 where a limit is missed."""
    settings = tyro.cli(ServeBenchmarkSettings, description=__doc__)
    if settings.quick:
        settings = replace(settings, **QUICK)
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(settings.run or small_run(Path(folder)))
        record = describe_run("serve", settings)
        plain = {threads: measure_plain(run, settings, threads) for threads in sorted({1, settings.workers})}
        results: dict[str, Any] = {"items": run.data.n_items, "plain_per_second_by_threads": plain}
        results |= asyncio.run(measure_load(run, settings, max(plain.values())))
        results |= asyncio.run(measure_swaps(run, Path(folder), settings, results["capacity"]["answers_per_second"]))
    limits = [] if settings.quick else check_limits(results)
    record |= {"results": results, "limits": limits, "ok": all(limit["ok"] for limit in limits) if limits else None}
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 1 if record["ok"] is False else 0


def small_run(folder: Path) -> Path:
    """A run of a small simulated store."""
    write_store(folder / "store", simulate(StoreSettings(users=100, items=200)))
    shape = PolicySettings(width=16, heads=2)
    run_all(folder / "store", folder / "run", RunSettings(policy=shape, train=TrainSettings(epochs=1)))
    return folder / "run"


def histories(run: Run, settings: ServeBenchmarkSettings) -> list[np.ndarray]:
    """Items of users drawn with replacement."""
    users = np.random.default_rng(settings.seed).integers(0, run.data.n_users, settings.users)
    bounds = run.data.user_offsets
    return [run.data.event_items[bounds[user] : bounds[user + 1]].astype(np.int64) for user in users]


def bodies(run: Run, settings: ServeBenchmarkSettings) -> list[bytes]:
    """The least requests of these histories."""
    ids = run.data.item_ids
    return [json.dumps({"history": ids.external(h), "k": settings.k}).encode() for h in histories(run, settings)]


def measure_plain(run: Run, settings: ServeBenchmarkSettings, threads: int) -> float:
    """Users a second of `exact_lists` on batches as they would be served, without HTTP."""
    torch.set_num_threads(threads)
    policy = run.policy(device="cpu")
    policy.freeze()
    chunk = histories(run, settings)[: settings.batch]
    rows = [Row(history, np.unique(history)) for history in chunk]
    longest = min(max(map(len, chunk)), policy.max_items)
    items = torch.zeros(len(chunk), longest, dtype=torch.int64)
    excluded = torch.full((len(chunk), max(map(len, chunk))), -1)
    for at, (row, history) in enumerate(zip(rows, chunk, strict=True)):
        read = torch.from_numpy(history[-policy.max_items :])
        items[at, : len(read)] = read
        excluded[at, : len(row.left_out)] = torch.from_numpy(row.left_out)
    lengths = torch.tensor([min(len(history), policy.max_items) for history in chunk])
    list_rows(policy, rows, settings.k)
    times = [
        timed(lambda: exact_lists(policy, items, lengths, k=settings.k, excluded=excluded))[1]
        for _ in range(settings.rounds)
    ]
    return round(len(chunk) / min(times), 1)


@contextmanager
def served(run: Path, settings: ServeBenchmarkSettings, *, workers: int) -> Iterator[tuple[int, int]]:
    """Port and process id of a server."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sagerec.cli", "serve", str(run), "--port", str(port), "--policy", "policy"]
    command += ["--batch", str(settings.batch), "--threads", str(settings.threads), "--workers", str(workers)]
    command += ["--queue", str(512 // workers)]  # of all workers together less than the client's connections
    environment = os.environ | {"SAGEREC_ADMIN_TOKEN": TOKEN}
    environment.pop("SAGEREC_TOKEN", None)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(300)


async def wait_ready(client: Client, seconds: float = 600) -> None:
    """Return once the server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            if (await client.ask("GET", "/ready"))[0] == 200:
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise TimeoutError("the server is not ready")
        await asyncio.sleep(0.2)


async def wait_workers(client: Client, workers: int) -> set[int]:
    """Process ids, once so many workers answer: a connection is one worker's, so new ones are opened until all have."""
    found: set[int] = set()
    while len(found) < workers:
        await wait_ready(client)
        status, body = await client.ask("GET", "/info")
        found |= {json.loads(body)["process"]} if status == 200 else set()
        client.close()
    return found


def descendants(process: int) -> list[int]:
    """A process and all that it started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(found for child in children for found in descendants(int(child)))]


def memory_mb(process: int) -> float:
    """Memory that a process and its children hold, what they share counted once (PSS)."""
    total = 0
    for one in descendants(process):
        lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return round(total / 1024, 1)


async def measure_load(run: Run, settings: ServeBenchmarkSettings, plain: float) -> dict[str, Any]:
    """Capacity, half and twice of it."""
    asked = bodies(run, settings)
    with served(run.folder, settings, workers=settings.workers) as (port, process):
        client = Client(HOST, port)
        await wait_workers(client, settings.workers)
        connections = 2 * settings.batch * settings.workers
        await closed_loop(client, asked, connections=connections, seconds=settings.capacity_seconds / 5)
        capacity = await closed_loop(client, asked, connections=connections, seconds=settings.capacity_seconds)
        rate = len(capacity.latencies) / capacity.seconds
        memory = [memory_mb(process)]
        half = await open_loop(client, asked, rate=rate / 2, seconds=settings.half_seconds, seed=settings.seed)
        memory.append(memory_mb(process))
        twice = []
        for part in range(2):
            twice.append(await open_loop(client, asked, rate=2 * rate, seconds=settings.twice_seconds / 2, seed=part))
            memory.append(memory_mb(process))
        client.close()
    for outcome in twice[1:]:
        twice[0].statuses += outcome.statuses
        twice[0].latencies += outcome.latencies
        twice[0].seconds += outcome.seconds
    return {
        "capacity": capacity.record(),
        "share_of_plain": round(rate / plain, 3),
        "half": half.record() | {"rate": round(rate / 2, 1)},
        "twice": twice[0].record() | {"rate": round(2 * rate, 1)},
        "memory_mb": dict(zip(("after capacity", "after half", "in twice", "after twice"), memory, strict=True)),
    }


async def measure_swaps(run: Run, folder: Path, settings: ServeBenchmarkSettings, rate: float) -> dict[str, Any]:
    """Reloads under load, each answer compared whole; then a worker killed under load."""
    link = folder / "link"
    places = [run.folder.absolute(), variant(run, folder / "variant")]
    asked = bodies(run, settings)[:32]
    expected: dict[str, list[Any]] = {}
    wrong = 0
    turn(link, places[0])
    with served(link, settings, workers=1) as (port, _):
        client = Client(HOST, port)
        await wait_ready(client)
        for place in (places[1], places[0]):
            turn(link, place)
            version = json.loads((await client.ask("POST", "/admin/reload", token=TOKEN))[1])["version"]
            answers = [json.loads((await client.ask("POST", "/recommend", body))[1]) for body in asked]
            assert all(answer["version"] == version for answer in answers)
            expected[version] = [signature(answer) for answer in answers]
        assert len(expected) == 2
        of = {version: set(map(json.dumps, found)) for version, found in expected.items()}

        def check(status: int, body: bytes) -> None:
            nonlocal wrong
            answer = json.loads(body)
            wrong += json.dumps(signature(answer)) not in of[answer["version"]]

        changed = 0

        async def reload() -> None:
            nonlocal changed
            for number in range(settings.reloads):
                turn(link, places[(number + 1) % 2])
                status, body = await client.ask("POST", "/admin/reload", token=TOKEN)
                assert status == 200, body
                changed += json.loads(body)["changed"]

        reloaded = await open_loop(
            client,
            asked,
            rate=rate / settings.workers / 4,
            seconds=3600,
            seed=settings.seed,
            on_answer=check,
            until=reload(),
        )
        client.close()
    killed = await measure_kill(run, settings, asked, rate)
    return {"reloads": reloaded.record() | {"reloads": changed, "mixed_answers": wrong}, "kill": killed}


async def measure_kill(run: Run, settings: ServeBenchmarkSettings, asked: list[bytes], rate: float) -> dict[str, Any]:
    """Kill one worker of two in the middle of a load."""
    with served(run.folder, settings, workers=2) as (port, process):
        client = Client(HOST, port)
        workers = await wait_workers(client, 2)
        shared = memory_mb(process)
        seconds = max(settings.twice_seconds / 3, 1)

        async def kill() -> None:
            await asyncio.sleep(seconds / 3)
            os.kill(min(workers), signal.SIGKILL)
            await asyncio.sleep(2 * seconds / 3)

        outcome = await open_loop(client, asked, rate=rate / 4, seconds=3600, seed=settings.seed, until=kill())
        client.close()
    return outcome.record() | {"memory_of_two_workers_mb": shared}


def turn(link: Path, target: Path) -> None:
    """Let a link lead elsewhere, at once."""
    fresh = link.with_name(link.name + ".fresh")
    fresh.symlink_to(target)
    fresh.replace(link)


def signature(answer: dict[str, Any]) -> list[Any]:
    """What of an answer hangs on the version: ids, titles, scores as far as a batch may not change them."""
    return [[item["item_id"], item["title"]] for item in answer["items"]]


def variant(run: Run, folder: Path) -> Path:
    """A copy of a run with other titles and other weights."""
    for name in ("dataset", "split", run.actions, "policy"):
        for file in (run.folder / name).rglob("*"):
            if file.is_file():
                target = folder / name / file.relative_to(run.folder / name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    grow_dataset(folder / "dataset", run.data.items.with_columns(pl.col("title").fill_null("") + " (other)"))
    manifest = read_manifest(folder / "policy", "policy")
    weights = load_file(run.folder / "policy" / WEIGHTS)
    torch.manual_seed(0)
    with write_artifact(
        folder / "policy", "policy", made_from=manifest.made_from, settings=manifest.settings, seed=manifest.seed
    ) as fresh:
        for file in (run.folder / "policy").iterdir():
            if file.is_file() and file.name not in (WEIGHTS, "manifest.json"):
                (fresh / file.name).write_bytes(file.read_bytes())
        noisy = {k: v + 0.05 * v.std() * torch.randn_like(v) if v.dim() > 1 else v for k, v in weights.items()}
        save_file(noisy, fresh / WEIGHTS)
    return folder


def check_limits(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What a served policy must bear."""
    half, twice, memory = results["half"], results["twice"], results["memory_mb"]

    def refused(part: dict[str, Any], *fine: str) -> int:
        return sum(count for status, count in part["statuses"].items() if status not in fine)

    def limit(name: str, measured: float, bound: str, value: float) -> dict[str, Any]:
        ok = measured >= value if bound == "at least" else measured <= value
        return {"name": name, "measured": measured, "bound": bound, "limit": value, "ok": ok}

    return [
        limit("capacity over exact_lists without HTTP", results["share_of_plain"], "at least", 0.5),
        limit("errors at half of the capacity", refused(half, "200"), "at most", 0),
        limit("at twice, neither answered nor refused with 429", refused(twice, "200", "429"), "at most", 0),
        limit("memory after twice over in its middle", memory["after twice"] / memory["in twice"], "at most", 1.05),
        limit("lost requests in reloads", refused(results["reloads"], "200"), "at most", 0),
        limit("answers of a mixture in reloads", results["reloads"]["mixed_answers"], "at most", 0),
        limit("after a killed worker, share answered", _share(results["kill"]), "at least", 0.9),
    ]


def _share(part: dict[str, Any]) -> float:
    return float(part["statuses"].get("200", 0) / part["requests"])


def show(record: dict[str, Any]) -> None:
    """Print the record."""
    console, results = Console(width=140), record["results"]
    shown = table("load", ["", "rate", "requests", "answers/s", "p50 ms", "p99 ms", "statuses"])
    for name in ("capacity", "half", "twice", "reloads", "kill"):
        part = results[name]
        rate = part.get("rate", "closed loop" if name == "capacity" else "quarter")
        figures = [rate, part["requests"], part["answers_per_second"], part.get("p50_ms"), part.get("p99_ms")]
        shown.add_row(name, *map(str, figures), " ".join(f"{k}: {v}" for k, v in part["statuses"].items()))
    console.print(shown)
    plain = ", ".join(f"{speed} by {n} threads" for n, speed in results["plain_per_second_by_threads"].items())
    console.print(f"exact_lists without HTTP, users a second: {plain}; over the faster: {results['share_of_plain']}")
    console.print(f"memory in MB: {results['memory_mb']}; two workers {results['kill']['memory_of_two_workers_mb']}")
    console.print(machine_line(record))
    show_limits(console, record)


if __name__ == "__main__":
    sys.exit(main())
