"""Statistics of a comparison: several systems, each with several seeds, on the same cases.

Tested are Recall, NDCG, Cold-Recall, Entropy (coarse clusters) and coverage at 10; in the simulated store, its users'
expected answers too.

Shapes: S seeds, U cases, K places in a list, N items.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy import stats

from sagerec.catalogue.simulated_store import SimulatedStore, expected_answers
from sagerec.catalogue.splits import Cases
from sagerec.evaluation import intervals, metrics
from sagerec.evaluation.metrics import Clusters

GROUPS = 20
"""Of the jackknife."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One system's lists, seed by seed, and its value on every case."""

    lists: tuple[np.ndarray, ...]
    """S arrays (U, K)."""
    per_case: dict[str, np.ndarray]
    """Metric -> (U',) mean over the seeds, U' the cases that count."""
    by_seed: dict[str, np.ndarray]
    """Metric -> (S,)."""


def measure(
    lists: Sequence[np.ndarray],
    cases: Cases,
    cold: np.ndarray,
    clusters: Clusters,
    n_items: int,
    *,
    store: SimulatedStore | None = None,
    k: int = 10,
) -> Measured:
    """The compared metrics at k of one system; `cold` (N,) marks the cold items; a simulated store answers too."""
    chosen = cold[cases.targets]
    rows: dict[str, list[np.ndarray]] = {}
    coverage = []
    for found in lists:
        ranks = metrics.first_rank(found, cases.targets)
        recall = metrics.recall_at(ranks, k)
        values = {"recall@10": recall, "ndcg@10": metrics.ndcg_at(ranks, k), "cold_recall@10": recall[chosen]}
        values["coarse_entropy@10"] = metrics.entropy_at(found, clusters, k)
        if store is not None:
            values |= {f"{name}@10": value for name, value in expected_answers(store, cases, found[:, :k]).items()}
        for name, value in values.items():
            if len(value):
                rows.setdefault(name, []).append(value)
        coverage.append(metrics.coverage_at(found, n_items, k))
    per_case = {name: np.mean(values, axis=0) for name, values in rows.items()}
    by_seed = {name: np.array([v.mean() for v in values]) for name, values in rows.items()}
    return Measured(tuple(lists), per_case, by_seed | {"coverage@10": np.array(coverage)})


def summarise(found: Measured, n_items: int, *, samples: int, seed: int, k: int = 10) -> dict[str, dict[str, float]]:
    """Value (mean over the seeds), 95 % interval over users, and deviation over seeds of each metric."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, by_seed in found.by_seed.items():
        if name == "coverage@10":
            interval = intervals.jackknife(
                _mean_coverage(len(found.lists), n_items, k),
                _beside(found.lists, k),
                groups=min(GROUPS, len(found.lists[0])),
                rng=rng,
            )
        else:
            interval = intervals.bootstrap_mean(found.per_case[name], samples=samples, rng=rng)
        deviation = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None
        values[name] = asdict(interval) | {"seed_std": deviation}
    return values


def _beside(lists: Sequence[np.ndarray], k: int) -> np.ndarray:
    """The seeds' lists side by side, (U, S k), so that a user's are resampled together."""
    return np.concatenate([part[:, :k] for part in lists], axis=1)


def _mean_coverage(n_seeds: int, n_items: int, k: int) -> Callable[[np.ndarray], float]:
    def statistic(lists: np.ndarray) -> float:
        parts = np.split(lists, n_seeds, axis=1)
        return float(np.mean([metrics.coverage_at(part, n_items, k) for part in parts]))

    return statistic


@dataclass(frozen=True, slots=True)
class SeedVariance:
    """How much a metric moves from seed to seed, pooled over the systems that have several."""

    variance: float
    """sum_i (S_i - 1) s_i^2 / sum_i (S_i - 1); 0 where no system has several seeds."""
    degrees: int
    """sum_i (S_i - 1)."""


def seed_variances(found: Sequence[Measured]) -> dict[str, SeedVariance]:
    """The pooled variance over seeds of each metric."""
    pooled = {}
    for name in found[0].by_seed:
        values = [m.by_seed[name] for m in found if len(m.by_seed[name]) > 1]
        degrees = sum(len(v) - 1 for v in values)
        total = sum(float(((v - v.mean()) ** 2).sum()) for v in values)
        pooled[name] = SeedVariance(total / degrees if degrees else 0.0, degrees)
    return pooled


def differences(
    a: Measured,
    b: Measured,
    n_items: int,
    seeds: dict[str, SeedVariance],
    *,
    seed: int,
    k: int = 10,
    confidence: float = 0.95,
) -> dict[str, dict[str, float]]:
    """Each metric of `a` less that of `b`, with an interval and a two-sided p that cover users and seeds.

    SE^2 = SE_users^2 + (1 / S_a + 1 / S_b) v: SE_users of the paired differences of the seeds' means over users (the
    jackknife's for coverage), v the pooled variance over seeds, which a system of one seed has too. Student's t with
    Satterthwaite's degrees of freedom; where no system has several seeds, v is unknown and taken as 0.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, float]] = {}
    for name in a.by_seed:
        if name != "coverage@10":
            paired = a.per_case[name] - b.per_case[name]
            value, users = float(paired.mean()), float(paired.var(ddof=1) / len(paired))
        else:
            value, users = _coverage_difference(a, b, n_items, k, rng)
        drawn = seeds[name]
        between = drawn.variance * (1 / len(a.by_seed[name]) + 1 / len(b.by_seed[name]))
        error = (users + between) ** 0.5
        freedom = (users + between) ** 2 / (between**2 / drawn.degrees) if between else np.inf
        reach = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
        p_value = float(2 * stats.t.sf(abs(value) / error, freedom)) if error else float(value == 0)
        found[name] = {"difference": value, "low": value - reach, "high": value + reach, "p_value": p_value}
    return found


def _coverage_difference(
    a: Measured, b: Measured, n_items: int, k: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Difference of the mean coverages and its variance over users, by the jackknife on both systems' lists at once."""
    first, second = _mean_coverage(len(a.lists), n_items, k), _mean_coverage(len(b.lists), n_items, k)
    width = len(a.lists) * k

    def statistic(lists: np.ndarray) -> float:
        return first(lists[:, :width]) - second(lists[:, width:])

    both = np.concatenate([_beside(a.lists, k), _beside(b.lists, k)], axis=1)
    interval = intervals.jackknife(statistic, both, groups=min(GROUPS, len(both)), rng=rng)
    return interval.value, ((interval.high - interval.low) / (2 * NormalDist().inv_cdf(0.975))) ** 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of n times (n - i + 1), never falling, at most 1 (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = [0.0] * len(p_values), 0.0
    for i, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - i) * p_values[index]))
        adjusted[index] = running
    return adjusted


def judge(tests: list[dict[str, Any]], *, level: float = 0.05) -> None:
    """Add Holm's p over all tests and a verdict to each: higher, lower or no difference."""
    for test, p in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["p_holm"] = p
        test["verdict"] = "no difference" if p >= level else ("higher" if test["difference"] > 0 else "lower")
