"""New items for a dataset: appended to its catalogue, so that the index of every older item stays what it was.

The log stays as it is, and with it the split.
"""

import shutil
from pathlib import Path

import polars as pl

from sagerec.artifacts import MANIFEST, read_manifest, write_artifact
from sagerec.catalogue.dataset import ITEM_ID, ITEMS, Dataset, check_items, files_in, read_table
from sagerec.errors import DatasetError


def read_new_items(path: Path, data: Dataset) -> pl.DataFrame:
    """The rows of a Parquet file with the columns of the dataset's items; optional ones that it lacks become null.

    Raises: DatasetError for a column or a type that the items do not have, or what `check_items` refuses.
    """
    table = check_items(read_table(path), path)
    for column in table.columns:
        if column not in data.items.columns:
            raise DatasetError(
                f"{path}: column {column!r} is not one of the items' ({', '.join(data.items.columns)}). "
                "Drop or rename it"
            )
        got, expected = table.schema[column], data.items.schema[column]
        if got not in (expected, pl.Null):
            raise DatasetError(f"{path}: column {column!r} has type {got}, the dataset's items {expected}. Cast it")
    return table.select(
        (pl.col(name) if name in table.columns else pl.lit(None)).cast(dtype).alias(name)
        for name, dtype in data.items.schema.items()
    )


def grow_dataset(folder: Path, items: pl.DataFrame) -> None:
    """Write the dataset artefact at `folder` anew with `items`, which begin with those that it has.

    It keeps what it was made from, and its manifest names the content that it had before.
    """
    manifest = read_manifest(folder, "dataset")
    with write_artifact(
        folder,
        "dataset",
        made_from=manifest.made_from,
        settings=manifest.settings,
        seed=manifest.seed,
        sizes=manifest.sizes | {"items": len(items)},
        grown_from=[*manifest.grown_from, manifest.content_hash],
    ) as fresh:
        for path in files_in(folder):
            if path.name not in (MANIFEST, ITEMS):
                shutil.copy(path, fresh / path.name)
        items.write_parquet(fresh / ITEMS)


def known_items(new: pl.DataFrame, data: Dataset) -> pl.Series:
    """(n,) bool: the dataset holds an item of this id."""
    return new[ITEM_ID].is_in(data.items[ITEM_ID].implode())
