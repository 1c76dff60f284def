"""Full-ranking evaluation of lists: every metric with its interval, by popularity, for policies and baselines alike.

All metrics are defined in `docs/metrics.md`. A report is a plain dict, saved as `evaluation.json`; the lists
themselves are saved beside it, so that two systems can be compared case by case.

Shapes: n cases, K places, N items.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from sagerec.actions.clusters import entropy_clusters
from sagerec.actions.space import ActionSpace
from sagerec.artifacts import write_json
from sagerec.catalogue.dataset import Dataset
from sagerec.catalogue.simulated_store import SimulatedStore, expected_answers
from sagerec.catalogue.splits import Cases, Sequences, Split, learnt_counts
from sagerec.config import require, require_choices, to_json
from sagerec.errors import DatasetError
from sagerec.evaluation import intervals, metrics

BUCKET_EDGES = (5, 10, 20, 50)


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """What is measured, and how the lists are made."""

    split: Literal["valid", "test"] = "test"
    """Part whose events are the targets."""
    k: tuple[int, ...] = (5, 10, 20)
    """Places of the list that count, each a column of the report."""
    lists: Literal["beam", "slate"] = "beam"
    """beam: the K most probable next items; slate: K items written one after another, greedily."""
    beams: int = 50
    """Beams of the first pass."""
    exact: bool = True
    """Widen the beam until each list is proven to be the true top K."""
    history: Literal["auto", "keep", "exclude"] = "auto"
    """Whether items of the history may be listed; auto excludes them where no training user ever had an item twice."""
    cold_max_count: int = 5
    """Items with at most this many training interactions are cold."""
    bootstrap_samples: int = 1000
    """Resamples of the users for the 95 % intervals."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(len(self.k) > 0 and min(self.k) >= 1, f"k is {self.k}; expected numbers of at least 1")
        require(self.beams >= 1, f"beams is {self.beams}; expected at least 1")
        require(self.cold_max_count >= 0, f"cold_max_count is {self.cold_max_count}; expected 0 or above")
        require(self.bootstrap_samples >= 100, f"bootstrap_samples is {self.bootstrap_samples}; expected at least 100")


def excludes_history(train: Sequences, settings: EvaluateSettings) -> bool:
    """Whether lists leave out the history: as set, or, on `auto`, where no training sequence repeats an item."""
    return train.excludes_history(settings.history)


def evaluate_lists(
    lists: np.ndarray,
    cases: Cases,
    data: Dataset,
    split: Split,
    space: ActionSpace,
    settings: EvaluateSettings,
    *,
    shared_ids: bool = False,
    store: SimulatedStore | None = None,
) -> dict[str, Any]:
    """The report of lists (n, K), -1 where there is no item, for the cases of a split.

    With `shared_ids` an entry of a list stands for every item of its Semantic ID: accuracy is then the expected
    value over their orders, with the optimistic and pessimistic ones beside it. With the simulated `store` that the
    users live in, it says what they would have answered.

    Raises: DatasetError where there are fewer than two cases.
    """
    if len(cases) < 2:
        raise DatasetError(
            f"the split has {len(cases)} cases for {settings.split}, expected at least 2; choose another split"
        )
    rng = np.random.default_rng(settings.seed)
    counts = learnt_counts(data, split)
    cold = counts[cases.targets] <= settings.cold_max_count
    groups = _shared_groups(space) if shared_ids else (np.arange(data.n_items), np.ones(data.n_items, dtype=np.int64))
    listed, sizes = groups
    ranks = metrics.first_rank(lists, listed[cases.targets])
    entry_sizes = np.where(lists >= 0, sizes[lists], 1)
    ranks = metrics.expanded_rank(ranks, entry_sizes)
    target_sizes = sizes[cases.targets]
    clusters = entropy_clusters(data, space)
    values: dict[str, Any] = {}

    def interval(per_case: np.ndarray) -> dict[str, float]:
        return asdict(intervals.bootstrap_mean(per_case, samples=settings.bootstrap_samples, rng=rng))

    for k in settings.k:
        for name in ("recall", "ndcg", "mrr"):
            per_case = metrics.tied_value(ranks, target_sizes, name, k, "expected")
            values[f"{name}@{k}"] = interval(per_case)
            if shared_ids:
                for view in ("optimistic", "pessimistic"):
                    values[f"{name}@{k}_{view}"] = interval(metrics.tied_value(ranks, target_sizes, name, k, view))
            if name == "recall" and cold.any():
                values[f"cold_recall@{k}"] = interval(per_case[cold])
        for name, membership in clusters.items():
            values[f"{name}@{k}"] = interval(metrics.entropy_at(lists, membership, k))
        values[f"novelty@{k}"] = interval(metrics.novelty_at(lists, counts, k))
        for name, statistic in (("coverage", metrics.coverage_at), ("gini", metrics.gini_at)):
            at_k = _catalogue_statistic(statistic, data.n_items, k)
            values[f"{name}@{k}"] = asdict(intervals.jackknife(at_k, lists, groups=min(20, len(lists)), rng=rng))
        if store is not None:
            for name, per_case in expected_answers(store, cases, lists[:, :k]).items():
                values[f"{name}@{k}"] = interval(per_case)
        values[f"invalid_rate@{k}"] = interval(metrics.invalid_rate(lists, k))
        values[f"duplicate_rate@{k}"] = interval(metrics.duplicate_rate(lists, k))
    return {
        "split": settings.split,
        "users": len(np.unique(cases.users)),
        "cases": len(cases),
        "cold_cases": int(cold.sum()),
        "metrics": values,
        "buckets": _by_popularity(ranks, target_sizes, counts[cases.targets], max(settings.k), interval),
        "settings": to_json(settings),
    }


def _catalogue_statistic(
    statistic: Callable[[np.ndarray, int, int], float], n_items: int, k: int
) -> Callable[[np.ndarray], float]:
    return lambda lists: statistic(lists, n_items, k)


def _shared_groups(space: ActionSpace) -> tuple[np.ndarray, np.ndarray]:
    """For each item (N,), the item that lists show for its sequence, and how many items share the sequence."""
    listed = space.listed_as(np.arange(space.n_items)).astype(np.int64)
    return listed, np.bincount(listed, minlength=space.n_items)[listed]


def _by_popularity(
    ranks: np.ndarray,
    sizes: np.ndarray,
    target_counts: np.ndarray,
    k_most: int,
    interval: Callable[[np.ndarray], dict[str, float]],
) -> list[dict[str, Any]]:
    """Recall and NDCG at min(10, K) by the target's training interactions."""
    k = min(10, k_most)
    bucket = metrics.popularity_buckets(target_counts, BUCKET_EDGES)
    lows = (0, *(edge + 1 for edge in BUCKET_EDGES))
    highs = (*BUCKET_EDGES, None)
    rows = []
    for number, (low, high) in enumerate(zip(lows, highs, strict=True)):
        inside = bucket == number
        row: dict[str, Any] = {"train_count_from": low, "train_count_to": high, "cases": int(inside.sum())}
        if inside.any():
            for name in ("recall", "ndcg"):
                per_case = metrics.tied_value(ranks[inside], sizes[inside], name, k, "expected")
                row[f"{name}@{k}"] = interval(per_case)
        rows.append(row)
    return rows


def write_evaluation(path: Path, report: dict[str, Any], cases: Cases, lists: np.ndarray, data: Dataset) -> None:
    """Write the report to `path` (JSON) and the lists beside it (`.lists.parquet`: row, target, item indices)."""
    lists_path = path.with_suffix(".lists.parquet")
    fresh = lists_path.with_suffix(".tmp")
    table = pl.DataFrame(
        {
            "event_row": cases.rows,
            "user_id": data.user_ids.external(cases.users),
            "target": cases.targets,
            "items": pl.Series(lists.astype(np.int32), dtype=pl.Array(pl.Int32, lists.shape[1])),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    table.write_parquet(fresh)
    fresh.replace(lists_path)
    write_json(path, report)
