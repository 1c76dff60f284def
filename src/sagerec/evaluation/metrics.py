"""Metrics of top-K recommendations, as numpy functions. Their intervals are in `intervals`.

Two kinds. A metric with one value a case (recall, NDCG, MRR, entropy, novelty, invalid and duplicate rate)
returns (U,), to be averaged and bootstrapped over users. Coverage and Gini belong to all lists together: they
return one number and take the jackknife. `docs/metrics.md` defines them all.

Shape legend: U users (evaluation cases), K places in a list, N items, Q clusters.
A list is an integer array (U, K) of item indices 0..N-1, best first, -1 where a place holds no valid item;
that place keeps its rank. Only the first k places count. A case has one target, hence one relevant item.
Every function that takes k raises SettingsError for k < 1, and for k > K where it sees the lists.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from scipy import sparse

from sagerec.errors import SettingsError

IntArray: TypeAlias = npt.NDArray[np.integer[Any]]
FloatArray: TypeAlias = npt.NDArray[np.float64]
RankMetric: TypeAlias = Literal["recall", "ndcg", "mrr"]
TieView: TypeAlias = Literal["optimistic", "expected", "pessimistic"]
Clusters: TypeAlias = "sparse.csr_array[np.float64, tuple[int, int]] | sparse.csr_matrix[np.float64]"

_BLOCK_USERS = 65_536  # users whose cluster distributions are held at a time


def _top(lists: IntArray, k: int) -> IntArray:
    assert lists.ndim == 2, lists.shape
    places = lists.shape[1]
    if not 1 <= k <= places:
        raise SettingsError(
            f"k is {k} for lists of {places} places; expected 1 to {places}: decode longer lists or change k"
        )
    return lists[:, :k]


def first_rank(lists: IntArray, targets: IntArray) -> npt.NDArray[np.int64]:
    """1-based place of each target in its list, 0 where it is absent; the first place where it stands twice.

    Args: lists (U, K); targets (U,) item indices. Returns: (U,).
    """
    assert lists.ndim == 2, lists.shape
    assert targets.shape == lists.shape[:1], (targets.shape, lists.shape)
    assert not targets.size or targets.min() >= 0, "a target of -1 would match an invalid place"
    hits = lists == targets[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0).astype(np.int64)


def expanded_rank(places: IntArray, sizes: IntArray) -> npt.NDArray[np.int64]:
    """First rank of the target among items, where each decoded Semantic ID stands for all items that bear it.

    rank = 1 + sum_{j < place} sizes[u, j], and 0 where place = 0.

    Args: places (U,) 1-based place of the target's ID among the decoded IDs, 0 absent (`first_rank` on IDs);
    sizes (U, K) items that bear the ID at each place, 1 at an invalid place, which keeps its one rank.
    Returns: (U,), the ranks that `tied_value` takes.
    """
    assert sizes.ndim == 2, sizes.shape
    assert places.shape == sizes.shape[:1], (places.shape, sizes.shape)
    assert not places.size or (places.min() >= 0 and places.max() <= sizes.shape[1] and sizes.min() >= 1)
    before = np.concatenate((np.zeros((len(sizes), 1), np.int64), np.cumsum(sizes, 1, np.int64)), axis=1)
    index = np.maximum(places, 1).astype(np.int64) - 1
    return np.where(places > 0, np.take_along_axis(before, index[:, None], axis=1)[:, 0] + 1, 0)


def _gains(metric: RankMetric, k: int) -> FloatArray:
    """Gain of each rank (k + 2,): 0 at rank 0, the metric's at 1..k, 0 at k + 1, which stands for all later."""
    if k < 1:
        raise SettingsError(f"k is {k}; expected 1 or more: give the number of places that count")
    if metric not in get_args(RankMetric):
        raise SettingsError(f"metric is {metric!r}; expected one of {', '.join(get_args(RankMetric))}")
    ranks = np.arange(1, k + 1, dtype=np.float64)
    gains = np.zeros(k + 2)
    gains[1:-1] = {"recall": np.ones(k), "ndcg": 1 / np.log2(ranks + 1), "mrr": 1 / ranks}[metric]
    return gains


def _gain_at(ranks: IntArray, metric: RankMetric, k: int) -> FloatArray:
    assert ranks.ndim == 1, ranks.shape
    assert not ranks.size or ranks.min() >= 0, "ranks are 1-based, 0 for an absent target"
    return _gains(metric, k)[np.minimum(ranks, k + 1)]


def recall_at(ranks: IntArray, k: int) -> FloatArray:
    """Recall@k = [1 <= rank <= k]; with one relevant item the same as the hit rate. (U,) -> (U,), 0 or 1.

    k may not exceed the K of the lists that the ranks come from; the ranks alone cannot tell.
    """
    return _gain_at(ranks, "recall", k)


def ndcg_at(ranks: IntArray, k: int) -> FloatArray:
    """NDCG@k = [1 <= rank <= k] / log2(rank + 1); one relevant item has an ideal DCG of 1. (U,) -> (U,).

    k as in `recall_at`. Source: Järvelin and Kekäläinen, ACM TOIS 2002.
    """
    return _gain_at(ranks, "ndcg", k)


def mrr_at(ranks: IntArray, k: int) -> FloatArray:
    """Reciprocal rank [1 <= rank <= k] / rank, whose mean is MRR@k. (U,) -> (U,). k as in `recall_at`.

    Source: Voorhees, TREC-8, 1999.
    """
    return _gain_at(ranks, "mrr", k)


def tied_value(ranks: IntArray, sizes: IntArray, metric: RankMetric, k: int, view: TieView) -> FloatArray:
    """A rank metric where the target shares its Semantic ID with other items, whose order is unknown.

    The target has one of the ranks r..r+s-1. optimistic: gain(r); pessimistic: gain(r + s - 1);
    expected: (1/s) sum_{j=r}^{r+s-1} gain(j), all orders equally likely (McSherry and Najork, ECIR 2008).

    Args: ranks (U,) the first rank r, 0 absent (`expanded_rank`); sizes (U,) items s that bear the target's
    ID, itself included. Returns: (U,). Raises: SettingsError for an unknown metric or view.
    """
    if view not in get_args(TieView):
        raise SettingsError(f"view is {view!r}; expected one of {', '.join(get_args(TieView))}")
    assert ranks.ndim == 1, ranks.shape
    assert sizes.shape == ranks.shape, (sizes.shape, ranks.shape)
    assert not ranks.size or (ranks.min() >= 0 and sizes.min() >= 1)
    gains = _gains(metric, k)
    first = np.where(ranks == 0, k + 1, np.minimum(ranks, k + 1)).astype(np.int64)
    last = np.minimum(first + sizes.astype(np.int64) - 1, k + 1)
    best, worst, total = gains[first], gains[last], np.cumsum(gains)
    # The clip takes away rounding only: a mean lies between the least and the greatest of its terms.
    expected = np.clip((total[last] - total[first - 1]) / sizes, worst, best)
    return {"optimistic": best, "expected": expected, "pessimistic": worst}[view]


def entropy_at(lists: IntArray, clusters: Clusters, k: int) -> FloatArray:
    """Shannon entropy of the item clusters in the top k: H = -sum_q p_q log2 p_q, in bits.

    p_q is the mean of clusters[item, q] over the valid places, so an item that stands twice counts twice. A
    list without a valid item has 0.

    Args: lists (U, K); clusters (N, Q) sparse, row i the shares of item i, non-negative with sum 1.
    Returns: (U,), from 0 to log2 Q. Raises: SettingsError for a row that does not sum to 1.
    """
    top, table = _top(lists, k), sparse.csr_array(clusters)
    assert not table.data.size or table.data.min() >= 0, "a negative share"
    sums: FloatArray = np.asarray(table.sum(axis=1)).ravel()
    if len(odd := np.flatnonzero(~(np.abs(sums - 1) <= 1e-5))):
        raise SettingsError(
            f"the cluster shares of item {odd[0]} sum to {sums[odd[0]]:g} ({len(odd)} such items); expected 1: "
            "give each of an item's n clusters 1/n, and an item without any a cluster of its own"
        )
    bits = np.zeros(len(top))
    for start in range(0, len(top), _BLOCK_USERS):
        block = top[start : start + _BLOCK_USERS]
        users, valid = len(block), block >= 0
        offsets = np.concatenate(([0], np.cumsum(valid.sum(axis=1))))
        picks = sparse.csr_array((np.ones(offsets[-1]), block[valid], offsets), (users, table.shape[0]))
        mass = picks @ table  # (users, Q); the product stores no zero
        row = np.repeat(np.arange(users), np.diff(mass.indptr))
        shares = mass.data / np.bincount(row, mass.data, users)[row]
        bits[start : start + users] = np.bincount(row, -shares * np.log2(shares), users)
    return bits


def _exposure(lists: IntArray, n_items: int, k: int) -> npt.NDArray[np.int64]:
    """How often each item stands in the top k (N,)."""
    if n_items < 1:
        raise SettingsError(f"n_items is {n_items}; expected 1 or more: give the size of the catalogue")
    top = _top(lists, k)
    assert not top.size or top.max() < n_items, (int(top.max()), n_items)
    return np.bincount(top[top >= 0], minlength=n_items).astype(np.int64)


def coverage_at(lists: IntArray, n_items: int, k: int) -> float:
    """Share of the catalogue that stands in the top k of at least one list: |union of lists| / N.

    It grows with U, so systems compare on the same users only. Interval: `jackknife`.

    Args: lists (U, K); n_items N.
    """
    return float(np.count_nonzero(_exposure(lists, n_items, k)) / n_items)


def gini_at(lists: IntArray, n_items: int, k: int) -> float:
    """Gini coefficient of how often each of the N items is shown in the top k, those never shown included.

    G = sum_{i=1}^{N} (2i - N - 1) x_(i) / (N sum x), x_(i) the i-th smallest count: 0 where all items are
    shown alike, 1 - 1/N where only one is. Interval: `jackknife`.

    Args: lists (U, K); n_items N. Raises: SettingsError where no place holds a valid item (G is 0/0).
    """
    exposure = np.sort(_exposure(lists, n_items, k))
    if not (total := int(exposure.sum())):
        raise SettingsError(
            f"the first {k} places of {len(lists)} lists hold no valid item; expected at least one, since Gini "
            "is undefined without exposure: leave it out and see the invalid rate"
        )
    weights = 2 * np.arange(1, n_items + 1, dtype=np.int64) - n_items - 1
    return int(weights @ exposure) / (n_items * total)


def novelty_at(lists: IntArray, popularity: IntArray, k: int) -> FloatArray:
    """Mean self-information of the items shown, in bits: mean over the valid places of -log2 share(item).

    share(i) = (count_i + 1) / (sum count + N): add-one smoothing keeps an item never seen finite. A list
    without a valid item has 0, the worst value. Source: Zhou et al., PNAS 2010; the smoothing is added.

    Args: lists (U, K); popularity (N,) training interactions. Returns: (U,).
    """
    top = _top(lists, k)
    assert popularity.ndim == 1, popularity.shape
    assert popularity.size, "an empty catalogue"
    assert popularity.min() >= 0, "a negative count"
    assert not top.size or top.max() < len(popularity), (int(top.max()), len(popularity))
    bits = np.log2(float(popularity.sum()) + len(popularity)) - np.log2(popularity + 1.0)
    valid = top >= 0
    mean: FloatArray = np.where(valid, bits[top], 0.0).sum(axis=1) / np.maximum(valid.sum(axis=1), 1)
    return mean


def invalid_rate(lists: IntArray, k: int) -> FloatArray:
    """Share of the first k places that hold no valid item (-1). (U, K) -> (U,), from 0 to 1."""
    rate: FloatArray = (_top(lists, k) < 0).mean(axis=1)
    return rate


def duplicate_rate(lists: IntArray, k: int) -> FloatArray:
    """Share of the first k places that repeat an item placed earlier in the list; -1 is never a repeat.

    (U, K) -> (U,), from 0 to (k - 1) / k.
    """
    ordered = np.sort(_top(lists, k), axis=1)
    repeats = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    rate: FloatArray = repeats.sum(axis=1) / k
    return rate


def popularity_buckets(counts: IntArray, edges: Sequence[int]) -> npt.NDArray[np.int64]:
    """Bucket of each item, the number of edges below its count: bucket b has edges[b-1] < count <= edges[b].

    Args: counts (N,) training interactions; edges, strictly rising, right-inclusive, len(edges) + 1 buckets.
    Returns: (N,), 0..len(edges). Raises: SettingsError for edges that are none or do not rise.
    """
    assert counts.ndim == 1, counts.shape
    if not len(edges) or np.any(np.diff(edges) <= 0):
        raise SettingsError(f"edges are {list(edges)}; expected rising counts such as [0, 5, 20]: sort them")
    return np.searchsorted(np.asarray(edges), counts, side="left").astype(np.int64)
