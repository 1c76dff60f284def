"""Where quoted cells begin and end, and so where records do: what a line cannot tell.

A quote opens a cell only at the cell's beginning, and closes it only before a separator or a line end; inside it is
written twice. Anywhere else it is a character like others (`15.6" sleeve`), or, behind a closed cell, a fault.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True, slots=True)
class Quoting:
    """The quote, and the separator that cells stand between."""

    mark: str = '"'
    """One character of ASCII."""
    separator: str = ","
    """One character of ASCII."""

    def cells(self) -> re.Pattern[bytes]:
        """Matches a quoted cell; its group is the closing quote, empty where the text ends before."""
        return _cells(self.mark, self.separator)


@cache
def _cells(mark: str, separator: str) -> re.Pattern[bytes]:
    quote, ends = re.escape(mark).encode(), re.escape(separator).encode() + rb"\n"
    return re.compile(rb"%b(?<![^%b]%b)(?:[^%b]++|%b%b)*+(%b?)" % (quote, ends, quote, quote, quote, quote, quote))


def is_closed(text: bytes, quoting: Quoting | None) -> bool:
    """Whether a regular text ends outside of cells."""
    return quoting is None or text.count(quoting.mark.encode()) % 2 == 0


def is_regular(text: bytes, quoting: Quoting | None) -> bool:
    """Whether every quote opens a cell, closes one, or stands beside its twin; the last cell may be open.

    Then an even number of quotes stands before whatever is outside of cells.
    """
    if quoting is None or quoting.mark.encode() not in text:
        return True
    content = np.frombuffer(text, dtype=np.uint8)
    marks = np.flatnonzero(content == ord(quoting.mark))
    around = np.zeros(256, dtype=bool)
    around[[ord(quoting.mark), ord(quoting.separator), ord("\n")]] = True
    opening, closing = marks[0::2], marks[1::2]
    first = int(opening.size > 0 and opening[0] == 0)
    closing = closing[: closing.size - int(closing.size > 0 and closing[-1] == len(text) - 1)]
    return bool(around[content[opening[first:] - 1]].all() and around[content[closing + 1]].all())


def end_of_records(text: bytes, quoting: Quoting | None, *, regular: bool) -> int:
    """Where the last whole record of `text`, which begins with one, ends; `regular` as `is_regular` says."""
    end = text.rfind(b"\n") + 1
    if quoting is None or (mark := quoting.mark.encode()) not in text:
        return end
    if not regular:
        return max((stop for _, stop, is_whole in records(text, quoting) if is_whole), default=0)
    odd = text.count(mark, 0, end) % 2
    while odd and end:
        before = text.rfind(b"\n", 0, end - 1) + 1
        odd ^= text.count(mark, before, end) % 2
        end = before
    return end


def records(text: bytes, quoting: Quoting | None) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether it ends before the text does) of every record."""
    start = 0
    while start < len(text):
        stop, is_whole = record_end(text, start, quoting)
        yield start, stop, is_whole
        start = stop


def record_end(text: bytes, start: int, quoting: Quoting | None) -> tuple[int, bool]:
    """Where the record that begins at `start` ends, and whether by a line end, not by that of the text."""
    stop = text.find(b"\n", start) + 1
    at = start
    while stop and quoting and (found := quoting.cells().search(text, at, stop)):
        cell = quoting.cells().match(text, found.start())
        assert cell is not None
        at = cell.end()
        if not cell[1]:
            return len(text), False
        if at >= stop:
            stop = text.find(b"\n", at) + 1
    return stop or len(text), bool(stop)
