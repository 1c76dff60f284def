"""One table of what every case is worth by every metric: validation, evaluation, studies and reports all read it.

Stands between the lists of a system and the averages over them: `metrics` are the formulas, `intervals` the averages
and what is known of them. Coverage and Gini belong to all lists together and are not here.

Shapes: n cases, K places, N items, m cases that count for a metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, get_args

import numpy as np

from sagerec.actions.clusters import entropy_clusters
from sagerec.actions.space import ActionSpace
from sagerec.catalogue.dataset import Dataset
from sagerec.catalogue.simulated_store import SimulatedStore, expected_answers
from sagerec.catalogue.splits import Cases, Split, learnt_counts
from sagerec.evaluation import metrics
from sagerec.evaluation.metrics import Clusters, FloatArray, IntArray, RankMetric, TieView

VIEWS: tuple[TieView, ...] = ("optimistic", "pessimistic")
"""Reported beside the expected value where items share Semantic IDs."""


@dataclass(frozen=True, slots=True)
class Values:
    """One metric's value on every case that counts for it."""

    values: FloatArray
    """(m,) in the metric's unit."""
    cases: IntArray
    """(m,) place of each in the cases, rising."""
    users: IntArray
    """(m,) user of each; the cases of a user are not independent."""

    def __len__(self) -> int:
        return len(self.values)

    def mean(self) -> float:
        """Mean over the cases that count."""
        return float(self.values.mean())

    def where(self, chosen: np.ndarray) -> "Values":
        """Those of the cases that `chosen` (n,) marks."""
        kept = chosen[self.cases]
        return Values(self.values[kept], self.cases[kept], self.users[kept])

    def minus(self, other: "Values") -> "Values":
        """Differences, case by case, to another system on the same cases."""
        assert np.array_equal(self.cases, other.cases), "two systems on different cases"
        return replace(self, values=self.values - other.values)


PerCase: TypeAlias = dict[str, Values]
"""Metric, such as recall@10 -> its values."""


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What lists are measured by; a metric whose part is absent is not measured."""

    cold: np.ndarray | None = None
    """(N,) bool, the cold items: for cold_recall."""
    counts: np.ndarray | None = None
    """(N,) interactions learnt from: for novelty."""
    clusters: Mapping[str, Clusters] = field(default_factory=dict)
    """Entropy -> clusters (N, Q): for entropy and coarse_entropy."""
    store: SimulatedStore | None = None
    """For its users' expected answers."""
    id_sizes: np.ndarray | None = None
    """(N,) items that bear each item's Semantic ID, where an entry of a list stands for all of them."""


def make_yardstick(
    data: Dataset, split: Split, space: ActionSpace, *, cold_max_count: int, store: SimulatedStore | None = None
) -> Yardstick:
    """The yardstick of a run, whose lists hold single items: cold and popular are by what was learnt."""
    counts = learnt_counts(data, split)
    return Yardstick(counts <= cold_max_count, counts, entropy_clusters(data, space), store)


def per_case(
    lists: IntArray,
    cases: Cases,
    ks: Sequence[int],
    yardstick: Yardstick | None = None,
    *,
    listed: IntArray | None = None,
) -> PerCase:
    """The table of lists (n, K), -1 where there is no item, at each cut k of `ks`; `docs/metrics.md` has the formulas.

    recall, ndcg, mrr, invalid_rate and duplicate_rate always; with shared IDs the accuracy is the expected value over
    the orders of their items, with `_optimistic` and `_pessimistic` beside it. A metric that no case counts for is
    left out.

    Args: listed (n,), the item by which lists show each target, where that is another with the same Semantic ID.
    Raises: SettingsError for a k above K.
    """
    by = yardstick or Yardstick()
    ranks = metrics.first_rank(lists, cases.targets if listed is None else listed)
    sizes = np.ones(len(cases), dtype=np.int64)
    if by.id_sizes is not None:
        ranks = metrics.expanded_rank(ranks, np.where(lists >= 0, by.id_sizes[lists], 1))
        sizes = by.id_sizes[cases.targets]
    everyone = np.arange(len(cases))
    found: PerCase = {}
    for k in ks:
        at_k: dict[str, FloatArray] = {}
        for name in get_args(RankMetric):
            at_k[f"{name}@{k}"] = metrics.tied_value(ranks, sizes, name, k, "expected")
            for view in VIEWS if by.id_sizes is not None else ():
                at_k[f"{name}@{k}_{view}"] = metrics.tied_value(ranks, sizes, name, k, view)
        for name, membership in by.clusters.items():
            at_k[f"{name}@{k}"] = metrics.entropy_at(lists, membership, k)
        if by.counts is not None:
            at_k[f"novelty@{k}"] = metrics.novelty_at(lists, by.counts, k)
        if by.store is not None:
            at_k |= {f"{name}@{k}": value for name, value in expected_answers(by.store, cases, lists[:, :k]).items()}
        at_k[f"invalid_rate@{k}"] = metrics.invalid_rate(lists, k)
        at_k[f"duplicate_rate@{k}"] = metrics.duplicate_rate(lists, k)
        found |= {name: Values(value, everyone, cases.users) for name, value in at_k.items()}
        if by.cold is not None:
            found[f"cold_recall@{k}"] = found[f"recall@{k}"].where(by.cold[cases.targets])
    return {name: values for name, values in found.items() if len(values)}


def mean_over_seeds(tables: Sequence[PerCase]) -> PerCase:
    """The mean of several seeds' tables of the same cases, value by value."""
    assert all(table.keys() == tables[0].keys() for table in tables)
    return {
        name: replace(first, values=np.mean([table[name].values for table in tables], axis=0))
        for name, first in tables[0].items()
    }


def validation_means(
    lists: IntArray,
    cases: Cases,
    names: Sequence[str],
    yardstick: Yardstick | None = None,
    *,
    k: int = 10,
    listed: IntArray | None = None,
) -> dict[str, float]:
    """`valid_NAME@k` -> the mean of each named metric; 0 for one that no case counts for."""
    table = per_case(lists, cases, (k,), yardstick, listed=listed)
    keys = [f"{name}@{k}" for name in names]
    return {f"valid_{key}": table[key].mean() if key in table else 0.0 for key in keys}
