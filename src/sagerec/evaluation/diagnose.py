"""Where lists miss: by the target's popularity, and at which code of its Semantic ID.

A target that is not in its list is missed at one place: it was never trained on; or no listed item shares its first
code; or some item shares that, but none its second; and so on, to the last code; or, where items share IDs, a listed
item has all its codes. The shares of hits and misses add up to 1. A hit is the target itself: where items share IDs,
Recall is lower here than the expected value of `evaluate`.

Shapes: n cases, K places, N items, L codes, B buckets.
"""

from dataclasses import dataclass

import numpy as np

from sagerec.actions.space import ActionSpace
from sagerec.evaluation import metrics

HIT, UNSEEN = "hit", "never trained on"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What became of the targets of one system's lists."""

    outcomes: dict[str, float]
    """Outcome -> share of the cases; the shares add up to 1."""
    by_popularity: np.ndarray
    """(B,) Recall@K of the targets of each popularity bucket, NaN where there is none."""
    cases: np.ndarray
    """(B,) targets in each bucket."""


def diagnose(
    lists: np.ndarray, targets: np.ndarray, space: ActionSpace, counts: np.ndarray, edges: tuple[int, ...]
) -> Diagnosis:
    """Outcomes and Recall by popularity of lists (n, K), -1 where there is none, for targets (n,).

    `counts` (N,) are the interactions of each item that was learnt from, `edges` the upper ends of the buckets but the
    last.
    """
    hit = (lists == targets[:, None]).any(axis=1)
    unseen = ~hit & (counts[targets] == 0)
    outcomes = {HIT: float(hit.mean()), UNSEEN: float(unseen.mean())}
    left = ~hit & ~unseen
    for level in range(space.longest):
        node = space.nodes_at(targets, level)
        shared = ((space.nodes_at(np.maximum(lists, 0), level) == node[:, None]) & (lists >= 0)).any(axis=1)
        missed = left & (node >= 0) & ~shared
        outcomes[f"missed at code {level + 1}"] = float(missed.mean())
        left &= ~missed
    if left.any():
        outcomes["shares its ID with a listed item"] = float(left.mean())
    bucket = metrics.popularity_buckets(counts[targets], edges)
    recalls = [hit[bucket == b].mean() if (bucket == b).any() else np.nan for b in range(len(edges) + 1)]
    return Diagnosis(outcomes, np.array(recalls), np.bincount(bucket, minlength=len(edges) + 1))
