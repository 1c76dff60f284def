"""How far the ratio leaves 1, and how often a bound acts: by passes over a round's rollouts and minibatches of a round.

Where every ratio is 1 no bound means anything, and two objectives that differ in their bounds alone are one. A round's
rollouts serve minibatches x passes updates; the first of them has r = 1. Each row is an alignment of RUN/policy as
`sagerec align` makes it, on the same reserved events, once, with nothing validated; nothing is written to the run.
The figures are those that the stage logs (docs/metrics.md), means over all updates:

- ratio: 5 %, 50 % and 95 % quantiles of r over the slates;
- at upper, at lower: slates with a positive (negative) advantage whose bound acts, over all slates. In the gradient
  form (sage) the bounds are r = 1 above and p / (1 - p) below, and lower the coefficient; in the clipped form
  (sage_paper) they are 1 + 4e-4 + boost x spread and 1 - 3e-4 - penalty x (1 - H) x spread, and cut the gradient.

    python benchmarks/ratio_spread.py --run RUN --out ratio_spread.json
"""

import logging
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from trie import describe_run, machine_line, show_limits, table

from sagerec.actions.semantic_ids.build import SemanticIdSettings
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.simulated_store import StoreSettings, write_store
from sagerec.catalogue.splits import SplitSettings
from sagerec.config import require
from sagerec.files import write_json
from sagerec.policies.lazy_decoder import LazyDecoderSettings
from sagerec.policies.registry import read_policy
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import make_actions, prepare, train
from sagerec.training.alignment import align_policy
from sagerec.training.settings import AlignSettings, TrainSettings
from sagerec.training.tracking import read_metrics

FIGURES = ("ratio_q05", "ratio_q50", "ratio_q95", "share_at_upper", "share_at_lower")
"""What is read of metrics.jsonl."""
QUICK: dict[str, Any] = {"passes": (1, 2), "minibatches": (1, 2), "rounds": 2, "batch_users": 16}


@dataclass(frozen=True)
class SpreadSettings:
    """What is measured."""

    run: Path | None = None
    """Run folder with a supervised policy and reserved events."""
    objectives: tuple[str, ...] = ("sage", "sage_paper")
    """Rows of the table of objectives: one of each form."""
    passes: tuple[int, ...] = (1, 2, 4)
    """Times that each round's rollouts are gone through."""
    minibatches: tuple[int, ...] = (4, 8, 16)
    """Minibatches of a round."""
    rounds: int = 2
    """Rounds of the longest kind: all rows get as many reserved events as these need."""
    batch_users: int = AlignSettings().batch_users
    """Contexts of a minibatch."""
    learning_rate: float = AlignSettings().learning_rate
    """Highest learning rate: the spread of the ratio is about proportional to it."""
    reward: tuple[str, ...] = ()
    """NAME=WEIGHT of each reward; without any, the defaults."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of the alignments."""
    quick: bool = False
    """Only see that it runs: a tiny simulated store in the place of the run, few and short rounds."""
    out: Path | None = None
    """Write the results as JSON to this file too."""

    def __post_init__(self) -> None:
        require(self.quick or self.run is not None, "run: expected a run folder, made with --split.reserve event")
        least = min(*self.passes, *self.minibatches, self.rounds, self.batch_users)
        require(least >= 1, "passes, minibatches, rounds and batch_users: expected at least 1")


def main() -> int:
    """Measure, print, write."""
    settings = tyro.cli(SpreadSettings, description=__doc__)
    if settings.quick:
        settings = replace(settings, **QUICK)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    record = describe_run("ratio_spread", settings)
    with tempfile.TemporaryDirectory() as scratch:
        run = open_run(settings.run) if settings.run is not None else make_quick_run(Path(scratch), settings.seed)
        rows = [
            measure(run, Path(scratch), objective, minibatches, passes, settings)
            for objective, minibatches, passes in product(settings.objectives, settings.minibatches, settings.passes)
        ]
    record |= {"results": rows, "limits": [], "ok": None}
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 0


def make_quick_run(folder: Path, seed: int) -> Run:
    """A small policy on a small store."""
    write_store(folder / "store", simulate(StoreSettings(users=60, items=200, seed=seed)))
    run = prepare(folder / "store", folder / "run", SplitSettings(reserve="event"))
    make_actions(run, SemanticIdSettings(levels=1, codebook_size=16, text_weight=0.0, collaborative_dimensions=8))
    train(run, LazyDecoderSettings(width=16, heads=2, encoder_layers=1), TrainSettings(epochs=1, device="cpu"))
    return open_run(run.folder)


def measure(
    run: Run, scratch: Path, objective: str, minibatches: int, passes: int, settings: SpreadSettings
) -> dict[str, Any]:
    """One alignment, and what it logged."""
    align = AlignSettings(
        objective=objective,
        reward=settings.reward,
        epochs=1,
        max_contexts=settings.batch_users * max(settings.minibatches) * settings.rounds,
        batch_users=settings.batch_users,
        round_users=settings.batch_users * minibatches,
        passes=passes,
        learning_rate=settings.learning_rate,
        validations=0,
        device=settings.device,
        seed=settings.seed,
    )
    space, folder = run.space(), scratch / f"policy-{objective}-{minibatches}-{passes}"
    start, reference = (read_policy(run.folder / "policy", space) for _ in range(2))
    align_policy(
        folder,
        start,
        reference,
        run.data,
        run.split,
        align.resolved(),
        store=run.store(),
        policy_settings=run.manifest("policy").settings["policy"],
        made_from=run.hashes("dataset", "split", run.actions, "policy"),
    )
    rounds = [line for line in read_metrics(folder) if "ratio_q50" in line]
    figures = {name: float(np.mean([line[name] for line in rounds])) for name in FIGURES}
    sizes = {"minibatches": minibatches, "passes": passes, "updates": minibatches * passes, "rounds": len(rounds)}
    return {"objective": objective} | sizes | figures


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    console = Console()
    console.print(machine_line(record))
    columns = ["objective", "minibatches", "passes", "updates a round", "r 5 %", "50 %", "95 %", "at upper", "at lower"]
    rows = table("The ratio, and how often a bound acts; means over updates", columns)
    for row in record["results"]:
        sizes = [str(row[name]) for name in ("minibatches", "passes", "updates")]
        ratios = [f"{row[name]:.4f}" for name in FIGURES[:3]]
        rows.add_row(row["objective"], *sizes, *ratios, *(f"{row[name]:.1%}" for name in FIGURES[3:]))
    console.print(rows)
    show_limits(console, record)


if __name__ == "__main__":
    sys.exit(main())
