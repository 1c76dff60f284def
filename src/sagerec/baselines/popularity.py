"""Popularity: the items most often taken, without what the user had.

Shapes: n cases, N items, S sequences, K places.
"""

import numpy as np

from sagerec.catalogue.splits import Cases, Sequences

BATCH_CASES = 1024


def popularity_lists(train: Sequences, cases: Cases, *, n_items: int, k: int, exclude_history: bool) -> np.ndarray:
    """The k items (n, k) with most training interactions, without the history where it is excluded."""
    counts = np.bincount(train.items, minlength=n_items)
    order = np.argsort(-counts, kind="stable")
    lists = np.full((len(cases), k), -1, dtype=np.int64)
    for begin in range(0, len(cases), BATCH_CASES):
        index = np.arange(begin, min(begin + BATCH_CASES, len(cases)))
        taken = cases.taken(index)
        candidates = order[: k + taken.shape[1]]
        barred = np.zeros((len(index), len(candidates)), dtype=bool)
        if exclude_history:
            for place in range(taken.shape[1]):
                barred |= taken[:, place : place + 1] == candidates
        chosen_places = np.argsort(barred, axis=1, kind="stable")[:, :k]
        chosen = np.where(np.take_along_axis(barred, chosen_places, 1), -1, candidates[chosen_places])
        lists[index, : chosen.shape[1]] = chosen
    return lists
