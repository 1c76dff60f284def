"""The command line: the only place that parses arguments, configures logging and prints.

Every flag is a field of a stage's settings, so a default and its help are written once.
"""

import json
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
from sagerec.catalogue.dataset import Dataset, read_dataset
from sagerec.catalogue.describe import describe
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.splits import SplitSettings, make_split
from sagerec.catalogue.store import StoreSettings, write_store
from sagerec.errors import SagerecError
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.evaluation.sasrec import TUNED, SasRecSettings
from sagerec.policies.lazy_decoder import LazyDecoderSettings
from sagerec.recommend import Recommender, load
from sagerec.report.page import write_report
from sagerec.report.training_plots import write_plots
from sagerec.run import BaselineName, RunSettings
from sagerec.semantic_ids.build import SemanticIdSettings
from sagerec.training import parallel
from sagerec.training.align_settings import AlignSettings
from sagerec.training.loop import TrainSettings
from sagerec.training.tracking import METRICS

console = Console()
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
            rows[name] = pipeline.evaluate_baseline(run, name, self.settings.evaluate)
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

    Example: sagerec ids RUN --levels 3 --codebook-size 256
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

    def __call__(self) -> None:
        run = pipeline.open_run(self.run)
        report = pipeline.evaluate_baseline(run, self.name, self.evaluate, model=self.sasrec, training=self.train)
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
    "inspect": Inspect,
    "run": RunAll,
    "prepare": Prepare,
    "ids": Ids,
    "train": Train,
    "align": Align,
    "evaluate": Evaluate,
    "baseline": Baseline,
    "audit": Audit,
    "recommend": Recommend,
    "report": Report,
}


def describe_dataset(data: Dataset, split: SplitSettings | None = None, cold_max_count: int = 5) -> dict[str, Any]:
    """Figures of a dataset under a split."""
    return describe(data, make_split(data, split or SplitSettings()), cold_max_count=cold_max_count)


def print_description(name: str, figures: dict[str, Any]) -> None:
    """A table of figures, one a row."""
    table = Table("figure", "value", title=name)
    for key, value in figures.items():
        if isinstance(value, dict):
            text = "  ".join(f"{k} {v:,.0f}" for k, v in value.items())
        elif isinstance(value, list):
            text = ", ".join(value) or "none"
        elif isinstance(value, float):
            text = f"{value:.2%}" if key.endswith("share") else f"{value:.3g}"
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(key.replace("_", " "), text)
    console.print(table)


def print_ids(run: pipeline.Run) -> None:
    """How good the Semantic IDs are."""
    sizes = run.manifest("semantic_ids").sizes
    console.print(
        f"Semantic IDs: {sizes['distinct_ids']:,} for {sizes['items']:,} items, level sizes {sizes['level_sizes']}; "
        f"before the last code {sizes['collision_rate']:.1%} of items collide, perplexity "
        f"{', '.join(f'{p:.0f}' for p in sizes['perplexity'])}, reconstruction error "
        f"{', '.join(f'{e:.3f}' for e in sizes['reconstruction_error'])}; trie {sizes['trie_bytes'] / 1e6:.1f} MB",
        highlight=False,
    )


def print_alignment(run: pipeline.Run, name: str) -> None:
    """What alignment did to the validation metrics, and how to measure it on test."""
    lines = (run.folder / name / METRICS).read_text(encoding="utf-8").splitlines()
    sizes = run.manifest(name).sizes
    validated = [values for values in map(json.loads, lines) if "criterion" in values]
    if validated:
        kept = next(values for values in validated if values["round"] == sizes["kept_round"])
        table = Table("validation", "before", f"after (round {kept['round']} of {sizes['rounds']})", title=name)
        for key in (*validated[0].keys() - {"step", "round", "seconds"},):
            table.add_row(key.removeprefix("valid_"), f"{validated[0][key]:.4f}", f"{kept[key]:.4f}")
        console.print(table)
    console.print(f"next: sagerec evaluate {run.folder} --policy {name}", highlight=False)


def print_reports(reports: dict[str, dict[str, Any]]) -> None:
    """Metrics with 95 % intervals: of one report at every K, of several at one K; and Recall by popularity."""
    first = next(iter(reports.values()))
    ks = first["settings"]["k"]
    if len(reports) > 1:
        ks = [10 if 10 in ks else ks[-1]]
    columns = [(name, k) for name in reports for k in ks]
    title = (
        f"{first['split']}: {first['users']:,} users, {first['cases']:,} cases, {first['cold_cases']:,} of them cold"
    )
    table = Table("metric", title=title)
    for name, k in columns:
        table.add_column(f"{name} @{k}" if len(reports) > 1 else f"@{k}", justify="right")
    for metric in dict.fromkeys(key.partition("@")[0] for key in first["metrics"]):
        suffixes = dict.fromkeys(
            key.partition("@")[2].partition("_")[2] for key in first["metrics"] if key.startswith(metric + "@")
        )
        for suffix in suffixes:
            tail = f"_{suffix}" if suffix else ""
            cells = [_cell(reports[name]["metrics"].get(f"{metric}@{k}{tail}")) for name, k in columns]
            table.add_row(f"{metric} {suffix}".strip(), *cells)
    console.print(table)
    key = next(key for row in first["buckets"] for key in row if key.startswith("recall@"))
    by = Table("target's training interactions", "cases", title=f"{key} by popularity")
    for name in reports:
        by.add_column(name, justify="right")
    for number, row in enumerate(first["buckets"]):
        if row["cases"]:
            high = "" if row["train_count_to"] is None else row["train_count_to"]
            cells = [_cell(report["buckets"][number].get(key)) for report in reports.values()]
            by.add_row(f"{row['train_count_from']}–{high}", f"{row['cases']:,}", *cells)
    console.print(by)


def _cell(value: dict[str, float] | None) -> str:
    """A value over its interval."""
    return "" if value is None else f"{value['value']:.4f}\n[dim]{value['low']:.4f}–{value['high']:.4f}[/]"


def print_examples(run: pipeline.Run, recommender: Recommender, users: int = 3, k: int = 5) -> None:
    """Readable slates: what some test users had, what is recommended, and what they took next."""
    cases = run.split.cases(run.data, "test")
    step = max(1, len(cases) // users)
    for case in range(0, step * users, step)[: len(cases)]:
        first, row = int(cases.starts[case]), int(cases.rows[case])
        history = run.data.event_items[max(first, row - 5) : row]
        target = int(cases.targets[case])
        found = recommender.recommend(run.data.item_ids.external(run.data.event_items[first:row]), k=k)
        table = Table("", "item_id", "title", title=f"user {run.data.user_ids.external([cases.users[case]])[0]}")
        for item in history:
            table.add_row("had", run.data.item_ids.external([item])[0], recommender.titles[item])
        table.add_section()
        for rank, item_id, title, _ in found.iter_rows():
            mark = " <- taken" if item_id == run.data.item_ids.external([target])[0] else ""
            table.add_row(f"{rank}", item_id, title + mark)
        table.add_section()
        table.add_row("took", run.data.item_ids.external([target])[0], recommender.titles[target])
        console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn the project's errors into one line. Returns the exit status."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_level=False, markup=False)],
    )
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="sagerec",
        description="Preference alignment of generative recommenders. `sagerec COMMAND --help` for the flags of one.",
        args=arguments,
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
