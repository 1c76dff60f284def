"""Delimited text (CSV, tab-separated) as tables: the file's first line names its columns."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl

from sagerec.artifacts import UNREADABLE
from sagerec.catalogue.dataset import SPLIT_VALUES, require_columns, stands_for_none
from sagerec.catalogue.formats.blocks import BadRows, Block, Chunk, read_blocks
from sagerec.catalogue.formats.fields import (
    DTYPES,
    FLAGS,
    UNIT,
    BadValueError,
    Field,
    as_lines,
    read_row,
    text_value,
    wrong,
)
from sagerec.catalogue.formats.quotes import Quoting, record_end, records
from sagerec.catalogue.formats.times import cast_times
from sagerec.errors import DatasetError

Choose = Callable[[list[str]], Sequence[Field]]
"""From the names of the header to the fields that are wanted of it."""
NEWLINE = b"\n"
ABOUT_QUOTES = "write a quote within a cell twice, or have quotes read as other characters with --columns.quote none"
ABOUT_ENCODINGS = "other encodings are read with --columns.encoding, such as latin-1"
SPACES = [bytes([code]) for code in b" \t\r\v\f\x1c\x1d\x1e\x1f"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How cells are told apart, and what the bytes mean."""

    separator: str = ","
    """One character, or several."""
    quote: str = '"'
    """Cells may stand between two of these, and then hold separators and newlines; empty: no character does that."""
    is_sure: bool = False
    """The quote is known, so that no cell is too strange to be one."""
    encoding: str = ""
    """Of the text; UTF-8 where empty."""
    header: tuple[str, ...] = ()
    """Names of the columns, for a file whose first line is a row."""

    @property
    def cut(self) -> str:
        """What stands between cells when they are told apart; in place of a separator of several bytes."""
        return self.separator if len(self.separator.encode()) == 1 else UNIT

    @property
    def quoting(self) -> Quoting | None:
        """Quotes, where there are any."""
        return Quoting(self.quote, self.cut) if self.quote else None


def read_delimited(path: Path, choose: Choose, bad: BadRows, dialect: Dialect) -> Iterator[Chunk]:
    """The chosen fields of every row, in chunks. Bad rows: broken lines, missing values, wrong types.

    Raises: DatasetError for a header that is not text, lacks a field, or has one twice.
    """
    header: list[str] = []
    fields: Sequence[Field] = ()
    for block in read_blocks(path, bad, quoting=dialect.quoting, encoding=dialect.encoding):
        if dialect.cut != dialect.separator:
            block = replace(block, text=block.text.replace(dialect.separator.encode(), dialect.cut.encode()))
        if not header:
            end = 0 if dialect.header else block.text.index(NEWLINE) + 1
            header = list(dialect.header) or _header(path, block.text[:end], dialect)
            fields = choose(header)
            twice = sorted({field.source for field in fields if header.count(field.source) > 1})
            if twice:
                raise DatasetError(f"{path}: column {twice[0]!r} stands twice in the header; rename one of them")
            require_columns(pl.DataFrame(schema=dict.fromkeys(header, pl.String)), [f.source for f in fields], path)
            skipped = int(end > 0)
            block = replace(
                block,
                text=block.text[end:],
                first_line=block.first_line + skipped,
                line_count=block.line_count - skipped,
            )
        if block.text.strip():
            yield fast_chunk(block, header, fields, dialect) or slow_chunk(
                block.path, slow_cells(block, header, fields, bad, dialect), fields, bad, block.source_bytes
            )


def _header(path: Path, line: bytes, dialect: Dialect) -> list[str]:
    try:
        return _cells(line, 1, dialect)
    except BadValueError as error:
        raise DatasetError(
            f"{path}: the first line names no columns: {error.detail}. Expected a header line"
        ) from error


def _cells(record: bytes, line: int, dialect: Dialect) -> list[str]:
    """The cells of the record that begins in `line`. Raises: BadValueError."""
    for cell in dialect.quoting.cells().finditer(record) if dialect.quoting else ():
        opened = f"the quote ({dialect.quote}) that opens in line {line + record.count(NEWLINE, 0, cell.start())}"
        if not cell[1]:
            raise BadValueError("broken line", f"{opened} is not closed; {ABOUT_QUOTES}")
        if (behind := record[cell.end() : cell.end() + 1]) not in (dialect.cut.encode(), NEWLINE, b""):
            shown = behind.decode("utf-8", "replace")
            raise BadValueError("broken line", f"{opened} closes before {shown!r}; {ABOUT_QUOTES}")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE
    try:
        text = record.decode("utf-8").removesuffix("\n")
        rows = list(csv.reader([text], delimiter=dialect.cut, quotechar=dialect.quote or '"', quoting=quoting))
    except UnicodeDecodeError as error:
        raise BadValueError("broken line", f"not UTF-8 ({error.reason}); {ABOUT_ENCODINGS}") from error
    except csv.Error as error:
        raise BadValueError("broken line", f"not delimited text ({error})") from error
    return rows[0] if rows else []


def _swallows_rows(record: bytes, dialect: Dialect, n_columns: int) -> bool:
    """Whether every line of a record of several looks like a row of its own, so that a quote is more likely stray."""
    lines = record.removesuffix(NEWLINE).split(NEWLINE)
    if dialect.quoting is None or dialect.is_sure or len(lines) == 1 or n_columns == 1:
        return False
    pattern, cut = dialect.quoting.cells(), dialect.cut.encode()
    bare = (pattern.sub(lambda cell: b"" if cell[1] else cell[0], line) for line in lines)
    return all(line.count(cut) == n_columns - 1 for line in bare)


def fast_chunk(block: Block, header: list[str], fields: Sequence[Field], dialect: Dialect) -> Chunk | None:
    """A block through polars; None where anything is amiss, so that the slow path may say what."""
    if not block.is_regular:
        return None
    try:
        table = pl.read_csv(
            block.text,
            has_header=False,
            separator=dialect.cut,
            quote_char=dialect.quote or None,
            schema={str(place): pl.String() for place in range(len(header))},
        )
        padded = may_be_padded(block.text, dialect)
        cast = pl.DataFrame([cast_cells(table[str(header.index(f.source))], f, padded=padded) for f in fields])
    except (*UNREADABLE, BadValueError):
        return None
    if table.height == block.line_count:
        lines = as_lines(range(block.first_line, block.first_line + table.height))
    else:
        found = list(records_of(block, dialect))
        if len(found) != table.height or any(_swallows_rows(record, dialect, len(header)) for _, record in found):
            return None
        lines = as_lines([number for number, _ in found])
    return Chunk(block.path, cast, lines, block.source_bytes)


def records_of(block: Block, dialect: Dialect) -> Iterator[tuple[int, bytes]]:
    """(first line, bytes) of every record that is not blank; with quotes, a record may span lines."""
    number = block.first_line
    for start, stop, _ in records(block.text, dialect.quoting):
        record = block.text[start:stop]
        if record.strip():
            yield number, record
        number += record.count(NEWLINE)


def may_be_padded(text: bytes, dialect: Dialect) -> bool:
    """Whether white space other than ends of lines and what cells are cut at is in a text: most logs have none."""
    return not text.isascii() or any(space in text for space in SPACES if space != dialect.cut.encode())


def cast_cells(column: pl.Series, field: Field, *, padded: bool = True) -> pl.Series:
    """A column of cells in the type of its field; white space around them counts only where they may be `padded`.

    Raises: BadValueError for any cell that does not fit.
    """
    stripped = column.str.strip_chars() if padded else column
    is_id = field.kind == "text" and field.required
    cells = column if field.kind in ("text", "split") else stripped
    filled = cells.set(stands_for_none(stripped) if is_id else stripped == "", None)
    if field.kind == "text":
        cast = filled
    elif field.kind == "split":
        cast = filled.set(~filled.is_in(SPLIT_VALUES), None)
    elif field.kind == "flag":
        cast = filled.str.to_lowercase().replace_strict(FLAGS, default=None, return_dtype=pl.Boolean)
    elif field.kind == "time":
        times = cast_times(filled, field.time_format)
        if times is None:
            raise BadValueError("wrong type", field.source)
        cast = times
    else:
        cast = filled.cast(pl.Float64, strict=False)
        if not cast.is_finite().all():
            raise BadValueError("wrong type", field.source)
    if cast.null_count() > (0 if field.required else filled.null_count()):
        raise BadValueError("wrong type", field.source)
    return cast.alias(field.name)


def slow_cells(
    block: Block, header: list[str], fields: Sequence[Field], bad: BadRows, dialect: Dialect
) -> Iterator[tuple[int, list[str | None]]]:
    """(line, the cells of `fields`) of every record; broken ones are reported."""
    places = [header.index(f.source) for f in fields]
    start, number = 0, block.first_line
    while start < len(block.text):
        stop, _ = record_end(block.text, start, dialect.quoting)
        record = block.text[start:stop]
        try:
            cells = _cells(record, number, dialect)
            if len(cells) > len(header):
                raise BadValueError("broken line", f"{len(cells)} cells, the header has {len(header)}")
            if _swallows_rows(record, dialect, len(header)):
                last = number + record.count(NEWLINE) - 1
                opened = f"the quote ({dialect.quote}) that opens in line {number}"
                raise BadValueError(
                    "broken line", f"{opened} closes in line {last}, and each line looks like a row; {ABOUT_QUOTES}"
                )
        except BadValueError as error:
            bad.report(block.path, number, error.reason, error.detail)
            record = record[: record.index(NEWLINE) + 1]  # the lines that a quote swallowed are read as rows
        else:
            if record.strip():
                yield number, [cells[p] if p < len(cells) else None for p in places]
        start += len(record)
        number += record.count(NEWLINE)


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
            row, faults = read_row(fields, row_cells, text_value)
            for field, value, first in zip(fields, row, rows[0] if rows else row, strict=True):
                if field.kind == "time" and isinstance(value, datetime) != isinstance(first, datetime):
                    raise wrong(field, str(value), "times all of one kind, numbers or dates")
        except BadValueError as error:
            bad.report(path, number, error.reason, error.detail)
        else:
            rows.append(row)
            lines.append(number)
            for field, fault in faults:
                bad.blank(path, number, field.name, fault.detail)
    columns = []
    for place, field in enumerate(fields):
        values = [row[place] for row in rows]
        dtype = DTYPES.get(field.kind)
        if field.kind == "time" and any(isinstance(v, float) for v in values):
            dtype = pl.Float64()
        columns.append(pl.Series(field.name, values, dtype=dtype, strict=False))
    return Chunk(path, pl.DataFrame(columns), as_lines(lines), source_bytes)
