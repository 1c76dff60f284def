"""What every objective costs: loss and gradient, over those of a plain masked cross-entropy mean on the same tensors.

The plain one is what a trainer computes without any of this, `-(logprobs * mask).sum() / mask.sum()`, and its
gradient to the log-probabilities. Ours is `policy_loss` from three rewards to loss, advantages, coefficients and
diagnostics, and the gradient of that loss. float32, random inputs, a tenth of the tokens masked.

Objectives and plain loss take turns, repetition by repetition, and the fastest repetition of each counts: what else
the machine does can only slow one down. Quantiles are in the JSON.

At (64, 16, 40) a core goes through a tensor in about 6 microseconds; what costs is starting some fifty small kernels,
most of them over the 1,024 slates. The larger shapes show the cost of the numbers.

The limit is for SAGE at (64, 16, 40): 1.5 times. With `--compile` (which needs a C++ compiler) it is that of the loss
in torch.compile over the plain one there, and 2 times for the one that starts its kernels one by one.

    python benchmarks/objectives.py --out objectives.json
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor
from trie import describe_run, machine_line, show_limits, table, timed

from sagerec.config import require
from sagerec.files import write_json
from sagerec.objectives.loss import policy_loss
from sagerec.objectives.table import OBJECTIVES

LIMIT_SHAPE = (64, 16, 40)
PLAIN_COMPILED, COMPILED = "plain, compiled", "sage, compiled"
LIMIT_OBJECTIVE, LIMIT_RATIO, LIMIT_UNCOMPILED = "sage", 1.5, 2.0
PLAIN = "plain"
REWARDS = 3


@dataclass(frozen=True)
class CostSettings:
    """What is measured."""

    shapes: tuple[tuple[int, int, int], ...] = (LIMIT_SHAPE, (512, 16, 40), (64, 16, 400))
    """(contexts, slates of each, tokens), once for each."""
    repetitions: int = 1000
    """Repetitions at the first shape; larger ones get fewer, by their size."""
    threads: int = 1
    """Threads of torch."""
    seed: int = 0
    """Seed of the inputs."""
    compile: bool = False
    """Measure SAGE's loss compiled too, over a plain mean compiled."""
    quick: bool = False
    """Only see that it runs: one tiny shape, few repetitions, no limit; replaces those settings."""
    out: Path | None = None
    """Write the results as JSON to this file too."""

    def __post_init__(self) -> None:
        require(len(self.shapes) >= 1 and min(map(min, self.shapes)) >= 1, "shapes: expected (B, G, T), each above 0")
        require(min(self.repetitions, self.threads) >= 1, "repetitions and threads: expected at least 1")


def main() -> int:
    """Measure, print, write; 1 where the limit is missed."""
    settings = tyro.cli(CostSettings, description=__doc__)
    if settings.quick:
        settings = replace(settings, shapes=((4, 4, 5),), repetitions=5)
    torch.set_num_threads(settings.threads)
    # Freeing 16 MB stops glibc from handing every freed tensor back to the system, as in any process that trains.
    torch.empty(16_000_000, dtype=torch.uint8)
    record = describe_run("objectives", settings)
    rows = [row for shape in settings.shapes for row in measure(shape, settings)]
    limits = check_limits(rows)
    record |= {
        "results": rows,
        "limits": limits,
        "ok": all(limit["ok"] for limit in limits) if limits else None,
    }
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 1 if record["ok"] is False else 0


def draw_inputs(shape: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """Log-probabilities, ratios about 1, a mask, three rewards, diversity and coldness."""
    generator = torch.Generator().manual_seed(seed)
    rand = partial(torch.rand, generator=generator)
    logprobs = -3 * rand(shape) - 0.01
    mask = rand(shape) < 0.9
    mask[..., 0] = True
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": (logprobs.detach() + 0.1 * torch.randn(shape, generator=generator)).clamp(max=0.0),
        "mask": mask,
        "rewards": rand(*shape[:2], REWARDS),
        "weights": rand(REWARDS),
        "diversity": rand(shape[:2]),
        "coldness": rand(shape[:2]),
    }


def plain_step(x: dict[str, Any]) -> Tensor:
    """Gradient of the masked cross-entropy mean."""
    loss = -(x["logprobs"] * x["mask"]).sum() / x["mask"].sum()
    found: Tensor = torch.autograd.grad(loss, x["logprobs"])[0]
    return found


def objective_step(name: str, x: dict[str, Any]) -> Tensor:
    """Gradient of an objective's loss."""
    found: Tensor = torch.autograd.grad(policy_loss(name, **x).loss, x["logprobs"])[0]
    return found


def compiled_steps(x: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """The plain loss and SAGE's, the value alone, in one graph each."""

    def plain(logprobs: Tensor, mask: Tensor) -> Tensor:
        return -(logprobs * mask).sum() / mask.sum()

    def sage(**given: Tensor) -> Tensor:
        return policy_loss(LIMIT_OBJECTIVE, **given).loss

    how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    one, other = torch.compile(plain, **how), torch.compile(sage, **how)
    return {
        PLAIN_COMPILED: lambda: torch.autograd.grad(one(x["logprobs"], x["mask"]), x["logprobs"])[0],
        COMPILED: lambda: torch.autograd.grad(other(**x), x["logprobs"])[0],
    }


def measure(shape: tuple[int, int, int], settings: CostSettings) -> list[dict[str, Any]]:
    """A row for the plain loss and for each objective at one shape."""
    x = draw_inputs(shape, settings.seed)
    steps: dict[str, Callable[[], Tensor]] = {PLAIN: partial(plain_step, x)}
    steps |= {name: partial(objective_step, name, x) for name, row in OBJECTIVES.items() if not row.trains_on_targets}
    if settings.compile:
        steps |= compiled_steps(x)
    smallest = float(np.prod(settings.shapes[0]))
    repetitions = max(3, round(settings.repetitions * min(1.0, smallest / float(np.prod(shape)))))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    # Rounds of ten in a row: as in training, code and tensors are then warm, and all share what the machine does.
    for start in range(-10, repetitions, 10):
        for name, step in steps.items():
            for _ in range(10 if start < 0 else min(10, repetitions - start)):
                elapsed = timed(step)[1]
                if start >= 0:
                    seconds[name].append(elapsed)
    plain = min(seconds[PLAIN])
    return [
        {
            "shape": list(shape),
            "objective": name,
            "microseconds": 1e6 * min(values),
            "microseconds_quantiles": [1e6 * float(v) for v in np.quantile(values, [0.1, 0.5, 0.9])],
            "repetitions": repetitions,
            "ratio": min(values) / (min(seconds[PLAIN_COMPILED]) if name in (PLAIN_COMPILED, COMPILED) else plain),
        }
        for name, values in seconds.items()
    ]


def check_limits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The limits asked for, where their shape was measured: what is compiled bears the stricter one."""
    is_compiled = any(row["objective"] == COMPILED for row in rows)
    limits = {LIMIT_OBJECTIVE: LIMIT_UNCOMPILED if is_compiled else LIMIT_RATIO, COMPILED: LIMIT_RATIO}
    return [
        {
            "name": f"{row['objective']} at {LIMIT_SHAPE}: loss and gradient over those of a plain mean",
            "measured": row["ratio"],
            "bound": "at most",
            "limit": limits[row["objective"]],
            "ok": row["ratio"] <= limits[row["objective"]],
        }
        for row in rows
        if row["objective"] in limits and tuple(row["shape"]) == LIMIT_SHAPE
    ]


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    console = Console()
    console.print(machine_line(record))
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in record["results"]))
    rows = table("Loss and gradient: microseconds, and times those of the plain mean", ["objective", *map(str, shapes)])
    for name in dict.fromkeys(row["objective"] for row in record["results"]):
        own = [row for row in record["results"] if row["objective"] == name]
        rows.add_row(name, *(f"{row['microseconds']:,.0f}  {row['ratio']:5.2f}" for row in own))
    console.print(rows)
    show_limits(console, record)


if __name__ == "__main__":
    sys.exit(main())
