"""Which items are taken by the same users: item-kNN's similarities, and the scores that they give a history.

Shapes: N items, S sequences, B histories of at most T items.
"""

from itertools import pairwise

import numpy as np
from scipy import sparse

from sagerec.catalogue.splits import Sequences

MOST_PAIRS = 2**25
"""Pairs of events of one user that are counted at a time: 0.4 GB."""


def item_similarities(train: Sequences, n_items: int, *, neighbours: int, shrinkage: float) -> sparse.csr_matrix:
    """Cosine of items over training users, s_ij = n_ij / (sqrt(n_i n_j) + shrinkage), the best `neighbours` of each.

    Sarwar et al. (2001); the shrinkage of Bell and Koren (2007) in the denominator.
    """
    user = np.repeat(np.arange(len(train)), np.diff(train.offsets))
    ones = np.ones(len(user), dtype=np.float32)
    taken = sparse.csr_matrix((ones, (user, train.items)), shape=(len(train), n_items))
    taken.data[:] = 1
    by_item = taken.T.tocsr()
    counts = np.diff(by_item.indptr).astype(np.float32)
    # Items are taken in blocks, for the pairs of all of them, of which few are kept, need not fit the memory.
    pairs_of_item = by_item @ np.diff(taken.indptr).astype(np.float64)
    block = (pairs_of_item.cumsum() // MOST_PAIRS).astype(np.int64)
    bounds = [0, *(np.flatnonzero(np.diff(block)) + 1), n_items]
    parts = [
        _neighbours_of(by_item, taken, counts, range(begin, end), neighbours=neighbours, shrinkage=shrinkage)
        for begin, end in pairwise(bounds)
    ]
    found: sparse.csr_matrix = sparse.vstack(parts, format="csr")
    return found


def _neighbours_of(
    by_item: sparse.csr_matrix,
    taken: sparse.csr_matrix,
    counts: np.ndarray,
    items: range,
    *,
    neighbours: int,
    shrinkage: float,
) -> sparse.csr_matrix:
    """The rows of `items` of `item_similarities`, from who took each item (N, S), its transpose and its sums (N,)."""
    together = (by_item[items.start : items.stop] @ taken).tocoo()
    others = together.col != together.row + items.start
    row, col, data = together.row[others], together.col[others], together.data[others]
    cosine = data / (np.sqrt(counts[row + items.start] * counts[col]) + shrinkage)
    # Keep the best of each row: sort by row, then by falling similarity, and cut at the rank.
    order = np.lexsort((col, -cosine, row))
    first = np.searchsorted(row[order], np.arange(len(items)))
    kept = order[np.arange(len(order)) - first[row[order]] < neighbours]
    return sparse.csr_matrix((cosine[kept], (row[kept], col[kept])), shape=(len(items), len(counts)))


def history_scores(
    similar: sparse.csr_matrix, history: np.ndarray, lengths: np.ndarray, *, decay: float
) -> sparse.csr_matrix:
    """Scores (B, N), most of them 0: similarities (N, N) summed over histories (B, T), an item d places back counting
    decay^d.
    """
    inside = np.arange(history.shape[1]) < lengths[:, None]
    weight = decay ** (lengths[:, None] - 1 - np.arange(history.shape[1]))
    user = np.broadcast_to(np.arange(len(history))[:, None], history.shape)
    shape = (len(history), similar.shape[0])
    profile = sparse.csr_matrix((weight[inside], (user[inside], history[inside])), shape=shape)
    found: sparse.csr_matrix = profile @ similar
    return found
