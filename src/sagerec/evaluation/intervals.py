"""Intervals of metrics: bootstrap of means, jackknife of what is no mean. `docs/metrics.md` defines them.

Shapes: U evaluation cases, K places in a list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from sagerec.errors import SettingsError
from sagerec.evaluation.metrics import FloatArray, IntArray

_BLOCK_DRAWS = 4_194_304  # bootstrap draws held at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic on all cases (`value`) and the ends of its confidence interval, in the statistic's unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Two systems compared on the same cases."""

    difference: Interval
    """Mean of a - b over the cases."""
    p_value: float
    """Two-sided, for the hypothesis that the mean difference is 0; never below 2 / (samples + 1)."""


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise SettingsError(f"confidence is {confidence}; expected between 0 and 1: give 0.95, for example")


def _resampled_means(values: FloatArray, samples: int, rng: np.random.Generator) -> FloatArray:
    """Means (samples,) of U draws from `values` with replacement, a block of samples at a time.

    Where few values are distinct (recall has two, NDCG@k k + 1), the number of draws of each is multinomial:
    the same distribution without a draw a user.
    """
    distinct, counts = np.unique(values, return_counts=True)
    n, few = len(values), 8 * len(distinct) <= len(values)
    step = max(1, _BLOCK_DRAWS // (len(distinct) if few else n))
    means = np.empty(samples)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        if few:
            means[start : start + size] = rng.multinomial(n, counts / n, size=size) @ distinct / n
        else:
            means[start : start + size] = values[rng.integers(n, size=(size, n))].mean(axis=1)
    return means


def _bootstrap(
    values: npt.NDArray[Any], samples: int, confidence: float, rng: np.random.Generator
) -> tuple[Interval, FloatArray]:
    assert values.ndim == 1, values.shape
    _check_confidence(confidence)
    if samples < 1:
        raise SettingsError(f"samples is {samples}; expected 1 or more: give 1000, for example")
    if not values.size:
        raise SettingsError("no case to average; expected at least one: widen the selection or leave it out")
    values = values.astype(np.float64)
    if wrong := int(np.count_nonzero(~np.isfinite(values))):
        raise SettingsError(f"{wrong} of {len(values)} values are not finite; expected numbers: mend the metric")
    means = _resampled_means(values, samples, rng)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high)), means


def bootstrap_mean(
    values: npt.NDArray[Any], *, samples: int = 1000, confidence: float = 0.95, rng: np.random.Generator
) -> Interval:
    """Percentile bootstrap of a mean over users: the (1 ∓ confidence)/2 quantiles of the resampled means.

    Args: values (U,), one a case. Raises: SettingsError for no value, one that is not finite, samples < 1, or
    confidence outside (0, 1). Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13.
    """
    return _bootstrap(values, samples, confidence, rng)[0]


def paired_bootstrap(
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> PairedDifference:
    """Percentile bootstrap of mean(a - b), users resampled in pairs, with a two-sided p-value.

    p = min(1, 2 (1 + min(#{m <= 0}, #{m >= 0})) / (samples + 1)) over the resampled means m; 1 - p is about the
    greatest confidence whose percentile interval leaves 0 out.

    Args: a, b (U,), the same cases in the same order. Raises: SettingsError as `bootstrap_mean`.
    """
    assert a.shape == b.shape, (a.shape, b.shape)
    interval, means = _bootstrap(a.astype(np.float64) - b.astype(np.float64), samples, confidence, rng)
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return PairedDifference(interval, min(1.0, 2 * (1 + tail) / (samples + 1)))


def jackknife(
    statistic: Callable[[IntArray], float],
    lists: IntArray,
    *,
    groups: int = 20,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> Interval:
    """Delete-a-group jackknife over users, for a statistic that is no mean over users (coverage, Gini).

    SE^2 = (g-1)/g sum_j (t_j - mean t)^2, t_j the statistic without random group j; t(all users) ∓ z SE.
    Not the bootstrap: a resample holds only about 63 % of the users, the rest being repeats, so its coverage
    lies below that of all users and its interval may leave that value out. The ends are not cut to [0, 1].

    Args: statistic (U', K) -> float; lists (U, K). Raises: SettingsError for groups outside 2..U or confidence
    outside (0, 1). Source: Kott, The delete-a-group jackknife, Journal of Official Statistics 17(4), 2001.
    """
    assert lists.ndim == 2, lists.shape
    _check_confidence(confidence)
    if not 2 <= groups <= len(lists):
        raise SettingsError(
            f"groups is {groups} for {len(lists)} lists; expected 2 to {len(lists)}: give fewer groups or more lists"
        )
    group = rng.permutation(len(lists)) % groups
    without = np.array([statistic(lists[group != j]) for j in range(groups)], dtype=np.float64)
    value, error = statistic(lists), float(np.sqrt((groups - 1) * without.var()))
    assert np.isfinite(value), value
    assert np.isfinite(error), without
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return Interval(value, value - z * error, value + z * error)
