"""What a study compares, and the settings that its trials may choose."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagerec.baselines.sasrec import TUNED, SasRecSettings
from sagerec.baselines.tuning import BaselineName, sasrec_grid
from sagerec.config import added, at_least, check_fields, require
from sagerec.objectives.rewards import parse_rewards
from sagerec.objectives.table import find_objective
from sagerec.run.folder import ALL_AT_ONCE
from sagerec.run.stages import RunSettings
from sagerec.training.reward_modules import check_origin
from sagerec.training.settings import OF_A_ROW, AlignSettings, TrainSettings

STUDY, RUN = "study.json", "run"
CONTROL, START, OURS = "sft", "supervised", "sage"
REFERENCES = (CONTROL, ALL_AT_ONCE)
"""What every row is compared with: supervised training that goes on, and all events at once."""
RIVALS = ("gbpo", "gbpo_decoupled", "gdpo", "sage_paper")
"""What sage is compared with beside them."""
ABLATIONS = ("sage_no_boost", "sage_no_penalty", "sage_coupled", "sage_token", "sage_bound")
DETERMINISTIC: tuple[BaselineName, ...] = ("popularity", "item-knn")
"""Rows with nothing random: a second seed would be the same."""
NOTES: dict[str, str] = {}
"""Row -> what a reader of its figures must know; every table shows it."""
COMMON_GRID: dict[str, tuple[Any, ...]] = {"learning_rate": (4e-4, 8e-4, 2e-4)}
"""What every objective may choose."""
OWN_GRID: dict[str, dict[str, tuple[Any, ...]]] = {
    "sage": {"policy_weight": (8.0, 4.0), "boost": (4.0, 8.0), "entropy_penalty": (4.0, 2.0, 0.0)},
    "sage_paper": {"policy_weight": (8.0, 4.0), "boost": (1.0, 2.0), "entropy_penalty": (1.0, 0.5)},
    "gbpo": {"policy_weight": (8.0, 4.0)},
    "gbpo_decoupled": {"policy_weight": (8.0, 4.0)},
    "gbpo_raw": {"policy_weight": (8.0, 4.0)},
    "up_grpo": {"clip_low": (0.2, 0.28), "policy_weight": (8.0, 4.0)},
    "gdpo": {"clip_high": (0.2, 0.28), "policy_weight": (8.0, 4.0)},
    "grpo": {"clip_high": (0.2, 0.28), "policy_weight": (8.0, 4.0)},
    "dapo": {"clip_high": (0.28, 0.4), "policy_weight": (8.0, 4.0)},
    "gspo": {"clip_high": (4e-4, 4e-2), "policy_weight": (8.0, 4.0)},
    "cispo": {"cap": (5.0, 2.0), "policy_weight": (8.0, 4.0)},
    "ecpo": {"clip_high": (0.2, 0.28), "policy_weight": (8.0, 4.0)},
}
"""What an objective may choose of its own; the first values are the defaults."""


def comparisons(rows: Sequence[str]) -> list[tuple[str, str]]:
    """The (row, rival) pairs that are tested, named before anything is measured; no pair stands twice.

    Each row against REFERENCES; sage against RIVALS; each ablation against sage.
    """
    pairs = [(row, CONTROL) for row in rows if row != CONTROL]
    if ALL_AT_ONCE in rows:
        pairs += [(row, ALL_AT_ONCE) for row in rows if row not in REFERENCES]
    if OURS in rows:
        pairs += [(OURS, rival) for rival in RIVALS if rival in rows]
        pairs += [(row, OURS) for row in rows if row in ABLATIONS]
    return pairs


def name_beside(row: str, study: str | None) -> str:
    """What a row of the study in that folder is called in the table of another."""
    return row if study is None else f"{row} ({Path(study).resolve().name})"


@dataclass(frozen=True, slots=True)
class StudySettings:
    """What is compared, and how."""

    objectives: tuple[str, ...] = ("sage", "gbpo")
    """Rows of the table of objectives that run with every seed; the control `sft` is added."""
    single: tuple[str, ...] = ()
    """Objectives that run with the first seed alone, and so get no verdict."""
    ablations: tuple[str, ...] = ()
    """Rows that take the settings that won for sage; `all` for the paper's. They run with the first seed alone, and get
    no verdict, unless they are named among `objectives` too."""
    baselines: tuple[BaselineName, ...] = ("popularity", "item-knn")
    """Baselines beside them; SASRec is tuned with as many trials, at most 4."""
    seeds: int = 3
    """Seeds 0, 1, …: each has Semantic IDs, policies without alignment, and alignments of its own."""
    share_start: bool = False
    """All alignments start from the policy of seed 0: seeds are then those of the alignment alone, which is less than
    what another training would change."""
    trials: int = 3
    """Trials of each objective's settings, the first with the defaults; 0 takes the defaults untried."""
    processes: int = 1
    """Jobs at a time, each with its share of the cores; on several GPUs, each on the next."""
    bootstrap_samples: int = 2000
    """Resamples of the users."""
    beside: str | None = added(None)
    """Folder of a finished study of the same events, such as one of the other action space: its rows stand beside
    these, measured by the same yardstick, and each row is compared with its namesake there."""

    def __post_init__(self) -> None:
        for name in ("objectives", "single", "ablations"):
            # As people write lists: sage,gbpo and sage gbpo are the same.
            words = [word for text in getattr(self, name) for word in text.split(",") if word]
            object.__setattr__(self, name, tuple(words))
        for name in (*self.objectives, *self.single, *self.ablation_rows):
            find_objective(name)
        check_fields(
            self,
            seeds=at_least(1, 1000),
            trials=at_least(0, 1000),
            processes=at_least(1, 1024),
            bootstrap_samples=at_least(100, 1_000_000),
        )

    @property
    def ablation_rows(self) -> tuple[str, ...]:
        return ABLATIONS if self.ablations == ("all",) else self.ablations

    @property
    def n_starts(self) -> int:
        """Seeds that have a run of their own."""
        return 1 if self.share_start else self.seeds

    def run_of(self, seed: int) -> str:
        """Folder of the run of a seed, in the study."""
        return RUN if seed == 0 or self.share_start else f"{RUN}-s{seed}"

    def rows(self) -> dict[str, int]:
        """Aligned row -> number of seeds, in the order of the table."""
        found = dict.fromkeys((CONTROL, *self.objectives), self.seeds)
        return found | {name: 1 for name in (*self.single, *self.ablation_rows) if name not in found}


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """Settings of the whole study."""

    study: StudySettings = field(default_factory=StudySettings)
    """What is compared."""
    run: RunSettings = field(default_factory=RunSettings)
    """The supervised stage, whose seeds are those of seed 0; its split reserves one event a user unless it says
    otherwise."""
    align: AlignSettings = field(default_factory=AlignSettings)
    """What all alignments share."""
    sasrec: SasRecSettings = field(default_factory=SasRecSettings)
    """Shape of the baseline SASRec; dropout and width are tried."""
    sasrec_train: TrainSettings = TUNED
    """How it is trained."""

    def __post_init__(self) -> None:
        for name, instead in (("objective", "objectives"), ("seed", "seeds")):
            require(
                getattr(self.align, name) == getattr(AlignSettings(), name),
                f"{name} is set for all alignments, and a study has its own; leave it out and give --{instead}",
            )
        check_origin(list(parse_rewards(self.align.resolved().reward)), self.align.reward_module)
        for name in OF_A_ROW:
            require(
                getattr(self.align, name) is None,
                f"{name} is set for all objectives, which would make one of another; leave it to the trials",
            )
        if "sasrec" in self.study.baselines:
            sasrec_grid(self.sasrec, max(self.study.trials, 1))
        require(
            self.align.validations > 0 or self.study.trials < 2,
            "validations is 0, so that no trial could win; expected at least 1",
        )
        require(
            self.run.evaluate.split == "test" and max(self.run.evaluate.k) >= 10,
            f"the study tests lists of 10 on test; expected --run.evaluate.split test and a k of at least 10, got "
            f"{self.run.evaluate.split} and {self.run.evaluate.k}",
        )
