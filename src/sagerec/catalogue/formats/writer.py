"""From chunks to a canonical dataset: `sagerec import`.

1. read the log, ids as numbers, so that ten million events take some hundred megabytes
2. put it into the canonical order: by user, by time, then as the files have it
3. leave out duplicates, then users and items below the k-core
4. read the items, leave out those that the log does not hold (or that have no words), and the k-core again
5. write, with what was left out, and why, in the manifest

Shapes: E events, U users, N items.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from sagerec.artifacts import hash_file, write_artifact
from sagerec.catalogue.dataset import (
    INTERACTIONS,
    ITEM_ID,
    ITEMS,
    SPLIT,
    TEXT_COLUMNS,
    TIMESTAMP,
    TITLE,
    USER_ID,
    check_items,
)
from sagerec.catalogue.describe import time_range
from sagerec.catalogue.formats.blocks import BadRows, Chunk, place
from sagerec.catalogue.formats.event_log import FILE, ITEM, LINE, USER, Codes, core, distinct, in_order, read_log, ties
from sagerec.catalogue.formats.source import Source
from sagerec.config import at_least, check_fields, to_json
from sagerec.errors import DatasetError

Progress = Callable[[int], None]
"""Called with the bytes of the source files that have been read."""


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """What is left out of the files that are imported."""

    k_core: int = 1
    """Every user and every item keeps at least this many events, repeated until it holds; 1 keeps all."""
    min_user_events: int = 1
    """Users with fewer events are left out; 2 leaves out those with one, who make no sequence."""
    duplicates: Literal["event", "item", "keep"] = "event"
    """event: of the same user, item and time one row is kept; item: of the same user and item the first in time; keep:
    all rows are."""
    items: Literal["auto", "log", "all"] = "auto"
    """log: only items that the log holds; all: those of the item files, so that never-seen ones can be recommended;
    auto: log for Amazon, whose files hold a whole category, else all."""
    unknown_items: Literal["error", "keep", "drop"] = "error"
    """Items of the log that the item files lack: an error (with --skip-bad-rows their events are left out), kept
    without words, or left out."""
    items_without_text: Literal["keep", "drop"] = "keep"
    """Items without title, brand, text and description: kept, or left out with their events."""
    skip_bad_rows: bool = False
    """Rows that cannot be read are counted and left out, in place of an error at the first."""

    def __post_init__(self) -> None:
        check_fields(self, k_core=at_least(1), min_user_events=at_least(1))

    def core(self) -> dict[str, int]:
        """How many events a user and an item keep at least."""
        return {"of_user": max(self.k_core, self.min_user_events), "of_item": self.k_core}


def write_imported(
    folder: Path,
    source: Source,
    settings: ImportSettings,
    bad: BadRows,
    *,
    origin: dict[str, Any],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read what `source` gives and write the canonical dataset; returns the figures of the import.

    `origin` says how the files were read (format, columns) and is saved with the settings.

    Raises: DatasetError for a fault of the files, or where nothing is left. Nothing half-written remains.
    """
    users, items = Codes(), Codes()
    events = read_log(_reporting(source.log, progress, 0), source.files, users, items)
    logged_bytes = sum(source.files[place].stat().st_size for place in events[FILE].unique())
    figures: dict[str, Any] = {"rows_read": len(events) + bad.counts.total()}
    events = in_order(events, users)
    before = len(events)
    events = distinct(events, settings.duplicates)
    figures["duplicate_events"] = before - len(events)
    before = len(events)
    events = core(events, users, items, **settings.core())
    table, figures["duplicate_items"] = read_items(
        _reporting(source.items, progress, logged_bytes) if source.items else None, source, events, items, settings, bad
    )
    below_core, before = before - len(events), len(events)
    events, table, figures["unknown_items"] = known(events, table, items, source, settings)
    events, table = worded(events, table, items, settings)
    figures["events_of_dropped_items"] = before - len(events)
    before = len(events)
    events = core(events, users, items, **settings.core())
    figures["events_below_k_core"] = below_core + before - len(events)
    figures["bad_rows"] = bad.counts.total()
    if events.is_empty():
        left_out = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in figures.items())
        raise DatasetError(
            f"no event is left ({left_out}); expected at least one. Lower --k-core or --min-user-events, or mend "
            "the files"
        )
    if _only_log(source, settings) or settings.k_core > 1:
        table = table.filter(pl.col(ITEM_ID).is_in(_ids_of(events, items).implode()))
    figures = _content_figures(events, table) | figures | {"bad_rows_by_reason": dict(bad.counts)}
    figures |= {"unreadable_values": bad.unreadable.total(), "unreadable_values_by_column": dict(bad.unreadable)}
    figures |= source.notes
    write(folder, source, origin | to_json(settings), events, table, users, items, figures)
    return figures


def _reporting(chunks: Iterator[Chunk], progress: Progress | None, done: int) -> Iterator[Chunk]:
    """The same chunks; `progress` hears of the bytes read, `done` of them before these."""
    path, read = None, 0
    for chunk in chunks:
        done += read if path not in (None, chunk.path) else 0
        path, read = chunk.path, chunk.source_bytes
        if progress:
            progress(done + read)
        yield chunk


def _only_log(source: Source, settings: ImportSettings) -> bool:
    """Whether items that the log does not hold are left out."""
    return settings.items == "log" or (settings.items == "auto" and source.has_whole_category)


def _ids_of(events: pl.DataFrame, items: Codes) -> pl.Series:
    """Ids of the items of some events, in the order in which the files first name them."""
    return items.ids(events[ITEM].unique().sort()).rename(ITEM_ID)


def read_items(
    chunks: Iterator[Chunk] | None,
    source: Source,
    events: pl.DataFrame,
    items: Codes,
    settings: ImportSettings,
    bad: BadRows,
) -> tuple[pl.DataFrame, int]:
    """The items, one row an id, and how many rows said again what one before had said.

    Of rows that differ the first is kept, and the others are bad ones. Where no file holds items, those of the log are
    taken, without words.
    """
    logged = _ids_of(events, items)
    if chunks is None:
        return _without_words(logged), 0
    wanted = np.zeros(len(items), dtype=bool)
    wanted[events[ITEM].unique().to_numpy()] = True
    parts: list[pl.DataFrame] = []
    for chunk in chunks:
        table = chunk.table.with_columns(
            pl.lit(source.files.index(chunk.path), pl.UInt16).alias(FILE), pl.Series(LINE, chunk.lines)
        )
        if _only_log(source, settings):
            codes = items.encode(table[ITEM_ID]).to_numpy()
            table = table.filter(pl.Series(wanted[np.minimum(codes, len(wanted) - 1)] & (codes < len(wanted))))
        parts.append(table)
    table = pl.concat(parts, how="diagonal_relaxed") if parts else _without_words(logged[:0])
    repeats = 0
    first: dict[str, tuple[list[Any], int, int]] = {}
    id_column = table.columns.index(ITEM_ID)
    for *row, file, line in table.filter(pl.col(ITEM_ID).is_duplicated()).iter_rows():
        content, known_file, known_line = first.setdefault(row[id_column], (row, file, line))
        if (known_file, known_line) == (file, line):
            continue
        repeats += content == row
        if content != row:
            where = f"{source.files[known_file].name}, {place(source.files[known_file], known_line)},"
            bad.report(
                source.files[file], line, "duplicate item", f"{row[id_column]!r} is in {where} with other content"
            )
    table = table.unique(ITEM_ID, keep="first", maintain_order=True).drop(FILE, LINE, strict=False)
    empty = [c for c in table.columns if c not in (ITEM_ID, TITLE) and table[c].null_count() == len(table)]
    return table.drop(empty), repeats


def _without_words(ids: pl.Series) -> pl.DataFrame:
    return pl.DataFrame([ids]).with_columns(pl.lit(None, pl.String).alias(TITLE))


def known(
    events: pl.DataFrame, table: pl.DataFrame, items: Codes, source: Source, settings: ImportSettings
) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """Events and items after those items of the log that no file has were added or left out; and their number.

    Raises: DatasetError with the place of the first, unless they are kept or left out.
    """
    logged = _ids_of(events, items)
    absent = logged.filter(~logged.is_in(table[ITEM_ID].implode()))
    if absent.is_empty():
        return events, table, 0
    is_absent = pl.col(ITEM).is_in(items.encode(absent).implode())
    if settings.unknown_items == "keep":
        return events, pl.concat([table, _without_words(absent)], how="diagonal"), len(absent)
    if settings.unknown_items == "error" and not settings.skip_bad_rows:
        row = events.filter(is_absent).sort(FILE, LINE).row(0, named=True)
        absent_id, path = items.ids()[row[ITEM]], source.files[row[FILE]]
        raise DatasetError(
            f"{path}: {place(path, row[LINE])}: item {absent_id!r} is in no item file, like "
            f"{len(absent) - 1:,} others. Add the items, keep them without words with --unknown-items keep, or leave "
            "their events out with --unknown-items drop"
        )
    return events.filter(~is_absent), table, len(absent)


def worded(
    events: pl.DataFrame, table: pl.DataFrame, items: Codes, settings: ImportSettings
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events and items without the items that have no words, where those are to be left out."""
    if settings.items_without_text == "keep":
        return events, table
    table = table.filter(_has_words(table))
    return events.filter(pl.col(ITEM).is_in(items.encode(table[ITEM_ID]).implode())), table


def _has_words(table: pl.DataFrame) -> pl.Expr:
    return pl.any_horizontal(pl.col(c).is_not_null() for c in TEXT_COLUMNS if c in table.columns)


def _content_figures(events: pl.DataFrame, table: pl.DataFrame) -> dict[str, Any]:
    """What the dataset holds."""
    of_user = np.bincount(events[USER].to_numpy())
    return {
        "users": int((of_user > 0).sum()),
        "items": len(table),
        "interactions": len(events),
        "feedback": [c for c in events.columns if c not in (USER, ITEM, TIMESTAMP, SPLIT, FILE, LINE)],
        "times": time_range(events[TIMESTAMP]),
        "same_time_ties": int(ties(events).sum()),
        "users_with_one_event": int((of_user == 1).sum()),
        "items_without_text": len(table) - int(table.select(_has_words(table).sum()).item()),
        "items_without_events": len(table) - events[ITEM].n_unique(),
    }


def write(
    folder: Path,
    source: Source,
    settings: dict[str, Any],
    events: pl.DataFrame,
    table: pl.DataFrame,
    users: Codes,
    items: Codes,
    figures: dict[str, Any],
) -> None:
    """Write the artefact; ids become text again a part at a time."""
    made_from = {f"{path.parent.name}/{path.name}": hash_file(path) for path in source.files}
    table = check_items(table, folder / ITEMS)
    rows = events.lazy().select(
        users.decode(pl.col(USER)).alias(USER_ID),
        items.decode(pl.col(ITEM)).alias(ITEM_ID),
        TIMESTAMP,
        *figures["feedback"],
        *([pl.col(SPLIT).cast(pl.String)] if SPLIT in events.columns else []),
    )
    with write_artifact(folder, "dataset", made_from=made_from, settings=settings, sizes=figures) as fresh:
        table.write_parquet(fresh / ITEMS)
        rows.sink_parquet(fresh / INTERACTIONS, compression_level=1)  # zstd; twice as fast as its default, 5 % larger
