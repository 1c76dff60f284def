"""The metrics of RecIF-Bench as pure functions. `docs/recif.md` defines them all.

Of a sample's predictions the first k count as they stand: they are not de-duplicated before the cut, so a repeat
wastes a place. Means are over all samples of a task, added up in the order of its rows, which is what the published
evaluator does: equal to the last bit.

Shapes: n samples, K predictions.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import log2

import numpy as np

from sagerec.evaluation.metrics import FloatArray

KS = (1, 32)
"""The published cuts."""
ABSENT = 1e-10
"""Probability of a token that is not among those that a generator returned."""


def passes(predicted: Sequence[Hashable], truth: Sequence[Hashable], k: int) -> bool:
    """pass@k: any of the first k predictions is asked for."""
    return not set(truth).isdisjoint(predicted[:k])


def passes_first(predicted: Sequence[Hashable], truth: Sequence[Hashable], k: int) -> bool:
    """position1_pass@k: the first item that is asked for is among the first k predictions."""
    return bool(truth) and truth[0] in predicted[:k]


def recall(predicted: Sequence[Hashable], truth: Sequence[Hashable], k: int) -> float:
    """recall@k: |set(first k) ∩ set(truth)| / |set(truth)|; 0 where nothing is asked for."""
    wanted = set(truth)
    return len(wanted.intersection(predicted[:k])) / len(wanted) if wanted else 0.0


def yes_score(p_yes: float | None, p_no: float | None) -> float | None:
    """P(yes) / (P(yes) + P(no)), an absent one 1e-10; None where both are 0, which is left out as published."""
    yes, no = (ABSENT if p is None else p for p in (p_yes, p_no))
    return yes / (yes + no) if yes + no > 0 else None


def auc(scores: FloatArray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; .5 where the labels (n,) are of one class, 0 without any."""
    if not len(labels):
        return 0.0
    if len(np.unique(labels)) < 2:
        return 0.5
    from sklearn.metrics import roc_auc_score  # half a second, which few commands need

    return float(roc_auc_score(labels, scores))


def mean_in_order(values: FloatArray) -> float:
    """Sum one after another over n, which may differ in the last bit from a sum by halves; 0 without any."""
    return float(np.add.accumulate(values)[-1] / len(values)) if len(values) else 0.0


def entropy_bits(clusters: Sequence[Hashable]) -> float:
    """Shannon entropy of the clusters of a list's items, in bits; 0 for none."""
    total = len(clusters)
    return -sum(count / total * log2(count / total) for count in Counter(clusters).values()) if total else 0.0


def cold_recall(keys: Sequence[int], cold: frozenset[int], k: int) -> float:
    """recall@k of the items that are asked for and cold (at least one)."""
    return len(cold.intersection(keys[:k])) / len(cold)


def repeated_share(predicted: Sequence[Hashable], k: int) -> float:
    """Share of the first k predictions that repeat one before them; 0 without any."""
    top = predicted[:k]
    return 1 - len(set(top)) / len(top) if top else 0.0
