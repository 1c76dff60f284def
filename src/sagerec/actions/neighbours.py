"""Neighbours: how many users took two items, for the pairs of the training sequences that occur most.

A part of an action space, beside its content vectors, for policies that read it (`policies.cooccurrence`). Counted over
whole sequences, a user once, so that a sequence adds at most one to any pair: what it added can be taken out again
exactly, which training on that very sequence must do.

Shapes: N items, m neighbours kept of each, S sequences.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from sagerec.catalogue.splits import Sequences

SHRINK = 5.0
"""Added to the root of the product of two items' counts, so that pairs of rare items are not believed at once."""
NONE = -1
"""Stands where an item has fewer neighbours than others."""
LARGEST_CHUNK = 2**25
"""Pairs that are held at a time, about."""


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The items that occur most with each item."""

    items: np.ndarray
    """(N, m) int32 neighbours of each item, -1 after the last."""
    counts: np.ndarray
    """(N, m) int32 users who took both, 0 after the last."""
    item_counts: np.ndarray
    """(N,) int32 users who took each item."""

    def grown(self, n_items: int) -> "Neighbours":
        """The same for a catalogue that grew to `n_items`: later items have no neighbours, and are none."""
        more = n_items - len(self.items)
        return Neighbours(
            np.pad(self.items, ((0, more), (0, 0)), constant_values=NONE),
            np.pad(self.counts, ((0, more), (0, 0))),
            np.pad(self.item_counts, (0, more)),
        )


def similarity(together: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """c_ij / (sqrt(n_i n_j) + SHRINK): the cosine of two items' users, shrunk."""
    found: np.ndarray = together / (np.sqrt(one.astype(np.float64) * other) + SHRINK)
    return found


def count_neighbours(train: Sequences, n_items: int, most: int) -> Neighbours:
    """The `most` neighbours of each item by count, ties by similarity, then by index. `train`: see the audit.

    Rows of the product of the users' table with itself are made in chunks: N x N is never held.
    """
    user = np.repeat(np.arange(len(train)), np.diff(train.offsets))
    ones = np.ones(len(train.items), dtype=np.int32)
    table = sparse.csr_matrix((ones, (user, train.items)), shape=(len(train), n_items))
    table.data[:] = 1  # an item that a user took twice
    taken = np.asarray(table.sum(axis=0), dtype=np.int32).ravel()
    by_item = table.T.tocsr()
    # Pairs that each row of the product adds up: the lengths of the sequences that hold the item.
    work = np.cumsum(by_item @ np.diff(table.indptr).astype(np.int64))
    bounds = np.searchsorted(work, np.arange(0, work[-1], LARGEST_CHUNK), side="left")
    items, counts = np.full((n_items, most), NONE, dtype=np.int32), np.zeros((n_items, most), dtype=np.int32)
    for begin, end in zip(bounds, [*bounds[1:], n_items], strict=True):
        pairs = (by_item[begin:end] @ table).tocoo()
        row, column, together = pairs.row.astype(np.int64), pairs.col, pairs.data
        other = column != row + begin
        row, column, together = row[other], column[other], together[other]
        order = np.lexsort((column, -similarity(together, taken[row + begin], taken[column]), -together, row))
        row, column, together = row[order], column[order], together[order]
        size = np.bincount(row, minlength=end - begin)
        rank = np.arange(len(row)) - np.repeat(size.cumsum() - size, size)
        kept = rank < most
        items[row[kept] + begin, rank[kept]] = column[kept]
        counts[row[kept] + begin, rank[kept]] = together[kept]
    widest = max(int((counts > 0).sum(axis=1).max(initial=0)), 1)
    return Neighbours(items[:, :widest].copy(), counts[:, :widest].copy(), taken)
