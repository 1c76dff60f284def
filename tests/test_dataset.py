"""The canonical dataset: every fault by its exact message, the canonical order against a slow twin, damaged files."""

import contextlib
import io
import re
import tempfile
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from sagerec.artifacts import hash_folder, read_manifest
from sagerec.catalogue.dataset import (
    INTERACTIONS,
    ITEMS,
    Dataset,
    IdMap,
    assemble,
    check_interactions,
    check_items,
    has_manifest,
    read_dataset,
    read_table,
    whole_ids,
    write_dataset,
)
from sagerec.errors import ArtifactError, DatasetError

CATALOGUE = pl.DataFrame(
    {"item_id": ["a", "b", "c"], "title": ["Apple", "Pear", None], "categories": [["fruit"], ["fruit", "green"], []]},
    schema_overrides={"categories": pl.List(pl.String)},
)
LOG = pl.DataFrame({"user_id": ["u", "v", "u", "u"], "item_id": ["a", "b", "c", "b"], "timestamp": [3, 1, 2, 2]})


def put(folder: Path, items: pl.DataFrame = CATALOGUE, events: pl.DataFrame = LOG) -> Path:
    """The two files alone, as a user would write them."""
    folder.mkdir(parents=True, exist_ok=True)
    items.write_parquet(folder / ITEMS)
    events.write_parquet(folder / INTERACTIONS)
    return folder


def dataset(histories: dict[str, list[tuple[str, int]]], *, items: list[str] | None = None, **columns: Any) -> Dataset:
    """A dataset in memory: (item, time) pairs of each user; the items are those of the log unless given."""
    rows = [(user, item, time) for user, pairs in histories.items() for item, time in pairs]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").with_columns(
        **{name: pl.Series(values) for name, values in columns.items()}
    )
    ids = sorted({row[1] for row in rows}) if items is None else items
    catalogue = pl.DataFrame({"item_id": ids, "title": [f"title {i}" for i in ids]})
    return assemble(check_items(catalogue, Path(ITEMS)), check_interactions(events, Path(INTERACTIONS)))


def column(table: pl.DataFrame, name: str, values: list[Any], dtype: Any = None) -> pl.DataFrame:
    return table.with_columns(pl.Series(name, values, dtype=dtype, strict=False))


# --- faults ---------------------------------------------------------------------------------------------------------


def error_of(folder: Path) -> str:
    with pytest.raises(DatasetError) as error:
        read_dataset(folder)
    return str(error.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none") == (
        f"{tmp_path}/none is not a folder; expected one with interactions.parquet and items.parquet"
    )


@pytest.mark.parametrize("name", [ITEMS, INTERACTIONS])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    (put(tmp_path) / name).unlink()
    assert error_of(tmp_path) == (
        f"{tmp_path}/{name} is missing; a dataset is a folder with interactions.parquet (user_id, item_id, timestamp) "
        "and items.parquet (item_id, title, categories). `sagerec simulate DATASET` writes one to look at"
    )


@pytest.mark.parametrize("name", [ITEMS, INTERACTIONS])
@pytest.mark.parametrize("content", [b"", b"item_id,title\na,Apple\n", b"PAR1 and then nothing else PAR1"])
def test_a_file_that_is_not_parquet(tmp_path: Path, name: str, content: bytes) -> None:
    (put(tmp_path) / name).write_bytes(content)
    assert re.fullmatch(
        rf"{tmp_path}/{name} cannot be read as Parquet \(.+\); write it again", error_of(tmp_path), re.S
    )


@pytest.mark.parametrize("name", [ITEMS, INTERACTIONS])
def test_an_empty_table(tmp_path: Path, name: str) -> None:
    put(tmp_path)
    pl.read_parquet(tmp_path / name).clear().write_parquet(tmp_path / name)
    assert error_of(tmp_path) == f"{tmp_path}/{name} has no row; expected at least one"


@pytest.mark.parametrize(
    ("name", "missing", "others"),
    [
        (ITEMS, "item_id", "title, categories"),
        (ITEMS, "title", "item_id, categories"),
        (INTERACTIONS, "user_id", "item_id, timestamp"),
        (INTERACTIONS, "item_id", "user_id, timestamp"),
        (INTERACTIONS, "timestamp", "user_id, item_id"),
    ],
)
def test_a_missing_column(tmp_path: Path, name: str, missing: str, others: str) -> None:
    put(tmp_path)
    pl.read_parquet(tmp_path / name).drop(missing).write_parquet(tmp_path / name)
    assert error_of(tmp_path) == f"{tmp_path}/{name}: column '{missing}' is missing; got {others}. Rename or add it"


EMPTY = "{at}: column '{column}' has {n} empty values, the first in row {row} (from 0). Drop these rows or fill them"
FAULTS: dict[str, tuple[str, Callable[[pl.DataFrame], pl.DataFrame], str]] = {
    "float item ids": (
        ITEMS,
        lambda t: column(t, "item_id", [1.0, 2.5, 3.0]),
        "{at}: column 'item_id' holds 2.5 in row 1 (from 0); expected text or whole numbers. Cast it to text",
    ),
    "list user ids": (
        INTERACTIONS,
        lambda t: column(t, "user_id", [["u"]] * 4),
        "{at}: column 'user_id' has type List(String), expected text or integers. Cast it",
    ),
    "boolean item ids in the log": (
        INTERACTIONS,
        lambda t: column(t, "item_id", [True] * 4),
        "{at}: column 'item_id' has type Boolean, expected text or integers. Cast it",
    ),
    "a word in place of an item id": (
        ITEMS,
        lambda t: column(t, "item_id", ["a", "NULL", "nan"]),
        "{at}: column 'item_id' holds 'NULL' in row 1 (from 0), which stands for a missing id; 2 rows are like this. "
        "Drop these rows or name the ids otherwise",
    ),
    "an infinite time": (
        INTERACTIONS,
        lambda t: column(t, "timestamp", [1.0, 2.0, float("-inf"), 4.0]),
        "{at}: column 'timestamp' holds -inf in row 2 (from 0); expected finite numbers or times. "
        "Drop the row or mend it",
    ),
    "null item id": (
        ITEMS,
        lambda t: column(t, "item_id", ["a", "b", None]),
        EMPTY.format(at="{at}", column="item_id", n=1, row=2),
    ),
    "null user ids": (
        INTERACTIONS,
        lambda t: column(t, "user_id", ["u", None, "u", None]),
        EMPTY.format(at="{at}", column="user_id", n=2, row=1),
    ),
    "null item id in the log": (
        INTERACTIONS,
        lambda t: column(t, "item_id", [None, "a", "b", "c"]),
        EMPTY.format(at="{at}", column="item_id", n=1, row=0),
    ),
    "null time": (
        INTERACTIONS,
        lambda t: column(t, "timestamp", [1, 2, 3, None]),
        EMPTY.format(at="{at}", column="timestamp", n=1, row=3),
    ),
    "NaN and null times": (
        INTERACTIONS,
        lambda t: column(t, "timestamp", [1.0, float("nan"), None, 4.0]),
        EMPTY.format(at="{at}", column="timestamp", n=2, row=1),
    ),
    "times as text": (
        INTERACTIONS,
        lambda t: column(t, "timestamp", ["2024-01-01"] * 4),
        "{at}: column 'timestamp' has type String, expected numbers or times. "
        "Parse it, for example with pl.col('timestamp').str.to_datetime()",
    ),
    "an item twice": (
        ITEMS,
        lambda t: column(t, "item_id", ["c", "a", "a"]),
        "{at}: column 'item_id' holds 'a' more than once, first in row 1 (from 0). Keep one row an item",
    ),
    "an item twice, as integers": (
        ITEMS,
        lambda t: column(t, "item_id", [7, 8, 7]),
        "{at}: column 'item_id' holds '7' more than once, first in row 0 (from 0). Keep one row an item",
    ),
    "unknown items": (
        INTERACTIONS,
        lambda t: column(t, "item_id", ["a", "b", "x", "y"]),
        "{at}: column 'item_id' holds 'x' in row 2 (from 0), which items.parquet does not have; 2 rows are like this. "
        "Add the items or drop the rows",
    ),
    "a title that is no text": (
        ITEMS,
        lambda t: column(t, "title", [1, 2, 3]),
        "{at}: column 'title' has type Int64, expected text. Cast or rename it",
    ),
    "a description that is no text": (
        ITEMS,
        lambda t: column(t, "description", [["x"], ["y"], ["z"]]),
        "{at}: column 'description' has type List(String), expected text. Cast or rename it",
    ),
    "categories as text": (
        ITEMS,
        lambda t: column(t, "categories", ["a|b", "c", ""]),
        "{at}: column 'categories' has type String, expected a list of strings. "
        "Split it, for example with pl.col('categories').str.split('|')",
    ),
    "categories as numbers": (
        ITEMS,
        lambda t: column(t, "categories", [[1], [2], [3]]),
        "{at}: column 'categories' has type List(Int64), expected a list of strings. "
        "Split it, for example with pl.col('categories').str.split('|')",
    ),
    "an unknown part": (
        INTERACTIONS,
        lambda t: column(t, "split", ["train", "dev", "test", "zzz"]),
        "{at}: column 'split' holds 'dev' in row 1 (from 0); expected train, align, valid or test. "
        "Rename the value, or drop the column to have sagerec split",
    ),
    "no part": (
        INTERACTIONS,
        lambda t: column(t, "split", ["train", "train", None, "test"]),
        EMPTY.format(at="{at}", column="split", n=1, row=2),
    ),
    "parts as numbers": (
        INTERACTIONS,
        lambda t: column(t, "split", [0, 1, 2, 3]),
        "{at}: column 'split' has type Int64, expected text (train, align, valid or test). "
        "Cast it, or drop the column to have sagerec split",
    ),
    "parts as lists": (
        INTERACTIONS,
        lambda t: column(t, "split", [["train"]] * 4),
        "{at}: column 'split' has type List(String), expected text (train, align, valid or test). "
        "Cast it, or drop the column to have sagerec split",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_file_column_and_row_on_reading_and_on_writing(tmp_path: Path, fault: str) -> None:
    name, spoil, expected = FAULTS[fault]
    tables = {ITEMS: CATALOGUE, INTERACTIONS: LOG}
    tables[name] = spoil(tables[name])
    put(tmp_path / "read", tables[ITEMS], tables[INTERACTIONS])
    assert error_of(tmp_path / "read") == expected.format(at=tmp_path / "read" / name)
    with pytest.raises(DatasetError) as error:
        write_dataset(tmp_path / "written", tables[ITEMS], tables[INTERACTIONS])
    assert str(error.value) == expected.format(at=tmp_path / "written" / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["read"]


# --- damaged files --------------------------------------------------------------------------------------------------


def whole_file() -> bytes:
    buffer = io.BytesIO()
    CATALOGUE.write_parquet(buffer)
    return buffer.getvalue()


WHOLE = whole_file()
FOOTER = len(WHOLE) - 8 - int.from_bytes(WHOLE[-8:-4], "little")
"""Where the file's metadata begins; the last 8 bytes are its length and PAR1."""


def read_bytes(content: bytes) -> pl.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ITEMS).write_bytes(content)
        return read_table(Path(folder) / ITEMS)


@given(length=st.integers(0, len(WHOLE) - 1))
@settings(max_examples=60, deadline=None)
def test_a_truncated_file_is_a_dataset_error(length: int) -> None:
    """Whatever is cut off, the end is no longer there."""
    with pytest.raises(DatasetError, match=r"cannot be read as Parquet \(.+"):
        read_bytes(WHOLE[:length])
    assert read_bytes(WHOLE).equals(CATALOGUE)


@given(place=st.integers(FOOTER, len(WHOLE) - 1), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_of_the_metadata_is_a_dataset_error_or_harmless(place: int, value: int) -> None:
    """Never another exception, and no panic of polars, which is no Exception and ends most programs.

    Only the metadata: a page header whose size turns negative makes polars 2.1 abort the process, beyond any
    `except`; about one change in two thousand of a small file does.
    """
    with contextlib.suppress(DatasetError):
        assert len(read_bytes(WHOLE[:place] + bytes([value]) + WHOLE[place + 1 :])) > 0


def test_a_panic_of_polars_is_a_dataset_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(_: Path) -> None:
        raise pl.exceptions.PanicException("range end out of bounds")

    put(tmp_path)
    monkeypatch.setattr(pl, "read_parquet", panic)
    assert error_of(tmp_path) == (
        f"{tmp_path}/items.parquet cannot be read as Parquet (range end out of bounds); write it again"
    )
    assert not issubclass(pl.exceptions.PanicException, Exception)


# --- what is accepted -----------------------------------------------------------------------------------------------


def test_by_hand(tmp_path: Path) -> None:
    """File order: u a 3, v b 1, u c 2, u b 2. By user, time, file: u c 2, u b 2 (a tie), u a 3, then v b 1.

    Items a, b, c are 0, 1, 2 as in items.parquet; users u, v are 0, 1.
    """
    data = read_dataset(put(tmp_path))
    assert data.events.rows() == [("u", "c", 2), ("u", "b", 2), ("u", "a", 3), ("v", "b", 1)]
    assert data.event_items.tolist() == [2, 1, 0, 1]
    assert data.event_users.tolist() == [0, 0, 0, 1]
    assert data.user_offsets.tolist() == [0, 3, 4]
    assert (data.n_users, data.n_items, data.n_events) == (2, 3, 4)
    dtypes = [array.dtype.name for array in (data.event_items, data.event_users, data.user_offsets)]
    assert dtypes == ["int32", "int32", "int64"]


@pytest.mark.parametrize("dtype", [pl.Int64, pl.UInt8, pl.Categorical, pl.Enum(["0", "1", "7", "10"])])
def test_ids_of_other_types_are_read_as_strings(tmp_path: Path, dtype: Any) -> None:
    """As strings, user 10 stands before user 7; the items keep the order of their file."""
    whole = dtype in (pl.Int64, pl.UInt8)
    cast = int if whole else str
    items = pl.DataFrame({"item_id": [cast(7), cast(10), cast(1)], "title": ["x", "y", "z"]})
    events = pl.DataFrame({"user_id": [cast(7), cast(10)], "item_id": [cast(1), cast(7)], "timestamp": [0, 0]})
    items, events = items.cast({"item_id": dtype}), events.cast({"user_id": dtype, "item_id": dtype})
    data = read_dataset(put(tmp_path, items, events))
    assert data.item_ids.external(range(3)) == ["7", "10", "1"]
    assert data.user_ids.external(range(2)) == ["10", "7"]
    assert data.event_items.tolist() == [0, 2]


@pytest.mark.parametrize(
    "times",
    [
        [3, 1, 2, 2],
        [3.5, 1.0, 2.0, 2.0],
        [date(2024, 1, d) for d in (3, 1, 2, 2)],
        [datetime(2024, 1, 1, h) for h in (3, 1, 2, 2)],
        [Decimal(d) for d in ("3.5", "1", "2", "2")],
        [1e300, -1e300, 0.0, -0.0],
    ],
    ids=["integers", "floats", "dates", "datetimes", "decimals", "large"],
)
def test_times_of_every_type_give_the_same_order(tmp_path: Path, times: list[Any]) -> None:
    """The four rows of LOG with times in the same order as 3, 1, 2, 2."""
    data = read_dataset(put(tmp_path, events=column(LOG, "timestamp", times)))
    assert data.event_items.tolist() == [2, 1, 0, 1]


def test_columns_named_like_the_inner_ones_are_carried_along(tmp_path: Path) -> None:
    """A log with columns item, row, _item, _row of its own: they change nothing and follow their events."""
    own = {name: pl.Series([9, 8, 7, 6]) for name in ("item", "row", "_item", "_row")}
    data = read_dataset(put(tmp_path, CATALOGUE.with_columns(item=pl.lit(5)), LOG.with_columns(**own)))
    assert data.event_items.tolist() == [2, 1, 0, 1]
    assert data.events.columns == ["user_id", "item_id", "timestamp", "item", "row", "_item", "_row"]
    assert data.events["_item"].to_list() == [7, 6, 9, 8]


Rows = list[tuple[str, int, int]]
rows_of_logs: st.SearchStrategy[Rows] = st.lists(
    st.tuples(st.sampled_from(["u", "u1", "U", "9", "10", "ü", "z", " "]), st.integers(0, 5), st.integers(-3, 3)),
    min_size=1,
    max_size=40,
)


@given(rows=rows_of_logs)
@settings(max_examples=60, deadline=None)
def test_order_offsets_users_and_items_equal_the_slow_twin(rows: Rows) -> None:
    """The twin sorts places by (user, time, place) with Python's stable sort and counts with a dict."""
    items = pl.DataFrame({"item_id": [f"i{i}" for i in (3, 0, 5, 1, 4, 2)], "title": ["t"] * 6})
    events = pl.DataFrame(
        {
            "user_id": [r[0] for r in rows],
            "item_id": [f"i{r[1]}" for r in rows],
            "timestamp": [r[2] for r in rows],
            "place": range(len(rows)),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        data = read_dataset(put(Path(folder), items, events))
    order = sorted(range(len(rows)), key=lambda i: (rows[i][0], rows[i][2], i))
    users = sorted({r[0] for r in rows})
    counts = [sum(r[0] == user for r in rows) for user in users]
    assert data.events["place"].to_list() == order
    assert data.event_items.tolist() == [[3, 0, 5, 1, 4, 2].index(rows[i][1]) for i in order]
    assert data.event_users.tolist() == [users.index(rows[i][0]) for i in order]
    assert data.user_offsets.tolist() == [sum(counts[:n]) for n in range(len(users) + 1)]
    assert data.user_ids.external(range(len(users))) == users


def test_id_map_both_ways_and_its_error() -> None:
    ids = IdMap(pl.Series(["x", "y", "z"]), "item_id")
    assert len(ids) == 3
    assert ids.index(["z", "x", "z"]).tolist() == [2, 0, 2]
    assert ids.index([]).dtype == np.int64
    assert ids.external(np.array([2, 0])) == ["z", "x"]
    assert ids.external([]) == []
    assert ids.external(ids.index(["y", "z", "x"])) == ["y", "z", "x"]
    with pytest.raises(DatasetError) as error:
        ids.index(["x", "nope"])
    assert str(error.value) == "unknown item_id 'nope'; expected one of the 3 ids of the dataset, such as 'x'"


def test_id_map_refuses_padding() -> None:
    """-1 pads lists that hold fewer items; it must not come out as the last item."""
    with pytest.raises(AssertionError, match="padding is no index"):
        IdMap(pl.Series(["x", "y"]), "item_id").external([0, -1])


def test_texts_and_titles_where_words_are_missing(tmp_path: Path) -> None:
    """A null and an empty text count alike: the item's title is its id, and its text is what is left."""
    items = pl.DataFrame(
        {
            "item_id": ["a", "b", "c", "d"],
            "title": ["Apple", None, "", "Date"],
            "description": ["red", "green", "sour", None],
            "brand": ["A", "", None, None],
        }
    )
    data = read_dataset(put(tmp_path, items, LOG))
    assert data.texts() == ["Apple . A . red", "green", "sour", "Date"]
    assert data.titles([3, 2, 1, 0]) == ["Date", "c", "b", "Apple"]
    assert data.titles(np.array([], dtype=np.int64)) == []


def test_titles_that_are_all_null(tmp_path: Path) -> None:
    data = read_dataset(put(tmp_path, pl.DataFrame({"item_id": ["a", "b", "c"], "title": [None] * 3}), LOG))
    assert data.items.schema["title"] == pl.String
    assert data.texts() == ["", "", ""]
    assert data.titles([1]) == ["b"]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([["x"], None, []], pl.List(pl.String), True),
        ([[], None, []], pl.List(pl.String), False),
        ([[None], None, []], pl.List(pl.String), False),
        ([[None], [None, "y"], []], pl.List(pl.String), True),
        ([[], [], []], pl.List(pl.Null), False),
    ],
)
def test_has_categories(tmp_path: Path, values: list[Any], dtype: Any, expected: bool) -> None:
    data = read_dataset(put(tmp_path, column(CATALOGUE, "categories", values, dtype)))
    assert data.has_categories() is expected
    assert data.items.schema["categories"] == pl.List(pl.String)
    assert not read_dataset(put(tmp_path, CATALOGUE.drop("categories"))).has_categories()


# --- writing --------------------------------------------------------------------------------------------------------


def test_write_and_read_give_the_same_tables(tmp_path: Path) -> None:
    """The events come back in the canonical order; their ids, integers before, are strings."""
    events = LOG.with_columns(like=pl.Series([1, 0, 1, 0]), rating=pl.Series([1.5, 2.5, 3.5, None]))
    extra, tensors = pl.DataFrame({"x": [1, 2]}), {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    content_hash = write_dataset(
        tmp_path / "d",
        CATALOGUE,
        events,
        settings={"users": 2},
        seed=5,
        extra_files={"shown.parquet": extra},
        extra_tensors={"truth.safetensors": tensors},
    )
    data = read_dataset(tmp_path / "d")
    assert data.items.equals(CATALOGUE)
    assert data.events.rows() == [
        ("u", "c", 2, 1, 3.5),
        ("u", "b", 2, 0, None),
        ("u", "a", 3, 1, 1.5),
        ("v", "b", 1, 0, 2.5),
    ]
    manifest = read_manifest(tmp_path / "d", "dataset")
    assert content_hash == manifest.content_hash == hash_folder(tmp_path / "d")
    assert manifest.sizes == {"users": 2, "items": 3, "interactions": 4, "feedback": ["like", "rating"]}
    assert (manifest.settings, manifest.seed) == ({"users": 2}, 5)
    assert pl.read_parquet(tmp_path / "d" / "shown.parquet").equals(extra)
    assert load_file(tmp_path / "d" / "truth.safetensors")["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert has_manifest(tmp_path / "d")
    assert not has_manifest(put(tmp_path / "plain"))
    # Written again from what was read, it is the same artefact.
    again = read_dataset(tmp_path / "d")
    write_dataset(tmp_path / "e", again.items, again.events)
    assert read_dataset(tmp_path / "e").events.equals(data.events)


def test_an_error_while_writing_leaves_the_old_dataset_and_nothing_half_written(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", CATALOGUE, LOG)
    before = hash_folder(tmp_path / "d")
    with pytest.raises(DatasetError):
        write_dataset(tmp_path / "d", CATALOGUE, column(LOG, "item_id", ["a", "b", "c", "x"]))
    strange = {"truth.safetensors": {"w": np.array(["no", "tensor"], dtype=object)}}
    with pytest.raises(Exception, match="object"):
        write_dataset(tmp_path / "d", CATALOGUE, LOG.head(2), extra_tensors=strange)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert hash_folder(tmp_path / "d") == before


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ArtifactError) as error:
        write_dataset(tmp_path / "mine", CATALOGUE, LOG)
    assert str(error.value) == (
        f"{tmp_path}/mine exists and is not an artefact of sagerec, so it is left alone; give another place or "
        "remove it"
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (pl.Series([1, 2], dtype=pl.Decimal(10, 2)), r"has type Decimal\(.*\), expected text or integers"),
        (pl.Series([True, False]), "has type Boolean, expected text or integers"),
        (pl.Series([16_777_216.0, 1.0], dtype=pl.Float32), r"holds 16777216\.0 in row 0"),
        (pl.Series([2.0**53, 1.0]), r"holds 9007199254740992\.0 in row 0"),
        (pl.Series([1.5, 1.0]), r"holds 1\.5 in row 0"),
    ],
)
def test_ids_of_another_type_or_that_are_not_told_apart_are_refused(ids: pl.Series, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        whole_ids(ids.alias("item_id"), Path("log.parquet"))
    assert whole_ids(pl.Series("item_id", [16_777_215.0], dtype=pl.Float32), Path("x")).to_list() == [16_777_215]
