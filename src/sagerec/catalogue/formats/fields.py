"""Fields of a file, and what becomes of a value that does not fit.

Each reader has a fast path, polars or msgspec on a whole block, and a slow one, row by row, that is taken for blocks in
which the fast one found a fault: it finds the line, and says what is wrong with it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from sagerec.catalogue.dataset import EXACT_FLOATS, ITEM_ID, MISSING_IDS, SPLIT, SPLIT_VALUES, TIMESTAMP, USER_ID
from sagerec.catalogue.formats.times import EXPECTED, number_of, time_of

Kind = Literal["text", "number", "integer", "flag", "time", "split"]
DTYPES: dict[Kind, pl.DataType] = {
    "text": pl.String(),
    "number": pl.Float64(),
    "integer": pl.Int64(),
    "flag": pl.Boolean(),
    "split": pl.String(),
}
"""The type of a column; that of a time follows from the file."""
UNIT = "\x1f"
"""The character of ASCII that stands between units: what cells are told apart by where a file has no such character."""
FLAGS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a file that becomes a column."""

    name: str
    """Canonical column."""
    source: str
    """The file's own name for it."""
    kind: Kind = "text"
    """What its values are."""
    required: bool = False
    """A row without it is a bad one; a text that is required is an id. Others that cannot be read become null."""
    time_format: str = ""
    """How a time is written, where it is neither a number nor an ISO date."""


def log_fields(user: str, item: str, time: str, time_kind: Kind = "time", time_format: str = "") -> tuple[Field, ...]:
    """The three fields that every log has, under the file's own names."""
    return (
        Field(USER_ID, user, required=True),
        Field(ITEM_ID, item, required=True),
        Field(TIMESTAMP, time, time_kind, required=True, time_format=time_format),
    )


def split_field(source: str = SPLIT) -> Field:
    """The part of an event, where the file has it."""
    return Field(SPLIT, source, "split", required=True)


class BadValueError(ValueError):
    """A row that does not fit: a reason that is counted, and the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def missing(field: Field) -> BadValueError:
    """The fault of a row without a required field."""
    return BadValueError("missing value", f"{field.source!r} is missing or empty")


def wrong(field: Field, value: Any, expected: str) -> BadValueError:
    """The fault of a value of another kind."""
    shown = repr(value)
    return BadValueError(
        "wrong type", f"{field.source!r} is {shown if len(shown) <= 60 else shown[:57] + '...'}; expected {expected}"
    )


def is_unicode(value: Any) -> bool:
    """Whether a value is text that UTF-8 can hold; JSON may escape half of a surrogate pair, which is none."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


def json_value(field: Field, record: dict[str, Any]) -> Any:
    """The value of `field` in a parsed record, None where it is null. Raises: BadValueError."""
    value = record.get(field.source)
    if value is None or (field.required and value in MISSING_IDS):
        if field.required:
            raise missing(field)
        return None
    if field.kind == "text":
        if isinstance(value, list | dict | tuple | set | bytes):
            raise wrong(field, value, "text")
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float) and field.required:
            if not (value.is_integer() and abs(value) < EXACT_FLOATS[pl.Float64]):
                raise wrong(field, value, "text or a whole number")
            value = int(value)
        text = str(value)
        if not is_unicode(text):
            raise wrong(field, value, "Unicode text, not half of a surrogate pair")
        return text
    if field.kind == "flag":
        if not isinstance(value, bool):
            raise wrong(field, value, "true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise wrong(field, value, "a number")
    if field.kind == "number":
        return float(value)
    if not (float(value).is_integer() and abs(value) < 2**63):
        raise wrong(field, value, "a whole number")
    return int(value)


def _is_finite(value: int | float) -> bool:
    """Whether a float can hold a number; whole ones of JSON have any number of digits."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def text_value(field: Field, value: str | None) -> Any:
    """The value of a cell of a text file, None where it is empty. Raises: BadValueError."""
    stripped = (value or "").strip()
    if value is None or not stripped or (field.required and field.kind == "text" and stripped in MISSING_IDS):
        if field.required:
            raise missing(field)
        return None
    if field.kind == "split" and value not in SPLIT_VALUES:
        raise wrong(field, value, "train, align, valid or test")
    if field.kind in ("text", "split"):
        return value
    if field.kind == "time":
        time = time_of(stripped, field.time_format)
        if time is None:
            raise wrong(field, value, f"a time as {field.time_format}" if field.time_format else EXPECTED)
        return time
    flag = FLAGS.get(stripped.lower())
    if field.kind == "flag":
        if flag is None:
            raise wrong(field, value, "true, false, 1 or 0")
        return flag
    number = float(flag) if flag is not None else number_of(stripped)
    if number is None:
        raise wrong(field, value, "a number")
    if field.kind == "integer" and not float(number).is_integer():
        raise wrong(field, value, "a whole number")
    return float(number)


def read_row(
    fields: Sequence[Field], values: Iterable[Any], read: Callable[[Field, Any], Any]
) -> tuple[list[Any], list[tuple[Field, BadValueError]]]:
    """The values of a row, and the faults of its optional ones, which are None. Raises: BadValueError."""
    row: list[Any] = []
    faults: list[tuple[Field, BadValueError]] = []
    for field, value in zip(fields, values, strict=False):
        try:
            row.append(read(field, value))
        except BadValueError as error:
            if field.required:
                raise
            row.append(None)
            faults.append((field, error))
    return row, faults


def as_lines(numbers: Sequence[int] | range) -> np.ndarray:
    """Line numbers as they are kept: (R,) uint32."""
    if isinstance(numbers, range):
        return np.arange(numbers.start, numbers.stop, dtype=np.uint32)
    return np.asarray(numbers, dtype=np.uint32)
