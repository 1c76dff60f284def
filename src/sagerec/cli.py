"""The command line: the only place that parses arguments, configures logging and prints.

Every flag is a field of a stage's settings, so a default and its help are written once.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from sagerec import run as pipeline
from sagerec.baselines import BaselineName, evaluate_baseline
from sagerec.catalogue.dataset import Dataset, read_dataset
from sagerec.catalogue.describe import describe
from sagerec.catalogue.export import ExportSettings, export_dataset
from sagerec.catalogue.fetch import FetchSettings, fetch_category
from sagerec.catalogue.formats.importer import Format, import_dataset
from sagerec.catalogue.formats.table import TableColumns
from sagerec.catalogue.formats.writer import ImportSettings
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.splits import SplitSettings, make_split
from sagerec.catalogue.store import StoreSettings, write_store
from sagerec.errors import SagerecError
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.evaluation.sasrec import TUNED, SasRecSettings
from sagerec.policies.lazy_decoder import LazyDecoderSettings
from sagerec.recommend import load
from sagerec.report.markdown import write_results
from sagerec.report.page import write_report
from sagerec.report.training_plots import write_plots
from sagerec.run import RunSettings
from sagerec.semantic_ids.build import SemanticIdSettings
from sagerec.settings import require
from sagerec.study import CompareSettings, StudySettings, compare
from sagerec.tables import (
    console,
    print_alignment,
    print_description,
    print_examples,
    print_ids,
    print_reports,
    print_study,
)
from sagerec.training import parallel
from sagerec.training.align_settings import AlignSettings
from sagerec.training.loop import TrainSettings

FLAT = tyro.conf.arg(name="")
Folder = tyro.conf.Positional[Path]


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
            run = pipeline.open_run(self.dataset)
            data, split, made_from = run.data, run.split, run.hashes("dataset", "split")
            if (self.dataset / "semantic_ids").is_dir():
                tokens = [[f"<{chr(97 + k)}_{c}>" for k, c in enumerate(row)] for row in run.ids().codes.tolist()]
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

    def __call__(self) -> None:
        print_description(
            self.dataset.name, describe_dataset(read_dataset(self.dataset), self.split, self.cold_max_count)
        )


@dataclass(frozen=True)
class RunAll:
    """Do all stages: split, Semantic IDs, supervised training, audit, evaluation. Stages that are there and fit are
    skipped; a killed training resumes.

    Example: sagerec run DATASET --out RUN --train.epochs 20 --ids.codebook-size 128
    """

    dataset: Folder
    """Dataset folder (interactions.parquet, items.parquet)."""
    out: Path
    """Run folder to write."""
    settings: Annotated[RunSettings, FLAT] = field(default_factory=RunSettings)
    """The stages' settings."""
    refit: bool = False
    """Train once more with the validation events, for deployment; a row of its own."""
    baselines: tuple[BaselineName, ...] = ()
    """Baselines to evaluate beside it."""

    def __call__(self) -> None:
        reports = pipeline.run_all(self.dataset, self.out, self.settings, with_refit=self.refit)
        rows = dict(zip(("policy", "policy, refit"), reports, strict=False))
        run = pipeline.open_run(self.out)
        for name in self.baselines:
            rows[name] = evaluate_baseline(run, name, self.settings.evaluate)
        print_ids(run)
        print_reports(rows)
        print_examples(run, load(self.out))


@dataclass(frozen=True)
class Prepare:
    """Copy a dataset into a run folder and split it.

    Example: sagerec prepare DATASET --out RUN --split.reserve event
    """

    dataset: Folder
    """Dataset folder (interactions.parquet, items.parquet)."""
    out: Path
    """Run folder to write."""
    split: SplitSettings = field(default_factory=SplitSettings)
    """How the log is divided."""

    def __call__(self) -> None:
        run = pipeline.prepare(self.dataset, self.out, self.split)
        console.print(f"{run.split.scheme} split: " + ", ".join(f"{n:,} {p}" for p, n in run.split.counts().items()))


@dataclass(frozen=True)
class Ids:
    """Make the Semantic IDs of a run.

    Example: sagerec ids RUN --quantiser balanced-kmeans --codebook-size 256
    """

    run: Folder
    """Run folder."""
    ids: Annotated[SemanticIdSettings, FLAT] = field(default_factory=SemanticIdSettings)
    """How items become codes."""

    def __call__(self) -> None:
        run = pipeline.open_run(self.run)
        pipeline.make_ids(run, self.ids)
        print_ids(run)


@dataclass(frozen=True)
class IdsAdd:
    """Add items to the catalogue of a run: they get codes from its codebooks, and its policies go on working.

    Example: sagerec ids add RUN ITEMS.parquet
    """

    run: Folder
    """Run folder."""
    items: Folder
    """Parquet file with the columns of items.parquet."""

    def __call__(self) -> None:
        added = pipeline.add_items(self.run, self.items)
        console.print(
            f"{added.items:,} items added, {added.collisions:,} of them with the codes of another item; "
            f"reconstruction error {added.reconstruction_error:.3f}",
            highlight=False,
        )
        print_ids(pipeline.open_run(self.run))


@dataclass(frozen=True)
class Train:
    """Train the policy of a run on its training events. A killed training resumes.

    Example: sagerec train RUN --train.epochs 20 --policy.width 64
    """

    run: Folder
    """Run folder."""
    policy: LazyDecoderSettings = field(default_factory=LazyDecoderSettings)
    """Shape of the policy."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """How the policy is trained."""
    refit: bool = False
    """Also train once more with the validation events, for deployment."""

    def __call__(self) -> None:
        run = pipeline.open_run(self.run)
        pipeline.train(run, self.policy, self.train)
        if self.refit:
            pipeline.refit(run, self.policy, self.train)


@dataclass(frozen=True)
class Align:
    """Align the supervised policy of a run with several rewards, on events that it has not seen. A killed one resumes.

    Example: sagerec align RUN --objective sage --reward hit=1 --reward cold*hit=0.5
    """

    run: Folder
    """Run folder, made with --split.reserve event (or users)."""
    align: Annotated[AlignSettings, FLAT] = field(default_factory=AlignSettings)
    """How it is aligned."""
    name: str | None = None
    """The aligned policy becomes RUN/policy-NAME; the objective's name if not given."""

    def __call__(self) -> None:
        run = pipeline.open_run(self.run)
        name = pipeline.align(run, self.align, name=self.name)
        if parallel.rank() == 0:
            write_plots(run.folder / name)
            print_alignment(run, name)


@dataclass(frozen=True)
class Compare:
    """Compare objectives under equal conditions: one supervised policy, the same events, rewards, rollouts and budget,
    as many trials of each one's settings, several seeds, always beside the control. A stopped study goes on.

    Example: sagerec compare DATASET --objectives sage,gbpo,gspo --seeds 3 --out STUDY
    """

    dataset: Folder
    """Dataset folder (interactions.parquet, items.parquet)."""
    out: Path
    """Study folder to write."""
    study: Annotated[StudySettings, FLAT] = field(default_factory=StudySettings)
    """What is compared."""
    align: AlignSettings = field(default_factory=AlignSettings)
    """What all alignments share."""
    run: RunSettings = field(default_factory=RunSettings)
    """The supervised stage."""

    def __call__(self) -> None:
        print_study(compare(self.dataset, self.out, CompareSettings(self.study, self.run, self.align)))


@dataclass(frozen=True)
class Results:
    """Write the tables of study folders as a page of Markdown, each under its title.

    Example: sagerec results "Amazon Beauty=STUDY" --out docs/results.md
    """

    studies: tyro.conf.Positional[tuple[str, ...]]
    """TITLE=FOLDER of each study."""
    out: Path
    """Page to write."""

    def __call__(self) -> None:
        folders = {}
        for text in self.studies:
            title, equals, folder = text.partition("=")
            require(bool(title and equals and folder), f"study {text!r}; expected TITLE=FOLDER")
            folders[title] = Path(folder)
        console.print("wrote " + ", ".join(map(str, write_results(self.out, folders))), highlight=False)


@dataclass(frozen=True)
class Evaluate:
    """Evaluate the policy of a run over every case of a split; writes RUN/evaluation.json.

    Example: sagerec evaluate RUN --policy policy-sage --k 10 20
    """

    run: Folder
    """Run folder."""
    evaluate: Annotated[EvaluateSettings, FLAT] = field(default_factory=EvaluateSettings)
    """What is measured."""
    policy: str = "policy"
    """Which policy of the run: policy, policy-refit, or an aligned one, such as policy-sage."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""

    def __call__(self) -> None:
        run = pipeline.open_run(self.run)
        print_reports({self.policy: pipeline.evaluate(run, self.evaluate, name=self.policy, device=self.device)})


@dataclass(frozen=True)
class Baseline:
    """Fit and evaluate a baseline on the split of a run.

    Example: sagerec baseline RUN sasrec --train.epochs 30
    """

    run: Folder
    """Run folder."""
    name: tyro.conf.Positional[BaselineName]
    """Which baseline."""
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    """What is measured."""
    sasrec: SasRecSettings = field(default_factory=SasRecSettings)
    """Shape of SASRec."""
    train: TrainSettings = TUNED
    """How SASRec is trained."""
    trials: int = 1
    """Learning rates and dropouts that SASRec is trained with; the best on validation is kept."""

    def __call__(self) -> None:
        run = pipeline.open_run(self.run)
        report = evaluate_baseline(
            run, self.name, self.evaluate, model=self.sasrec, training=self.train, trials=self.trials
        )
        print_reports({self.name: report})


@dataclass(frozen=True)
class Audit:
    """Prove that no stage of a run saw a test or validation target.

    Example: sagerec audit RUN
    """

    run: Folder
    """Run folder."""

    def __call__(self) -> None:
        table = Table(title="events that each stage used")
        for column in ("stage", "train", "align", "valid", "test", "may use"):
            table.add_column(column, justify="left" if column in ("stage", "may use") else "right")
        for finding in pipeline.audit(pipeline.open_run(self.run)):
            counts = [f"{finding.counts[part]:,}" for part in ("train", "align", "valid", "test")]
            table.add_row(finding.stage, *counts, ", ".join(finding.allowed))
        console.print(table)


@dataclass(frozen=True)
class Recommend:
    """Print the next items for a history.

    Example: sagerec recommend RUN --history B004756YJA,B004ZT0SSG -k 10
    """

    run: Folder
    """Run folder."""
    history: str
    """Item ids, the oldest first, separated by commas."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Items to print."""
    slate: bool = False
    """Write a slate, item after item, in place of the k most probable next items."""
    keep_history: bool = False
    """Items of the history may be recommended again."""
    policy: str = "policy"
    """Which policy of the run: policy, policy-refit, or an aligned one, such as policy-sage."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""

    def __call__(self) -> None:
        recommender = load(self.run, policy=self.policy, device=self.device)
        history = [value.strip() for value in self.history.split(",") if value.strip()]
        found = recommender.recommend(history, k=self.k, exclude_history=not self.keep_history, slate=self.slate)
        table = Table()
        for column, justify in (("rank", "right"), ("item_id", "left"), ("title", "left"), ("score", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for rank, item, title, score in found.iter_rows():
            table.add_row(str(rank), item, title, f"{score:.3f}")
        console.print(table)


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page of a run or a study: settings, table, trade-offs, curves, example users.

    Example: sagerec report RUN --out report.html
    """

    run: Folder
    """Run folder, or study folder."""
    out: Path | None = None
    """Where the page goes; report.html in the folder if not given."""

    def __call__(self) -> None:
        path = write_report(self.run, self.out)
        console.print(f"{path} ({path.stat().st_size / 1e6:.2f} MB): open it in a browser", highlight=False)


COMMANDS: dict[str, Callable[..., Callable[[], None]]] = {
    "simulate": Simulate,
    "import": Import,
    "fetch": Fetch,
    "export": Export,
    "inspect": Inspect,
    "run": RunAll,
    "prepare": Prepare,
    "ids": Ids,
    "ids add": IdsAdd,
    "train": Train,
    "align": Align,
    "compare": Compare,
    "results": Results,
    "evaluate": Evaluate,
    "baseline": Baseline,
    "audit": Audit,
    "recommend": Recommend,
    "report": Report,
}


def describe_dataset(data: Dataset, split: SplitSettings | None = None, cold_max_count: int = 5) -> dict[str, Any]:
    """Figures of a dataset under a split."""
    return describe(data, make_split(data, split or SplitSettings()), cold_max_count=cold_max_count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn the project's errors into one line. Returns the exit status."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_level=False, markup=False)],
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    if " ".join(words[:2]) in COMMANDS:
        words[:2] = [" ".join(words[:2])]
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="sagerec",
        description="Preference alignment of generative recommenders. `sagerec COMMAND --help` for the flags of one.",
        args=words,
    )
    started = time.perf_counter()
    try:
        command()
    except SagerecError as error:
        Console(stderr=True).print(Text.assemble(("error", "bold red"), f": {error}"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was")
        return 130
    logging.getLogger(__name__).info("done in %.1f s", time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
