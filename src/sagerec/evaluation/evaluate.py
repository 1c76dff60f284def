"""Full-ranking evaluation of lists: every metric with its interval, by popularity, for policies and baselines alike.

All metrics are defined in `docs/metrics.md`. A report is a plain dict, saved as `evaluation.json`; the lists
themselves are saved beside it, so that two systems can be compared case by case.

Shapes: n cases, K places, N items.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from sagerec.actions.space import ActionSpace
from sagerec.artifacts import hash_file
from sagerec.catalogue.dataset import Dataset
from sagerec.catalogue.simulated_store import SimulatedStore
from sagerec.catalogue.splits import Cases, Sequences, Split, learnt_counts
from sagerec.config import at_least, check_fields, require, to_json
from sagerec.errors import DatasetError
from sagerec.evaluation import intervals, metrics
from sagerec.evaluation.per_case import PerCase, Values, Yardstick, make_yardstick, per_case
from sagerec.files import replace_file, write_record

BUCKET_EDGES = (5, 10, 20, 50)


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """What is measured, and how the lists are made."""

    split: Literal["valid", "test"] = "test"
    """Part whose events are the targets."""
    k: tuple[int, ...] = (5, 10, 20)
    """Places of the list that count, each a column of the report."""
    lists: Literal["beam", "slate", "free", "free-nearest"] = "beam"
    """beam: the K most probable next items; slate: K items written one after another, greedily; free: beam search over
    the whole vocabulary of a language model, which may write what is no item; free-nearest: what is none is taken for
    the most similar item."""
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
        require(len(self.k) > 0, "k is empty; expected numbers of at least 1")
        check_fields(
            self,
            k=at_least(1, 10_000),
            beams=at_least(1, 100_000),
            cold_max_count=at_least(0),
            bootstrap_samples=at_least(100, 1_000_000),
        )


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

    Raises: DatasetError where there are fewer than two users, for whom no interval could be given.
    """
    n_users = len(np.unique(cases.users))
    if n_users < 2:
        raise DatasetError(
            f"the split has {len(cases)} cases for {settings.split}, of {n_users} users; expected at least 2 users: "
            "choose another split"
        )
    rng = np.random.default_rng(settings.seed)
    counts = learnt_counts(data, split)
    yardstick = make_yardstick(data, split, space, cold_max_count=settings.cold_max_count, store=store)
    listed = cases.targets
    if shared_ids:
        shown, sizes = _shared_groups(space)
        yardstick, listed = replace(yardstick, id_sizes=sizes), shown[cases.targets]
    table = per_case(lists, cases, settings.k, yardstick, listed=listed)
    bucket_k = min(10, max(settings.k))
    accuracy = per_case(lists, cases, (bucket_k,), Yardstick(id_sizes=yardstick.id_sizes), listed=listed)

    def interval(found: Values) -> dict[str, float]:
        drawn = intervals.bootstrap_mean(found.values, found.users, samples=settings.bootstrap_samples, rng=rng)
        return asdict(drawn)

    values = {name: interval(found) for name, found in table.items()}
    for k in settings.k:
        for name, statistic in (("coverage", metrics.coverage_at), ("gini", metrics.gini_at)):
            if name == "gini" and settings.lists.startswith("free"):  # no exposure, no Gini
                continue
            at_k = partial(statistic, n_items=data.n_items, k=k)
            values[f"{name}@{k}"] = asdict(intervals.jackknife(at_k, lists, cases.users, rng=rng).interval())
    return {
        "split": settings.split,
        "users": n_users,
        "cases": len(cases),
        "cold_cases": int((counts[cases.targets] <= settings.cold_max_count).sum()),
        "metrics": values,
        "buckets": _by_popularity(accuracy, counts[cases.targets], bucket_k, interval),
        "settings": to_json(settings),
    }


def _shared_groups(space: ActionSpace) -> tuple[np.ndarray, np.ndarray]:
    """For each item (N,), the item that lists show for its sequence, and how many items share the sequence."""
    listed = space.listed_as(np.arange(space.n_items)).astype(np.int64)
    return listed, np.bincount(listed, minlength=space.n_items)[listed]


def _by_popularity(
    table: PerCase, target_counts: np.ndarray, k: int, interval: Callable[[Values], dict[str, float]]
) -> list[dict[str, Any]]:
    """Recall and NDCG at k by the target's training interactions."""
    bucket = metrics.popularity_buckets(target_counts, BUCKET_EDGES)
    lows = (0, *(edge + 1 for edge in BUCKET_EDGES))
    highs = (*BUCKET_EDGES, None)
    rows = []
    for number, (low, high) in enumerate(zip(lows, highs, strict=True)):
        inside = bucket == number
        row: dict[str, Any] = {"train_count_from": low, "train_count_to": high, "cases": int(inside.sum())}
        if inside.any():
            row |= {name: interval(table[name].where(inside)) for name in (f"recall@{k}", f"ndcg@{k}")}
        rows.append(row)
    return rows


def write_evaluation(
    path: Path, report: dict[str, Any], cases: Cases, lists: np.ndarray, data: Dataset
) -> dict[str, Any]:
    """Write the report to `path` (JSON) and the lists beside it (`.lists.parquet`: row, target, item indices).

    Returns the report with the hash of its lists, so that none is read with those of another.
    """
    lists_path = path.with_suffix(".lists.parquet")
    table = pl.DataFrame(
        {
            "event_row": cases.rows,
            "user_id": data.user_ids.external(cases.users),
            "target": cases.targets,
            "items": pl.Series(lists.astype(np.int32), dtype=pl.Array(pl.Int32, lists.shape[1])),
        }
    )
    with replace_file(lists_path) as fresh:
        table.write_parquet(fresh)
    report = report | {"hashes": {"lists": hash_file(lists_path)}}
    write_record(path, report)
    return report
