"""RecBole's atomic files: tab-separated, the header names columns and their types (`user_id:token`, `rating:float`).

Of the `.inter` file, `user_id`, `item_id` and `timestamp` are the event, a `split` column its part, every other
`:float` column feedback. Files whose rows hold whole sequences (`item_id_list:token_seq`) repeat the events of the
plain one, and are left out.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from sagerec.catalogue.dataset import CATEGORIES, ITEM_ID, SPLIT, TIMESTAMP, TITLE, USER_ID
from sagerec.catalogue.formats.blocks import BadRows, Chunk, peek_header
from sagerec.catalogue.formats.delimited import Dialect, read_delimited
from sagerec.catalogue.formats.fields import Field, log_fields, split_field
from sagerec.catalogue.formats.source import Source, clean_items
from sagerec.errors import DatasetError

ATOMIC = Dialect(separator="\t", quoted=False)
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
    """A `.inter` file or several, and the `.item` file beside. Raises: DatasetError."""
    logs = [p for p in files if p.suffix == ".inter"]
    plain = [p for p in logs if SEQUENCE_COLUMN not in peek_header(p).split("\t")]
    items = [p for p in files if p.suffix == ".item"]
    if not plain:
        why = f"those there are ({', '.join(p.name for p in logs)}) hold whole sequences" if logs else "there is none"
        raise DatasetError(
            f"no .inter file with one event a row: {why}. Give the plain .inter file, and the .item file"
        )
    return Source(
        log=chain.from_iterable(read_delimited(p, _log_fields, bad, ATOMIC) for p in plain),
        items=chain.from_iterable(_read_items(p, bad) for p in items) if items else None,
        files=(*plain, *items),
    )


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


def _read_items(path: Path, bad: BadRows) -> Iterator[Chunk]:
    for chunk in read_delimited(path, _item_fields, bad, ATOMIC):
        yield clean_items(chunk)
