"""Times of text files: numbers and ISO dates, read alike from a whole column and from one cell; nothing is guessed.

A date is `2024-01-31`, or with a time `2024-01-31T12:00`, `…:30`, `…:30.5` (a space may stand for the T, a comma for
the point), and with a zone `Z`, `+02`, `+0200`, `+02:00` behind the time. Times with a zone become UTC. Any other way
of writing, such as `01/02/2024`, of which nobody can say which is the day, is read by a format of the user's.
"""

import math
import re
from datetime import UTC, datetime

import polars as pl

from sagerec.artifacts import UNREADABLE
from sagerec.config import require

ISO = (
    r"^[1-9]\d{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
    r"(?:[T ](?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:[.,]\d{1,9})?)?(?:Z|[+-](?:[01]\d|2[0-3])(?::?[0-5]\d)?)?)?$"
)
"""The dates that are read, apart from days that a month does not have."""
ISO_FORMATS = tuple(f"%Y-%m-%d{time}" for time in ("T%H:%M:%S%.f", "", "T%H:%M", "T%H:%M:%S%.f%#z", "T%H:%M%#z"))
"""The same as polars writes them; of one column all dates are of one of these, else it is read cell by cell."""
EXPECTED = (
    "a number or an ISO date such as 2024-01-31T12:00:00; dates of other kinds are read with --columns.time-format, "
    "such as '%d/%m/%Y %H:%M'"
)
FIRST_YEAR, LAST_YEAR = 1000, 9999


def require_time_format(time_format: str) -> None:
    """Raise SettingsError unless a format reads a time: its day and year, and hours with their minutes."""
    day = pl.Series([datetime(2001, 12, 31, tzinfo=UTC)])
    try:
        found = _datetimes(day.dt.strftime(time_format), time_format).to_list()
    except UNREADABLE:
        found = []
    require(
        found == day.dt.replace_time_zone(None).to_list(),
        f"time_format is {time_format!r}; expected one that reads year, month and day, and hours only with minutes, "
        "such as %d/%m/%Y %H:%M",
    )


def cast_times(cells: pl.Series, time_format: str = "") -> pl.Series | None:
    """A column of stripped cells, null where empty, as Int64, Float64 or Datetime; None where one does not fit."""
    empty = cells.null_count()
    if time_format:
        return _in_years(_datetimes(cells, time_format), empty)
    whole = cells.cast(pl.Int64, strict=False)
    if whole.null_count() == empty:
        return whole
    numbers = cells.cast(pl.Float64, strict=False)
    if numbers.null_count() == empty:
        return numbers if numbers.is_finite().all() and not (numbers.abs() >= 2.0**63).any() else None
    if not cells.str.contains(ISO).all():
        return None
    cells = cells.str.replace(" ", "T", literal=True).str.replace(",", ".", literal=True)
    read = (_datetimes(cells, time_format) for time_format in ISO_FORMATS)
    return next((dates for each in read if (dates := _in_years(each, empty)) is not None), None)


def _datetimes(cells: pl.Series, time_format: str) -> pl.Series:
    """Dates of one format, null where a cell has another; in UTC, without a zone."""
    dates = cells.str.to_datetime(time_format, strict=False, time_unit="us")
    if isinstance(dates.dtype, pl.Datetime) and dates.dtype.time_zone:
        dates = dates.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return dates


def _in_years(dates: pl.Series, empty: int) -> pl.Series | None:
    """The dates where no more than `empty` are null and all are of years with four digits."""
    years = dates.dt.year()
    fits = dates.null_count() == empty and bool(((years >= FIRST_YEAR) & (years <= LAST_YEAR)).all())
    return dates if fits else None


def time_of(cell: str, time_format: str = "") -> int | float | datetime | None:
    """The same of one cell that is not empty."""
    cell = cell.strip()
    if time_format:
        dates = cast_times(pl.Series([cell]), time_format)
        return None if dates is None else dates.to_list()[0]
    number = number_of(cell)
    if number is not None:
        return number if -(2**63) <= number < 2**63 else None
    if not re.fullmatch(ISO.strip("^$"), cell, re.ASCII):
        return None
    try:
        time = datetime.fromisoformat(cell.replace(",", "."))
        time = time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        return None
    return time if time.year >= FIRST_YEAR else None


def number_of(cell: str) -> int | float | None:
    """A finite number, whole where it is written so; None for other text, as `1_000`, which Python reads."""
    if not cell.isascii() or "_" in cell:
        return None
    for read in (int, float):
        try:
            number = read(cell)
            return number if math.isfinite(number) else None
        except (ValueError, OverflowError):
            continue
    return None
