"""Predictions of a benchmark's rows, as files that others write and read: JSON lines, or Parquet of the same columns.

A line is `{"task": "video", "row": 17, "predictions": ["<|sid_begin|><s_a_4>…", …]}`, best first, `row` the place in
the task's file from 0; of label_pred `"p_yes": .7, "p_no": .1` in place of predictions, where one that is absent or
null is a token that the generator did not return.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from sys import float_info
from typing import Annotated, Any

import msgspec
import polars as pl
from polars import selectors

from sagerec.artifacts import UNREADABLE
from sagerec.catalogue.formats.blocks import BadRows, read_blocks
from sagerec.errors import DatasetError
from sagerec.files import replace_file

Probability = Annotated[float, msgspec.Meta(ge=0, le=float_info.max)]
BLOCK_ROWS = 4096
UNREADABLE_LINE = "lines that cannot be read"


class Prediction(msgspec.Struct, gc=False, omit_defaults=True):
    """What a system says of one row."""

    task: str
    """Of layout.TASKS."""
    row: int
    """Its place in the task's file, from 0."""
    predictions: list[str] | None = None
    """Generations, best first."""
    p_yes: Probability | None = None
    """Of label_pred: the probability of 是 as the first token."""
    p_no: Probability | None = None
    """And of 否."""


_decoder = msgspec.json.Decoder(Prediction)


def read_line(line: bytes) -> Prediction:
    """The prediction of a line. Raises: ValueError or RecursionError where it is none."""
    try:
        return _decoder.decode(line)
    except msgspec.ValidationError:
        raise
    except ValueError:  # maybe NaN, infinities or halves of pairs, which Python writes
        found = msgspec.convert(json.loads(line), Prediction)
    if found.predictions:
        found.predictions = [text.encode("utf-8", "replace").decode() for text in found.predictions]
    return found


def read_predictions(path: Path, faults: Counter[str]) -> Iterator[Prediction]:
    """The predictions of a file, some megabytes at a time; lines that cannot be read are counted.

    Raises: DatasetError where the file is missing, empty or no Parquet, or its columns are others.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, faults)
        return
    bad = BadRows(skip=True)
    for block in read_blocks(path, bad):
        for number, line in enumerate(block.text.splitlines(), block.first_line):
            if not line.strip():
                continue
            try:
                found = read_line(line)
            except (ValueError, RecursionError) as error:
                bad.report(path, number, "not a prediction", str(error))
                faults[UNREADABLE_LINE] += 1
            else:
                yield found
    faults[UNREADABLE_LINE] += bad.counts["file cut short"]


def _read_parquet(path: Path, faults: Counter[str]) -> Iterator[Prediction]:
    if not path.is_file():
        raise DatasetError(f"{path} is missing; give the file of predictions")
    try:
        table = pl.scan_parquet(path)
        columns = table.collect_schema().names()
        wanted = [name for name in Prediction.__struct_fields__ if name in columns]
        if not {"task", "row"} < set(wanted):
            raise DatasetError(
                f"{path}: got the columns {', '.join(columns)}; expected task, row, and predictions (or p_yes and p_no)"
            )
        table = table.select(wanted).with_columns(selectors.float().fill_nan(None))  # as pandas writes what is absent
        begin = 0
        while len(block := table.slice(begin, BLOCK_ROWS).collect()):
            for values in block.iter_rows(named=True):
                try:
                    yield msgspec.convert(values, Prediction)
                except msgspec.ValidationError:
                    faults[UNREADABLE_LINE] += 1
            begin += len(block)
    except UNREADABLE as error:
        raise DatasetError(f"{path} cannot be read as Parquet ({error}); get it again") from error


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """Write predictions as JSON lines while they are passed on; the file is there once all have been."""
    encoder: Any = msgspec.json.Encoder()
    with replace_file(path) as fresh, fresh.open("wb") as file:
        for prediction in predictions:
            file.write(encoder.encode(prediction) + b"\n")
            yield prediction
        file.flush()
