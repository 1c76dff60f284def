"""The figures of `sagerec inspect`, worked by hand."""

from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sagerec.catalogue.dataset import INTERACTIONS, ITEMS, Dataset, assemble, check_interactions, check_items
from sagerec.catalogue.describe import describe, time_range
from sagerec.catalogue.splits import Split, SplitSettings, make_split
from tests.test_dataset import dataset

EVENTS = [
    ("u", "a", 1),
    ("u", "b", 1),
    ("u", "a", 2),
    ("u", "c", 3),
    ("u", "d", 3),
    ("v", "e", 3),
    ("v", "b", 4),
    ("v", "a", 4),
    ("w", "b", 5),
]
CATEGORIES = [["x"], ["x", "y", "x"], [], None, ["y", None]]


def small(times: list[Any] | None = None) -> Dataset:
    items = pl.DataFrame(
        {"item_id": list("abcde"), "title": ["A", None, "", "D", "E"], "categories": CATEGORIES}, strict=False
    )
    events = pl.DataFrame(EVENTS, schema=["user_id", "item_id", "timestamp"], orient="row")
    events = events.with_columns(rating=pl.lit(5.0), click=pl.lit(1), page=pl.lit(2))
    if times:
        events = events.with_columns(pl.Series("timestamp", times))
    return assemble(check_items(items, Path(ITEMS)), check_interactions(events, Path(INTERACTIONS)))


def test_every_figure_by_hand() -> None:
    """Three users, five items, nine events.

    Leave-one-out: u trains on a, b, a, validates on c, tests on d; v trains on e, validates on b, tests on a; w only
    trains on b. Training counts: a 2, b 2, c 0, d 0, e 1; at most 1 is cold: c, d, e, three of five; never trained:
    c, d. Of the two test targets d and a, one is cold.

    Ties: u's a b at time 1 and c d at time 3, v's b a at time 4; u's last and v's first event share time 3 but not
    the user. Neighbours of one user: 4 + 2 + 0 = 6, so 3 of 6. Repeats: u's second a.

    Lengths 5, 3, 1: the quantile q stands at place 2q of 1, 3, 5, so 0.9 -> 3 + 0.8 * 2, 0.99 -> 3 + 0.98 * 2.
    Interactions of the items 3, 3, 1, 1, 1: at place 4q of 1, 1, 1, 3, 3. Density 9 / (3 * 5).
    Titles: b's is null and c's is empty. Categories: x and y; nulls and empty lists are none.
    """
    data = small()
    found = describe(data, make_split(data, SplitSettings()), cold_max_count=1)
    assert found == {
        "users": 3,
        "items": 5,
        "interactions": 9,
        "density": pytest.approx(0.6),
        "parts": {"train": 5, "align": 0, "valid": 2, "test": 2},
        "scheme": "leave-one-out",
        "sequence_length": pytest.approx(
            {"0%": 1, "25%": 2, "50%": 3, "75%": 4, "90%": 4.6, "99%": 4.96, "100%": 5},
        ),
        "item_interactions": pytest.approx(
            {"0%": 1, "25%": 1, "50%": 1, "75%": 3, "90%": 3, "99%": 3, "100%": 3},
        ),
        "times": "1 to 5",
        "same_time_ties": 3,
        "same_time_tie_share": pytest.approx(0.5),
        "repeated_items": 1,
        "users_with_one_event": 1,
        "items_without_title": 2,
        "items_without_text": 2,
        "categories": 2,
        "feedback_columns": ["click", "rating"],
        "cold_max_count": 1,
        "cold_item_share": pytest.approx(0.6),
        "never_trained_item_share": pytest.approx(0.4),
        "cold_test_cases": 1,
        "cold_test_case_share": pytest.approx(0.5),
    }


@pytest.mark.parametrize(("limit", "items", "cases"), [(0, 2, 1), (1, 3, 1), (2, 5, 2)])
def test_cold_counts_grow_with_the_limit(limit: int, items: int, cases: int) -> None:
    """Training counts 2, 2, 0, 0, 1; the targets are d (0) and a (2)."""
    data = small()
    found = describe(data, make_split(data, SplitSettings()), cold_max_count=limit)
    assert found["cold_item_share"] == pytest.approx(items / 5)
    assert (found["cold_test_cases"], found["cold_test_case_share"]) == (cases, cases / 2)


@pytest.mark.parametrize(
    "times",
    [
        [datetime(2024, 1, row[2]) for row in EVENTS],
        [Decimal(row[2]) / 4 for row in EVENTS],
        [row[2] / 3 for row in EVENTS],
    ],
    ids=["datetimes", "decimals", "floats"],
)
def test_ties_are_the_same_for_times_of_every_type(times: list[Any]) -> None:
    data = small(times)
    assert describe(data, make_split(data, SplitSettings()), cold_max_count=1)["same_time_ties"] == 3


MIXED = "MIXED UNITS (2 in seconds, 1 in milliseconds), so their order is wrong; write all in one unit"
RANGES: list[tuple[list[Any], str]] = [
    ([0, 57, 3], "0 to 57"),
    ([1.5, -2.0], "-2.0 to 1.5"),
    ([1500794772, 1500794700], "2017-07-23 07:25 to 2017-07-23 07:26 (UTC, of seconds)"),
    ([1500794772000, 1588687728923], "2017-07-23 07:26 to 2020-05-05 14:08 (UTC, of milliseconds)"),
    ([0, 1500794772], "1970-01-01 00:00 to 2017-07-23 07:26 (UTC, of seconds)"),
    ([1500794772, 1500794773000, 1500794771], f"1500794771 to 1500794773000: {MIXED}"),
    ([datetime(2011, 2, 1, 8, 26), datetime(2011, 1, 12)], "2011-01-12 00:00:00 to 2011-02-01 08:26:00"),
    ([-(10**11) + 1, 1500794772], "-99999999999 to 1500794772"),
]


@pytest.mark.parametrize(("times", "expected"), RANGES)
def test_the_range_of_times_is_of_dates_where_they_look_like_it(times: list[Any], expected: str) -> None:
    """1500794772 s is 23 July 2017, 07:26:12 UTC."""
    assert time_range(pl.Series(times)) == expected


def test_users_of_one_event_have_no_ties_and_no_repeats() -> None:
    """Three users take the same item at the same time: no two events share user and time, or user and item."""
    data = dataset({user: [("a", 1)] for user in "uvw"})
    found = describe(data, Split(np.array([0, 0, 3], dtype=np.uint8), "column"), cold_max_count=5)
    assert (found["same_time_ties"], found["same_time_tie_share"], found["repeated_items"]) == (0, 0.0, 0)
    assert (found["categories"], found["feedback_columns"], found["items_without_title"]) == (0, [], 0)
    assert found["parts"] == {"train": 2, "align": 0, "valid": 0, "test": 1}
