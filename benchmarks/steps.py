"""What a step costs on a device: milliseconds, kernels launched, waits for the device, peak memory.

Of a run's policy: a supervised step, an epoch, a round of alignment and one update of it, lists of one user and of many
with the encoding alone beside them. Of a language model of the Qwen3 layout with random weights (`--parameters`), which
needs no run: an update of alignment in bfloat16. A step is timed with the clock between two waits, the fastest of some
after a warm-up; launches and waits are counted by the profiler in one more. Without a GPU the counts are 0.

    python benchmarks/steps.py --run RUN --device cuda --out steps.json
    python benchmarks/steps.py --parameters 500M --device cuda
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from text import TextSettings, draw_titles, write_space
from trie import GB, describe_run, machine_line, table

from sagerec.catalogue.splits import Cases
from sagerec.decoding.beam import exact_lists
from sagerec.files import write_json
from sagerec.objectives.rewards import Facts, Membership
from sagerec.policies.causal_lm import CausalLM, CausalLMSettings
from sagerec.policies.language import make_language
from sagerec.policies.small_lm import SmallLMSettings, new_language_model
from sagerec.run.folder import open_run
from sagerec.training.batches import make_windows, shuffled_batches
from sagerec.training.feedback import Feedback, gather_facts, to_device
from sagerec.training.loop import autocast, choose_device, make_optimizer
from sagerec.training.rounds import Stage, roll_round, update
from sagerec.training.settings import AlignSettings

try:
    from sagerec.decoding.captured import capture_lists
    from sagerec.training.batches import device_batch
except ImportError:  # a version before they were there, measured for comparison
    capture_lists = None  # type: ignore[assignment]

    def device_batch(windows: Any, index: Any, device: torch.device) -> Any:  # type: ignore[misc]
        return tuple(torch.from_numpy(x).to(device) for x in windows.batch(index))


LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class StepSettings:
    """What is measured."""

    run: Path | None = None
    """A run of `sagerec run`; its supervised policy is measured."""
    parameters: str = ""
    """Weights of a language model, such as 500M; none if not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …"""
    batch_size: int = 128
    """Sequences of a supervised step, and contexts of an update."""
    users: tuple[int, ...] = (1, 512, 4096, 16384)
    """Users whose lists are written in one call."""
    k: int = 10
    """Items of each list."""
    lm_users: int = 8
    """Contexts of the language model's update."""
    lm_slates: int = 8
    """Slates of each."""
    repetitions: int = 20
    """Times that a step is run; the fastest counts."""
    seed: int = 0
    """Seed of batches and slates."""
    out: Path | None = None
    """Write the results as JSON to this file too."""


def measure(name: str, step: Callable[[], Any], device: torch.device, repetitions: int) -> dict[str, Any]:
    """A row: the fastest of some runs of `step`, the p50 and p99 of them, and what the profiler counts in one."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repetitions):
        wait()
        begin = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - begin)
    row: dict[str, Any] = {"name": name, "ms": 1e3 * min(seconds)}
    row |= dict(zip(("p50", "p99"), (1e3 * np.quantile(seconds, [0.5, 0.99])).tolist(), strict=True))
    if device.type == "cuda":
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            step()
            wait()
        events = profile.key_averages()
        row["launches"] = sum(e.count for e in events if e.key in LAUNCHES)
        row["waits"] = sum(e.count for e in events if e.key in WAITS) - 1
        row["device_ms"] = sum(e.self_device_time_total for e in events if e.device_type.name == "CUDA") / 1e3
        row["peak_gb"] = torch.cuda.max_memory_allocated(device) / GB
    return row


def of_run(settings: StepSettings, device: torch.device) -> list[dict[str, Any]]:
    """Rows of a run's policy."""
    assert settings.run is not None
    run = open_run(settings.run)
    policy = run.policy("policy", device=settings.device)
    train = run.split.sequences(run.data, "train")
    windows = make_windows(train, policy.max_items)
    optimizer = make_optimizer(policy, 1e-4, 0.1)
    rng = np.random.default_rng(settings.seed)
    batches = shuffled_batches(np.zeros_like(windows.lengths), settings.batch_size, rng)
    turn = iter(range(10**9))

    def supervised() -> None:
        given = device_batch(windows, batches[next(turn) % len(batches)], device)
        with autocast("auto", device):
            loss = policy.next_item_loss(*given)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        assert bool(norm.isfinite())
        optimizer.step()

    policy.train()
    rows = [measure("supervised step", supervised, device, settings.repetitions)]
    begin = time.perf_counter()
    for _ in batches:
        supervised()
    if device.type == "cuda":
        torch.cuda.synchronize()
    rows.append({"name": f"epoch of {windows.n_targets:,} targets", "ms": 1e3 * (time.perf_counter() - begin)})
    policy.eval()
    trained, policy = policy, run.policy("policy", device=settings.device)
    policy.freeze()

    cases = run.split.cases(run.data, "test")
    for users in settings.users:
        index = np.arange(users) % len(cases)
        history, length = cases.histories(index, policy.max_items)
        items, lengths = (torch.from_numpy(x).to(device) for x in (history, length))
        taken = torch.from_numpy(cases.taken(index)).to(device)

        def encode(items: Any = items, lengths: Any = lengths) -> None:
            with torch.no_grad():
                policy.encode(items, lengths)

        def lists(items: Any = items, lengths: Any = lengths, taken: Any = taken) -> None:
            exact_lists(policy, items, lengths, k=settings.k, excluded=taken)

        rows.append(measure(f"encoding, {users:,} users", encode, device, settings.repetitions))
        rows.append(measure(f"proven lists, {users:,} users", lists, device, settings.repetitions))
        if users == 1 and device.type == "cuda" and capture_lists is not None:
            width = {"longest": policy.max_items, "excluded": 2 * policy.max_items}
            replay = capture_lists(policy, n_users=1, k=settings.k, **width)
            expected = exact_lists(policy, items, lengths, k=settings.k, excluded=taken)
            assert torch.equal(replay(items, lengths, taken).items, expected.items)
            captured = partial(replay, items, lengths, taken)
            rows.append(measure("captured lists, 1 user", captured, device, 10 * settings.repetitions))

    align = AlignSettings(reward=("hit=3", "cold*hit=6", "diversity=0.1"), seed=settings.seed).resolved()
    reserved = run.split.cases(run.data, "valid")
    facts = gather_facts(run.data, run.split, policy.space, clusters="coarse", cold_max_count=5)
    policy = trained
    stage = Stage(
        settings=align,
        policy=policy,
        reference=run.policy("policy", device=settings.device).eval(),
        optimizer=optimizer,
        cases=reserved,
        exclude_history=True,
        rewards={"hit": 3.0, "cold*hit": 6.0, "diversity": 0.1},
        facts=to_device(facts, device),
        feedback=Feedback(reserved),
        work=Path(tempfile.gettempdir()),
        replay=windows,
    )
    return rows + of_stage(stage, device, settings, align.batch_users, 4)


def of_stage(
    stage: Stage, device: torch.device, settings: StepSettings, users: int, minibatches: int
) -> list[dict[str, Any]]:
    """Rows of an alignment: the rollouts of a round, and an update."""
    parts = [np.arange(i * users, (i + 1) * users) % len(stage.cases) for i in range(minibatches)]
    made, _ = roll_round(stage, parts, 0)
    few = max(3, settings.repetitions // 4)
    return [
        measure(f"rollouts of {users * minibatches} contexts", lambda: roll_round(stage, parts, 0), device, few),
        measure(f"update on {users} contexts", lambda: update(stage, made[0], 0, 100), device, few),
    ]


def of_language_model(settings: StepSettings, device: torch.device) -> list[dict[str, Any]]:
    """Rows of a language model of titles."""
    shape = TextSettings()
    with tempfile.TemporaryDirectory() as name:
        folder, titles = Path(name) / "lm", draw_titles(shape.items, settings.seed)
        sizes = new_language_model(folder, titles, SmallLMSettings(settings.parameters, 32_768, seed=settings.seed))
        space = write_space(titles, folder)
        made = CausalLMSettings(max_items=20, max_tokens=512, dtype="bfloat16")
        policy, reference = (
            CausalLM(made, space, make_language("", space, instruction="", dtype="bfloat16")).eval().move(device)
            for _ in range(2)
        )
    rng = np.random.default_rng(settings.seed)
    events = np.stack([rng.permutation(shape.items)[:21] for _ in range(4 * settings.lm_users)]).astype(np.int32)
    starts = np.arange(len(events), dtype=np.int64) * 21
    cases = Cases(np.arange(len(events), dtype=np.int32), events[:, -1], starts + 20, starts, events.ravel())
    align = AlignSettings(
        reward=("hit=1",), slates=settings.lm_slates, batch_users=settings.lm_users, round_users=settings.lm_users
    ).resolved()
    cluster = torch.arange(shape.items)[:, None] % 32
    facts = Facts(
        cold=torch.arange(shape.items) % 4 == 0,
        novelty=torch.zeros(shape.items),
        clusters=Membership(cluster, torch.ones_like(cluster, dtype=torch.float32), 32),
    )
    stage = Stage(
        settings=align,
        policy=policy,
        reference=reference,
        optimizer=make_optimizer(policy, 1e-5, 0.01),
        cases=cases,
        exclude_history=True,
        rewards={"hit": 1.0},
        facts=to_device(facts, device),
        feedback=Feedback(cases),
        work=Path(tempfile.gettempdir()),
    )
    rows = of_stage(stage, device, settings, settings.lm_users, 1)
    first = torch.from_numpy(events[: settings.lm_users].astype(np.int64)).to(space.device)
    tokens = int((policy.space.offsets[1:] - policy.space.offsets[:-1])[first.to(policy.space.device)].sum())
    rows[-1]["history_tokens_per_second"] = tokens / rows[-1]["ms"] * 1e3
    return [row | {"name": f"{sizes['parameters']:,} weights: {row['name']}"} for row in rows]


def main() -> int:
    """Measure, print, write."""
    settings = tyro.cli(StepSettings, description=__doc__)
    device = choose_device(settings.device)
    settings = replace(settings, device=str(device))
    record = describe_run("steps", settings)
    rows = of_run(settings, device) if settings.run is not None else []
    if settings.parameters:
        rows += of_language_model(settings, device)
    record["results"] = rows
    console = Console(width=140)
    console.print(machine_line(record))
    if device.type == "cuda":
        console.print(torch.cuda.get_device_name(device))
    columns = ("ms", "p50", "p99", "launches", "waits", "device_ms", "peak_gb", "history_tokens_per_second")
    shown = table("Steps", ["step", *columns])
    for row in rows:
        cells = (row.get(name) for name in columns)
        shown.add_row(
            row["name"], *("" if x is None else f"{x:,.2f}" if isinstance(x, float) else str(x) for x in cells)
        )
    console.print(shown)
    if settings.out is not None:
        write_json(settings.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
