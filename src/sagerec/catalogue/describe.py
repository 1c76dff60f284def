"""What `sagerec inspect` says of a dataset: counts, quantiles, ties in time, cold items."""

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

from sagerec.catalogue.dataset import CATEGORIES, FEEDBACK_COLUMNS, TIMESTAMP, TITLE, Dataset
from sagerec.catalogue.splits import Split, learnt_counts

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
EPOCH_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
"""Unit -> how many make a second."""
EPOCH_SECONDS = (1e8, 1e10)
"""From 1973 to 2286: a number within, in a unit, is likely a time since 1970 in it; no number is so in two."""


def _quantiles(values: np.ndarray) -> dict[str, float]:
    points = np.quantile(values, QUANTILES)
    return {f"{q:.0%}": float(v) for q, v in zip(QUANTILES, points, strict=True)}


def time_range(times: pl.Series) -> str:
    """The first and the last time, as dates where the numbers look like an epoch; units that are mixed are named."""
    first, last = times.min(), times.max()
    if times.dtype.is_numeric():
        low, high = EPOCH_SECONDS
        size = times.cast(pl.Float64).abs()
        counts = {unit: int(((size >= low * n) & (size < high * n)).sum()) for unit, n in EPOCH_UNITS.items()}
        counts = {unit: count for unit, count in counts.items() if count}
        if len(counts) > 1:
            each = ", ".join(f"{count:,} in {unit}" for unit, count in counts.items())
            return f"{first!s} to {last!s}: MIXED UNITS ({each}), so their order is wrong; write all in one unit"
        for unit in counts:
            seconds = times.cast(pl.Float64) / EPOCH_UNITS[unit]
            if (seconds.abs() < high).all():
                begin = datetime(1970, 1, 1)
                dates = [begin + timedelta(seconds=float(t)) for t in seconds.bottom_k(1).append(seconds.top_k(1))]
                return f"{dates[0]:%Y-%m-%d %H:%M} to {dates[1]:%Y-%m-%d %H:%M} (UTC, of {unit})"
    return f"{first!s} to {last!s}"


def describe(data: Dataset, split: Split, *, cold_max_count: int) -> dict[str, Any]:
    """Figures of a dataset under a split.

    Same-time ties are events that share user and time with the one before: their order, and so the target of a
    case, is arbitrary. Cold items have at most `cold_max_count` training interactions.
    """
    times = data.events[TIMESTAMP].rank("dense").to_numpy()
    same_user = data.event_users[1:] == data.event_users[:-1]
    ties = int((same_user & (times[1:] == times[:-1])).sum())
    repeats = len(data.event_items) - len(
        np.unique(data.event_users.astype(np.int64) * data.n_items + data.event_items)
    )
    counts = learnt_counts(data, split)
    cold = counts <= cold_max_count
    targets = data.event_items[split.mask("test")]
    return {
        "users": data.n_users,
        **({} if data.profiles is None else {"users_with_profile": int((data.profiles != "").sum())}),
        "items": data.n_items,
        "interactions": data.n_events,
        "density": data.n_events / data.n_users / data.n_items,
        "parts": split.counts(),
        "scheme": split.scheme,
        "sequence_length": _quantiles(np.diff(data.user_offsets)),
        "item_interactions": _quantiles(np.bincount(data.event_items, minlength=data.n_items)),
        "times": time_range(data.events[TIMESTAMP]),
        "same_time_ties": ties,
        "same_time_tie_share": ties / max(int(same_user.sum()), 1),
        "repeated_items": repeats,
        "users_with_one_event": int((np.diff(data.user_offsets) == 1).sum()),
        "items_without_title": data.items[TITLE].null_count(),
        "items_without_text": data.texts().count(""),
        "categories": int(data.items[CATEGORIES].explode().drop_nulls().n_unique()) if data.has_categories() else 0,
        "feedback_columns": [c for c in FEEDBACK_COLUMNS if c in data.events.columns],
        "cold_max_count": cold_max_count,
        "cold_item_share": float(cold.mean()),
        "never_trained_item_share": float((counts == 0).mean()),
        "cold_test_cases": int(cold[targets].sum()),
        "cold_test_case_share": float(cold[targets].mean()),
    }
