"""What every format gives to the writer: the files it was handed, sorted, and the chunks it reads from them."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from sagerec.catalogue.dataset import CATEGORIES, ITEM_ID, TITLE
from sagerec.catalogue.formats.blocks import Chunk
from sagerec.catalogue.formats.fields import as_lines
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


def clean_items(chunk: Chunk, category_separator: str = "") -> Chunk:
    """Items whose cells are all text, in the columns of ITEM_SCHEMA.

    Categories are split at `category_separator`, or, where none is given, at `|`, else at commas, else at spaces.
    """
    rows = []
    for row in chunk.table.iter_rows(named=True):
        cleaned = {name: clean_text(row.get(name)) for name in ITEM_SCHEMA if name not in (CATEGORIES, "price")}
        categories = row.get(CATEGORIES) or ""
        separator = category_separator or next((s for s in "|," if s in categories), " ")
        parts = [part.strip().strip("'\"") for part in categories.split(separator)]
        rows.append(
            cleaned | {CATEGORIES: clean_list(parts), "price": clean_price(row.get("price")), ITEM_ID: row[ITEM_ID]}
        )
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
