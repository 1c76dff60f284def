"""Commands that make, read and write datasets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from sagerec.catalogue.dataset import Dataset, read_dataset
from sagerec.catalogue.describe import describe
from sagerec.catalogue.export import ExportSettings, export_dataset
from sagerec.catalogue.fetch import FetchSettings, fetch_category
from sagerec.catalogue.formats.importer import Format, import_dataset
from sagerec.catalogue.formats.table import TableColumns
from sagerec.catalogue.formats.writer import ImportSettings
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.simulated_store import StoreSettings, write_store
from sagerec.catalogue.splits import SplitSettings, make_split
from sagerec.cli.arguments import FLAT, Folder
from sagerec.cli.tables import (
    console,
    print_description,
)
from sagerec.config import at_least, check_fields
from sagerec.run.folder import open_run


@dataclass(frozen=True)
class Simulate:
    """Write the simulated store: a log and a catalogue whose truth is known.

    Example: sagerec simulate STORE --users 5000 --items 2000 --seed 1
    """

    out: Folder
    """Dataset folder to write."""
    store: Annotated[StoreSettings, FLAT] = field(default_factory=StoreSettings)
    """The store."""

    def __call__(self) -> None:
        write_store(self.out, simulate(self.store))
        print_description(self.out.name, describe_dataset(read_dataset(self.out)))


@dataclass(frozen=True)
class Import:
    """Make a dataset of files in another format; docs/data.md says what each format holds.

    Example: sagerec import amazon-2023 All_Beauty.jsonl.gz meta_All_Beauty.jsonl.gz --out DATASET --k-core 5
    """

    format: tyro.conf.Positional[Format]
    """What the files are."""
    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Files, or folders that hold them; of tables the log first, then the items."""
    out: Path
    """Dataset folder to write."""
    clean: Annotated[ImportSettings, FLAT] = field(default_factory=ImportSettings)
    """What is left out."""
    columns: TableColumns = field(default_factory=TableColumns)
    """Names of the columns of `table`."""

    def __call__(self) -> None:
        print_description(self.out.name, import_dataset(self.format, self.sources, self.out, self.clean, self.columns))


@dataclass(frozen=True)
class Fetch:
    """Download a category of Amazon Product Reviews from its publishers and import it; a cut download goes on.

    Example: sagerec fetch Beauty --release 2014 --out DATASET
    """

    name: tyro.conf.Positional[str]
    """The category as its publishers write it, such as All_Beauty."""
    out: Path
    """Dataset folder to write."""
    fetch: Annotated[FetchSettings, FLAT] = field(default_factory=FetchSettings)
    """What is downloaded."""
    clean: Annotated[ImportSettings, FLAT] = field(default_factory=ImportSettings)
    """What is left out."""
    downloads: Path | None = None
    """Folder for the files as they come, which stay; without it DATASET.downloads."""

    def __call__(self) -> None:
        folder = self.downloads or self.out.with_name(self.out.name + ".downloads")
        files = fetch_category(self.name, folder, self.fetch)
        release: dict[str, Format] = {"2014": "amazon-2014", "2018": "amazon-2018", "2023": "amazon-2023"}
        print_description(self.out.name, import_dataset(release[self.fetch.release], files, self.out, self.clean))


@dataclass(frozen=True)
class Export:
    """Write a dataset as the files of a peer, on exactly the same split.

    Example: sagerec export RUN --out PEER --format recbole
    """

    dataset: Folder
    """Dataset folder; or a run folder, whose split and Semantic IDs are then taken."""
    out: Path
    """Folder to write; its name becomes that of the files."""
    export: Annotated[ExportSettings, FLAT] = field(default_factory=ExportSettings)
    """What is written."""
    split: SplitSettings = field(default_factory=SplitSettings)
    """How the log of a dataset folder is divided."""

    def __call__(self) -> None:
        tokens, made_from = None, {}
        if (self.dataset / "split").is_dir():
            run = open_run(self.dataset)
            data, split, made_from = run.data, run.split, run.hashes("dataset", "split")
            if (self.dataset / "semantic_ids").is_dir():
                table = run.space().padded().tolist()
                tokens = [[f"<{chr(97 + k)}_{c}>" for k, c in enumerate(row) if c >= 0] for row in table]
        else:
            data = read_dataset(self.dataset)
            split = make_split(data, self.split)
        rows = export_dataset(self.out, data, split, self.export, semantic_ids=tokens, made_from=made_from)
        console.print(f"{self.export.format} files: " + ", ".join(f"{n:,} rows of {part}" for part, n in rows.items()))


@dataclass(frozen=True)
class Inspect:
    """Print what a dataset holds: counts, quantiles, ties in time, cold items.

    Example: sagerec inspect DATASET --split.scheme global-time
    """

    dataset: Folder
    """Dataset folder (interactions.parquet, items.parquet)."""
    split: SplitSettings = field(default_factory=SplitSettings)
    """How the log is divided."""
    cold_max_count: int = 5
    """Items with at most this many training interactions are cold."""

    def __post_init__(self) -> None:
        check_fields(self, cold_max_count=at_least(0))

    def __call__(self) -> None:
        print_description(
            self.dataset.name, describe_dataset(read_dataset(self.dataset), self.split, self.cold_max_count)
        )


def describe_dataset(data: Dataset, split: SplitSettings | None = None, cold_max_count: int = 5) -> dict[str, Any]:
    """Figures of a dataset under a split."""
    return describe(data, make_split(data, split or SplitSettings()), cold_max_count=cold_max_count)
