"""Commands that fill a run folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sagerec.actions.registry import ActionSettings
from sagerec.actions.titles import TitleSettings
from sagerec.baselines.tuning import BaselineName, evaluate_baseline
from sagerec.catalogue.dataset import read_dataset
from sagerec.catalogue.splits import SplitSettings
from sagerec.cli.arguments import FLAT, Folder
from sagerec.cli.tables import (
    console,
    print_alignment,
    print_examples,
    print_ids,
    print_reports,
)
from sagerec.policies.registry import PolicySettings
from sagerec.policies.small_lm import SmallLMSettings, new_language_model
from sagerec.recommend import load
from sagerec.report.model_card import export_model
from sagerec.report.training_plots import write_plots
from sagerec.run import stages as pipeline
from sagerec.run.additions import add_items
from sagerec.run.folder import open_run
from sagerec.run.stages import RunSettings
from sagerec.training import parallel
from sagerec.training.settings import AlignSettings, ComputeSettings, TrainSettings


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
        run = open_run(self.out)
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
    """Make the Semantic IDs of a run, or its titles as a language model writes them.

    Example: sagerec ids RUN --quantiser balanced-kmeans --codebook-size 256
    Example: sagerec ids RUN --actions text --model LM
    """

    run: Folder
    """Run folder."""
    ids: Annotated[ActionSettings, FLAT] = field(default_factory=ActionSettings)
    """How items become codes."""
    actions: Literal["semantic-id", "text"] = "semantic-id"
    """What items are written as: semantic-id, a few codes; text, their titles."""
    model: str = ""
    """For text: folder or hub name of the language model whose tokenizer writes them."""
    text: TitleSettings = field(default_factory=TitleSettings)
    """How titles become tokens."""

    def __call__(self) -> None:
        run = open_run(self.run)
        pipeline.make_actions(run, pipeline.action_settings(self.actions, self.ids, self.text, self.model))
        print_ids(run)


@dataclass(frozen=True)
class LmNew:
    """Make a small language model for a catalogue: a tokenizer of its words, and random weights.

    Example: sagerec lm new --dataset DATASET --out LM --parameters 5M
    """

    dataset: Path
    """Dataset folder (interactions.parquet, items.parquet)."""
    out: Path
    """Folder to write, as Hugging Face has it."""
    small: Annotated[SmallLMSettings, FLAT] = field(default_factory=SmallLMSettings)
    """How large."""

    def __call__(self) -> None:
        sizes = new_language_model(self.out, read_dataset(self.dataset).texts(), self.small)
        console.print(
            f"{sizes['parameters']:,} weights, {sizes['vocabulary']:,} tokens, width {sizes['width']}, "
            f"{sizes['layers']} layers",
            highlight=False,
        )


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
        added = add_items(self.run, self.items)
        console.print(
            f"{added['items']:,} items added, {added['collisions']:,} of them with the codes of another item; "
            f"reconstruction error {added['reconstruction_error']:.3f}",
            highlight=False,
        )
        print_ids(open_run(self.run))


@dataclass(frozen=True)
class LmExport:
    """Copy a language-model policy of a run, with a model card, to a folder that Hugging Face and engines load.

    Example: sagerec lm export RUN --policy policy-sage --out MODEL
    """

    run: Folder
    """Run folder."""
    out: Path
    """Folder to write."""
    policy: str = "policy"
    """Which policy of the run."""

    def __call__(self) -> None:
        console.print(str(export_model(open_run(self.run), self.policy, self.out)), highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Train:
    """Train the policy of a run on its training events. A killed training resumes.

    Example: sagerec train RUN --train.epochs 20 --policy.width 64
    """

    run: Folder
    """Run folder."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    """Shape of the policy."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """How the policy is trained."""
    refit: bool = False
    """Also train once more with the validation events, for deployment."""
    all_at_once: bool = False
    """Also train a policy on the training and the reserved events together: RUN/policy-all-at-once, which an alignment
    must beat."""
    zero_shot: bool = False
    """Only write the language model as it comes, RUN/policy-zero-shot, to be evaluated beside what training makes."""

    def __call__(self) -> None:
        run = open_run(self.run)
        if self.zero_shot:
            pipeline.zero_shot(run, self.policy)
            return
        pipeline.train(run, self.policy, self.train)
        if self.all_at_once:
            pipeline.train_all_at_once(run, self.policy, self.train)
        if self.refit:
            pipeline.refit(run, self.policy, self.train)


@dataclass(frozen=True)
class Align:
    """Align a supervised policy of a run with several rewards, on the reserved events. A killed one resumes.

    Example: sagerec align RUN --objective sage --reward hit=1 --reward cold*hit=0.5
    """

    run: Folder
    """Run folder, made with --split.reserve event (or users)."""
    align: Annotated[AlignSettings, FLAT] = field(default_factory=AlignSettings)
    """How it is aligned."""
    compute: Annotated[ComputeSettings, FLAT] = field(default_factory=ComputeSettings)
    """How it is computed."""
    name: str | None = None
    """The aligned policy becomes RUN/policy-NAME; the objective's name if not given."""

    def __call__(self) -> None:
        run = open_run(self.run)
        name = pipeline.align(run, self.align, name=self.name, compute=self.compute)
        if parallel.rank() == 0:
            write_plots(run.folder / name)
            print_alignment(run, name)
