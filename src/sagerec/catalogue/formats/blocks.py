"""Text files, plain or gzip, as blocks of whole lines: what every reader of lines stands on.

A block is some megabytes, so memory does not grow with the file. The next block is read and decompressed in a thread
while the last one is parsed. A byte-order mark is taken off, every line end is made a newline, and text of another
encoding UTF-8.
"""

import codecs
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import polars as pl
from isal import isal_zlib

from sagerec.catalogue.formats.quotes import Quoting, end_of_records, is_closed, is_regular
from sagerec.errors import DatasetError

logger = logging.getLogger(__name__)
BLOCK_BYTES = 4 << 20
PACKED_BYTES = 1 << 20
"""Compressed bytes that are read at a time."""
MAX_RECORD_BYTES = 64 << 20
"""A line, or a quoted cell, that does not end within this many bytes is a broken one."""
GZIP_WINDOW = 31
"""What zlib calls a gzip stream with the largest window."""
GZIP_MAGIC, ZIP_MAGIC = b"\x1f\x8b", b"PK\x03\x04"
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
DAMAGED: tuple[type[Exception], ...] = (EOFError, OSError, cast(type[Exception], isal_zlib.error))
"""What reading a gzip stream raises that is cut short or damaged."""
LOGGED_BAD_ROWS = 5
"""Bad rows of an import that are logged one by one; the others are counted."""


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of a file."""

    path: Path
    """The file."""
    text: bytes
    """The lines, each ended by a newline."""
    first_line: int
    """Number of the first line, from 1."""
    line_count: int
    """Lines in `text`."""
    source_bytes: int
    """How much of the file as it lies on disk has been read so far."""
    is_regular: bool = True
    """Quotes only open and close cells, or stand beside their twin."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that were read from one file."""

    path: Path
    """The file."""
    table: pl.DataFrame
    """R rows in canonical columns and types."""
    lines: np.ndarray
    """(R,) uint32 line of each row, from 1; of a Parquet file the row, from 1."""
    source_bytes: int
    """How much of the file has been read so far."""


class BadRows:
    """What becomes of rows that cannot be read: an error, or with `skip` a count."""

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()
        """Rows left out, by reason."""
        self.unreadable: Counter[str] = Counter()
        """Values of optional columns that could not be read and became null, by column."""

    def blank(self, path: Path, line: int, column: str, detail: str) -> None:
        """Count a value that became null; its row stays. The first of each column is logged."""
        self.unreadable[column] += 1
        if self.unreadable[column] == 1:
            logger.warning(
                "no %s for %s, %s: %s; the row stays, and further ones are counted",
                column, path.name, place(path, line), detail,
            )  # fmt: skip

    def report(self, path: Path, line: int, reason: str, detail: str) -> None:
        """Count a bad row under `reason`. Raises: DatasetError, with its place and the detail, unless `skip`."""
        if not self.skip:
            raise DatasetError(
                f"{path}: {place(path, line)}: {reason}: {detail}. Mend it, or leave such rows out with --skip-bad-rows"
            )
        self.counts[reason] += 1
        total = self.counts.total()
        if total <= LOGGED_BAD_ROWS:
            more = "; further ones are only counted" if total == LOGGED_BAD_ROWS else ""
            logger.warning("left out %s, %s: %s: %s%s", path.name, place(path, line), reason, detail, more)


def place(path: Path, line: int) -> str:
    """Where a row stands in its file."""
    kinds = {".parquet": "row", ".item.json": "entry"}
    return f"{next((kind for end, kind in kinds.items() if path.name.endswith(end)), 'line')} {line}"


def read_blocks(
    path: Path, bad: BadRows, *, quoting: Quoting | None = None, encoding: str = "", block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """The lines of a file in blocks; with `quoting`, no block ends inside a quoted cell. `encoding`: UTF-8 if empty.

    Raises: DatasetError for a file that is missing, empty, UTF-16 or damaged gzip, or not of its `encoding`. Where bad
    rows are skipped, the damage counts as one, and the whole lines before it are kept: all of them before a cut, those
    of the compressed bytes read earlier (`PACKED_BYTES` at a time) before a wrong byte.
    """
    blocks = _blocks(path, bad, quoting, encoding, block_bytes)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, blocks, None)
        while (block := ahead.result()) is not None:
            ahead = pool.submit(next, blocks, None)
            yield block


def peek_header(path: Path) -> str:
    """The first line of a file, as far as it can be read; its faults are for `read_blocks` to tell."""
    with path.open("rb") as raw:
        try:
            head = next(_content(raw, 1 << 16), b"")
        except DAMAGED:
            head = b""
    return head.removeprefix(UTF8_MARK).decode("utf-8", "replace").split("\n", 1)[0].removesuffix("\r")


def gzip_fault(path: Path) -> str | None:
    """What is wrong with a gzip file, which is read to its end; None where it is whole."""
    with path.open("rb") as raw:
        begin = raw.read(len(GZIP_MAGIC))
        if begin != GZIP_MAGIC:
            return f"begins with {begin!r}"
        raw.seek(0)
        try:
            for _ in _content(raw, BLOCK_BYTES):
                pass
        except DAMAGED as error:
            return _told(error)
    return None


def _told(error: Exception) -> str:
    return "ends early" if isinstance(error, EOFError) else f"cannot be read ({error})"


def _blocks(path: Path, bad: BadRows, quoting: Quoting | None, encoding: str, block_bytes: int) -> Iterator[Block]:
    if not path.is_file():
        raise DatasetError(f"{path} is not a file; give the files to import, or a folder that holds them")
    line, parts, size, damage = 1, list[bytes](), 0, list[str]()
    with path.open("rb") as raw:
        content = _content(raw, block_bytes)
        content = _decoded(path, content, encoding) if encoding else content
        for part in chain(_line_ends(_pieces(path, content, damage)), [None]):
            if part is not None:
                parts.append(part)
                size += len(part)
                if size < block_bytes:
                    continue
            text, rest, regular = _cut(parts, quoting)
            if text:
                count = _newlines(text)
                yield Block(path, text, line, count, raw.tell(), regular)
                line += count
            parts, size = [rest], len(rest)
            if size > max(MAX_RECORD_BYTES, block_bytes):
                what = f"a quote ({quoting.mark}) that is opened there is not closed" if quoting else "it does not end"
                mend = "read quotes as other characters with --columns.quote none" if quoting else "give another format"
                raise DatasetError(
                    f"{path}: line {line}: {what} within {MAX_RECORD_BYTES >> 20} MB; expected text of separate lines. "
                    f"Mend the file or {mend}"
                )
        if damage:
            line += rest.count(b"\n")
            if not bad.skip:
                raise DatasetError(
                    f"{path}: line {line}: the file {damage[0]}; expected a whole gzip file. Get it again, or keep the "
                    "lines before with --skip-bad-rows"
                )
            bad.report(path, line, "file cut short", f"it {damage[0]}")
        elif rest:
            regular = is_regular(rest, quoting) and is_closed(rest, quoting)
            yield Block(path, rest + b"\n", line, rest.count(b"\n") + 1, raw.tell(), regular)
        elif line == 1:
            raise DatasetError(f"{path} is empty; expected at least one line. Get it again, or leave it out")


def _newlines(text: bytes) -> int:
    """Newlines of a text: five times as fast as `bytes.count`, which looks for one after the other."""
    return int(np.count_nonzero(np.frombuffer(text, dtype=np.uint8) == ord("\n")))


def _content(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The bytes of a file, decompressed where it is gzip, in parts of at most `size`. Raises: one of DAMAGED."""
    part = file.read(min(size, PACKED_BYTES))
    if not part.startswith(GZIP_MAGIC):
        while part:
            yield part
            part = file.read(size)
        return
    stream = isal_zlib.decompressobj(wbits=GZIP_WINDOW)
    while part:
        yield stream.decompress(part, size)
        part = stream.unconsumed_tail
        if stream.eof:  # a further member may follow, or the zeros that some archives are padded with
            part = stream.unused_data.lstrip(b"\0")
            while not part and (more := file.read(PACKED_BYTES)):
                part = more.lstrip(b"\0")
            if part:
                stream = isal_zlib.decompressobj(wbits=GZIP_WINDOW)
        part = part or file.read(min(size, PACKED_BYTES))
    yield stream.flush()
    if not stream.eof:
        raise EOFError


def _pieces(path: Path, content: Iterator[bytes], damage: list[str]) -> Iterator[bytes]:
    """The content without a byte-order mark; where it is damaged, what came before, and why is added to `damage`."""
    begin: bytes | None = b""
    try:
        for part in content:
            if begin is None:
                yield part
                continue
            begin += part
            if begin[:2] in UTF16_MARKS:
                raise DatasetError(
                    f"{path} is UTF-16 text; expected UTF-8. Convert it, for example with: iconv -f UTF-16 -t UTF-8"
                )
            if begin.startswith(ZIP_MAGIC):
                raise DatasetError(f"{path} is a zip archive; expected text, plain or gzip. Unpack it")
            if len(begin) >= len(UTF8_MARK):
                yield begin.removeprefix(UTF8_MARK)
                begin = None
    except DAMAGED as error:
        damage.append(_told(error))
    yield begin or b""


def _line_ends(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same text with every line end a newline; a carriage return at the end of a piece waits for the next."""
    waiting = False
    for piece in pieces:
        text = b"\r" + piece if waiting else piece
        waiting = text.endswith(b"\r") and bool(piece)
        if waiting:
            text = text[:-1]
        yield text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text
    if waiting:
        yield b"\n"


def _cut(parts: list[bytes], quoting: Quoting | None) -> tuple[bytes, bytes, bool]:
    """The whole records of the parts, the rest behind, whether quotes are regular; copied once where a line ends."""
    end = 0 if quoting else parts[-1].rfind(b"\n") + 1
    if end:
        return b"".join([*parts[:-1], parts[-1][:end]]), parts[-1][end:], True
    text = b"".join(parts)
    regular = is_regular(text, quoting)
    end = end_of_records(text, quoting, regular=regular)
    return text[:end], text[end:], regular


def _decoded(path: Path, content: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """The content as UTF-8. Raises: DatasetError, with the line, for bytes that the encoding does not have."""
    decoder, lines = codecs.getincrementaldecoder(encoding)(), 1
    try:
        for part in content:
            text = decoder.decode(part)
            lines += text.count("\n")
            yield text.encode("utf-8", "replace")
        yield decoder.decode(b"", final=True).encode("utf-8", "replace")
    except UnicodeError as error:
        lines += error.object[: error.start].count(b"\n") if isinstance(error, UnicodeDecodeError) else 0
        raise DatasetError(
            f"{path}: line {lines} is not {encoding} ({error}); expected text of this encoding. Give another one with "
            "--columns.encoding"
        ) from error
