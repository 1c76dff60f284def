"""CSV, tab-separated and Parquet tables whose columns the user names: the first file is the log, the second the items.

Times are numbers or ISO dates, or written as `--columns.time-format` says. A column named `split` and the known
feedback columns are taken where they are there; `--columns.feedback` names further ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from sagerec.artifacts import UNREADABLE
from sagerec.catalogue.dataset import (
    CATEGORIES,
    FEEDBACK_COLUMNS,
    ITEM_ID,
    SPLIT,
    TITLE,
    is_text,
    require_columns,
    whole_ids,
)
from sagerec.catalogue.formats.blocks import BadRows, Chunk
from sagerec.catalogue.formats.delimited import Choose, Dialect, cast_cells, read_delimited, slow_chunk
from sagerec.catalogue.formats.fields import UNIT, BadValueError, Field, as_lines, log_fields, split_field
from sagerec.catalogue.formats.source import NO_SEPARATOR, Source, clean_items
from sagerec.catalogue.formats.times import require_time_format
from sagerec.config import check_fields, require
from sagerec.errors import DatasetError, SettingsError

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
    """What stands between categories, or none; where not given: | if any item has one, else a comma, else none. What
    was taken is printed."""
    separator: str = ""
    """What stands between cells, such as ; or ::; where not given: a tab in .tsv files, else a comma."""
    items_separator: str = ""
    """The same in the items, where it is another than in the log."""
    quote: str = ""
    """The character that cells may stand between, or none; where not given: a double quote, and none in .tsv files and
    where several characters stand between cells. Where given, a cell may hold lines that look like rows."""
    encoding: str = ""
    """Encoding of the text, such as latin-1; UTF-8 where not given."""
    header: tuple[str, ...] = ()
    """Names of the log's columns, for a file without a header line."""
    items_header: tuple[str, ...] = ()
    """Names of the items' columns, for a file without a header line."""
    time_format: str = ""
    """How times are written that are neither numbers nor ISO dates, such as %d/%m/%Y %H:%M."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("quote", "separator", "items_separator"):
            value = getattr(self, name)
            require(not set(value) & set("\r\n\0"), f"{name} is {value!r}; expected no line end")
        require(
            self.quote in ("", NO_SEPARATOR) or (len(self.quote) == 1 and self.quote.isascii()),
            f"quote is {self.quote!r}; expected one character of ASCII, or none",
        )
        separators = (self.separator or ",", self.items_separator or self.separator or ",")
        if self.quote != NO_SEPARATOR:
            quote = self.quote or '"'
            require(quote not in separators, f"separator is {quote!r}; expected another character than the quote")
        if self.quote not in ("", NO_SEPARATOR):
            long = next((s for s in separators if len(s.encode()) > 1), None)
            require(long is None, f"quote is {self.quote!r}; expected none where cells are told apart at {long!r}")
        if self.encoding:
            require_encoding(self.encoding)
        if self.time_format:
            require_time_format(self.time_format)

    def log_dialect(self, path: Path) -> Dialect:
        """How the log is written."""
        return self._dialect(path, self.separator, self.header)

    def items_dialect(self, path: Path) -> Dialect:
        """How the items are written."""
        return self._dialect(path, self.items_separator or self.separator, self.items_header)

    def _dialect(self, path: Path, separator: str, header: tuple[str, ...]) -> Dialect:
        is_tabbed = ".tsv" in path.suffixes
        separator = separator or ("\t" if is_tabbed else ",")
        quote = self.quote or (NO_SEPARATOR if is_tabbed or len(separator.encode()) > 1 else '"')
        return Dialect(separator, "" if quote == NO_SEPARATOR else quote, bool(self.quote), self.encoding, header)


def require_encoding(name: str) -> None:
    """Raise SettingsError unless Python knows an encoding of text by this name."""
    try:
        "a".encode(name)
    except (LookupError, UnicodeError, ValueError) as error:
        raise SettingsError(f"encoding is {name!r}; expected one such as latin-1, cp1252 or utf-16") from error


def read_tables(files: Sequence[Path], bad: BadRows, columns: TableColumns) -> Source:
    """The log, and the items where there is a second file. Raises: DatasetError."""
    if not 1 <= len(files) <= 2:
        raise DatasetError(f"{len(files)} files are given; expected the log, or the log and the items, in this order")

    def log_of(header: list[str]) -> list[Field]:
        wanted = dict.fromkeys((*columns.feedback, *(c for c in FEEDBACK_COLUMNS if c in header)))
        fields = list(log_fields(columns.user, columns.item, columns.time, time_format=columns.time_format))
        fields += [split_field()] if SPLIT in header else []
        return fields + [Field(name, name, "number") for name in wanted]

    def items_of(header: list[str]) -> list[Field]:
        named = {TITLE: columns.title, CATEGORIES: columns.categories}
        optional = {"brand": "brand", "text": "text", "description": "description", "price": "price"} | named
        present = {name: source for name, source in optional.items() if source in header}
        fields = [Field(ITEM_ID, columns.item, required=True), Field(TITLE, columns.title)]
        return fields + [Field(name, source) for name, source in present.items() if name != TITLE]

    log = _read(files[0], log_of, bad, columns.log_dialect(files[0]))
    if len(files) == 1:
        return Source(log=log, items=None, files=tuple(files))
    notes: dict[str, str] = {}
    items = _read(files[1], items_of, bad, columns.items_dialect(files[1]))
    items = clean_items(items, notes, separator=columns.category_separator)
    return Source(log=log, items=items, files=tuple(files), notes=notes)


def _read(path: Path, choose: Choose, bad: BadRows, dialect: Dialect) -> Iterator[Chunk]:
    if path.suffix == ".parquet":
        return _read_parquet(path, choose, bad)

    def choose_named(header: list[str]) -> Sequence[Field]:
        fields = choose(header)
        lacking = next((f.source for f in fields if f.source not in header), None)
        if lacking is not None:
            raise DatasetError(
                f"{path}: column {lacking!r} is missing; got {', '.join(header)}. Give its name in the file with "
                f"--columns.…, what stands between cells (now {dialect.separator!r}) with --columns.separator, or the "
                "names of all columns, where the first line is a row, with --columns.header"
            )
        return fields

    return read_delimited(path, choose_named, bad, dialect)


def _read_parquet(path: Path, choose: Choose, bad: BadRows) -> Iterator[Chunk]:
    """The chosen columns, some row groups at a time, as cells of text: faults are found and named as in a CSV file."""
    try:
        lazy = pl.scan_parquet(path)
        header = lazy.collect_schema()
        height = int(lazy.select(pl.len()).collect().item())
    except UNREADABLE as error:
        raise DatasetError(f"{path} cannot be read as Parquet ({error}); write it again") from error
    fields = [
        f if f.source not in header or is_text(header[f.source]) else replace(f, time_format="")
        for f in choose(list(header))
    ]
    require_columns(pl.DataFrame(schema=header), [f.source for f in fields], path)
    if height == 0:
        raise DatasetError(f"{path} has no row; expected at least one")
    size = path.stat().st_size
    for start in range(0, height, ROWS):
        try:
            rows = lazy.select(pl.col(f.source).alias(f.name) for f in fields).slice(start, ROWS).collect()
        except UNREADABLE as error:
            raise DatasetError(f"{path} cannot be read as Parquet ({error}); write it again") from error
        cells = [_as_cells(rows[f.name], f, path, start) for f in fields]
        lines = as_lines(range(start + 1, start + 1 + len(rows)))
        read_so_far = size * min(start + ROWS, height) // height
        try:
            table = pl.DataFrame([cast_cells(column, f) for column, f in zip(cells, fields, strict=True)])
            yield Chunk(path, table, lines, read_so_far)
        except BadValueError:
            numbered = zip(lines.tolist(), zip(*cells, strict=True), strict=True)
            yield slow_chunk(path, numbered, fields, bad, read_so_far)


def _as_cells(column: pl.Series, field: Field, path: Path, first_row: int) -> pl.Series:
    """A typed column as text. Raises: DatasetError for a type that has none."""
    if column.dtype == pl.List(pl.String):
        return column.list.eval(pl.element().drop_nulls()).list.join(UNIT) + UNIT
    if field.kind == "text" and field.required:
        column = whole_ids(column.alias(field.source), path, first_row)
    if column.dtype == pl.Boolean:
        column = column.cast(pl.Int8)
    dtype = column.dtype
    if not (dtype.is_numeric() or dtype.is_temporal() or is_text(dtype) or dtype == pl.Null):
        raise DatasetError(
            f"{path}: column {field.source!r} has type {dtype}, expected text, numbers or times. Cast it"
        )
    if isinstance(dtype, pl.Datetime) and dtype.time_zone:
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return column.cast(pl.String)
