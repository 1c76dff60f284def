"""The files of RecIF-Bench's `benchmark_data`: a task's rows, streamed, and what its items' keys stand for.

Bad rows are skipped by the rules of the published loader, and counted by reason; a file that cannot be read at all is
an error, which the evaluation names.

Shapes: M items of a map.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from sagerec.artifacts import UNREADABLE
from sagerec.errors import DatasetError

RECOMMENDATION = ("video", "ad", "product", "label_cond", "interactive")
LABEL, TEXT = "label_pred", ("item_understand", "rec_reason")
TASKS = (*RECOMMENDATION, LABEL, *TEXT)
MESSAGES, METADATA = "messages", "metadata"
BESIDE = ("answer", "answer_pid", "answer_iid", "uid")
"""Keys of `metadata` that may be columns instead."""
BLOCK_ROWS = 4096
PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of a task that counts."""

    row: int
    """Its place in the file, from 0."""
    user: Any
    """`uid`, None where the row has none."""
    answer: str
    """What is asked for."""
    ids: Sequence[Any] | None
    """`answer_pid`, else `answer_iid`; None where the row has neither, or what cannot be read."""
    messages: list[dict[str, Any]]
    """The conversation, the content of each message a text."""

    @property
    def prompt(self) -> str:
        """The texts of all messages, one after another."""
        return "\n".join(message["content"] for message in self.messages)


def task_path(folder: Path, task: str) -> Path:
    """Where a task's rows are."""
    return folder / task / f"{task}_test.parquet"


def read_samples(path: Path, skipped: Counter[str]) -> Iterator[Sample]:
    """The rows of a task, a block at a time; those that the published loader leaves out are counted by reason.

    Raises: DatasetError where the file is damaged, or lacks a column.
    """
    try:
        table = pl.scan_parquet(path)
        columns = table.collect_schema().names()
        for column in (MESSAGES, METADATA):
            if column not in columns:
                raise DatasetError(f"{path}: column {column!r} is missing; got {', '.join(columns)}. Rename or add it")
        table = table.select(MESSAGES, METADATA, *(name for name in BESIDE if name in columns))
        begin = 0
        while len(block := table.slice(begin, BLOCK_ROWS).collect()):
            for row, values in enumerate(block.iter_rows(named=True), begin):
                sample = _read_row(row, values)
                if isinstance(sample, Sample):
                    yield sample
                else:
                    skipped[sample] += 1
            begin += len(block)
    except UNREADABLE as error:
        raise DatasetError(f"{path} cannot be read as Parquet ({error}); get it again") from error


def _read_row(row: int, values: dict[str, Any]) -> Sample | str:
    """A row as a sample, or why it is skipped."""
    if is_empty(values[MESSAGES]):
        return "messages are empty"
    messages = _read_messages(values[MESSAGES])
    if messages is None:
        return "messages cannot be read"
    metadata = values[METADATA]
    if is_empty(metadata):
        return "metadata is empty"
    if isinstance(metadata, str):
        metadata = _parse(metadata)
    if not isinstance(metadata, dict):
        return "metadata cannot be read"

    def value(name: str) -> Any:
        found = metadata.get(name)
        return values.get(name) if found is None else found

    if is_empty(value("answer")):
        return "answer is empty"
    ids = next((found for name in ("answer_pid", "answer_iid") if (found := value(name)) is not None), None)
    user = None if is_empty(value("uid")) else value("uid")
    return Sample(row, user, str(value("answer")).strip(), read_ids(ids), messages)


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: none, NaN, white space, or a list or object without entries."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    return not value.strip() if isinstance(value, str) else isinstance(value, list | dict) and not value


def read_ids(value: Any) -> list[Any] | None:
    """A list of ids, or one as JSON; None where it is neither. An id that is null is one that nothing hits."""
    found = _parse(value) if isinstance(value, str) else value
    if isinstance(found, int | float):
        found = [found]
    return [x for x in found if x is None or isinstance(x, int | float | str)] if isinstance(found, list) else None


def _parse(text: str) -> Any:
    """JSON as the published loader reads it, None where it is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        pass
    try:
        return json.loads(text)  # slower, but knows NaN and halves of pairs, which Python writes
    except (ValueError, RecursionError):
        return None


def _read_messages(value: Any) -> list[dict[str, Any]] | None:
    """Messages whose contents are texts: of a content in parts, the texts joined. None where they are no such list."""
    found = _parse(value) if isinstance(value, str) else value
    if not isinstance(found, list) or not found:
        return None
    if not all(isinstance(message, dict) for message in found):
        return None
    return [{"role": message.get("role"), "content": _joined(message.get("content"))} for message in found]


def _joined(content: Any) -> str:
    """The text of a message; of a content in parts, those of type `text` joined; nothing for what is no text."""
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text")
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


class _Entry(msgspec.Struct, gc=False):
    count_after_downsample: float
    pid: int | None = None
    iid: int | None = None
    count: float = 0.0

    @property
    def id(self) -> int:
        return self.pid if self.pid is not None else self.iid or 0


@dataclass(frozen=True, slots=True)
class ItemMap:
    """What `sid2pid.json` or `sid2iid.json` says."""

    keys: np.ndarray
    """(M,) int64, ascending."""
    ids: np.ndarray
    """(M,) int64 the id of each that is most frequent after down-sampling, of equals the smallest; 0 for none."""
    counts: np.ndarray
    """(M,) float64 `count` of all its ids together."""

    def places(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """Place of each of the keys (n,), -1 where the map has it not."""
        wanted = np.asarray(keys, dtype=np.int64)
        if not len(self.keys):
            return np.full(len(wanted), -1)
        at = np.minimum(self.keys.searchsorted(wanted), len(self.keys) - 1)
        found: np.ndarray = np.where(self.keys[at] == wanted, at, -1)
        return found


def best_id(entries: Sequence[_Entry]) -> int:
    """The id with the highest count after down-sampling, of equals the smallest; 0 without any."""
    top = max((entry.count_after_downsample for entry in entries), default=0.0)
    return min((entry.id for entry in entries if entry.count_after_downsample == top), default=0)


def read_item_map(path: Path) -> ItemMap:
    """A map of items, some megabytes at a time. Raises: DatasetError where it is no such JSON."""
    keys, ids, counts = [], [], []
    try:
        for piece in _pieces(path):
            for key, entries in msgspec.json.decode(piece, type=dict[str, list[_Entry]]).items():
                keys.append(int(key))
                ids.append(entries[0].id if len(entries) == 1 else best_id(entries))
                counts.append(sum(entry.count for entry in entries))
        found = np.array(keys, dtype=np.int64)
        order = np.argsort(found, kind="stable")
        return ItemMap(found[order], np.array(ids, dtype=np.int64)[order], np.array(counts, dtype=np.float64)[order])
    except (msgspec.DecodeError, UnicodeError, ValueError, OverflowError) as error:
        raise DatasetError(
            f'{path} cannot be read ({error}); expected {{"KEY": [{{"pid": 1, "count": 2, "count_after_downsample": 1}}'
            ", …]}, or iid in place of pid"
        ) from error


def _pieces(path: Path) -> Iterator[bytes]:
    """A JSON object of lists of flat objects, as several of its entries each: cut where a list ends."""
    rest, first = b"", True
    with path.open("rb") as file:
        while block := file.read(PIECE_BYTES):
            text = rest + block
            end = text.rfind(b"]") + 1
            whole, rest = text[:end], text[end:]
            if whole:
                yield (whole if first else b"{" + whole.lstrip().removeprefix(b",")) + b"}"
                first = False
    if first:
        yield rest
    elif rest.strip() != b"}":
        raise ValueError("the file ends early" if not rest.strip() else f"its end is {rest.strip()[:20]!r}")
