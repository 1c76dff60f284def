"""Splits by hand and by their properties; sequences, cases and histories against slow twins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.artifacts import read_manifest
from sagerec.catalogue.dataset import Dataset
from sagerec.catalogue.splits import (
    PARTS,
    Cases,
    Part,
    Split,
    SplitSettings,
    learnt_counts,
    make_split,
    read_split,
    write_split,
)
from sagerec.errors import ArtifactError, DatasetError, SettingsError
from tests.test_dataset import dataset

TRAIN, ALIGN, VALID, TEST = range(4)


def log(lengths: list[int]) -> Dataset:
    """Users u00, u01 … with so many events; event number n of the log is item n modulo 7 at time n."""
    starts = np.cumsum([0, *lengths])
    return dataset(
        {
            f"u{u:02}": [(f"i{n % 7}", n) for n in range(starts[u], starts[u + 1])]
            for u in range(len(lengths))
            if lengths[u]
        },
        items=[f"i{i}" for i in range(7)],
    )


def timed(times: list[int], users: int = 1) -> Dataset:
    """Events at these times, dealt to the users in turn."""
    return dataset(
        {f"u{u}": [("i", t) for t in times[u::users]] for u in range(users) if times[u::users]}, items=["i", "j"]
    )


def parts_by_user(data: Dataset, split: Split) -> list[list[int]]:
    return [
        split.parts[begin:end].tolist()
        for begin, end in zip(data.user_offsets[:-1], data.user_offsets[1:], strict=True)
    ]


lengths_of_users = st.lists(st.integers(1, 7), min_size=1, max_size=12).map(lambda lengths: [*lengths, 4])
"""At least one user has 4 events, so that a leave-one-out split exists whatever is reserved."""


# --- leave-one-out --------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand() -> None:
    """Users with 5, 1, 3 and 2 events: those with fewer than 3 only train.

    The counts are 3 + 1 + 1 + 2 = 7 train, 2 valid, 2 test. Item n is event n modulo 7; train holds events
    0, 1, 2, 5, 6, 9, 10, so items 0, 1, 2, 5, 6, 2, 3.
    """
    data = log([5, 1, 3, 2])
    split = make_split(data, SplitSettings(scheme="leave-one-out"))
    assert parts_by_user(data, split) == [
        [TRAIN, TRAIN, TRAIN, VALID, TEST],
        [TRAIN],
        [TRAIN, VALID, TEST],
        [TRAIN, TRAIN],
    ]
    assert split.counts() == {"train": 7, "align": 0, "valid": 2, "test": 2}
    assert split.scheme == "leave-one-out"
    assert learnt_counts(data, split).tolist() == [1, 1, 2, 1, 0, 1, 1]


@given(lengths=lengths_of_users, reserve=st.sampled_from(["none", "event"]))
@settings(max_examples=60, deadline=None)
def test_leave_one_out_equals_the_slow_twin(lengths: list[int], reserve: Any) -> None:
    """The twin: train …, [align], valid, test; an event is reserved where another is left to train on."""
    data = log(lengths)
    split = make_split(data, SplitSettings(scheme="leave-one-out", reserve=reserve))
    for n, parts in zip(lengths, parts_by_user(data, split), strict=True):
        held_out = [VALID, TEST] if n >= 3 else []
        before = n - len(held_out)
        aligned = [ALIGN] if reserve == "event" and before >= 2 else []
        assert parts == [TRAIN] * (before - len(aligned)) + aligned + held_out
    later = [max(np.flatnonzero(np.array(p) <= ALIGN)) for p in parts_by_user(data, split)]
    held = [min(np.flatnonzero(np.array(p) >= VALID), default=99) for p in parts_by_user(data, split)]
    assert all(a < b for a, b in zip(later, held, strict=True))


def test_no_user_long_enough() -> None:
    with pytest.raises(DatasetError) as error:
        make_split(log([2, 1, 2]), SplitSettings())
    assert str(error.value) == (
        "the leave-one-out split leaves no event for test (users have 1.7 events on average); expected users with at "
        "least 3 events"
    )


# --- global time ----------------------------------------------------------------------------------------------------


def test_global_time_by_hand() -> None:
    """Ten events, times 1 … 6, 7, 7, 7, 10; the last 20 % begin at the 9th, time 7, so all three 7s test.

    The 30 % before would begin at the 6th, time 6: one event validates, for the others went to the test.
    """
    data = timed([1, 2, 3, 4, 5, 6, 7, 7, 7, 10])
    split = make_split(data, SplitSettings(scheme="global-time", test_share=0.2, valid_share=0.3))
    assert split.parts.tolist() == [TRAIN] * 5 + [VALID] + [TEST] * 4
    assert split.scheme == "global-time"


def test_global_time_without_validation() -> None:
    """40 events, a quarter tests: times 30 … 39."""
    split = make_split(timed(list(range(40))), SplitSettings(scheme="global-time", test_share=0.25, valid_share=0))
    assert split.parts.tolist() == [TRAIN] * 30 + [TEST] * 10


def test_the_smallest_test_share_leaves_the_last_time() -> None:
    split = make_split(timed([1, 2, 3, 3]), SplitSettings(scheme="global-time", test_share=1e-18, valid_share=0))
    assert split.parts.tolist() == [TRAIN, TRAIN, TEST, TEST]


@given(
    times=st.lists(st.integers(0, 12), min_size=2, max_size=40),
    users=st.integers(1, 4),
    shares=st.tuples(st.sampled_from([0, 0.1, 0.25]), st.sampled_from([0.1, 0.3, 0.5])),
)
@settings(max_examples=100, deadline=None)
def test_global_time_keeps_ties_together_and_the_parts_in_order(
    times: list[int], users: int, shares: tuple[float, float]
) -> None:
    data = timed(times, users)
    """The twin looks the two cuts up in the sorted times; where the first is the earliest time, nothing is left."""
    chosen = SplitSettings(scheme="global-time", valid_share=shares[0], test_share=shares[1])
    at = data.events["timestamp"].to_numpy()
    n = len(times)
    first_test = sorted(times)[int(n * (1 - shares[1]))]
    first_held_out = sorted(times)[int(n * (1 - shares[1] - shares[0]))]
    if first_held_out == min(times):
        with pytest.raises(DatasetError, match=r"^the global-time split leaves no event for train"):
            make_split(data, chosen)
        return
    split = make_split(data, chosen)
    for time in set(times):
        assert len(set(split.parts[at == time])) == 1
    order = split.parts[np.argsort(at, kind="stable")]
    assert (np.diff(order.astype(int)) >= 0).all()
    assert ((split.parts == TEST) == (at >= first_test)).all()
    assert ((split.parts == TRAIN) == (at < first_held_out)).all()
    assert split.counts()["test"] >= shares[1] * n - 1e-9
    assert split.counts()["valid"] + split.counts()["test"] >= (shares[0] + shares[1]) * n - 1e-9


# --- the log's own column -------------------------------------------------------------------------------------------


def test_a_column_is_followed_and_auto_takes_it() -> None:
    """Under auto the column wins; without one it is leave-one-out. Marked align events stay, whatever is reserved."""
    names = ["train", "align", "test", "train", "valid", "train"]
    data = dataset({"u": [("a", 1), ("b", 2), ("c", 3)], "v": [("a", 1), ("b", 2), ("c", 3)]}, split=names)
    for chosen in (SplitSettings(), SplitSettings(scheme="column", reserve="event")):
        split = make_split(data, chosen)
        assert [PARTS[p] for p in split.parts] == names
        assert split.scheme == "column"
    assert make_split(data, SplitSettings(scheme="leave-one-out")).parts.tolist() == [TRAIN, VALID, TEST] * 2
    assert make_split(log([3]), SplitSettings()).scheme == "leave-one-out"


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(DatasetError) as error:
        make_split(log([3]), SplitSettings(scheme="column"))
    assert str(error.value) == (
        "scheme 'column' needs a column 'split' in interactions.parquet (train, align, valid, test); "
        "add it, or choose leave-one-out or global-time"
    )


@pytest.mark.parametrize(("names", "part"), [(["train", "train"], "test"), (["test", "align"], "train")])
def test_a_column_that_leaves_a_part_empty(names: list[str], part: str) -> None:
    data = dataset({"u": [("a", 1), ("b", 2)]}, split=names)
    with pytest.raises(DatasetError, match=f"^the column split leaves no event for {part} "):
        make_split(data, SplitSettings())


# --- reserve --------------------------------------------------------------------------------------------------------


def test_reserved_events_by_hand() -> None:
    """Training events 3, 1, 1, 2: the last of the users who have two or more goes to alignment."""
    data = log([5, 1, 3, 2])
    split = make_split(data, SplitSettings(reserve="event"))
    assert parts_by_user(data, split) == [
        [TRAIN, TRAIN, ALIGN, VALID, TEST],
        [TRAIN],
        [TRAIN, VALID, TEST],
        [TRAIN, ALIGN],
    ]
    # Learnt from: events 0, 1, 5, 6, 9 of training and 2, 10 of alignment, items 0, 1, 5, 6, 2 and 2, 3.
    assert learnt_counts(data, split).tolist() == [1, 1, 2, 1, 0, 1, 1]


def test_reserved_users() -> None:
    """A fifth of ten users with 4 events: two users lose both training events to alignment, and nothing else."""
    data = log([4] * 10)
    chosen = SplitSettings(reserve="users", reserve_share=0.2, seed=1)
    split = make_split(data, chosen)
    parts = parts_by_user(data, split)
    reserved = [u for u in range(10) if ALIGN in parts[u]]
    assert len(reserved) == 2
    assert all(p == ([ALIGN] if u in reserved else [TRAIN]) * 2 + [VALID, TEST] for u, p in enumerate(parts))
    assert (make_split(data, chosen).parts == split.parts).all()
    others = [make_split(data, SplitSettings(reserve="users", reserve_share=0.2, seed=s)).parts for s in range(2, 8)]
    assert any((other != split.parts).any() for other in others)


def test_a_share_of_no_user() -> None:
    """0.04 of 10 users is 0.4, which rounds to none."""
    with pytest.raises(SettingsError) as error:
        make_split(log([4] * 10), SplitSettings(reserve="users", reserve_share=0.04))
    assert str(error.value) == "reserve_share 0.04 of 10 users is none; give a larger share"


def test_reserving_every_user_leaves_no_training() -> None:
    with pytest.raises(DatasetError, match=r"^the leave-one-out split leaves no event for train \(users have 3\.0 "):
        make_split(log([3]), SplitSettings(reserve="users", reserve_share=0.6))


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheme": "random"}, "scheme is 'random'; expected one of auto, leave-one-out, global-time, column"),
        ({"reserve": "items"}, "reserve is 'items'; expected one of none, event, users"),
        ({"reserve_share": 0.0}, "reserve_share is 0.0; expected between 0 and 1"),
        ({"reserve_share": 1.0}, "reserve_share is 1.0; expected between 0 and 1"),
        (
            {"test_share": 0.0},
            "valid_share 0.1 and test_share 0.0: expected positive, below 1 together",
        ),
        (
            {"valid_share": -0.1},
            "valid_share -0.1 and test_share 0.1: expected positive, below 1 together",
        ),
        (
            {"valid_share": 0.6, "test_share": 0.4},
            "valid_share 0.6 and test_share 0.4: expected positive, below 1 together",
        ),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        SplitSettings(**values)
    assert str(error.value) == message


# --- sequences and cases --------------------------------------------------------------------------------------------

some_parts = st.lists(st.sampled_from(PARTS), max_size=4, unique=True)


@st.composite
def splits(draw: st.DrawFn) -> tuple[Dataset, Split]:
    """A log and any division of it at all."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    parts = draw(st.lists(st.integers(0, 3), min_size=sum(lengths), max_size=sum(lengths)))
    return log(lengths), Split(np.array(parts, dtype=np.uint8), "column")


@given(both=splits(), chosen=some_parts)
@settings(max_examples=80, deadline=None)
def test_sequences_equal_the_slow_twin(both: tuple[Dataset, Split], chosen: list[Part]) -> None:
    data, split = both
    found = split.sequences(data, *chosen)
    expected: dict[int, list[int]] = {}
    for row in range(data.n_events):
        if PARTS[split.parts[row]] in chosen:
            expected.setdefault(int(data.event_users[row]), []).append(row)
    assert len(found) == len(expected)
    assert found.users.tolist() == list(expected)
    bounds = zip(found.offsets[:-1], found.offsets[1:], strict=True)
    assert [found.rows[begin:end].tolist() for begin, end in bounds] == list(expected.values())
    assert found.offsets[-1] == len(found.rows) == len(found.items)
    assert found.items.tolist() == [int(data.event_items[row]) for row in found.rows]
    assert [array.dtype.name for array in (found.offsets, found.rows, found.items)] == ["int64", "int64", "int32"]


@given(both=splits())
@settings(max_examples=40, deadline=None)
def test_the_parts_partition_the_events(both: tuple[Dataset, Split]) -> None:
    data, split = both
    rows = np.concatenate([split.sequences(data, part).rows for part in PARTS])
    assert sorted(rows) == list(range(data.n_events))
    assert sum(split.counts().values()) == data.n_events
    assert all(split.counts()[part] == len(split.sequences(data, part).rows) for part in PARTS)
    assert split.sequences(data, *PARTS).items.tolist() == data.event_items.tolist()


@given(both=splits(), part=st.sampled_from(PARTS), longest=st.integers(1, 7))
@settings(max_examples=80, deadline=None)
def test_cases_and_their_histories_equal_the_slow_twin(both: tuple[Dataset, Split], part: Part, longest: int) -> None:
    """The twin walks each user's events: the history of a target is everything before it, of whatever part."""
    data, split = both
    cases = split.cases(data, part)
    expected = []
    past: dict[int, list[int]] = {}
    for row in range(data.n_events):
        user, item = int(data.event_users[row]), int(data.event_items[row])
        before = past.setdefault(user, [])
        if PARTS[split.parts[row]] == part and before:
            expected.append((user, item, row, before[-longest:]))
        before.append(item)
    assert len(cases) == len(expected)
    assert list(zip(cases.users, cases.targets, cases.rows, strict=True)) == [e[:3] for e in expected]
    items, counts = cases.histories(np.arange(len(cases)), longest)
    histories = [e[3] for e in expected]
    width = max((len(h) for h in histories), default=1)
    assert counts.tolist() == [len(h) for h in histories]
    assert items.tolist() == [h + [0] * (width - len(h)) for h in histories]
    assert items.dtype == counts.dtype == np.int64


def test_histories_by_hand() -> None:
    """Users with 5 and 3 events, items 0-4 and 5, 6, 0; the tests' histories are 0 1 2 3 and 5 6.

    At most 3: 1 2 3 (the oldest goes) and 5 6 0 (padding on the right); at most 1: 3 and 6.
    """
    data = log([5, 3])
    cases = make_split(data, SplitSettings()).cases(data, "test")
    items, lengths = cases.histories(np.array([0, 1]), 3)
    assert items.tolist() == [[1, 2, 3], [5, 6, 0]]
    assert lengths.tolist() == [3, 2]
    items, lengths = cases.histories(np.array([1, 0, 1]), 1)
    assert items.tolist() == [[6], [3], [6]]
    assert lengths.tolist() == [1, 1, 1]
    items, lengths = cases.histories(np.array([1]), 50)
    assert items.tolist() == [[5, 6]]
    items, lengths = cases.histories(np.array([], dtype=np.int64), 5)
    assert (items.shape, lengths.shape) == ((0, 1), (0,))


def test_an_event_without_a_history_is_no_case() -> None:
    """User u's only event tests; v's second does. One case: v's, after its first."""
    data = dataset({"u": [("a", 1)], "v": [("a", 1), ("b", 2)]}, split=["test", "train", "test"])
    cases = make_split(data, SplitSettings()).cases(data, "test")
    assert (cases.users.tolist(), cases.targets.tolist(), cases.rows.tolist()) == ([1], [1], [2])


def test_sample() -> None:
    data = log([4] * 30)
    cases = make_split(data, SplitSettings()).cases(data, "valid")
    assert cases.sample(30, np.random.default_rng(0)) is cases
    drawn = cases.sample(10, np.random.default_rng(0))
    assert len(drawn) == 10
    assert (np.diff(drawn.rows) > 0).all()
    whole = {int(row): i for i, row in enumerate(cases.rows)}
    index = np.array([whole[int(row)] for row in drawn.rows])
    for name in ("users", "targets", "rows", "starts"):
        assert (getattr(drawn, name) == getattr(cases, name)[index]).all()
    assert drawn.histories(np.arange(10), 5)[0].tolist() == cases.histories(index, 5)[0].tolist()
    assert (cases.sample(10, np.random.default_rng(0)).rows == drawn.rows).all()
    seen: set[int] = set()
    for seed in range(20):
        seen |= set(cases.sample(10, np.random.default_rng(seed)).rows.tolist())
    assert len(seen) == 30
    empty = Cases(*(np.array([], dtype=np.int64) for _ in range(5)))
    assert len(empty.sample(3, np.random.default_rng(0))) == 0


# --- on disk --------------------------------------------------------------------------------------------------------


def test_write_and_read(tmp_path: Path) -> None:
    split, chosen = make_split(log([5, 3]), SplitSettings()), SplitSettings(reserve_share=0.3, seed=9)
    write_split(tmp_path / "split", split, chosen, "abc")
    found = read_split(tmp_path / "split")
    assert found.parts.tolist() == split.parts.tolist()
    assert (found.parts.dtype.name, found.scheme) == ("uint8", "leave-one-out")
    manifest = read_manifest(tmp_path / "split", "split")
    assert manifest.made_from == {"dataset": "abc"}
    assert manifest.sizes == {"scheme": "leave-one-out", "train": 4, "align": 0, "valid": 2, "test": 2}
    assert (manifest.seed, manifest.settings["reserve_share"]) == (9, 0.3)


@pytest.mark.parametrize("content", [None, b"no parquet"])
def test_a_damaged_split_is_refused(tmp_path: Path, content: bytes | None) -> None:
    write_split(tmp_path / "split", make_split(log([3]), SplitSettings()), SplitSettings(), "abc")
    path = tmp_path / "split" / "parts.parquet"
    path.unlink()
    if content:
        path.write_bytes(content)
    with pytest.raises(ArtifactError) as error:
        read_split(tmp_path / "split")
    said = "was changed after it was written" if content else "cannot be read (No such file or directory)"
    assert str(error.value) == f"{path} {said}; make {path.parent} again"
    with pytest.raises(ArtifactError, match=r"is not a split artefact: it has no manifest\.json"):
        read_split(tmp_path / "none")
