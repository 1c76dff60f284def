"""CSV, tab-separated and Parquet tables whose columns the user names: the first file is the log, the second the items.

Times are numbers or ISO dates. A column named `split` and the known feedback columns are taken where they are there;
`--columns.feedback` names further ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from sagerec.artifacts import UNREADABLE
from sagerec.catalogue.dataset import CATEGORIES, FEEDBACK_COLUMNS, ITEM_ID, SPLIT, TITLE, is_text, require_columns
from sagerec.catalogue.formats.blocks import BadRows, Chunk
from sagerec.catalogue.formats.delimited import Choose, Dialect, cast_cells, read_delimited, slow_chunk
from sagerec.catalogue.formats.fields import BadValueError, Field, as_lines, log_fields, split_field
from sagerec.catalogue.formats.source import Source, clean_items
from sagerec.config import require
from sagerec.errors import DatasetError

ROWS = 500_000
"""Rows of a Parquet file that are read at a time."""


@dataclass(frozen=True, slots=True)
class TableColumns:
    """What the columns of the user's own tables are called."""

    user: str = "user_id"
    """Column of the log: who."""
    item: str = "item_id"
    """Column of the log and of the items: what."""
    time: str = "timestamp"
    """Column of the log: when, a number or an ISO date."""
    feedback: tuple[str, ...] = ()
    """Further numeric columns of the log to carry along."""
    title: str = "title"
    """Column of the items: the title."""
    categories: str = "categories"
    """Column of the items: the categories, in one text."""
    category_separator: str = ""
    """What stands between categories; where not given: |, else a comma, else a space."""
    separator: str = ""
    """What stands between cells; where not given: a tab in .tsv files, else a comma."""

    def __post_init__(self) -> None:
        require(len(self.separator) <= 1, f"separator is {self.separator!r}; expected one character")


def read_tables(files: Sequence[Path], bad: BadRows, columns: TableColumns) -> Source:
    """The log, and the items where there is a second file. Raises: DatasetError."""
    if not 1 <= len(files) <= 2:
        raise DatasetError(f"{len(files)} files are given; expected the log, or the log and the items, in this order")

    def log_of(header: list[str]) -> list[Field]:
        wanted = dict.fromkeys((*columns.feedback, *(c for c in FEEDBACK_COLUMNS if c in header)))
        fields = list(log_fields(columns.user, columns.item, columns.time))
        fields += [split_field()] if SPLIT in header else []
        return fields + [Field(name, name, "number") for name in wanted]

    def items_of(header: list[str]) -> list[Field]:
        named = {TITLE: columns.title, CATEGORIES: columns.categories}
        optional = {"brand": "brand", "text": "text", "description": "description", "price": "price"} | named
        present = {name: source for name, source in optional.items() if source in header}
        fields = [Field(ITEM_ID, columns.item, required=True), Field(TITLE, columns.title)]
        return fields + [Field(name, source) for name, source in present.items() if name != TITLE]

    log = _read(files[0], log_of, bad, columns)
    if len(files) == 1:
        return Source(log=log, items=None, files=tuple(files))
    items = (clean_items(chunk, columns.category_separator) for chunk in _read(files[1], items_of, bad, columns))
    return Source(log=log, items=items, files=tuple(files))


def _read(path: Path, choose: Choose, bad: BadRows, columns: TableColumns) -> Iterator[Chunk]:
    if path.suffix == ".parquet":
        return _read_parquet(path, choose, bad)
    separator = columns.separator or ("\t" if ".tsv" in path.suffixes else ",")
    return read_delimited(path, choose, bad, Dialect(separator))


def _read_parquet(path: Path, choose: Choose, bad: BadRows) -> Iterator[Chunk]:
    """The chosen columns, some row groups at a time, as cells of text: faults are found and named as in a CSV file."""
    try:
        lazy = pl.scan_parquet(path)
        header = lazy.collect_schema()
        height = int(lazy.select(pl.len()).collect().item())
    except UNREADABLE as error:
        raise DatasetError(f"{path} cannot be read as Parquet ({error}); write it again") from error
    fields = choose(list(header))
    require_columns(pl.DataFrame(schema=header), [f.source for f in fields], path)
    if height == 0:
        raise DatasetError(f"{path} has no row; expected at least one")
    size = path.stat().st_size
    for start in range(0, height, ROWS):
        try:
            rows = lazy.select(pl.col(f.source).alias(f.name) for f in fields).slice(start, ROWS).collect()
        except UNREADABLE as error:
            raise DatasetError(f"{path} cannot be read as Parquet ({error}); write it again") from error
        cells = [_as_cells(rows[f.name], f, path) for f in fields]
        lines = as_lines(range(start + 1, start + 1 + len(rows)))
        read_so_far = size * min(start + ROWS, height) // height
        try:
            table = pl.DataFrame([cast_cells(column, f) for column, f in zip(cells, fields, strict=True)])
            yield Chunk(path, table, lines, read_so_far)
        except BadValueError:
            numbered = zip(lines.tolist(), zip(*cells, strict=True), strict=True)
            yield slow_chunk(path, numbered, fields, bad, read_so_far)


def _as_cells(column: pl.Series, field: Field, path: Path) -> pl.Series:
    """A typed column as text. Raises: DatasetError for a type that has none."""
    if column.dtype == pl.List(pl.String):
        return column.list.join("|")
    if column.dtype == pl.Boolean:
        column = column.cast(pl.Int8)
    dtype = column.dtype
    if not (dtype.is_numeric() or dtype.is_temporal() or is_text(dtype) or dtype == pl.Null):
        raise DatasetError(
            f"{path}: column {field.source!r} has type {column.dtype}, expected text, numbers or times. Cast it"
        )
    if isinstance(column.dtype, pl.Datetime) and column.dtype.time_zone:
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return column.cast(pl.String)
