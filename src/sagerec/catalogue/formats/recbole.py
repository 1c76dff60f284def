"""RecBole's atomic files: tab-separated, the header names columns and their types (`user_id:token`, `rating:float`).

Of the `.inter` file, `user_id`, `item_id` and `timestamp` are the event, a `split` column its part, every other
`:float` column feedback. Of benchmark files (`NAME.train.inter`, `NAME.valid.inter`, `NAME.test.inter`) the name is the
part. Files whose rows hold whole sequences (`item_id_list:token_seq`) repeat the events of the
plain one, and are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import polars as pl

from sagerec.catalogue.dataset import CATEGORIES, ITEM_ID, SPLIT, TIMESTAMP, TITLE, USER_ID
from sagerec.catalogue.formats.blocks import BadRows, Chunk, peek_header
from sagerec.catalogue.formats.delimited import Dialect, read_delimited
from sagerec.catalogue.formats.fields import Field, log_fields, split_field
from sagerec.catalogue.formats.source import Source, clean_items
from sagerec.errors import DatasetError

ATOMIC = Dialect(separator="\t", quote="")
PARTS = ("train", "valid", "test")
"""What RecBole calls the files of a data set that comes divided: NAME.train.inter and so on."""
SEQUENCE_COLUMN = "item_id_list:token_seq"
ITEM_NAMES: dict[str, tuple[str, ...]] = {
    TITLE: ("title", "movie_title", "item_name", "name"),
    "brand": ("brand", "store"),
    "description": ("description",),
    CATEGORIES: ("categories", "category", "class", "genre", "genres"),
    "price": ("price",),
}
"""Canonical column -> the names that RecBole's own data sets use for it, the first that is there."""


def read_recbole(files: Sequence[Path], bad: BadRows) -> Source:
    """A whole `.inter` file, or those of the parts, and the `.item` file beside. Raises: DatasetError."""
    logs = [p for p in files if p.name.endswith((".inter", ".inter.gz"))]
    plain = [p for p in logs if SEQUENCE_COLUMN not in peek_header(p).split("\t")]
    items = [p for p in files if p.name.endswith((".item", ".item.gz"))]
    if not plain:
        why = f"those there are ({', '.join(p.name for p in logs)}) hold whole sequences" if logs else "there is none"
        raise DatasetError(
            f"no .inter file with one event a row: {why}. Give the plain .inter file, and the .item file"
        )
    by_part = _parts(plain)
    notes: dict[str, str] = {}
    chunks = chain.from_iterable(read_delimited(p, _item_fields, bad, ATOMIC) for p in items)
    return Source(
        log=chain.from_iterable(_read_part(p, part, bad) for part, p in by_part),
        items=clean_items(chunks, notes, candidates=("|", ",", " ")) if items else None,
        files=(*(p for _, p in by_part), *items),
        notes=notes,
    )


def _parts(plain: Sequence[Path]) -> list[tuple[str, Path]]:
    """(part, file) of RecBole's benchmark files, train first; the part of a whole file is empty.

    Raises: DatasetError where whole files stand beside parts, or a data set is in files of other parts.
    """
    named = [(p.name.split(".inter")[0].rpartition("."), p) for p in plain]
    by_part = [(end if base and end in PARTS else "", p) for (base, _, end), p in named]
    whole = [p.name for part, p in by_part if not part]
    if len(whole) < len(by_part) and whole:
        raise DatasetError(
            f"{', '.join(whole)} stands beside the parts {', '.join(p.name for part, p in by_part if part)}, so that "
            "events would come twice. Give the parts, to keep their split, or the whole file"
        )
    sets = sorted({base for (base, _, end), _ in named if base and end in PARTS})
    if len(sets) > 1:
        raise DatasetError(f"the parts are of several data sets ({', '.join(sets)}); give those of one")
    bases = [base for (base, _, _), _ in named if base]
    if whole and len(set(bases)) < len(bases):
        raise DatasetError(
            f"{', '.join(whole)} are parts of one data set; expected them to be named train, valid and test, such as "
            f"{bases[0]}.train.inter. Rename them, or give one whole file"
        )
    return sorted(by_part, key=lambda pair: PARTS.index(pair[0]) if pair[0] else 0)


def _read_part(path: Path, part: str, bad: BadRows) -> Iterator[Chunk]:
    """The events of a file; with its part as their split, where it is one."""
    for chunk in read_delimited(path, _part_fields if part else _log_fields, bad, ATOMIC):
        yield replace(chunk, table=chunk.table.with_columns(pl.lit(part).alias(SPLIT))) if part else chunk


def _part_fields(header: list[str]) -> list[Field]:
    return [field for field in _log_fields(header) if field.name != SPLIT]


def _log_fields(header: list[str]) -> list[Field]:
    """What is wanted of a `.inter` header."""
    sources = {bare_name(name): name for name in header}
    event = (USER_ID, ITEM_ID, TIMESTAMP)
    user, item, time = (sources.get(name, f"{name}:token") for name in event)
    fields = list(log_fields(user, item, time))
    fields += [split_field(sources[SPLIT])] if SPLIT in sources else []
    fields += [
        Field(name, source, "number")
        for name, source in sources.items()
        if source.endswith(":float") and name not in (*event, SPLIT)
    ]
    return fields


def _item_fields(header: list[str]) -> list[Field]:
    """What is wanted of a `.item` header; all of it as text, for `clean_items`."""
    sources = {bare_name(name): name for name in header}
    fields = [Field(ITEM_ID, sources.get(ITEM_ID, f"{ITEM_ID}:token"), required=True)]
    for column, names in ITEM_NAMES.items():
        fields += [Field(column, sources[name]) for name in names if name in sources][:1]
    return fields


def bare_name(name: str) -> str:
    """A column's name without its type."""
    return name.rsplit(":", 1)[0]
