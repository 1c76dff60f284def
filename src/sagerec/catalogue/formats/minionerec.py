"""MiniOneRec's files: CSV rows of a history and its target, `NAME.item.json`, `NAME.index.json`.

A row holds the last items before its target (at most ten), so the log is put together again from overlapping rows: of
a user, the rows of train, valid and test in turn, and what a row's history adds to the sequence so far. Times are
positions in the user's sequence. An item that is no target belongs to the part of the user's last target before it,
else to train. The index becomes the column `semantic_id`.
"""

import ast
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from sagerec.catalogue.dataset import CATEGORIES, ITEM_ID, SPLIT, TIMESTAMP, TITLE, USER_ID
from sagerec.catalogue.formats.blocks import BadRows, Chunk
from sagerec.catalogue.formats.delimited import Dialect, read_delimited
from sagerec.catalogue.formats.fields import Field, as_lines, is_unicode
from sagerec.catalogue.formats.source import ITEM_SCHEMA, Source, clean_list, clean_price, clean_text
from sagerec.errors import DatasetError

SEMANTIC_ID = "semantic_id"
PARTS = ("train", "valid", "test")
FIELDS = (
    Field(USER_ID, "user_id", required=True),
    Field("history", "history_item_id"),
    Field(ITEM_ID, "item_id", required=True),
)


def read_minionerec(files: Sequence[Path], bad: BadRows) -> Source:
    """CSV files, each of one part, and the item files. Raises: DatasetError."""
    tables = [p for p in files if p.suffix == ".csv"]
    items = [p for p in files if p.name.endswith(".item.json")]
    indices = [p for p in files if p.name.endswith(".index.json")]
    if not tables or len(items) != 1 or len(indices) > 1:
        raise DatasetError(
            f"{len(tables)} .csv, {len(items)} .item.json and {len(indices)} .index.json files are given; expected at "
            "least one, one, and at most one. Give MiniOneRec's folder, or these files"
        )
    by_part = sorted(((part_of(p), p) for p in tables), key=lambda pair: PARTS.index(pair[0]))
    return Source(
        log=_read_log(by_part, bad),
        items=_read_items(items[0], indices[0] if indices else None, bad),
        files=(*tables, *items, *indices),
    )


def part_of(path: Path) -> str:
    """The part that a CSV file holds, by its folder's name or its own. Raises: DatasetError."""
    for name in (path.parent.name, path.stem):
        found = [part for part in PARTS if part in name.lower()]
        if len(found) == 1:
            return found[0]
    raise DatasetError(
        f"{path}: neither the folder nor the file says train, valid or test; expected a name such as train/NAME.csv"
    )


def _read_log(by_part: Sequence[tuple[str, Path]], bad: BadRows) -> Iterator[Chunk]:
    """All events, in one chunk a file; the line is that of the row that brought the event."""
    sequences: dict[str, list[str]] = {}
    last_part: dict[str, str] = {}
    for part, path in by_part:
        rows: list[tuple[str, str, int, str]] = []
        lines: list[int] = []
        for chunk in read_delimited(path, lambda _: FIELDS, bad, Dialect()):
            for line, (user, history, target) in zip(chunk.lines.tolist(), chunk.table.iter_rows(), strict=True):
                before = _history(path, line, history, bad)
                if before is None:
                    continue
                sequence = sequences.setdefault(user, [])
                new = before[_overlap(sequence, before) :]
                for item, its_part in [*((item, last_part.get(user, "train")) for item in new), (target, part)]:
                    rows.append((user, item, len(sequence), its_part))
                    lines.append(line)
                    sequence.append(item)
                last_part[user] = part
        schema = {USER_ID: pl.String(), ITEM_ID: pl.String(), TIMESTAMP: pl.Int64(), SPLIT: pl.String()}
        yield Chunk(path, pl.DataFrame(rows, schema=schema, orient="row"), as_lines(lines), path.stat().st_size)


def _history(path: Path, line: int, cell: str | None, bad: BadRows) -> list[str] | None:
    """The item ids of a history cell, a Python list; None, and a bad row, where it is none."""
    try:
        values = ast.literal_eval(cell or "[]")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(isinstance(v, int) or is_unicode(v) for v in values):
        bad.report(path, line, "wrong type", f"'history_item_id' is {(cell or '')[:60]!r}; expected a list of item ids")
        return None
    return [str(v) for v in values]


def _overlap(sequence: Sequence[str], history: Sequence[str]) -> int:
    """How many items `history` begins with that `sequence` ends with, at most."""
    for length in range(min(len(sequence), len(history)), 0, -1):
        if list(sequence[-length:]) == list(history[:length]):
            return length
    return 0


def _read_items(path: Path, index_path: Path | None, bad: BadRows) -> Iterator[Chunk]:
    items = _read_object(path)
    index = _read_object(index_path) if index_path else {}
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, (item_id, record) in enumerate(items.items(), 1):
        codes = index.get(item_id, [])
        if not isinstance(record, dict) or not isinstance(codes, list) or not all(map(is_unicode, (item_id, *codes))):
            bad.report(path, number, "wrong type", f"item {item_id!r} has no object, or its index no list of codes")
            continue
        categories = record.get("categories")
        rows.append(
            {
                ITEM_ID: item_id,
                TITLE: clean_text(record.get("title")),
                "brand": clean_text(record.get("brand")),
                "text": None,
                "description": clean_text(record.get("description")),
                CATEGORIES: clean_list(categories.split(",") if isinstance(categories, str) else categories),
                "price": clean_price(record.get("price")),
                SEMANTIC_ID: "".join(codes) or None,
            }
        )
        lines.append(number)
    schema = ITEM_SCHEMA | ({SEMANTIC_ID: pl.String()} if index_path else {})
    rows = [{name: row[name] for name in schema} for row in rows]
    yield Chunk(path, pl.DataFrame(rows, schema=schema), as_lines(lines), path.stat().st_size)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: DatasetError."""
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read as JSON ({error}); get it again") from error
    if not isinstance(values, dict):
        raise DatasetError(f"{path} holds a {type(values).__name__}, expected an object from item id to its content")
    return values
