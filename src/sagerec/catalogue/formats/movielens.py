"""MovieLens as GroupLens publishes it (Harper and Konstan, TiiS 2015), by the names of the files.

- 100K: `u.data` (tabs, no header) and `u.item` (`|`, latin-1), where a column for each genre holds 0 or 1
- 1M and 10M: `ratings.dat` and `movies.dat` (`::`, no header); latin-1 in 1M, UTF-8 in 10M, which the bytes tell
- 20M, 25M, 32M and the latest: `ratings.csv` and `movies.csv`

Titles are taken as they stand, with their year. Other files (tags, users, links, the cuts of 100K) are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from sagerec.catalogue.dataset import CATEGORIES, ITEM_ID, TIMESTAMP, TITLE, USER_ID
from sagerec.catalogue.formats.blocks import BadRows, Chunk, read_blocks
from sagerec.catalogue.formats.delimited import Dialect, read_delimited
from sagerec.catalogue.formats.fields import Field, log_fields
from sagerec.catalogue.formats.source import Source, clean_items
from sagerec.errors import DatasetError

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The genres of 100K, in the order of its columns; the first means none."""
RATINGS = (USER_ID, ITEM_ID, "rating", TIMESTAMP)
MOVIES = (ITEM_ID, TITLE, CATEGORIES)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a generation of MovieLens is written."""

    movies: str
    """Name of the items' file."""
    log: Dialect
    """How the ratings are written."""
    items: Dialect
    """How the movies are written."""
    log_names: tuple[str, ...] = RATINGS
    """The file's names of user, item, rating and time."""
    item_names: tuple[str, ...] = MOVIES
    """The file's names of item, title and genres."""


LAYOUTS = {
    "u.data": Layout(
        "u.item",
        Dialect("\t", quote="", header=RATINGS),
        Dialect("|", quote="", header=(ITEM_ID, TITLE, "released", "video", "url", *GENRES)),
    ),
    "ratings.dat": Layout(
        "movies.dat", Dialect("::", quote="", header=RATINGS), Dialect("::", quote="", header=MOVIES)
    ),
    "ratings.csv": Layout(
        "movies.csv",
        Dialect(),
        Dialect(),
        ("userId", "movieId", "rating", "timestamp"),
        ("movieId", "title", "genres"),
    ),
}
"""Name of the ratings' file -> how it and the movies are written."""


def read_movielens(files: Sequence[Path], bad: BadRows) -> Source:
    """One file of ratings, and the movies beside it where they are given. Raises: DatasetError."""
    ratings = [p for p in files if _name(p) in LAYOUTS]
    if len(ratings) != 1:
        raise DatasetError(
            f"{len(ratings)} files of ratings are given{': ' if ratings else ''}{', '.join(map(str, ratings))}; "
            f"expected one of {', '.join(LAYOUTS)}, as GroupLens names them. Give the folder of one unpacked MovieLens"
        )
    layout = LAYOUTS[_name(ratings[0])]
    movies = [p for p in files if _name(p) == layout.movies]
    if len(movies) > 1:
        raise DatasetError(
            f"{len(movies)} files of movies are given: {', '.join(map(str, movies))}; expected one {layout.movies}"
        )
    user, item, rating, time = layout.log_names
    fields = [*log_fields(user, item, time), Field("rating", rating, "number")]
    notes: dict[str, str] = {}
    return Source(
        log=read_delimited(ratings[0], lambda _: fields, bad, layout.log),
        items=clean_items(_read_movies(movies[0], layout, bad, notes), notes, separator="|") if movies else None,
        files=(*ratings, *movies),
        notes=notes,
    )


def _name(path: Path) -> str:
    return path.name.removesuffix(".gz")


def _read_movies(path: Path, layout: Layout, bad: BadRows, notes: dict[str, str]) -> Iterator[Chunk]:
    """The movies, with their genres in one text."""
    item, title, genres = layout.item_names
    fields = [Field(ITEM_ID, item, required=True), Field(TITLE, title)]
    dialect = layout.items
    if layout.movies != "movies.csv":
        notes["encoding"] = "UTF-8" if _is_utf8(path) else "latin-1"
        dialect = replace(dialect, encoding="" if notes["encoding"] == "UTF-8" else "latin-1")
    if genres in dialect.header or not dialect.header:
        yield from read_delimited(path, lambda _: [*fields, Field(CATEGORIES, genres)], bad, dialect)
        return
    flags = GENRES[1:]
    for chunk in read_delimited(path, lambda _: [*fields, *(Field(name, name) for name in flags)], bad, dialect):
        named = [pl.when(pl.col(name) == "1").then(pl.lit(name)) for name in flags]
        text = pl.concat_str(named, separator="|", ignore_nulls=True).alias(CATEGORIES)
        yield replace(chunk, table=chunk.table.select(ITEM_ID, TITLE, text))


def _is_utf8(path: Path) -> bool:
    """Whether a whole file is UTF-8, which text of another encoding with letters beyond ASCII hardly ever is."""
    try:
        for block in read_blocks(path, BadRows(skip=True)):
            block.text.decode()
    except UnicodeDecodeError:
        return False
    return True
