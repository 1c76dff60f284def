"""The canonical dataset folder: `interactions.parquet`, `items.parquet`, and `users.parquet` where users have profiles;
validated on reading.

First stage of the pipeline. Inside, users and items are indices (0 … U-1, 0 … N-1); outside they are the ids of
the files, and `IdMap` is the one place that translates. Events stand in one order everywhere: by user, then by
time, then as the file has them, so that events of the same time keep their order from run to run.

Shapes: E events, U users, N items.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors.numpy import save_file

from sagerec.artifacts import MANIFEST, UNREADABLE, read_manifest, write_artifact
from sagerec.errors import DatasetError

INTERACTIONS, ITEMS, USERS = "interactions.parquet", "items.parquet", "users.parquet"
SOURCE = "source.json"
"""In a run's copy of a dataset, the manifest that the original had."""
USER_ID, ITEM_ID, TIMESTAMP, SPLIT = "user_id", "item_id", "timestamp", "split"
TITLE, CATEGORIES, PROFILE = "title", "categories", "profile"
TEXT_COLUMNS = (TITLE, "brand", "text", "description")
"""Columns of `items.parquet` that describe an item in words, in the order in which they are joined."""
FEEDBACK_COLUMNS = (
    "click",
    "like",
    "dislike",
    "follow",
    "forward",
    "longview",
    "watch_seconds",
    "duration_seconds",
    "rating",
    "verified",
    "helpful_votes",
)
"""Known feedback columns of `interactions.parquet`; others are carried along unread."""
SPLIT_VALUES = ("train", "align", "valid", "test")
"""What the column `split` of `interactions.parquet` may hold."""
MISSING_IDS = ("", "nan", "NaN", "NULL", "null", "None", "NA", "N/A", "<NA>")
"""What stands in place of an id that is missing, as other tools write it."""
EXACT_FLOATS: dict[Any, int] = {pl.Float64: 2**53, pl.Float32: 2**24}
"""Whole numbers below it are exact as floats, so that one may be an id."""


class IdMap:
    """External id <-> index, frozen. `index` raises DatasetError for an id that is not there."""

    def __init__(self, ids: pl.Series, what: str) -> None:
        self.ids = ids
        self.what = what
        self._index: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, external: str) -> bool:
        return external in self._places()

    def _places(self) -> dict[str, int]:
        if self._index is None:
            self._index = {value: i for i, value in enumerate(self.ids)}
        return self._index

    def index(self, ids: Iterable[str]) -> np.ndarray:
        """Indices (n,) int64 of external ids."""
        places = self._places()
        try:
            return np.array([places[value] for value in ids], dtype=np.int64)
        except KeyError as error:
            raise DatasetError(
                f"unknown {self.what} {error.args[0]!r}; expected one of the {len(self.ids)} ids of the dataset, "
                f"such as {self.ids[0]!r}"
            ) from None

    def external(self, indices: np.ndarray | Sequence[int]) -> list[str]:
        """External ids of indices (n,)."""
        places = np.asarray(indices, dtype=np.int64)
        assert places.min(initial=0) >= 0, "padding is no index"
        values: list[str] = self.ids.gather(places).to_list()
        return values


@dataclass(frozen=True, slots=True)
class Dataset:
    """A catalogue and its log."""

    items: pl.DataFrame
    """N rows, row number = item index: item_id, title, further text columns, categories (list of strings)."""
    events: pl.DataFrame
    """E rows in the canonical order, with every column of the file."""
    item_ids: IdMap
    """External item ids."""
    user_ids: IdMap
    """External user ids, in sorted order."""
    event_items: np.ndarray
    """(E,) int32 item index of each event."""
    event_users: np.ndarray
    """(E,) int32 user index of each event, ascending."""
    user_offsets: np.ndarray
    """(U + 1,) int64: the events of user u are rows user_offsets[u] … user_offsets[u + 1] - 1."""
    profiles: pl.Series | None = field(default=None, kw_only=True)
    """(U,) who each user is, in words, "" of whom nothing is known; None where `users.parquet` has none."""

    @property
    def n_items(self) -> int:
        return len(self.items)

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_events(self) -> int:
        return len(self.events)

    def texts(self) -> list[str]:
        """(N,) the words that describe each item: its text columns joined by ` . `."""
        columns = [c for c in TEXT_COLUMNS if c in self.items.columns]
        joined = self.items.select(pl.concat_str(columns, separator=" . ", ignore_nulls=True).fill_null(""))
        values: list[str] = joined.to_series().to_list()
        return values

    def titles(self, indices: np.ndarray | Sequence[int]) -> list[str]:
        """Titles of items, the id where an item has none."""
        rows = self.items[np.asarray(indices, dtype=np.int64)]
        values: list[str] = rows.select(pl.coalesce(TITLE, ITEM_ID)).to_series().to_list()
        return values

    def has_categories(self) -> bool:
        """Whether any item has a category."""
        return CATEGORIES in self.items.columns and bool(
            self.items.select((pl.col(CATEGORIES).list.drop_nulls().list.len() > 0).any()).item()
        )


def read_table(path: Path) -> pl.DataFrame:
    """Read a Parquet file. Raises: DatasetError where it is missing, not Parquet, or has no row."""
    if not path.is_file():
        raise DatasetError(
            f"{path} is missing; a dataset is a folder with {INTERACTIONS} (user_id, item_id, timestamp) and "
            f"{ITEMS} (item_id, title, categories). `sagerec simulate DATASET` writes one to look at"
        )
    try:
        table = pl.read_parquet(path)
    except UNREADABLE as error:
        raise DatasetError(f"{path} cannot be read as Parquet ({error}); write it again") from error
    if table.is_empty():
        raise DatasetError(f"{path} has no row; expected at least one")
    return table


def require_columns(table: pl.DataFrame, columns: Sequence[str], path: Path) -> None:
    """Raise DatasetError for the first of `columns` that `table` lacks."""
    for column in columns:
        if column not in table.columns:
            raise DatasetError(
                f"{path}: column {column!r} is missing; got {', '.join(table.columns)}. Rename or add it"
            )


def is_text(dtype: pl.DataType) -> bool:
    """Whether a column of this type holds words."""
    return dtype == pl.String or isinstance(dtype, (pl.Categorical, pl.Enum))


def stands_for_none(ids: pl.Series) -> pl.Series:
    """(n,) bool: a text stands for a missing id. Of most columns all are longer, which costs little to know."""
    short = ids.str.len_bytes() <= max(map(len, MISSING_IDS))
    return short & ids.is_in(MISSING_IDS) if short.any() else short


def whole_ids(ids: pl.Series, path: Path, first_row: int = 0) -> pl.Series:
    """Ids as text or whole numbers: floats 12.0 become 12, NaN null.

    Raises: DatasetError for another type, or a float that is no whole number or too large to be told from its
    neighbours.
    """
    if not (is_text(ids.dtype) or ids.dtype.is_integer() or ids.dtype.is_float() or ids.dtype == pl.Null):
        raise DatasetError(f"{path}: column {ids.name!r} has type {ids.dtype}, expected text or integers. Cast it")
    if not ids.dtype.is_float():
        return ids
    ids = ids.fill_nan(None)
    fits = (ids.floor() == ids) & (ids.abs() < EXACT_FLOATS[ids.dtype])
    if not fits.all():
        row = int((~fits).arg_max() or 0)
        raise DatasetError(
            f"{path}: column {ids.name!r} holds {ids[row]} in row {first_row + row} (from 0); expected text or whole "
            "numbers. Cast it to text"
        )
    return ids.cast(pl.Int64)


def as_ids(table: pl.DataFrame, column: str, path: Path) -> pl.DataFrame:
    """`table` with `column` as strings, 12.0 as 12.

    Raises: DatasetError for other types than text and whole numbers, a null, or a word that stands for one.
    """
    ids = table[column]
    whole = whole_ids(ids, path)
    require_no_null(table, column, path)
    ids = whole.cast(pl.String)
    none = stands_for_none(ids)
    if none.any():
        row = int(none.arg_max() or 0)
        raise DatasetError(
            f"{path}: column {column!r} holds {ids[row]!r} in row {row} (from 0), which stands for a missing id; "
            f"{none.sum()} rows are like this. Drop these rows or name the ids otherwise"
        )
    return table.with_columns(ids)


def require_no_null(table: pl.DataFrame, column: str, path: Path) -> None:
    """Raise DatasetError, with the first row, where `column` has a null or a NaN."""
    bad = table[column].is_null()
    if table.schema[column].is_float():
        bad = bad | table[column].is_nan()
    if bad.any():
        raise DatasetError(
            f"{path}: column {column!r} has {bad.sum()} empty values, the first in row {bad.arg_max()} (from 0). "
            "Drop these rows or fill them"
        )


def require_distinct(table: pl.DataFrame, column: str, path: Path, what: str) -> None:
    """Raise DatasetError, with the first row, where an id of `what` stands twice in `column`."""
    duplicated = table[column].is_duplicated()
    if duplicated.any():
        row = int(duplicated.arg_max() or 0)
        raise DatasetError(
            f"{path}: column {column!r} holds {table[column][row]!r} more than once, first in row {row} (from 0). "
            f"Keep one row {'an' if what == 'item' else 'a'} {what}"
        )


def check_items(items: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The items table in canonical types, an empty text a null.

    Raises: DatasetError naming file, column and row of the first fault.
    """
    require_columns(items, (ITEM_ID, TITLE), path)
    items = as_ids(items, ITEM_ID, path)
    require_distinct(items, ITEM_ID, path, "item")
    for column in TEXT_COLUMNS:
        if column in items.columns:
            if items.schema[column] not in (pl.String, pl.Null):
                raise DatasetError(
                    f"{path}: column {column!r} has type {items.schema[column]}, expected text. Cast or rename it"
                )
            items = items.with_columns(pl.col(column).cast(pl.String).replace("", None))
    if CATEGORIES in items.columns:
        dtype = items.schema[CATEGORIES]
        if dtype == pl.List(pl.Null):
            items = items.with_columns(pl.col(CATEGORIES).cast(pl.List(pl.String)))
        elif dtype != pl.List(pl.String):
            raise DatasetError(
                f"{path}: column 'categories' has type {dtype}, expected a list of strings. "
                "Split it, for example with pl.col('categories').str.split('|')"
            )
    return items


def check_interactions(events: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The interactions table in canonical types. Raises: DatasetError naming file, column and row."""
    require_columns(events, (USER_ID, ITEM_ID, TIMESTAMP), path)
    events = as_ids(as_ids(events, USER_ID, path), ITEM_ID, path)
    dtype = events.schema[TIMESTAMP]
    if not (dtype.is_numeric() or isinstance(dtype, (pl.Datetime, pl.Date))):
        raise DatasetError(
            f"{path}: column 'timestamp' has type {dtype}, expected numbers or times. "
            "Parse it, for example with pl.col('timestamp').str.to_datetime()"
        )
    require_no_null(events, TIMESTAMP, path)
    if dtype.is_float() and not (finite := events[TIMESTAMP].is_finite()).all():
        row = int((~finite).arg_max() or 0)
        raise DatasetError(
            f"{path}: column 'timestamp' holds {events[TIMESTAMP][row]} in row {row} (from 0); expected finite numbers "
            "or times. Drop the row or mend it"
        )
    if SPLIT in events.columns:
        if not is_text(events.schema[SPLIT]):
            raise DatasetError(
                f"{path}: column 'split' has type {events.schema[SPLIT]}, expected text (train, align, valid or test). "
                "Cast it, or drop the column to have sagerec split"
            )
        require_no_null(events, SPLIT, path)
        events = events.with_columns(pl.col(SPLIT).cast(pl.String))
        unknown = ~events[SPLIT].is_in(SPLIT_VALUES)
        if unknown.any():
            row = int(unknown.arg_max() or 0)
            raise DatasetError(
                f"{path}: column 'split' holds {events[SPLIT][row]!r} in row {row} (from 0); expected train, align, "
                "valid or test. Rename the value, or drop the column to have sagerec split"
            )
    return events


def read_dataset(folder: str | Path) -> Dataset:
    """Read and validate a canonical dataset folder.

    Raises: DatasetError for a missing file or column, a wrong type, an empty value, an item id that stands twice
    in the items, or one of the log that the items do not hold; each with the file, the column and how to mend it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder; expected one with {INTERACTIONS} and {ITEMS}")
    files_in(folder)
    try:
        items = check_items(read_table(folder / ITEMS), folder / ITEMS)
        events = check_interactions(read_table(folder / INTERACTIONS), folder / INTERACTIONS)
        data = assemble(items, events, folder / INTERACTIONS)
        return replace(data, profiles=read_profiles(folder / USERS, data.user_ids))
    except UNREADABLE as error:  # a damaged file may be read, and break only what is made of it
        raise DatasetError(f"{folder} holds a damaged table ({error}); write it again") from error


def read_profiles(path: Path, user_ids: IdMap) -> pl.Series | None:
    """(U,) the profiles of the users in a table with `user_id` and `profile`, "" of those that it lacks; None where
    there is no such table, or it has no profiles. Users that the log lacks are left out.

    Raises: DatasetError naming file, column and row of the first fault.
    """
    if not path.exists() and not path.is_symlink():
        return None
    table = read_table(path)
    if PROFILE not in table.columns:
        return None
    require_columns(table, (USER_ID,), path)
    table = as_ids(table, USER_ID, path)
    said = pl.DataFrame([table[USER_ID], profile_column(table, path)])
    require_distinct(table, USER_ID, path, "user")
    known = pl.DataFrame(user_ids.ids.alias(USER_ID))
    return known.join(said, on=USER_ID, how="left", maintain_order="left")[PROFILE].fill_null("")


def profile_column(table: pl.DataFrame, path: Path) -> pl.Series:
    """The column `profile` of a table as text. Raises: DatasetError for another type."""
    dtype = table.schema[PROFILE]
    if dtype != pl.Null and not is_text(dtype):
        raise DatasetError(f"{path}: column 'profile' has type {dtype}, expected text. Cast it")
    return table[PROFILE].cast(pl.String)


def files_in(folder: Path) -> list[Path]:
    """The files of a dataset folder, in name order. Raises: DatasetError for a link that leads out of the folder."""
    files = sorted(p for p in folder.iterdir() if p.is_symlink() or p.is_file())
    for path in files:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DatasetError(
                f"{path} is a link to {path.resolve()}, outside the dataset folder; expected the file itself. Copy it "
                "into the folder, or remove the link"
            )
    return [path for path in files if path.is_file()]


def assemble(items: pl.DataFrame, events: pl.DataFrame, path: Path | str = INTERACTIONS) -> Dataset:
    """A dataset from checked tables; `path` names the log in errors."""
    lookup = items.select(ITEM_ID).with_row_index("item")
    event_items = events.select(ITEM_ID).join(lookup, on=ITEM_ID, how="left", maintain_order="left")["item"]
    unknown = event_items.is_null()
    if unknown.any():
        row = int(unknown.arg_max() or 0)
        raise DatasetError(
            f"{path}: column 'item_id' holds {events[ITEM_ID][row]!r} in row {row} (from 0), which {ITEMS} does not "
            f"have; {unknown.sum()} rows are like this. Add the items or drop the rows"
        )
    order = events.select(USER_ID, TIMESTAMP).with_row_index("row").sort([USER_ID, TIMESTAMP, "row"])["row"]
    events, event_items = events[order], event_items[order]
    users = events[USER_ID].rle_id().to_numpy().astype(np.int32)
    user_ids = events[USER_ID].unique(maintain_order=True)
    offsets = np.zeros(len(user_ids) + 1, dtype=np.int64)
    np.cumsum(np.bincount(users, minlength=len(user_ids)), out=offsets[1:])
    return Dataset(
        items=items,
        events=events,
        item_ids=IdMap(items[ITEM_ID], "item_id"),
        user_ids=IdMap(user_ids, "user_id"),
        event_items=event_items.to_numpy().astype(np.int32),
        event_users=users,
        user_offsets=offsets,
    )


def write_dataset(
    folder: str | Path,
    items: pl.DataFrame,
    events: pl.DataFrame,
    *,
    settings: dict[str, object] | None = None,
    seed: int | None = None,
    extra_files: dict[str, pl.DataFrame] | None = None,
    extra_tensors: dict[str, dict[str, np.ndarray]] | None = None,
) -> str:
    """Check the two tables and write them as a canonical dataset folder; returns its content hash.

    `extra_files` (name -> table, as Parquet) and `extra_tensors` (name -> arrays, as safetensors) are written
    beside them, such as the impressions and the truth of a simulated store.
    """
    folder = Path(folder)
    items = check_items(items, folder / ITEMS)
    events = check_interactions(events, folder / INTERACTIONS)
    data = assemble(items, events, folder / INTERACTIONS)
    sizes = {"users": data.n_users, "items": data.n_items, "interactions": data.n_events}
    feedback = [c for c in FEEDBACK_COLUMNS if c in events.columns]
    with write_artifact(folder, "dataset", settings=settings, seed=seed, sizes=sizes | {"feedback": feedback}) as fresh:
        items.write_parquet(fresh / ITEMS)
        events.write_parquet(fresh / INTERACTIONS)
        for name, table in (extra_files or {}).items():
            table.write_parquet(fresh / name)
        for name, arrays in (extra_tensors or {}).items():
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, fresh / name)
    return read_manifest(folder, "dataset").content_hash


def has_manifest(folder: Path) -> bool:
    """Whether a dataset folder was written by sagerec (others hold the two files alone)."""
    return (folder / MANIFEST).is_file()
