"""`sagerec import`: a format by its name, its files to a canonical dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sagerec.catalogue.formats.amazon import read_amazon
from sagerec.catalogue.formats.blocks import BadRows
from sagerec.catalogue.formats.minionerec import read_minionerec
from sagerec.catalogue.formats.movielens import read_movielens
from sagerec.catalogue.formats.recbole import read_recbole
from sagerec.catalogue.formats.recif import import_recif
from sagerec.catalogue.formats.source import files_of
from sagerec.catalogue.formats.table import TableColumns, read_tables
from sagerec.catalogue.formats.writer import ImportSettings, write_imported
from sagerec.config import to_json
from sagerec.progress import progress_bar

Format = Literal["amazon-2014", "amazon-2018", "amazon-2023", "minionerec", "movielens", "recbole", "recif", "table"]
MB = 1_000_000


def import_dataset(
    format_name: Format,
    sources: Sequence[Path],
    out: Path,
    settings: ImportSettings | None = None,
    columns: TableColumns | None = None,
) -> dict[str, Any]:
    """Import files, or the files of folders, and write the canonical dataset; returns the figures of the import.

    Raises: DatasetError, and then nothing is written.
    """
    settings, columns = settings or ImportSettings(), columns or TableColumns()
    files, bad = files_of(sources), BadRows(skip=settings.skip_bad_rows)
    if format_name == "recif":
        with progress_bar("users read", 0) as bar:
            return import_recif(files, out, settings, lambda done, total: bar.update(done, total=total))
    origin: dict[str, Any] = {"format": format_name}
    if format_name == "minionerec":
        source = read_minionerec(files, bad)
    elif format_name == "movielens":
        source = read_movielens(files, bad)
    elif format_name == "recbole":
        source = read_recbole(files, bad)
    elif format_name == "table":
        source = read_tables(files, bad, columns)
        origin["columns"] = to_json(columns)
    else:
        source = read_amazon(format_name, files, bad)
    total = sum(path.stat().st_size for path in source.files)
    with progress_bar("MB read", total // MB) as bar:
        return write_imported(out, source, settings, bad, origin=origin, progress=lambda done: bar.update(done // MB))
