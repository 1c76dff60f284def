"""Metrics: values worked by hand, parity with scikit-learn and scipy, slow twins in plain Python, identities."""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

from sagerec.errors import SettingsError
from sagerec.evaluation import metrics
from sagerec.evaluation.metrics import (
    IntArray,
    RankMetric,
    TieView,
    coverage_at,
    duplicate_rate,
    entropy_at,
    expanded_rank,
    first_rank,
    gini_at,
    invalid_rate,
    mrr_at,
    ndcg_at,
    novelty_at,
    popularity_buckets,
    recall_at,
    tied_value,
)

N_ITEMS = 7
RANK_METRICS: tuple[RankMetric, ...] = ("recall", "ndcg", "mrr")
quick = settings(max_examples=80, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def ints(values: Any) -> IntArray:
    return np.array(values, dtype=np.int64)


def random_lists(rng: np.random.Generator) -> IntArray:
    """Lists of 0..12 users and 1..6 places with repeats and invalid places, N_ITEMS items."""
    return rng.integers(-1, N_ITEMS, size=(rng.integers(13), rng.integers(1, 7)))


def random_clusters(rng: np.random.Generator) -> "sparse.csr_array[np.float64, tuple[int, int]]":
    """Each item has 1..3 of 5 clusters, in equal shares."""
    dense = np.zeros((N_ITEMS, 5))
    for row in dense:
        chosen = rng.choice(5, size=rng.integers(1, 4), replace=False)
        row[chosen] = 1 / len(chosen)
    return sparse.csr_array(dense)


def gain(metric: str, rank: int, k: int) -> float:
    """The slow twin of the gain vector."""
    if not 1 <= rank <= k:
        return 0.0
    return {"recall": 1.0, "ndcg": 1 / math.log2(rank + 1), "mrr": 1 / rank}[metric]


# --- ranks ---


def test_first_rank_by_hand() -> None:
    """Target 4 stands second; 9 nowhere; 2 stands third and fourth, the first counts; -1 keeps its rank."""
    lists = ints([[3, 4, 5, 6], [1, 2, 3, 4], [0, 1, 2, 2], [-1, -1, -1, 8]])
    ranks = first_rank(lists, ints([4, 9, 2, 8]))
    assert ranks.tolist() == [2, 0, 3, 4]
    assert ranks.dtype == np.int64


@quick
@given(seeds)
def test_first_rank_equals_its_slow_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lists = random_lists(rng)
    targets = rng.integers(N_ITEMS, size=len(lists))
    slow = [
        row.index(target) + 1 if target in row else 0
        for row, target in zip(lists.tolist(), targets.tolist(), strict=True)
    ]
    assert first_rank(lists, targets).tolist() == slow


def test_a_negative_target_is_refused() -> None:
    """It would otherwise be found at the invalid place."""
    with pytest.raises(AssertionError, match="would match an invalid place"):
        first_rank(ints([[-1, 2]]), ints([-1]))


def test_expanded_rank_by_hand() -> None:
    """IDs that stand for 2, 3, 1, 4 items hold ranks 1-2, 3-5, 6, 7-10: places 1, 2, 3, 4 begin at 1, 3, 6, 7."""
    sizes = ints([[2, 3, 1, 4]] * 5)
    assert expanded_rank(ints([1, 2, 3, 4, 0]), sizes).tolist() == [1, 3, 6, 7, 0]


@quick
@given(seeds)
def test_expanded_rank_and_tied_value_equal_the_enumerated_orders(seed: int) -> None:
    """Write the items out: the target's rank is one of those its ID covers, and each is as likely as the others."""
    rng = np.random.default_rng(seed)
    users, width, k = int(rng.integers(1, 8)), int(rng.integers(1, 6)), int(rng.integers(1, 10))
    sizes, places = rng.integers(1, 5, size=(users, width)), rng.integers(0, width + 1, size=users)
    ranks = expanded_rank(places, sizes)
    own = np.where(places > 0, sizes[np.arange(users), places - 1], 1)
    for metric in RANK_METRICS:
        values = {view: tied_value(ranks, own, metric, k, view) for view in ("optimistic", "expected", "pessimistic")}
        for user in range(users):
            written = [place for place in range(width) for _ in range(sizes[user, place])]
            covered = [rank for rank, place in enumerate(written, 1) if place == places[user] - 1]
            gains = [gain(metric, rank, k) for rank in covered] or [0.0]
            assert values["optimistic"][user] == max(gains)
            assert values["pessimistic"][user] == min(gains)
            assert values["expected"][user] == pytest.approx(sum(gains) / len(gains), abs=1e-12)


# --- accuracy ---


def test_accuracy_by_hand() -> None:
    """At k = 3, rank 1: 1, 1/log2(2) = 1, 1; rank 3: 1, 1/log2(4) = 0.5, 1/3; rank 4 and absent (0): 0."""
    ranks = ints([1, 3, 4, 0])
    assert recall_at(ranks, 3).tolist() == [1, 1, 0, 0]
    assert ndcg_at(ranks, 3).tolist() == [1, 0.5, 0, 0]
    assert mrr_at(ranks, 3).tolist() == [1, 1 / 3, 0, 0]


def test_accuracy_agrees_with_scikit_learn() -> None:
    """60 users, 15 items, scores without ties: scikit-learn ranks the scores itself."""
    rng = np.random.default_rng(3)
    scores, targets = rng.random((60, 15)), rng.integers(15, size=60)
    relevant = np.eye(15, dtype=int)[targets]
    ranks = first_rank(np.argsort(-scores, axis=1), targets)
    for k in (1, 4, 10, 15):
        recall = top_k_accuracy_score(targets, scores, k=k, labels=range(15)) if k < 15 else 1.0
        assert recall_at(ranks, k).mean() == pytest.approx(recall, abs=1e-12)
        assert ndcg_at(ranks, k).mean() == pytest.approx(ndcg_score(relevant, scores, k=k), abs=1e-12)
    assert mrr_at(ranks, 15).mean() == pytest.approx(label_ranking_average_precision_score(relevant, scores), abs=1e-12)


@quick
@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 20))
def test_accuracy_identities(values: list[int], k: int) -> None:
    """Slow twin; never falls with k; mrr <= ndcg <= recall; at k = 1 the three are one."""
    ranks = ints(values)
    for name, function in (("recall", recall_at), ("ndcg", ndcg_at), ("mrr", mrr_at)):
        assert function(ranks, k).tolist() == pytest.approx([gain(name, rank, k) for rank in values], abs=1e-15)
        assert (function(ranks, k + 1) >= function(ranks, k)).all()
    assert (mrr_at(ranks, k) <= ndcg_at(ranks, k)).all()
    assert (ndcg_at(ranks, k) <= recall_at(ranks, k)).all()
    assert recall_at(ranks, 1).tolist() == ndcg_at(ranks, 1).tolist() == mrr_at(ranks, 1).tolist()


# --- shared Semantic IDs ---


def test_tied_values_by_hand() -> None:
    """At k = 3, first rank 2, 3 items on the ID: the target has rank 2, 3 or 4.

    Recall: 1, 1, 0 -> optimistic 1, expected 2/3, pessimistic 0. MRR: 1/2, 1/3, 0 -> 1/2, 5/18, 0.
    NDCG: 1/log2(3) = .63093, .5, 0 -> .63093, .37698, 0. A target that is absent has 0 in every view.
    """
    ranks, sizes = ints([2, 0]), ints([3, 3])
    expected: dict[RankMetric, dict[TieView, float]] = {
        "recall": {"optimistic": 1, "expected": 2 / 3, "pessimistic": 0},
        "mrr": {"optimistic": 1 / 2, "expected": 5 / 18, "pessimistic": 0},
        "ndcg": {"optimistic": 0.6309297536, "expected": 0.3769765845, "pessimistic": 0},
    }
    for metric, views in expected.items():
        for view, value in views.items():
            found = tied_value(ranks, sizes, metric, 3, view)
            assert found.tolist() == pytest.approx([value, 0], abs=1e-10)


@quick
@given(seeds, st.integers(1, 12), st.sampled_from(RANK_METRICS))
def test_views_are_ordered_and_agree_where_the_id_is_not_shared(seed: int, k: int, metric: RankMetric) -> None:
    rng = np.random.default_rng(seed)
    ranks, sizes = rng.integers(0, 15, size=9), rng.integers(1, 40, size=9)
    low, mean, high = (tied_value(ranks, sizes, metric, k, v) for v in ("pessimistic", "expected", "optimistic"))
    assert (low <= mean).all()
    assert (mean <= high).all()
    plain = {"recall": recall_at, "ndcg": ndcg_at, "mrr": mrr_at}[metric](ranks, k)
    assert high.tolist() == plain.tolist()
    unshared = np.ones_like(sizes)
    assert tied_value(ranks, unshared, metric, k, "pessimistic").tolist() == plain.tolist()
    assert tied_value(ranks, unshared, metric, k, "expected").tolist() == plain.tolist()


# --- what the lists hold ---


def test_entropy_by_hand() -> None:
    """Items 0, 1 belong to cluster 0; item 2 to cluster 1; item 3 to both, half each.

    [0, 1, 2, 2]: p = (1/2, 1/2): 1 bit. [0, 1, 1, 2]: p = (3/4, 1/4): 2 - .75 log2 3 = .8112781 bits.
    [0, 3, -1, -1]: p = (1.5, .5)/2: the same. [0, 1, 0, 1]: 0. No valid item: 0.
    """
    clusters = sparse.csr_array(np.array([[1, 0], [1, 0], [0, 1], [0.5, 0.5]]))
    lists = ints([[0, 1, 2, 2], [0, 1, 1, 2], [0, 3, -1, -1], [0, 1, 0, 1], [-1, -1, -1, -1]])
    assert entropy_at(lists, clusters, 4).tolist() == pytest.approx([1, 0.8112781245, 0.8112781245, 0, 0], abs=1e-9)
    # Cut at 3: [0, 1, 2] has p = (2/3, 1/3), log2 3 - 2/3 bits; [0, 1, 1] has 0.
    assert entropy_at(lists, clusters, 3).tolist() == pytest.approx([0.9182958341, 0, 0.8112781245, 0, 0], abs=1e-9)


@quick
@given(seeds)
def test_entropy_equals_scipy_and_its_slow_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lists, clusters = random_lists(rng), random_clusters(rng)
    k = int(rng.integers(1, lists.shape[1] + 1))
    dense = clusters.toarray()
    found = entropy_at(lists, clusters, k)
    assert found.shape == (len(lists),)
    for bits, row in zip(found.tolist(), lists[:, :k].tolist(), strict=True):
        mass: Counter[int] = Counter()
        for item in row:
            if item >= 0:
                for cluster in range(5):
                    mass[cluster] += dense[item, cluster]
        total = sum(mass.values())
        slow = -sum(m / total * math.log2(m / total) for m in mass.values() if m > 0) if total else 0.0
        assert bits == pytest.approx(slow, abs=1e-9)
        if total:
            assert bits == pytest.approx(float(stats.entropy([mass[c] for c in range(5)], base=2)), abs=1e-9)


@quick
@given(seeds)
def test_entropy_is_at_most_log2_and_ignores_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lists, clusters = random_lists(rng), random_clusters(rng)
    k = lists.shape[1]
    bits = entropy_at(lists, clusters, k)
    assert (bits >= 0).all()
    assert (bits <= math.log2(5) + 1e-12).all()
    assert entropy_at(lists[:, ::-1], clusters, k).tolist() == pytest.approx(bits.tolist(), abs=1e-12)


def test_entropy_of_all_different_clusters_is_log2_k() -> None:
    assert entropy_at(ints([[0, 1, 2, 3, 4, 5, 6, 7]]), sparse.csr_matrix(np.eye(8)), 8).tolist() == [3.0]


def test_entropy_over_several_blocks_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 5 users give what one block gives, the last, short one included."""
    rng = np.random.default_rng(0)
    lists, clusters = rng.integers(-1, N_ITEMS, size=(13, 4)), random_clusters(rng)
    whole = entropy_at(lists, clusters, 4)
    monkeypatch.setattr(metrics, "_BLOCK_USERS", 5)
    assert entropy_at(lists, clusters, 4).tolist() == whole.tolist()
    assert whole[-1] > 0


def test_entropy_takes_stored_zeros_without_a_warning() -> None:
    """A stored 0 is no cluster: 0 log 0 = 0. The matrix stays as it was."""
    clusters = sparse.csr_array((np.array([1.0, 0.0]), np.array([0, 1]), np.array([0, 2])), shape=(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert entropy_at(ints([[0, 0]]), clusters, 2).tolist() == [0.0]
    assert clusters.nnz == 2


def test_coverage_by_hand() -> None:
    """Top 2 hold the items {0, 1, 3} of 6: 1/2. Top 1 holds {0, 3}: 1/3. The -1 is no item."""
    lists = ints([[0, 1, 5], [0, -1, 5], [3, 0, 5]])
    assert coverage_at(lists, 6, 2) == 0.5
    assert coverage_at(lists, 6, 1) == pytest.approx(1 / 3)


def test_coverage_of_one_list_repeated_is_that_of_the_list() -> None:
    """1,000 users with the same 4 different items of 16: 1/4, as for one user."""
    one = ints([[3, 1, 8, 15]])
    assert coverage_at(np.repeat(one, 1000, axis=0), 16, 4) == coverage_at(one, 16, 4) == 0.25


def test_gini_by_hand() -> None:
    """Counts of 4 items: 0, 0, 1, 3, total 4. G = (-3*0 - 1*0 + 1*1 + 3*3) / (4 * 4) = 10/16."""
    lists = ints([[0, 1], [0, -1], [0, -1]])
    assert gini_at(lists, 4, 2) == 0.625


def test_gini_limits() -> None:
    """Uniform exposure: 0, exactly. One of 8 items only: 1 - 1/8. Half of 8 items alike: 1/2."""
    assert gini_at(ints([[0, 1, 2, 3], [4, 5, 6, 7]]), 8, 4) == 0
    assert gini_at(ints([[5], [5], [5]]), 8, 1) == 0.875
    assert gini_at(ints([[0, 1], [2, 3]]), 8, 2) == 0.5


@quick
@given(seeds)
def test_exposure_metrics_equal_their_slow_twins(seed: int) -> None:
    """Coverage by a set; Gini by its other definition, the mean absolute difference over twice the mean."""
    rng = np.random.default_rng(seed)
    lists = random_lists(rng)
    k = int(rng.integers(1, lists.shape[1] + 1))
    shown = [item for row in lists[:, :k].tolist() for item in row if item >= 0]
    counts = Counter(shown)
    assert coverage_at(lists, N_ITEMS, k) == pytest.approx(len(set(shown)) / N_ITEMS, abs=1e-15)
    if shown:
        exposure = [counts[item] for item in range(N_ITEMS)]
        gaps = sum(abs(x - y) for x in exposure for y in exposure)
        assert gini_at(lists, N_ITEMS, k) == pytest.approx(gaps / (2 * N_ITEMS * sum(exposure)), abs=1e-12)
        assert 0 <= gini_at(lists, N_ITEMS, k) <= 1 - 1 / N_ITEMS


def test_novelty_by_hand() -> None:
    """Counts 3, 0, 1 of 3 items: shares 4/7, 1/7, 2/7, so log2 7 - (2, 0, 1) bits.

    [0, 1]: log2 7 - 1. [2, -1]: log2 7 - 1, the invalid place left out. [1, 1]: log2 7. No valid item: 0.
    """
    bits = novelty_at(ints([[0, 1], [2, -1], [1, 1], [-1, -1]]), ints([3, 0, 1]), 2)
    assert bits.tolist() == pytest.approx([math.log2(7) - 1, math.log2(7) - 1, math.log2(7), 0], abs=1e-12)


@quick
@given(seeds)
def test_per_list_rates_equal_their_slow_twins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lists, popularity = random_lists(rng), rng.integers(0, 50, size=N_ITEMS)
    k = int(rng.integers(1, lists.shape[1] + 1))
    novelty, invalid, repeated = novelty_at(lists, popularity, k), invalid_rate(lists, k), duplicate_rate(lists, k)
    assert novelty.shape == invalid.shape == repeated.shape == (len(lists),)
    total = int(popularity.sum()) + N_ITEMS
    for user, row in enumerate(lists[:, :k].tolist()):
        valid = [item for item in row if item >= 0]
        bits = [-math.log2((int(popularity[item]) + 1) / total) for item in valid]
        assert novelty[user] == pytest.approx(sum(bits) / len(bits) if bits else 0, abs=1e-9)
        assert invalid[user] == pytest.approx((k - len(valid)) / k, abs=1e-15)
        again = sum(item >= 0 and item in row[:place] for place, item in enumerate(row))
        assert repeated[user] == pytest.approx(again / k, abs=1e-15)


def test_invalid_and_duplicate_rates_by_hand() -> None:
    """[2, 2, 2, -1, -1], k = 5: 2 invalid places of 5, 2 repeats of 5. k = 1: none of either."""
    lists = ints([[2, 2, 2, -1, -1]])
    assert (invalid_rate(lists, 5).tolist(), duplicate_rate(lists, 5).tolist()) == ([0.4], [0.4])
    assert (invalid_rate(lists, 1).tolist(), duplicate_rate(lists, 1).tolist()) == ([0.0], [0.0])


def test_popularity_buckets_by_hand() -> None:
    """Edges 0, 5: never seen, 1 to 5, more than 5. The edge belongs to the bucket on its left."""
    assert popularity_buckets(ints([0, 1, 5, 6, 100]), [0, 5]).tolist() == [0, 1, 1, 2, 2]


@quick
@given(st.lists(st.integers(0, 40), max_size=30), st.sets(st.integers(0, 40), min_size=1))
def test_popularity_buckets_equal_their_slow_twin(counts: list[int], edges: set[int]) -> None:
    slow = [sum(edge < count for edge in edges) for count in counts]
    assert popularity_buckets(ints(counts), sorted(edges)).tolist() == slow


def test_inputs_are_not_changed() -> None:
    """Duplicate rate and Gini sort: a copy, not the caller's array."""
    lists = ints([[5, 1, 5], [0, -1, 2]])
    before = lists.copy()
    lists.setflags(write=False)
    duplicate_rate(lists, 3)
    gini_at(lists, 6, 3)
    entropy_at(lists, sparse.csr_array(np.eye(6)), 3)
    assert (lists == before).all()


# --- errors ---

PAIR = ints([[0, 1], [1, -1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: coverage_at(PAIR, 3, 5),
            "k is 5 for lists of 2 places; expected 1 to 2: decode longer lists or change k",
        ),
        (
            lambda: invalid_rate(PAIR, 0),
            "k is 0 for lists of 2 places; expected 1 to 2: decode longer lists or change k",
        ),
        (lambda: recall_at(ints([1]), 0), "k is 0; expected 1 or more: give the number of places that count"),
        (
            lambda: tied_value(ints([1]), ints([1]), cast(RankMetric, "map"), 3, "expected"),
            "metric is 'map'; expected one of recall, ndcg, mrr",
        ),
        (
            lambda: tied_value(ints([1]), ints([1]), "mrr", 3, cast(TieView, "mean")),
            "view is 'mean'; expected one of optimistic, expected, pessimistic",
        ),
        (
            lambda: entropy_at(PAIR, sparse.csr_array(np.array([[1.0, 0], [0, 0.25], [0, 0]])), 2),
            "the cluster shares of item 1 sum to 0.25 (2 such items); expected 1: give each of an item's n clusters "
            "1/n, and an item without any a cluster of its own",
        ),
        (lambda: coverage_at(PAIR, 0, 1), "n_items is 0; expected 1 or more: give the size of the catalogue"),
        (
            lambda: gini_at(ints([[-1, 3], [-1, 2]]), 4, 1),
            "the first 1 places of 2 lists hold no valid item; expected at least one, since Gini is undefined without "
            "exposure: leave it out and see the invalid rate",
        ),
        (
            lambda: popularity_buckets(ints([1]), [5, 5]),
            "edges are [5, 5]; expected rising counts such as [0, 5, 20]: sort them",
        ),
        (
            lambda: popularity_buckets(ints([1]), []),
            "edges are []; expected rising counts such as [0, 5, 20]: sort them",
        ),
    ],
)
def test_errors_say_got_expected_and_how_to_mend(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        call()
    assert str(error.value) == message


def test_no_user_gives_empty_values() -> None:
    """Per-case metrics of no case are empty arrays, not errors; coverage of no list is 0."""
    none, clusters = np.empty((0, 3), dtype=np.int64), sparse.csr_array(np.eye(4))
    ranks = first_rank(none, ints([]))
    found = [recall_at(ranks, 3), entropy_at(none, clusters, 3), novelty_at(none, ints([1, 2]), 3)]
    found += [invalid_rate(none, 3), duplicate_rate(none, 3), tied_value(ranks, ints([]), "ndcg", 3, "expected")]
    assert all(array.shape == (0,) and array.dtype == np.float64 for array in found)
    assert coverage_at(none, 4, 3) == 0
