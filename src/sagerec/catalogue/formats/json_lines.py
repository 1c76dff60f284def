"""JSON lines, and lines of Python literals, as tables or as records.

The oldest Amazon files hold Python dictionaries, which `ast.literal_eval` parses: it knows literals
only and runs nothing.
"""

import ast
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import polars as pl

from sagerec.catalogue.dataset import stands_for_none
from sagerec.catalogue.formats.blocks import BadRows, Block, Chunk, read_blocks
from sagerec.catalogue.formats.fields import DTYPES, BadValueError, Field, Kind, as_lines, json_value, read_row

Parse = Callable[[str], Any]
WHOLE = Annotated[int, msgspec.Meta(gt=-(2**63), le=2**63 - 1)]
TYPES: dict[Kind, Any] = {"text": str, "number": float, "integer": WHOLE, "flag": bool, "time": WHOLE}
"""What the fast path takes for a value of each kind; the slow one takes a little more, see `json_value`."""
NOT_EMPTY = Annotated[str, msgspec.Meta(min_length=1)]


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
    """The named fields of every object, in chunks; one is parsed while the last is taken in.

    Bad rows, which are told in their order: broken lines, missing values, wrong types.
    """
    waiting: tuple[Block, Future[Chunk | None]] | None = None
    with ThreadPoolExecutor(1) as pool:
        for block in read_blocks(path, bad):
            waiting, parsed = (block, pool.submit(fast_chunk, block, fields)), waiting
            if parsed is not None:
                yield parsed[1].result() or slow_chunk(parsed[0], fields, bad, parse)
        if waiting is not None:
            yield waiting[1].result() or slow_chunk(waiting[0], fields, bad, parse)


def fast_chunk(block: Block, fields: Sequence[Field]) -> Chunk | None:
    """A block through msgspec; None where anything is amiss, so that the slow path may say what.

    That is a value that is not exactly of its field's type, or a line that is not one object from end to end.
    """
    try:
        block.text.decode()  # msgspec does not look at the characters that it passes over
        rows = _decoder(tuple(fields)).decode_lines(block.text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if len(rows) != block.line_count or not _is_object_a_line(block.text):
        return None
    columns = {f.name: list(map(attrgetter(f.name), rows)) for f in fields}
    lines = as_lines(range(block.first_line, block.first_line + block.line_count))
    table = pl.DataFrame(columns, schema=_schema(fields))
    if any(stands_for_none(table[f.name]).any() for f in fields if f.kind == "text" and f.required):
        return None
    return Chunk(block.path, table, lines, block.source_bytes)


@cache
def _decoder(fields: tuple[Field, ...]) -> msgspec.json.Decoder[Any]:
    """Objects as structs of the fields, without conversions; a required field is there, and not empty."""
    members: list[Any] = []
    for field in fields:
        taken = NOT_EMPTY if field.kind == "text" and field.required else TYPES[field.kind]
        members.append((field.name, taken) if field.required else (field.name, taken | None, None))
    names = {f.name: f.source for f in fields}
    return msgspec.json.Decoder(msgspec.defstruct("Row", members, rename=names, kw_only=True, gc=False))


def _is_object_a_line(text: bytes) -> bool:
    """Whether every line begins and ends as an object does; no newline within an object stands between } and {."""
    content = np.frombuffer(text, dtype=np.uint8)
    ends = np.flatnonzero(content == ord("\n"))
    begins = np.append(0, ends[:-1] + 1)
    return bool((content[begins] == ord("{")).all() and (content[ends - 1] == ord("}")).all())


def slow_chunk(block: Block, fields: Sequence[Field], bad: BadRows, parse: Parse) -> Chunk:
    """The same, row by row; bad rows are reported."""
    rows, lines = [], []
    for number, record in block_records(block, bad, parse):
        try:
            row, faults = read_row(fields, repeat(record), json_value)
        except BadValueError as error:
            bad.report(block.path, number, error.reason, error.detail)
        else:
            rows.append(row)
            lines.append(number)
            for field, fault in faults:
                bad.blank(block.path, number, field.name, fault.detail)
    table = pl.DataFrame(rows, schema=_schema(fields), orient="row")
    return Chunk(block.path, table, as_lines(lines), block.source_bytes)


def _schema(fields: Sequence[Field]) -> dict[str, pl.DataType]:
    return {f.name: pl.Int64() if f.kind == "time" else DTYPES[f.kind] for f in fields}
