"""`sagerec export`: a dataset under its split as files that RecBole or MiniOneRec reads.

Both learn from rows of a history and its target, so each event of train (and of align, which a peer may train on) after
a user's first becomes a row of the train file, and each case of valid and test one row, with all that came before it as
the history, as in our own evaluation. A user's first event is a target nowhere.

Shapes: E events, N items.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from sagerec.artifacts import write_artifact
from sagerec.catalogue.dataset import CATEGORIES, ITEM_ID, SPLIT, TIMESTAMP, TITLE, USER_ID, Dataset
from sagerec.catalogue.splits import PARTS, Part, Split
from sagerec.config import at_least, check_fields, to_json
from sagerec.errors import DatasetError
from sagerec.files import write_json

PEER_PARTS: tuple[Part, ...] = ("train", "valid", "test")
OWN_HISTORY = {"recbole": 50, "minionerec": 10}
"""Items of a history that the peers' own scripts keep."""
CSV_COLUMNS = (
    "user_id",
    "history_item_title",
    "item_title",
    "history_item_id",
    "item_id",
    "history_item_sid",
    "item_sid",
)
"""MiniOneRec's columns; the histories are Python lists."""
TOKEN = re.compile(r"<[^<>]+>")


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """What is written."""

    format: Literal["recbole", "minionerec"] = "recbole"
    """Whose files."""
    max_history: int = 0
    """Items of a history that are kept, the last ones; 0 takes what the peer's own scripts do: 50 or 10."""

    def __post_init__(self) -> None:
        check_fields(self, max_history=at_least(0))


@dataclass(frozen=True, slots=True)
class Row:
    """A history and the item that came next."""

    user: int
    """User index."""
    history: np.ndarray
    """(H,) item indices, the oldest first."""
    event: int
    """Row of the target in `Dataset.events`."""


def export_dataset(
    out: Path,
    data: Dataset,
    split: Split,
    settings: ExportSettings,
    *,
    semantic_ids: Sequence[Sequence[str]] | None = None,
    made_from: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Write the files to the folder `out`, whose name becomes theirs; returns the number of rows of each part.

    `semantic_ids` are the tokens of each item; without them MiniOneRec's files hold the column `semantic_id` of the
    items, or, where there is none, only what its own quantiser needs.

    Raises: DatasetError where an id holds a space or tab, which RecBole's files cannot.
    """
    limit = settings.max_history or OWN_HISTORY[settings.format]
    rows = {part: list(rows_of(data, split, part, limit)) for part in PEER_PARTS}
    sizes: dict[str, Any] = {part: len(rows[part]) for part in PEER_PARTS}
    with write_artifact(out, "export", made_from=made_from, settings=to_json(settings), sizes=sizes) as fresh:
        if settings.format == "recbole":
            write_recbole(fresh, out.name, data, split, rows, limit)
        else:
            write_minionerec(fresh, out.name, data, rows, semantic_ids or column_tokens(data))
    return sizes


def rows_of(data: Dataset, split: Split, part: Part, max_history: int) -> Iterator[Row]:
    """The rows of one part; those of train hold training events alone."""
    if part == "train":
        train = split.sequences(data, "train", "align")
        for user, start, end in zip(train.users, train.offsets[:-1], train.offsets[1:], strict=True):
            for place in range(start + 1, end):
                yield Row(int(user), train.items[max(start, place - max_history) : place], int(train.rows[place]))
    else:
        cases = split.cases(data, part)
        for user, start, event in zip(cases.users, cases.starts, cases.rows, strict=True):
            yield Row(int(user), data.event_items[max(start, event - max_history) : event], int(event))


def write_recbole(
    folder: Path, name: str, data: Dataset, split: Split, rows: dict[Part, list[Row]], max_history: int
) -> None:
    """`NAME/NAME.{train,valid,test}.inter` of rows, the whole log `NAME/NAME.inter`, `NAME/NAME.item`, `NAME.yaml`."""
    users, items = data.user_ids.ids.to_list(), data.item_ids.ids.to_list()
    for column, ids in ((USER_ID, users), (ITEM_ID, items)):
        spaced = next((value for value in ids if not value or re.search(r"\s", value)), None)
        if spaced is not None:
            raise DatasetError(
                f"{column} {spaced!r} is empty or holds a space, at which RecBole separates ids; expected ids without. "
                "Rename them"
            )
    times = _numbers(data.events[TIMESTAMP])
    place = folder / name
    place.mkdir()
    for part, part_rows in rows.items():
        with (place / f"{name}.{part}.inter").open("w", encoding="utf-8", newline="\n") as file:
            file.write("user_id:token\titem_id_list:token_seq\titem_id:token\ttimestamp:float\n")
            for row in part_rows:
                history = " ".join(items[i] for i in row.history)
                target = items[data.event_items[row.event]]
                file.write(f"{users[row.user]}\t{history}\t{target}\t{times[row.event]}\n")
    feedback = [c for c, dtype in data.events.schema.items() if dtype.is_numeric() or dtype == pl.Boolean]
    log = data.events.select(
        pl.col(USER_ID).alias("user_id:token"),
        pl.col(ITEM_ID).alias("item_id:token"),
        times.alias("timestamp:float"),
        *(pl.col(c).cast(pl.Float64).alias(f"{c}:float") for c in feedback if c != TIMESTAMP),
        pl.Series(f"{SPLIT}:token", [PARTS[p] for p in split.parts]),
    )
    log.write_csv(place / f"{name}.inter", separator="\t", quote_style="never")
    words = {
        c: "token" if c == ITEM_ID else "token_seq" for c in data.items.columns if data.items[c].dtype == pl.String
    }
    table = data.items.select(
        *(pl.col(c).str.replace_all(r"\s+", " ").alias(f"{c}:{kind}") for c, kind in words.items()),
        *(pl.col(c).alias(f"{c}:float") for c, dtype in data.items.schema.items() if dtype.is_numeric()),
        *([_joined_categories()] if CATEGORIES in data.items.columns else []),
    )
    table.write_csv(place / f"{name}.item", separator="\t", quote_style="never")
    (folder / f"{name}.yaml").write_text(
        f"# RecBole: python run_recbole.py --model=SASRec --dataset={name} --config_files=THIS_FILE\n"
        f"data_path: .\ndataset: {name}\nbenchmark_filename: [train, valid, test]\n"
        "alias_of_item_id: [item_id_list]\nload_col: {inter: [user_id, item_id_list, item_id]}\n"
        f"MAX_ITEM_LIST_LENGTH: {max_history}\ntrain_neg_sample_args: ~\n",
        encoding="utf-8",
    )


def _joined_categories() -> pl.Expr:
    """Categories between spaces; a space, comma or bar within one becomes an underscore."""
    return (
        pl.col(CATEGORIES)
        .list.eval(pl.element().str.replace_all(r"[\s,|]+", "_"))
        .list.join(" ", ignore_nulls=True)
        .alias(f"{CATEGORIES}:token_seq")
    )


def _numbers(times: pl.Series) -> pl.Series:
    """Times as numbers: of dates the seconds since 1970."""
    if times.dtype.is_temporal():
        return times.cast(pl.Datetime("us")).cast(pl.Int64) / 1e6
    return times


def column_tokens(data: Dataset) -> list[list[str]] | None:
    """The tokens of the items' column `semantic_id`, such as `<a_1><b_2>`; None where some item has none."""
    if "semantic_id" not in data.items.columns or data.items["semantic_id"].null_count():
        return None
    return [TOKEN.findall(value) or [value] for value in data.items["semantic_id"]]


def write_minionerec(
    folder: Path,
    name: str,
    data: Dataset,
    rows: dict[Part, list[Row]],
    semantic_ids: Sequence[Sequence[str]] | None,
) -> None:
    """`NAME.item.json`, `NAME.{train,valid,test}.inter`, the ids' maps; with Semantic IDs also the CSV files and index.

    Items are called by their index, as MiniOneRec's scripts ask; `NAME.item2id` and `NAME.user2id` translate.
    """
    users = data.user_ids.ids.to_list()
    titles = data.titles(np.arange(data.n_items))
    words = [c for c in ("description", "brand") if c in data.items.columns]
    described = {
        str(index): {TITLE: titles[index], CATEGORIES: ",".join(c for c in row.get(CATEGORIES) or [] if c)}
        | {c: row[c] or "" for c in words}
        for index, row in enumerate(data.items.iter_rows(named=True))
    }
    write_json(folder / f"{name}.item.json", described)
    for kind, ids in (("item", data.item_ids.ids), ("user", data.user_ids.ids)):
        text = "".join(f"{value}\t{index}\n" for index, value in enumerate(ids))
        (folder / f"{name}.{kind}2id").write_text(text, encoding="utf-8")
    for part, part_rows in rows.items():
        with (folder / f"{name}.{part}.inter").open("w", encoding="utf-8", newline="\n") as file:
            file.write("user_id:token\titem_id_list:token_seq\titem_id:token\n")
            for row in part_rows:
                file.write(f"{row.user}\t{' '.join(map(str, row.history))}\t{data.event_items[row.event]}\n")
    if semantic_ids is None:
        return
    joined = ["".join(tokens) for tokens in semantic_ids]
    (folder / f"{name}.index.json").write_text(
        json.dumps({str(i): list(tokens) for i, tokens in enumerate(semantic_ids)}), encoding="utf-8"
    )
    (folder / "info").mkdir()
    listed = zip(joined, titles, strict=True)
    info = "".join(f"{sid}\t{' '.join(title.split())}\t{index}\n" for index, (sid, title) in enumerate(listed))
    (folder / "info" / f"{name}.txt").write_text(info, encoding="utf-8")
    for part, part_rows in rows.items():
        (folder / part).mkdir()
        with (folder / part / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(CSV_COLUMNS)
            for row in part_rows:
                target, history = int(data.event_items[row.event]), row.history.tolist()
                writer.writerow(
                    [
                        users[row.user],
                        [titles[i] for i in history],
                        titles[target],
                        history,
                        target,
                        [joined[i] for i in history],
                        joined[target],
                    ]
                )
