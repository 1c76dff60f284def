"""Commands that evaluate, compare, audit and show."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from sagerec.baselines.sasrec import TUNED, SasRecSettings
from sagerec.baselines.tuning import BaselineName, evaluate_baseline
from sagerec.catalogue.dataset import IdMap
from sagerec.catalogue.splits import PARTS
from sagerec.cli.arguments import FLAT, Folder
from sagerec.cli.tables import (
    console,
    print_diagnoses,
    print_reports,
    print_study,
)
from sagerec.config import at_least, check_fields, require
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.recommend import load
from sagerec.report.markdown import write_results
from sagerec.report.page import write_report
from sagerec.run import stages as pipeline
from sagerec.run.folder import open_run
from sagerec.run.stages import RunSettings
from sagerec.serving.lists import list_users
from sagerec.study import CompareSettings, StudySettings, run_study
from sagerec.study.workers import over_ranks
from sagerec.training.settings import AlignSettings, TrainSettings


@dataclass(frozen=True)
class Compare:
    """Compare objectives under equal conditions: the same events, rewards, rollouts and budget, as many trials of each
    one's settings, several seeds with supervised policies of their own, always beside the control and the policy that
    learnt all events at once. A stopped study goes on.

    Example: sagerec compare DATASET --objectives sage,gbpo,gspo --seeds 3 --out STUDY
    """

    dataset: Folder
    """Dataset folder (interactions.parquet, items.parquet)."""
    out: Path
    """Study folder to write."""
    study: Annotated[StudySettings, FLAT] = field(default_factory=StudySettings)
    """What is compared."""
    actions: Literal["semantic-id", "text"] | None = None
    """What items are written as, in place of --run.actions: semantic-id, a few codes; text, their titles."""
    align: AlignSettings = field(default_factory=AlignSettings)
    """What all alignments share."""
    run: RunSettings = field(default_factory=RunSettings)
    """The supervised stage."""
    sasrec: SasRecSettings = field(default_factory=SasRecSettings)
    """Shape of the baseline SASRec; dropout and width are tried."""
    sasrec_train: TrainSettings = TUNED
    """How it is trained."""

    def __call__(self) -> None:
        run = self.run if self.actions is None else replace(self.run, actions=self.actions)
        settings = CompareSettings(self.study, run, self.align, self.sasrec, self.sasrec_train)
        record = over_ranks(lambda: run_study(self.dataset, self.out, settings), self.study.processes)
        if record is not None:
            print_study(record)


@dataclass(frozen=True)
class Results:
    """Write the tables of study folders as a page of Markdown, each under its title; notes below its mark are kept.

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
            require(title not in folders, f"title {title!r} stands twice; expected another for each study")
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
    """Which policy of the run: policy, policy-refit, policy-all-at-once, or an aligned one, such as policy-sage."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""

    def __call__(self) -> None:
        run = open_run(self.run)
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
    """Dropouts and widths that SASRec is trained with; the best on validation is kept."""
    refit: bool = False
    """Train SASRec once more, on the validation events too, after the same flags without this one; a row of its own."""

    def __post_init__(self) -> None:
        check_fields(self, trials=at_least(1, 1000))

    def __call__(self) -> None:
        run = open_run(self.run)
        report = evaluate_baseline(
            run, self.name, self.evaluate, model=self.sasrec, training=self.train, trials=self.trials, refit=self.refit
        )
        print_reports({self.name: report})


@dataclass(frozen=True)
class Diagnose:
    """Say where the test lists of some policies and baselines miss: by popularity, and at which code.

    Example: sagerec diagnose RUN policy policy-sage sasrec
    """

    run: Folder
    """Run folder."""
    names: tyro.conf.Positional[tuple[str, ...]] = ("policy",)
    """Policies and baselines that were evaluated; the others are compared with the first."""
    k: int = 10
    """Places of the list that count."""

    def __post_init__(self) -> None:
        check_fields(self, k=at_least(1))

    def __call__(self) -> None:
        print_diagnoses(pipeline.diagnose_lists(open_run(self.run), self.names, self.k), self.k)


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
        for finding in pipeline.audit(open_run(self.run)):
            counts = [f"{finding.counts[part]:,}" if not finding.stale else "stale" for part in PARTS]
            table.add_row(finding.stage, *counts, ", ".join(finding.allowed))
        console.print(table)


@dataclass(frozen=True)
class Recommend:
    """Print the next items for a history, or write those of a table of users.

    Example: sagerec recommend RUN --history B004756YJA,B004ZT0SSG -k 10
    """

    run: Folder
    """Run folder."""
    history: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Item ids, the oldest first, separated by commas; may be given several times. What is an id as it stands, comma
    and all, is taken as one."""
    profile: str = ""
    """Who the user is, in words, for a policy that reads profiles."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Items to print."""
    slate: bool = False
    """Write a slate, item after item, in place of the k most probable next items."""
    keep_history: bool = False
    """Items of the history may be recommended again."""
    policy: str = "policy"
    """Which policy of the run: policy, policy-refit, policy-all-at-once, or an aligned one, such as policy-sage."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    users: Path | None = None
    """Parquet file with user_id and history (a list of item ids, the oldest first), or user_id alone for users of the
    run's log, and maybe profile; their lists go to --out, and a stopped call goes on."""
    out: Path | None = None
    """Parquet file for the lists of --users."""

    def __post_init__(self) -> None:
        check_fields(self, k=at_least(1))
        require((self.users is None) == (self.out is None), "--users and --out go together; give both, or neither")
        require(
            self.users is None or not (self.history or self.slate or self.profile),
            "--users is given with --history, --profile or --slate; expected one or the other",
        )

    def __call__(self) -> None:
        if self.users is not None and self.out is not None:
            done = list_users(
                open_run(self.run),
                self.users,
                self.out,
                policy=self.policy,
                k=self.k,
                keep_history=self.keep_history,
                device=self.device,
            )
            console.print(
                f"{self.out}: lists of {done['users']:,} users, {done['empty']:,} of them empty; "
                f"{done['unknown']:,} unknown item ids",
                highlight=False,
            )
            return
        recommender = load(self.run, policy=self.policy, device=self.device)
        history = [item for given in self.history for item in named_items(given, recommender.item_ids)]
        found = recommender.recommend(
            history, k=self.k, exclude_history=not self.keep_history, slate=self.slate, profile=self.profile
        )
        table = Table()
        for column, justify in (("rank", "right"), ("item_id", "left"), ("title", "left"), ("score", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for rank, item, title, score in found.iter_rows():
            table.add_row(str(rank), item, title, f"{score:.3f}")
        console.print(table)


def named_items(given: str, known: IdMap) -> list[str]:
    """The ids of one --history: the text itself where it is an id, else those between its commas."""
    if given in known:
        return [given]
    return [part if part in known else part.strip() for part in given.split(",") if part.strip()]


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
        said = f"{path} ({path.stat().st_size / 1e6:.2f} MB): open it in a browser"
        console.print(said, highlight=False, soft_wrap=True)
