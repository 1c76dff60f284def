"""JSON lines, and lines of Python literals, as tables or as records.

The oldest Amazon files hold Python dictionaries, which `ast.literal_eval` parses: it knows literals
only and runs nothing.
"""

import ast
import json
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl

from sagerec.artifacts import UNREADABLE
from sagerec.catalogue.formats.blocks import BadRows, Block, Chunk, read_blocks
from sagerec.catalogue.formats.fields import DTYPES, BadValueError, Field, as_lines, json_value

PARSERS = 2
"""Blocks that are parsed at once, while a further one is read; polars has the threads that do it."""
Parse = Callable[[str], Any]


def parse_json(line: str) -> Any:
    """Strict JSON. Raises: BadValueError."""
    try:
        return json.loads(line, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise BadValueError("broken line", f"not JSON ({error})") from error


def parse_json_or_literal(line: str) -> Any:
    """JSON, or a Python literal as the files of 2014 hold. Raises: BadValueError."""
    try:
        return json.loads(line, parse_constant=_not_json)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise BadValueError("broken line", f"neither JSON nor a Python literal ({said})") from error


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def records(
    path: Path, bad: BadRows, *, parse: Parse = parse_json
) -> Iterator[tuple[int, list[tuple[int, dict[str, Any]]]]]:
    """The objects of a file, block by block: bytes of the file read so far, and (line, object) pairs."""
    for block in read_blocks(path, bad):
        yield block.source_bytes, list(block_records(block, bad, parse))


def block_records(block: Block, bad: BadRows, parse: Parse) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of every line of a block that holds one; the others are bad rows, blank ones nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python literals of 2014 have escapes that Python since frowns on
        for number, line in enumerate(block.text.split(b"\n"), block.first_line):
            if not line.strip():
                continue
            try:
                try:
                    record = parse(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise BadValueError("broken line", f"not UTF-8 ({error.reason})") from error
                if not isinstance(record, dict):
                    raise BadValueError("broken line", f"holds a {type(record).__name__}, expected an object")
            except BadValueError as error:
                bad.report(block.path, number, error.reason, error.detail)
            else:
                yield number, record


def read_json_lines(path: Path, fields: Sequence[Field], bad: BadRows, *, parse: Parse = parse_json) -> Iterator[Chunk]:
    """The named fields of every object, in chunks, some of which are parsed at once; bad rows are told in their order.

    Bad rows: broken lines, missing values, wrong types.
    """
    with ThreadPoolExecutor(PARSERS) as pool:
        parsing: deque[tuple[Block, Future[Chunk | None]]] = deque()
        for block in read_blocks(path, bad):
            parsing.append((block, pool.submit(fast_chunk, block, fields)))
            if len(parsing) > PARSERS:
                block, chunk = parsing.popleft()
                yield chunk.result() or slow_chunk(block, fields, bad, parse)
        for block, chunk in parsing:
            yield chunk.result() or slow_chunk(block, fields, bad, parse)


def fast_chunk(block: Block, fields: Sequence[Field]) -> Chunk | None:
    """A block through polars; None where anything is amiss, so that the slow path may say what."""
    schema = {f.source: pl.Int64() if f.kind == "time" else DTYPES[f.kind] for f in fields}
    try:
        table = pl.read_ndjson(block.text, schema=schema)
    except UNREADABLE:
        return None
    if table.height == block.line_count:
        lines = as_lines(range(block.first_line, block.first_line + table.height))
    else:
        filled = [i for i, line in enumerate(block.text.split(b"\n"), block.first_line) if line.strip()]
        if len(filled) != table.height:
            return None
        lines = as_lines(filled)
    table = table.rename({f.source: f.name for f in fields})
    for column, field in zip(table, fields, strict=True):
        if field.required and column.null_count():
            return None
        if field.kind == "text" and ((field.required and (column == "").any()) or _has_nested(column)):
            return None
    return Chunk(block.path, table, lines, block.source_bytes)


def _has_nested(column: pl.Series) -> bool:
    """Whether a text may be a list or an object, which polars takes as text."""
    return bool((column.str.starts_with("[") | column.str.starts_with("{")).any())


def slow_chunk(block: Block, fields: Sequence[Field], bad: BadRows, parse: Parse) -> Chunk:
    """The same, row by row; bad rows are reported."""
    rows, lines = [], []
    for number, record in block_records(block, bad, parse):
        try:
            rows.append([json_value(f, record) for f in fields])
            lines.append(number)
        except BadValueError as error:
            bad.report(block.path, number, error.reason, error.detail)
    schema = {f.name: pl.Int64() if f.kind == "time" else DTYPES[f.kind] for f in fields}
    return Chunk(block.path, pl.DataFrame(rows, schema=schema, orient="row"), as_lines(lines), block.source_bytes)
