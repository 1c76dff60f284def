"""Item-kNN: the whole catalogue ranked by its similarity to a history.

Shapes: n cases, N items, S sequences, K places.
"""

import numpy as np

from sagerec.catalogue.similarity import history_scores, item_similarities
from sagerec.catalogue.splits import Cases, Sequences

BATCH_CASES, MOST_SCORES = 1024, 2**25
"""Cases at a time, and scores of them: a quarter of a GB."""


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """The k highest columns of scores (n, N), best first, ties by the lower index; -1 for scores of -inf."""
    k_present = min(k, scores.shape[1])
    # Stable order among equals: sort by (-score, index) within the candidates above the k-th score.
    threshold = -np.partition(-scores, k_present - 1, axis=1)[:, k_present - 1 : k_present]
    result = np.full((len(scores), k), -1, dtype=np.int64)
    for row, (values, cut) in enumerate(zip(scores, threshold, strict=True)):
        candidates = np.flatnonzero(values >= cut[0])
        best = candidates[np.argsort(-values[candidates], kind="stable")][:k_present]
        result[row, :k_present] = np.where(np.isneginf(values[best]), -1, best)
    return result


def item_knn_lists(
    train: Sequences,
    cases: Cases,
    *,
    n_items: int,
    k: int,
    exclude_history: bool,
    max_items: int,
    neighbours: int = 100,
    shrinkage: float = 5.0,
    decay: float = 0.8,
) -> np.ndarray:
    """Items (n, k) by the summed similarity to the history, an item d places back counting decay^d."""
    similar = item_similarities(train, n_items, neighbours=neighbours, shrinkage=shrinkage)
    lists = np.full((len(cases), k), -1, dtype=np.int64)
    size = max(1, min(BATCH_CASES, MOST_SCORES // n_items))
    for begin in range(0, len(cases), size):
        index = np.arange(begin, min(begin + size, len(cases)))
        history, lengths = cases.histories(index, max_items)
        scores = history_scores(similar, history, lengths, decay=decay).toarray()
        if exclude_history:
            taken = cases.taken(index)
            scores[np.nonzero(taken >= 0)[0], taken[taken >= 0]] = -np.inf
        lists[index] = top_k(scores, k)
    return lists
