"""Amazon Product Reviews in its three releases: reviews, and metadata of a whole category.

- 2014 (McAuley et al., SIGIR 2015): `reviews_*_5.json.gz` (reviewerID, asin, overall, unixReviewTime, day by day) and
  `meta_*.json.gz`, whose lines are Python literals.
- 2018 (Ni et al., EMNLP 2019): `*_5.json.gz`, the same names and `verified`; `meta_*.json.gz`, which is JSON.
- 2023 (Hou et al., arXiv 2403.03952): `*.jsonl.gz` (user_id, parent_asin, rating, timestamp in ms, verified_purchase,
  helpful_vote) and `meta_*.jsonl.gz`.

An item of 2023 is the parent product, as its publishers have it: variants of one product share it.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from sagerec.catalogue.dataset import CATEGORIES, ITEM_ID, TITLE
from sagerec.catalogue.formats.blocks import BadRows, Chunk
from sagerec.catalogue.formats.fields import BadValueError, Field, json_value, log_fields
from sagerec.catalogue.formats.json_lines import (
    Parse,
    parse_json,
    parse_json_or_literal,
    read_json_lines,
    records,
)
from sagerec.catalogue.formats.source import Source, clean_list, clean_price, clean_text, item_chunk
from sagerec.errors import DatasetError

Release = Literal["amazon-2014", "amazon-2018", "amazon-2023"]
OLD = log_fields("reviewerID", "asin", "unixReviewTime", "integer")
LOG_FIELDS: dict[Release, tuple[Field, ...]] = {
    "amazon-2014": (*OLD, Field("rating", "overall", "number")),
    "amazon-2018": (*OLD, Field("rating", "overall", "number"), Field("verified", "verified", "flag")),
    "amazon-2023": (
        *log_fields("user_id", "parent_asin", "timestamp", "integer"),
        Field("rating", "rating", "number"),
        Field("verified", "verified_purchase", "flag"),
        Field("helpful_votes", "helpful_vote", "integer"),
    ),
}
ITEM_FIELDS: dict[Release, dict[str, tuple[str, ...]]] = {
    "amazon-2014": {"id": ("asin",), "brand": ("brand",), "text": (), "categories": ("categories",)},
    "amazon-2018": {
        "id": ("asin",),
        "brand": ("brand",),
        "text": ("feature",),
        "categories": ("category", "categories"),
    },
    "amazon-2023": {
        "id": ("parent_asin",),
        "brand": ("store",),
        "text": ("features",),
        "categories": ("main_category", "categories"),
    },
}
"""The file's names for what is called otherwise from release to release."""
SCRIPT_IN_TITLE = "getTime()"
"""Some titles of 2018 are pieces of the web page's script."""


def read_amazon(release: Release, files: Sequence[Path], bad: BadRows) -> Source:
    """Reviews, and metadata where a file's name begins with `meta_`. Raises: DatasetError where no file has reviews."""
    metadata = [p for p in files if p.name.startswith("meta_")]
    reviews = [p for p in files if not p.name.startswith("meta_")]
    if not reviews:
        raise DatasetError(
            f"no file with reviews among {', '.join(p.name for p in files) or 'none'}; expected one whose name does "
            "not begin with meta_"
        )
    parse = parse_json_or_literal if release == "amazon-2014" else parse_json
    log = (read_json_lines(p, LOG_FIELDS[release], bad, parse=parse) for p in reviews)
    items = (read_metadata(release, p, bad, parse) for p in metadata)
    return Source(
        log=chain.from_iterable(log),
        items=chain.from_iterable(items) if metadata else None,
        files=(*reviews, *metadata),
        has_whole_category=True,
    )


def read_metadata(release: Release, path: Path, bad: BadRows, parse: Parse) -> Iterator[Chunk]:
    """The items of a metadata file."""
    names = ITEM_FIELDS[release]
    identity = Field(ITEM_ID, names["id"][0], required=True)
    for source_bytes, pairs in records(path, bad, parse=parse):
        rows: list[dict[str, Any]] = []
        lines: list[int] = []
        for number, record in pairs:
            try:
                item_id = json_value(identity, record)
            except BadValueError as error:
                bad.report(path, number, error.reason, error.detail)
                continue
            title = clean_text(record.get("title"))
            rows.append(
                {
                    ITEM_ID: item_id,
                    TITLE: None if title and SCRIPT_IN_TITLE in title else title,
                    "brand": next((t for name in names["brand"] if (t := clean_text(record.get(name)))), None),
                    "text": next((t for name in names["text"] if (t := clean_text(record.get(name)))), None),
                    "description": clean_text(record.get("description")),
                    CATEGORIES: clean_list([record.get(name) for name in names["categories"]]),
                    "price": clean_price(record.get("price")),
                }
            )
            lines.append(number)
        yield item_chunk(path, rows, lines, source_bytes)
