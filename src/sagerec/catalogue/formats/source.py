"""What every format gives to the writer: the files it was handed, sorted, and the chunks it reads from them."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from sagerec.catalogue.dataset import CATEGORIES, ITEM_ID, TITLE
from sagerec.catalogue.formats.blocks import Chunk
from sagerec.catalogue.formats.fields import UNIT, as_lines
from sagerec.errors import DatasetError

ITEM_SCHEMA: dict[str, Any] = {
    ITEM_ID: pl.String(),
    TITLE: pl.String(),
    "brand": pl.String(),
    "text": pl.String(),
    "description": pl.String(),
    CATEGORIES: pl.List(pl.String()),
    "price": pl.Float64(),
}
"""Columns that readers of item files fill; a file may have further ones."""
PRICE = re.compile(r"\s*(?:US)?\$?\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)\s*(?:USD)?\s*")


NO_CATEGORY = "(no genres listed)"
"""What MovieLens writes for an item without categories."""
NO_SEPARATOR = "none"
SEPARATOR_NAMES = {",": "comma", " ": "space", "\t": "tab", UNIT: "that of a list"}


@dataclass(frozen=True, slots=True)
class Source:
    """What one format read."""

    log: Iterator[Chunk]
    """Events: user_id, item_id, timestamp, feedback, and `split` where the files say."""
    items: Iterator[Chunk] | None
    """Items, None where no file holds any."""
    files: tuple[Path, ...]
    """All files, for provenance and progress."""
    has_whole_category: bool = False
    """The item files hold far more than the log; only items of the log are kept unless asked."""
    notes: dict[str, str] = field(default_factory=dict)
    """What the readers decide on the way, for the summary of the import; whole when all chunks are read."""


def files_of(sources: Sequence[Path]) -> list[Path]:
    """The files named, and those in the folders named, in a fixed order. Raises: DatasetError."""
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            found += sorted(p for p in source.rglob("*") if p.is_file() and not p.name.startswith("."))
        elif source.is_file():
            found.append(source)
        else:
            raise DatasetError(f"{source} is missing; give the files to import, or a folder that holds them")
    return found


def item_chunk(path: Path, rows: list[dict[str, Any]], lines: list[int], source_bytes: int) -> Chunk:
    """Items as a chunk, in the columns of ITEM_SCHEMA."""
    return Chunk(path, pl.DataFrame(rows, schema=ITEM_SCHEMA), as_lines(lines), source_bytes)


def clean_items(
    chunks: Iterator[Chunk], notes: dict[str, str], *, separator: str = "", candidates: Sequence[str] = ("|", ",")
) -> Iterator[Chunk]:
    """Items whose cells are all text, in the columns of ITEM_SCHEMA.

    Categories are split at `separator`; where none is given, at the first candidate that any of them holds, else not at
    all ("none"). One separator serves all chunks, so they are read first; `notes` is told which it is.
    """
    read = list(chunks)
    columns = [chunk.table[CATEGORIES].drop_nulls() for chunk in read if CATEGORIES in chunk.table.columns]
    held = (s for s in (UNIT, *candidates) if any(c.str.contains(s, literal=True).any() for c in columns))
    separator = separator or next(held, NO_SEPARATOR)
    if columns:
        notes["category_separator"] = SEPARATOR_NAMES.get(separator, separator)
    while read:
        yield _clean(read.pop(0), separator)


def _clean(chunk: Chunk, separator: str) -> Chunk:
    rows = []
    for row in chunk.table.iter_rows(named=True):
        cleaned = {name: clean_text(row.get(name)) for name in ITEM_SCHEMA if name not in (CATEGORIES, "price")}
        text = row.get(CATEGORIES) or ""
        parts = [text] if separator == NO_SEPARATOR else [part.strip().strip("'\"") for part in text.split(separator)]
        categories = [part for part in clean_list(parts) if part != NO_CATEGORY]
        rows.append(cleaned | {CATEGORIES: categories, "price": clean_price(row.get("price")), ITEM_ID: row[ITEM_ID]})
    return Chunk(chunk.path, pl.DataFrame(rows, schema=ITEM_SCHEMA), chunk.lines, chunk.source_bytes)


def clean_text(value: Any) -> str | None:
    """A text, or a list of texts joined, without HTML entities and needless space; None where nothing is left."""
    if isinstance(value, list | tuple):
        value = " ".join(v for v in value if isinstance(v, str))
    if not isinstance(value, str):
        return None
    if "&" in value:
        value = html.unescape(value)
    return " ".join(value.encode("utf-8", "replace").decode("utf-8").split()) or None


def clean_list(value: Any) -> list[str]:
    """The texts of a list, of lists in a list, or of one text, each once."""
    return list(dict.fromkeys(text for part in _flat(value) if (text := clean_text(part))))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def clean_price(value: Any) -> float | None:
    """A price in dollars, None where there is none or the text is a range or no price at all."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if 0 <= value < 1e9 else None
    match = PRICE.fullmatch(value) if isinstance(value, str) else None
    return float(match[1].replace(",", "")) if match else None
