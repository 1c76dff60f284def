"""Which items are taken by the same users: item-kNN's similarities, and the scores that they give a history.

Shapes: N items, S sequences, B histories of at most T items.
"""

import numpy as np
from scipy import sparse

from sagerec.catalogue.splits import Sequences


def item_similarities(train: Sequences, n_items: int, *, neighbours: int, shrinkage: float) -> sparse.csr_matrix:
    """Cosine of items over training users, s_ij = n_ij / (sqrt(n_i n_j) + shrinkage), the best `neighbours` of each.

    Sarwar et al. (2001); the shrinkage of Bell and Koren (2007) in the denominator.
    """
    user = np.repeat(np.arange(len(train)), np.diff(train.offsets))
    ones = np.ones(len(user), dtype=np.float32)
    taken = sparse.csr_matrix((ones, (user, train.items)), shape=(len(train), n_items))
    taken.data[:] = 1
    together = (taken.T @ taken).tocsr()
    counts = together.diagonal()
    together.setdiag(0)
    together.eliminate_zeros()
    pairs = together.tocoo()
    cosine = pairs.data / (np.sqrt(counts[pairs.row] * counts[pairs.col]) + shrinkage)
    # Keep the best of each row: sort by row, then by falling similarity, and cut at the rank.
    order = np.lexsort((pairs.col, -cosine, pairs.row))
    row = pairs.row[order]
    first = np.searchsorted(row, np.arange(n_items))
    kept = order[np.arange(len(row)) - first[row] < neighbours]
    return sparse.csr_matrix((cosine[kept], (pairs.row[kept], pairs.col[kept])), shape=(n_items, n_items))


def history_scores(similar: sparse.csr_matrix, history: np.ndarray, lengths: np.ndarray, *, decay: float) -> np.ndarray:
    """Scores (B, N): similarities (N, N) summed over histories (B, T), an item d places back counting decay^d."""
    inside = np.arange(history.shape[1]) < lengths[:, None]
    weight = decay ** (lengths[:, None] - 1 - np.arange(history.shape[1]))
    user = np.broadcast_to(np.arange(len(history))[:, None], history.shape)
    shape = (len(history), similar.shape[0])
    profile = sparse.csr_matrix((weight[inside], (user[inside], history[inside])), shape=shape)
    return np.asarray((profile @ similar).todense())
