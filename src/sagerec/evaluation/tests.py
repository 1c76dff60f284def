"""Statistics of a comparison: several systems, each with several seeds, on the same cases.

A difference has two sources of error: the users at hand, and the seeds of the training. A verdict needs both. A trained
system of one seed says nothing about the second, so its differences are shown with the error over users alone and get
no verdict; a system with nothing random has no second source. `docs/metrics.md` says how each part is had.

Shapes: S seeds, n cases, U users, K places in a list, N items.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sagerec.catalogue.splits import Cases
from sagerec.evaluation import intervals, metrics
from sagerec.evaluation.intervals import Estimate
from sagerec.evaluation.per_case import PerCase, Yardstick, mean_over_seeds, per_case

COMPARED = (
    *("recall", "ndcg", "cold_recall", "entropy", "coarse_entropy", "coverage"),
    *("clicks", "likes", "dislikes", "watch_seconds"),
)
"""The metrics that are compared, those of them that the data has."""
ONE_SEED, NO_DIFFERENCE, HIGHER, LOWER = "one seed", "no difference", "higher", "lower"
"""Verdicts."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One system's lists, seed by seed, and its values."""

    lists: tuple[np.ndarray, ...]
    """S arrays (n, k)."""
    users: np.ndarray
    """(n,) user of each case."""
    n_items: int
    """N."""
    per_case: PerCase
    """Metric -> mean over the seeds on every case that counts."""
    by_seed: dict[str, np.ndarray]
    """Metric -> (S,), coverage included."""
    is_random: bool = True
    """Whether another seed would give another system."""

    @property
    def seeds(self) -> int:
        """S."""
        return len(self.lists)

    def seed_error(self, variance: float) -> float:
        """Variance of the mean over its seeds, where one seed has `variance`."""
        return variance / self.seeds if self.is_random else 0.0


def measure(
    lists: Sequence[np.ndarray],
    cases: Cases,
    yardstick: Yardstick,
    n_items: int,
    *,
    is_random: bool = True,
    k: int = 10,
) -> Measured:
    """The compared metrics at k of one system, by its lists (n, K) of each seed."""
    compared = {f"{name}@{k}" for name in COMPARED}
    tables = [
        {name: v for name, v in per_case(found, cases, (k,), yardstick).items() if name in compared} for found in lists
    ]
    by_seed = {name: np.array([table[name].mean() for table in tables]) for name in tables[0]}
    by_seed[f"coverage@{k}"] = np.array([metrics.coverage_at(found, n_items, k) for found in lists])
    ordered = {name: by_seed[name] for name in (f"{name}@{k}" for name in COMPARED) if name in by_seed}
    cut = tuple(found[:, :k] for found in lists)
    return Measured(cut, cases.users, n_items, mean_over_seeds(tables), ordered, is_random)


def summarise(found: Measured, *, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Value (mean over the seeds), 95 % interval over users, and deviation over seeds of each metric."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, by_seed in found.by_seed.items():
        if name in found.per_case:
            drawn = found.per_case[name]
            interval = intervals.bootstrap_mean(drawn.values, drawn.users, samples=samples, rng=rng)
        else:
            beside = np.concatenate(found.lists, axis=1)
            interval = intervals.jackknife(_mean_coverage(found), beside, found.users, rng=rng).interval()
        deviation = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None
        values[name] = asdict(interval) | {"seed_std": deviation}
    return values


def _mean_coverage(found: Measured) -> Callable[[np.ndarray], float]:
    """The mean of the seeds' coverages, of their lists side by side (n, S k), so that a user's are drawn together."""

    def statistic(lists: np.ndarray) -> float:
        parts = np.split(lists, found.seeds, axis=1)
        return float(np.mean([metrics.coverage_at(part, found.n_items, part.shape[1]) for part in parts]))

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
        values = [m.by_seed[name] for m in found if m.is_random and m.seeds > 1]
        degrees = sum(len(v) - 1 for v in values)
        total = sum(float(((v - v.mean()) ** 2).sum()) for v in values)
        pooled[name] = SeedVariance(total / degrees if degrees else 0.0, degrees)
    return pooled


def block_variances(found: Sequence[Measured]) -> dict[str, SeedVariance]:
    """What is left of the variance over seeds where the rows of a seed share a start: a seed is a block.

    v = sum_is (y_is - y_i - y_s + y)^2 / ((R - 1)(S - 1)), over the R random rows of S seeds each (randomised blocks):
    what the start of a seed does to both of two rows cancels in their difference. Without two such rows there is none.
    """
    several = [m for m in found if m.is_random and m.seeds > 1]
    if len(several) < 2 or len({m.seeds for m in several}) > 1:
        return {}
    left = {}
    for name in several[0].by_seed:
        values = np.stack([m.by_seed[name] for m in several])
        residual = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
        degrees = (values.shape[0] - 1) * (values.shape[1] - 1)
        left[name] = SeedVariance(float((residual**2).sum()) / degrees, degrees)
    return left


def differences(
    a: Measured,
    b: Measured,
    seeds: dict[str, SeedVariance],
    *,
    seed: int,
    blocks: dict[str, SeedVariance] | None = None,
    confidence: float = 0.95,
) -> dict[str, dict[str, Any]]:
    """Each metric of `a` less that of `b`, with its interval and, where both have several seeds, a two-sided p.

    SE^2 = SE_users^2 + (1 / S_a + 1 / S_b) v: SE_users of the paired differences of the seeds' means over users
    (`mean_over_users`; the jackknife for coverage), v the pooled variance over seeds; the part of a system with nothing
    random is 0. Student's t with Satterthwaite's degrees of freedom, of U - 1 (groups - 1) and of the pooled seeds'.
    Where the rows of a seed share a start, `blocks` (`block_variances`) stands in the place of v between random rows.

    Where one side is a random system of one seed, the interval is over users alone (`covers`), `p_value` is None and
    the verdict says `one seed`. A metric whose cases are of one user is left out: it has no error to compare with.
    """
    rng = np.random.default_rng(seed)
    tested = all(m.seeds > 1 or not m.is_random for m in (a, b))
    found: dict[str, dict[str, Any]] = {}
    for name, drawn in seeds.items():
        if name not in a.per_case:
            estimate = _coverage_difference(a, b, rng)
        else:
            paired = a.per_case[name].minus(b.per_case[name])
            if len(np.unique(paired.users)) < 2:
                continue
            estimate = intervals.mean_over_users(paired.values, paired.users)
        if tested:
            if a.is_random and b.is_random and blocks:
                drawn = blocks[name]
            estimate = estimate.widened(a.seed_error(drawn.variance) + b.seed_error(drawn.variance), drawn.degrees)
        ends = estimate.interval(confidence)
        found[name] = {"difference": estimate.value, "low": ends.low, "high": ends.high}
        if tested:
            found[name] |= {"covers": "users and seeds", "p_value": estimate.p_value()}
        else:
            found[name] |= {"covers": "users", "p_value": None, "verdict": ONE_SEED}
    return found


def _coverage_difference(a: Measured, b: Measured, rng: np.random.Generator) -> Estimate:
    """Difference of the mean coverages, by the jackknife on both systems' lists at once."""
    first, second = _mean_coverage(a), _mean_coverage(b)
    width = sum(part.shape[1] for part in a.lists)

    def statistic(lists: np.ndarray) -> float:
        return first(lists[:, :width]) - second(lists[:, width:])

    return intervals.jackknife(statistic, np.concatenate([*a.lists, *b.lists], axis=1), a.users, rng=rng)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of n times (n - i + 1), never falling, at most 1 (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = [0.0] * len(p_values), 0.0
    for i, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - i) * p_values[index]))
        adjusted[index] = running
    return adjusted


def judge(tests: Sequence[dict[str, Any]], *, level: float = 0.05) -> int:
    """Add Holm's p over all tests that have a p, and a verdict to each; returns how many they are."""
    judged = [test for test in tests if test["p_value"] is not None]
    for test, p in zip(judged, holm([test["p_value"] for test in judged]), strict=True):
        test["p_holm"] = p
        test["verdict"] = NO_DIFFERENCE if p >= level else (HIGHER if test["difference"] > 0 else LOWER)
    return len(judged)
