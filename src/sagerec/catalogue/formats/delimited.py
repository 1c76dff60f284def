"""Delimited text (CSV, tab-separated) as tables: the file's first line names its columns."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl

from sagerec.artifacts import UNREADABLE
from sagerec.catalogue.dataset import SPLIT_VALUES, require_columns
from sagerec.catalogue.formats.blocks import BadRows, Block, Chunk, read_blocks
from sagerec.catalogue.formats.fields import DTYPES, FLAGS, BadValueError, Field, as_lines, text_value, wrong
from sagerec.errors import DatasetError

Choose = Callable[[list[str]], Sequence[Field]]
"""From the names of the header to the fields that are wanted of it."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How cells are told apart."""

    separator: str = ","
    """One character."""
    quoted: bool = True
    """Cells may stand in double quotes, and then hold separators and newlines."""


def read_delimited(path: Path, choose: Choose, bad: BadRows, dialect: Dialect) -> Iterator[Chunk]:
    """The chosen fields of every row, in chunks. Bad rows: broken lines, missing values, wrong types.

    Raises: DatasetError for a header that is not text, or lacks a field.
    """
    header: list[str] = []
    fields: Sequence[Field] = ()
    for block in read_blocks(path, bad, quoted=dialect.quoted):
        if not header:
            end = block.text.index(b"\n") + 1
            header = _header(path, block.text[:end], dialect)
            fields = choose(header)
            require_columns(pl.DataFrame(schema=dict.fromkeys(header, pl.String)), [f.source for f in fields], path)
            block = Block(path, block.text[end:], block.first_line + 1, block.line_count - 1, block.source_bytes)
        if block.text.strip():
            yield fast_chunk(block, header, fields, dialect) or slow_chunk(
                block.path, slow_cells(block, header, fields, bad, dialect), fields, bad, block.source_bytes
            )


def _header(path: Path, line: bytes, dialect: Dialect) -> list[str]:
    try:
        return _cells(line, dialect)
    except BadValueError as error:
        raise DatasetError(
            f"{path}: the first line names no columns: {error.detail}. Expected a header line"
        ) from error


def _cells(record: bytes, dialect: Dialect) -> list[str]:
    """The cells of one record. Raises: BadValueError."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE
    try:
        text = record.decode("utf-8").removesuffix("\n")
        rows = list(csv.reader([text], delimiter=dialect.separator, quoting=quoting, strict=True))
    except UnicodeDecodeError as error:
        raise BadValueError("broken line", f"not UTF-8 ({error.reason})") from error
    except csv.Error as error:
        raise BadValueError("broken line", f"not delimited text ({error})") from error
    return rows[0] if rows else []


def records_of(block: Block, dialect: Dialect) -> Iterator[tuple[int, bytes]]:
    """(first line, bytes) of every record that is not blank; with quotes, a record may span lines."""
    start, held, open_quote = block.first_line, b"", False
    for number, line in enumerate(block.text.split(b"\n")[:-1], block.first_line):
        if not held:
            start = number
        held += line + b"\n"
        open_quote ^= dialect.quoted and line.count(b'"') % 2 == 1
        if not open_quote:
            if held.strip():
                yield start, held
            held = b""
    if held.strip():
        yield start, held


def fast_chunk(block: Block, header: list[str], fields: Sequence[Field], dialect: Dialect) -> Chunk | None:
    """A block through polars; None where anything is amiss, so that the slow path may say what."""
    try:
        table = pl.read_csv(
            block.text,
            has_header=False,
            separator=dialect.separator,
            quote_char='"' if dialect.quoted else None,
            schema={str(place): pl.String() for place in range(len(header))},
        )
        cast = pl.DataFrame([cast_cells(table[str(header.index(f.source))], f) for f in fields])
    except (*UNREADABLE, BadValueError):
        return None
    if table.height == block.line_count:
        lines = as_lines(range(block.first_line, block.first_line + table.height))
    else:
        lines = as_lines([number for number, _ in records_of(block, dialect)])
        if len(lines) != table.height:
            return None
    return Chunk(block.path, cast, lines, block.source_bytes)


def cast_cells(column: pl.Series, field: Field) -> pl.Series:
    """A column of cells in the type of its field. Raises: BadValueError for any cell that does not fit."""
    filled = column.set(column.str.strip_chars() == "", None)
    if field.kind == "text":
        cast = filled
    elif field.kind == "split":
        cast = filled.set(~filled.is_in(SPLIT_VALUES), None)
    elif field.kind == "flag":
        cast = filled.str.to_lowercase().replace_strict(FLAGS, default=None, return_dtype=pl.Boolean)
    else:
        cast = filled.cast(pl.Int64, strict=False)
        if field.kind == "number" or cast.null_count() > filled.null_count():
            cast = filled.cast(pl.Float64, strict=False)
            if not cast.is_finite().all() or (field.kind == "time" and (cast.abs() >= 2.0**63).any()):
                raise BadValueError("wrong type", field.source)
        if field.kind == "time" and cast.null_count() > filled.null_count():
            cast = filled.str.to_datetime(strict=False, time_unit="us")
            if isinstance(cast.dtype, pl.Datetime) and cast.dtype.time_zone:
                cast = cast.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    if cast.null_count() > (0 if field.required else filled.null_count()):
        raise BadValueError("wrong type", field.source)
    return cast.alias(field.name)


def slow_cells(
    block: Block, header: list[str], fields: Sequence[Field], bad: BadRows, dialect: Dialect
) -> Iterator[tuple[int, list[str | None]]]:
    """(line, the cells of `fields`) of every record; broken ones are reported."""
    places = [header.index(f.source) for f in fields]
    for number, record in records_of(block, dialect):
        try:
            cells = _cells(record, dialect)
            if len(cells) > len(header):
                raise BadValueError("broken line", f"{len(cells)} cells, the header has {len(header)}")
        except BadValueError as error:
            bad.report(block.path, number, error.reason, error.detail)
        else:
            yield number, [cells[p] if p < len(cells) else None for p in places]


def slow_chunk(
    path: Path,
    cells: Iterable[tuple[int, Sequence[str | None]]],
    fields: Sequence[Field],
    bad: BadRows,
    source_bytes: int,
) -> Chunk:
    """Cells in the types of their fields, row by row; bad rows are reported."""
    rows: list[list[Any]] = []
    lines: list[int] = []
    for number, row_cells in cells:
        try:
            row = [text_value(f, cell) for f, cell in zip(fields, row_cells, strict=True)]
            for field, value, first in zip(fields, row, rows[0] if rows else row, strict=True):
                if field.kind == "time" and isinstance(value, datetime) != isinstance(first, datetime):
                    raise wrong(field, str(value), "times all of one kind, numbers or dates")
        except BadValueError as error:
            bad.report(path, number, error.reason, error.detail)
        else:
            rows.append(row)
            lines.append(number)
    columns = []
    for place, field in enumerate(fields):
        values = [row[place] for row in rows]
        dtype = DTYPES.get(field.kind)
        if field.kind == "time" and any(isinstance(v, float) for v in values):
            dtype = pl.Float64()
        columns.append(pl.Series(field.name, values, dtype=dtype, strict=False))
    return Chunk(path, pl.DataFrame(columns), as_lines(lines), source_bytes)
