"""Items that join the catalogue of a run after its policies were trained."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from sagerec.actions.registry import kind_in
from sagerec.catalogue.dataset import ITEM_ID
from sagerec.catalogue.grow import grow_dataset, known_items, read_new_items
from sagerec.errors import ArtifactError, DatasetError
from sagerec.files import locked
from sagerec.run.folder import open_run

logger = logging.getLogger(__name__)


def add_items(folder: Path, items: Path) -> dict[str, Any]:
    """Add the items of a Parquet file to the catalogue and the Semantic IDs of a run, whose policies serve on.

    The codes are found first; then the dataset is written, then the IDs. Cut short between the two, the same call goes
    on; once it is done, the same call changes nothing. Returns the record of the addition: items, collisions,
    reconstruction_error.

    Raises: DatasetError for an item that the run has already, or what `read_new_items` refuses; ArtifactError.
    """
    open_run(folder)  # refuses what is no run
    kind = kind_in(folder)
    with locked(folder / "dataset"), locked(folder / kind.name):
        run = open_run(folder)
        if kind.code_new_items is None or kind.write_addition is None:
            raise ArtifactError(f"{folder / kind.name} cannot take more items; make the run anew")
        data, new = run.data, read_new_items(items, run.data)
        known, sizes = known_items(new, data), run.manifest(kind.name).sizes
        waiting, added = data.items[sizes["items"] :], sizes.get("added", [])
        last = data.items.tail(len(new))
        if len(waiting) and waiting.equals(new):
            logger.info("dataset: has these items already, and the Semantic IDs do not; going on there")
        elif added and not len(waiting) and added[-1]["items"] == len(new) and last.equals(new):
            logger.info("these items are the last that were added; nothing to do")
            return dict(added[-1])
        elif known.any():
            raise DatasetError(
                f"{items}: {int(known.sum())} of {len(new)} items are in the run already, the first "
                f"{new[ITEM_ID].filter(known)[0]!r} in row {known.arg_max()} (from 0). Drop these rows"
            )
        else:
            run.space()  # refuses one that does not fit the dataset
            data = replace(data, items=pl.concat([data.items, new]))
        addition = kind.code_new_items(folder / kind.name, data)
        if data is not run.data:
            grow_dataset(folder / "dataset", data.items)
        kind.write_addition(folder / kind.name, addition, made_from=run.hashes("dataset"))
        return dict(run.manifest(kind.name).sizes["added"][-1])
