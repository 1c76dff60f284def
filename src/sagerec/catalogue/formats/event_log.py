"""The log while it is imported: ids as numbers, in the canonical order, without duplicates, in its k-core.

A row is some forty bytes, whatever the texts of the files, so ten million events take some hundred megabytes. Steps
that make a new table of an old one take the old one apart on the way, column by column, so that memory holds one.

Shapes: E events, U users, N items.
"""

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np
import polars as pl

from sagerec.catalogue.dataset import ITEM_ID, SPLIT, SPLIT_VALUES, TIMESTAMP, USER_ID
from sagerec.catalogue.formats.blocks import Chunk
from sagerec.errors import DatasetError

USER, ITEM, FILE, LINE = "_user", "_item", "_file", "_line"
"""Columns of the log while it is made: codes of the ids, and where a row came from."""
MERGED_ROWS = 1_000_000
"""Rows whose parts become one: the memory of many small ones comes back in shreds that no large column fits into."""


class Codes:
    """External ids as numbers, in the order in which they came: a dictionary that polars keeps."""

    def __init__(self) -> None:
        self._dtype = pl.Categorical(pl.Categories.random())
        self._alive: list[pl.Series] = []  # polars forgets categories that no series holds
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def encode(self, ids: pl.Series) -> pl.Series:
        """uint32 codes of ids, new ones numbered on."""
        encoded = ids.cast(self._dtype)
        self._alive = self._alive or [encoded]
        codes = encoded.to_physical()
        if len(codes):
            self._size = max(self._size, int(codes.max()) + 1)  # type: ignore[arg-type]
        return codes

    def decode(self, codes: pl.Expr) -> pl.Expr:
        """The ids of a column of codes."""
        return codes.cat.to(self._dtype).cast(pl.String)

    def ids(self, codes: pl.Series | None = None) -> pl.Series:
        """The ids of some codes, or of all."""
        numbers = pl.int_range(self._size, dtype=pl.UInt32, eager=True) if codes is None else codes
        return numbers.cat.to(self._dtype).cast(pl.String)


def read_log(chunks: Iterator[Chunk], files: tuple[Path, ...], users: Codes, items: Codes) -> pl.DataFrame:
    """All events as codes, times and feedback, with file and line of each row.

    Raises: DatasetError where no row is left, or the times of two files are of two kinds.
    """
    merged: list[pl.DataFrame] = []
    parts: list[pl.DataFrame] = []
    are_dates: set[bool] = set()
    for chunk in chunks:
        table = chunk.table
        if table.is_empty():
            continue
        are_dates.add(isinstance(table.schema[TIMESTAMP], pl.Datetime))
        if len(are_dates) > 1:
            raise DatasetError("the times are numbers in some rows and dates in others; write them in one way")
        parts.append(
            table.drop(USER_ID, ITEM_ID).with_columns(
                users.encode(table[USER_ID]).alias(USER),
                items.encode(table[ITEM_ID]).alias(ITEM),
                *([pl.col(SPLIT).cast(pl.Enum(SPLIT_VALUES))] if SPLIT in table.columns else []),
                pl.lit(files.index(chunk.path), pl.UInt16).alias(FILE),
                pl.Series(LINE, chunk.lines),
            )
        )
        if sum(map(len, parts)) >= MERGED_ROWS:
            merged.append(pl.concat(parts, how="diagonal_relaxed", rechunk=True))
            parts.clear()
    if not merged + parts:
        raise DatasetError(f"{', '.join(p.name for p in files)}: no row can be used; expected at least one event")
    return pl.concat(merged + parts, how="diagonal_relaxed")


def in_order(events: pl.DataFrame, users: Codes) -> pl.DataFrame:
    """The canonical order: by user id as text, by time, then as the files have it. Takes `events` apart."""
    by_time = _stable_order(events[TIMESTAMP])
    rank = pl.Series(_ranks(users.ids())[events[USER].to_numpy()])
    order = by_time.gather(_stable_order(rank.gather(by_time)))  # two sorts by one key: half the time of one by two
    del by_time, rank
    return pl.DataFrame([events.drop_in_place(name).rechunk().gather(order) for name in events.columns])


def _stable_order(keys: pl.Series) -> pl.Series:
    """The rows in the order of their `keys`, equal ones as they stood."""
    return keys.to_frame("key").select(pl.arg_sort_by("key", maintain_order=True)).to_series()


def _ranks(ids: pl.Series) -> np.ndarray:
    """The place of each id among all in the order of text.

    They are sorted by the eight bytes behind their common beginning, as a number, and as text only where those are
    equal; that is several times as fast.
    """
    ends = zip(str(ids.min()).encode(), str(ids.max()).encode(), strict=False)
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], ends)))
    padded = pl.col("id").cast(pl.Binary).bin.slice(common, 8) + pl.lit(b"\0" * 8)
    number = padded.bin.slice(0, 8).bin.reinterpret(dtype=pl.UInt64, endianness="big")
    order = ids.to_frame("id").select(pl.arg_sort_by(number, "id")).to_series()
    rank = np.empty(len(ids), dtype=np.uint32)
    rank[order.to_numpy()] = np.arange(len(ids), dtype=np.uint32)
    return rank


def _kept(events: pl.DataFrame, keep: np.ndarray) -> pl.DataFrame:
    """The rows that are kept. Takes `events` apart column by column, so that no more than one is held twice."""
    if keep.all():
        return events
    mask = pl.Series(keep)
    return pl.DataFrame([events.drop_in_place(name).filter(mask) for name in events.columns])


def distinct(events: pl.DataFrame, duplicates: str) -> pl.DataFrame:
    """The events, which are in order, without duplicates; the first row of each is kept. May take `events` apart."""
    if duplicates == "keep":
        return events
    if duplicates == "item":
        pair = pl.col(USER).cast(pl.UInt64) * (int(events[ITEM].max() or 0) + 1) + pl.col(ITEM)  # type: ignore[arg-type]
        return _kept(events, events.select(pair.is_first_distinct()).to_series().to_numpy())
    tied = np.append(ties(events), False)
    tied[:-1] |= tied[1:]  # only rows that share user and time with a neighbour can be duplicates
    rows = np.flatnonzero(tied)
    first = events[rows].select(pl.struct(USER, TIMESTAMP, ITEM).is_first_distinct()).to_series().to_numpy()
    keep = np.ones(len(events), dtype=bool)
    keep[rows[~first]] = False
    return _kept(events, keep)


def ties(events: pl.DataFrame) -> np.ndarray:
    """(E,) bool: the event shares user and time with the one before."""
    same = (pl.col(USER) == pl.col(USER).shift()) & (pl.col(TIMESTAMP) == pl.col(TIMESTAMP).shift())
    return events.select(same.fill_null(False)).to_series().to_numpy()


def core(events: pl.DataFrame, users: Codes, items: Codes, *, of_user: int, of_item: int) -> pl.DataFrame:
    """The events of users and items that have at least so many of them, repeated until it holds.

    May take `events` apart.
    """
    if max(of_user, of_item) == 1:
        return events
    user, item = events[USER].to_numpy(), events[ITEM].to_numpy()
    keep = np.ones(len(events), dtype=bool)
    left, before = len(events), -1
    while left != before:
        enough_users = np.bincount(user[keep], minlength=len(users)) >= of_user
        enough_items = np.bincount(item[keep], minlength=len(items)) >= of_item
        keep &= enough_users[user] & enough_items[item]
        left, before = int(keep.sum()), left
    return _kept(events, keep)
