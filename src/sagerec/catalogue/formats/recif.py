"""RecIF-Bench's wide table and maps as a canonical dataset, a block of users at a time.

A user's videos, ads and products are three sequences, since the table says nothing of their order to each other: the
users UID, UID/ad and UID/product. What a user of the training split had (`hist_*`) trains; of what the user took then
(`target_*`) the last item tests, the one before validates, and the others are reserved for alignment: fresh feedback.
The users of the test split are the benchmark's, and are left out. Times are places.

An item is a pid of one of the two maps: v17 of video_ad_pid2sid, p17 of product_pid2sid. It keeps its Semantic ID,
which others may share. Its text is its caption, its title the caption's beginning.

Nothing in the files is an error that a count can tell of: see `FAULTS`.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sagerec.artifacts import UNREADABLE, hash_file, write_artifact
from sagerec.catalogue.dataset import INTERACTIONS, ITEM_ID, ITEMS, SPLIT, TIMESTAMP, TITLE, USER_ID, check_items
from sagerec.catalogue.formats.writer import ImportSettings
from sagerec.config import require, to_json
from sagerec.errors import DatasetError

WIDE, VIDEO_MAP, PRODUCT_MAP = "onerec_bench_release.parquet", "video_ad_pid2sid.parquet", "product_pid2sid.parquet"
CAPTIONS = "pid2caption.parquet"
CAPTION_COLUMNS = ("dense_caption", "caption")
BLOCK_USERS = 8192
SEMANTIC_ID, TEXT = "semantic_id", "text"
TITLE_PATTERN = r"^\s*([^。！？!?\n]{1,60})"
MASKS = {
    "longview": "longview",
    "like": "like",
    "follow": "follow",
    "forward": "forward",
    "not_interested": "dislike",
    "watch_seconds": "watch_seconds",
    "duration_seconds": "duration_seconds",
}
"""Column of the wide table behind hist_video_ and target_video_ -> column of the dataset; the last two are taken where
a table has them, which the published one has not."""
FAULTS = {
    "rows_without_uid": "rows without uid or split, or of an unknown split, left out",
    "repeated_uids": "rows of a uid that an earlier one has, left out",
    "null_pids": "empty places in lists of pids, left out",
    "pids_without_sid": "pids without a Semantic ID",
    "events_without_sid": "their events, left out",
    "pids_with_several_sids": "pids that a map names with several Semantic IDs, of which the last counts",
    "shared_sids": "Semantic IDs that several pids share",
    "masks_of_another_length": "lists of feedback that are not as long as the pids, whose feedback is then unknown",
    "columns_absent": "columns that the wide table does not have",
}
"""Figure of the import -> what it counts."""


@dataclass(frozen=True, slots=True)
class Domain:
    """A kind of items in the wide table."""

    column: str
    """hist_COLUMN_pid, target_COLUMN_pid."""
    letter: str
    """With which its items' ids begin."""
    suffix: str
    """With which its users' ids end."""
    masks: tuple[str, ...] = ()
    """Feedback on it."""


DOMAINS = (Domain("video", "v", "", tuple(MASKS)), Domain("ad", "v", "/ad"), Domain("goods", "p", "/product"))


def import_recif(
    files: Sequence[Path], out: Path, settings: ImportSettings, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write the dataset of a RecIF folder; returns the figures. `progress` hears of the users read, and of all.

    Raises: DatasetError where a file is missing or damaged; SettingsError for a setting that this format does not read.
    """
    for field in fields(settings):
        given = getattr(settings, field.name)
        require(
            field.name == "items" or given == field.default,
            f"{field.name} is {given!r}, which the format recif does not read; leave it out",
        )
    by_name = {path.name: path for path in files if path.name in (WIDE, VIDEO_MAP, PRODUCT_MAP, CAPTIONS)}
    for name in (WIDE, VIDEO_MAP):
        if name not in by_name:
            raise DatasetError(f"{name} is not among the files; give the folder of OpenOneRec-RecIF")
    figures: dict[str, Any] = dict.fromkeys(FAULTS, 0) | {"columns_absent": []}
    try:
        known = read_maps(by_name, figures)
        made_from = {path.name: hash_file(path) for path in by_name.values()}
        origin = {"format": "recif", **to_json(settings)}
        with write_artifact(out, "dataset", made_from=made_from, settings=origin, sizes=figures) as fresh:
            parts = fresh / ".parts"
            parts.mkdir()
            used = _write_parts(parts, by_name[WIDE], known, figures, progress)
            pl.scan_parquet(parts / "*.parquet").sink_parquet(fresh / INTERACTIONS, compression_level=1)
            shutil.rmtree(parts)
            items = _items(known, used if settings.items != "all" else None, by_name.get(CAPTIONS))
            check_items(items, out / ITEMS).write_parquet(fresh / ITEMS)
            figures["items"] = len(items)
            figures["items_without_text"] = int(items[TEXT].null_count())
    except UNREADABLE as error:
        raise DatasetError(
            f"a file of {by_name[WIDE].parent} cannot be read as Parquet ({error}); get it again"
        ) from error
    return figures


@dataclass(frozen=True, slots=True)
class Known:
    """The items of both maps."""

    table: pl.DataFrame
    """letter, pid, and sid as text, in the order of the files; the row is the item's number."""


def read_maps(files: dict[str, Path], figures: dict[str, Any]) -> Known:
    """Both maps, one row a pid. Raises: DatasetError for other columns."""
    tables = []
    for name, letter in ((VIDEO_MAP, "v"), (PRODUCT_MAP, "p")):
        if name not in files:
            figures["columns_absent"].append(name)
            continue
        table = pl.read_parquet(files[name])
        if not {"pid", "sid"} <= set(table.columns):
            raise DatasetError(
                f"{files[name]}: got the columns {', '.join(table.columns)}; expected pid and sid (three codes)"
            )
        sid = pl.col("sid").cast(pl.List(pl.Int64))
        table = table.select(pl.lit(letter).alias("letter"), pl.col("pid").cast(pl.Int64), sid).drop_nulls()
        codes = [pl.col("sid").list.get(level, null_on_oob=True).cast(pl.String) for level in range(3)]
        text = pl.format("<a_{}><b_{}><c_{}>", *codes).alias("sid")
        table = table.filter(pl.col("sid").list.len() == 3).select("letter", "pid", text)
        different = table.unique().group_by("pid").len().filter(pl.col("len") > 1)
        figures["pids_with_several_sids"] += len(different)
        tables.append(table.unique("pid", keep="last", maintain_order=True))
    found = pl.concat(tables)
    figures["shared_sids"] = int((found.group_by("letter", "sid").len()["len"] > 1).sum())
    return Known(found)


def _write_parts(
    folder: Path, wide: Path, known: Known, figures: dict[str, Any], progress: Callable[[int, int], None]
) -> np.ndarray:
    """Write the events of each block of users as a file; returns (M,) bool, the items that occur."""
    table = pl.scan_parquet(wide)
    columns = table.collect_schema().names()
    for column in ("uid", SPLIT):
        if column not in columns:
            raise DatasetError(f"{wide}: column {column!r} is missing; got {', '.join(columns)}. Rename or add it")
    wanted = [column for domain in DOMAINS for column in _columns(domain)]
    published = [c for c in wanted if not c.endswith("_seconds")]
    figures["columns_absent"] += [c for c in published if c not in columns]
    table = table.select("uid", SPLIT, *(c for c in wanted if c in columns))
    total = int(table.select(pl.len()).collect().item())
    used, seen = np.zeros(len(known.table), dtype=bool), pl.Series("uid", [], dtype=pl.String)
    figures |= {"users": 0, "interactions": 0, "test_users": 0}
    numbered = known.table.with_row_index("item").select("letter", "pid", "item")
    without: list[pl.DataFrame] = []
    for number, begin in enumerate(range(0, total, BLOCK_USERS)):
        block, seen = _training_users(table.slice(begin, BLOCK_USERS).collect(), seen, figures)
        events = pl.concat([part for domain in DOMAINS for part in _events(block, domain, figures)], how="diagonal")
        events = events.join(numbered, on=["letter", "pid"], how="left", maintain_order="left")
        lost = events.filter(pl.col("item").is_null())
        figures["events_without_sid"] += len(lost)
        without.append(lost.select("letter", "pid").unique())
        events = _in_places(events.filter(pl.col("item").is_not_null()))
        used[events["item"].to_numpy()] = True
        figures["users"] += events[USER_ID].n_unique()
        figures["interactions"] += len(events)
        events.drop("letter", "pid", "item").write_parquet(folder / f"{number:06}.parquet", compression_level=1)
        progress(min(begin + BLOCK_USERS, total), total)
    figures["pids_without_sid"] = len(pl.concat(without).unique()) if without else 0
    if not figures["interactions"]:
        raise DatasetError(f"{wide}: no event of a training user is left; expected rows with split 0 and lists of pids")
    return used


def _columns(domain: Domain) -> Iterator[str]:
    """The columns of the wide table that a domain has."""
    for side in ("hist", "target"):
        yield f"{side}_{domain.column}_pid"
        yield from (f"{side}_{domain.column}_{mask}" for mask in domain.masks)


def _training_users(block: pl.DataFrame, seen: pl.Series, figures: dict[str, Any]) -> tuple[pl.DataFrame, pl.Series]:
    """The rows of a block that train, and the uids seen so far."""
    block = block.with_columns(pl.col("uid").cast(pl.String), pl.col(SPLIT).cast(pl.Int64, strict=False))
    whole = block.filter(pl.col("uid").is_not_null() & pl.col(SPLIT).is_in([0, 1]))
    figures["rows_without_uid"] += len(block) - len(whole)
    fresh = whole.unique("uid", keep="first", maintain_order=True).filter(~pl.col("uid").is_in(seen.implode()))
    figures["repeated_uids"] += len(whole) - len(fresh)
    train = fresh.filter(pl.col(SPLIT) == 0)
    figures["test_users"] += len(fresh) - len(train)
    return train.drop(SPLIT), pl.concat([seen, fresh["uid"]])


def _events(block: pl.DataFrame, domain: Domain, figures: dict[str, Any]) -> Iterator[pl.DataFrame]:
    """The events of a domain, histories first; `side` is 0 for those and 1 for what was taken then."""
    for number, side in enumerate(("hist", "target")):
        pids = f"{side}_{domain.column}_pid"
        if pids not in block.columns:
            continue
        masks = {m: MASKS[m] for m in domain.masks if f"{side}_{domain.column}_{m}" in block.columns}
        own = block.filter(pl.col(pids).list.len() > 0)
        length = pl.col(pids).list.len()
        lists = [pl.col(pids).cast(pl.List(pl.Int64)).alias("pid")]
        for mask, name in masks.items():
            column = pl.col(f"{side}_{domain.column}_{mask}")
            fits = (column.list.len() == length).fill_null(False)
            figures["masks_of_another_length"] += int(own.select((~fits & column.is_not_null()).sum()).item())
            dtype = pl.Float32 if mask.endswith("_seconds") else pl.Int8
            unknown = pl.lit(None, dtype).repeat_by(length)
            lists.append(pl.when(fits).then(column.cast(pl.List(dtype), strict=False)).otherwise(unknown).alias(name))
        user = (pl.col("uid") + domain.suffix).alias(USER_ID)
        table = own.select(user, *lists).explode("pid", *masks.values())
        figures["null_pids"] += int(table["pid"].null_count())
        kept = table.filter(pl.col("pid").is_not_null())
        yield kept.with_columns(pl.lit(domain.letter).alias("letter"), pl.lit(number, pl.Int8).alias("side"))


def _in_places(events: pl.DataFrame) -> pl.DataFrame:
    """The events with item id, time and part: a user's in their order, histories before what was taken."""
    events = events.sort(USER_ID, "side", maintain_order=True)
    place = pl.int_range(pl.len()).over(USER_ID)
    from_end = pl.len().over(USER_ID) - 1 - place
    later = pl.when(from_end == 0).then(pl.lit("test")).when(from_end == 1).then(pl.lit("valid"))
    part = pl.when(pl.col("side") == 0).then(pl.lit("train")).otherwise(later.otherwise(pl.lit("align")))
    return events.with_columns(
        pl.concat_str("letter", "pid").alias(ITEM_ID), place.alias(TIMESTAMP), part.alias(SPLIT)
    ).drop("side")


def _items(known: Known, used: np.ndarray | None, captions: Path | None) -> pl.DataFrame:
    """The items table; of those that occur, or of all where `used` is None."""
    table = known.table if used is None else known.table.filter(pl.Series(used))
    items = table.with_columns(pl.concat_str("letter", "pid").alias(ITEM_ID), pl.col("sid").alias(SEMANTIC_ID))
    texts = pl.DataFrame(schema={"pid": pl.Int64, TEXT: pl.String})
    if captions is not None:
        read = pl.scan_parquet(captions)
        names = read.collect_schema().names()
        column = next((name for name in CAPTION_COLUMNS if name in names), None)
        if column is None or "pid" not in names:
            raise DatasetError(
                f"{captions}: got the columns {', '.join(names)}; expected pid, and dense_caption or caption"
            )
        wanted = items.filter(pl.col("letter") == "v")["pid"].implode()
        found = read.select(pl.col("pid").cast(pl.Int64), pl.col(column).cast(pl.String).alias(TEXT))
        texts = found.filter(pl.col("pid").is_in(wanted)).unique("pid", keep="first").collect()
    items = items.join(
        texts.with_columns(pl.lit("v").alias("letter")), on=["letter", "pid"], how="left", maintain_order="left"
    )
    text = pl.col(TEXT).str.strip_chars().replace("", None)
    title = text.str.extract(TITLE_PATTERN).str.strip_chars().alias(TITLE)
    return items.select(ITEM_ID, title, text, SEMANTIC_ID)
