"""The runs of a study, one a seed: the same data and split, with Semantic IDs and supervised policies of its own."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sagerec.config import require
from sagerec.errors import ArtifactError, SettingsError
from sagerec.run import stages as pipeline
from sagerec.run.folder import ALL_AT_ONCE, Run, open_run
from sagerec.run.stages import RunSettings
from sagerec.study.design import StudySettings
from sagerec.study.workers import do_tasks

POLICIES = ("policy", f"policy-{ALL_AT_ONCE}")
"""What each run has before anything is aligned."""


@dataclass(frozen=True, slots=True)
class Start:
    """A policy to train without rewards, and to evaluate."""

    run: str
    """Folder of the run, in the study."""
    policy: str
    """One of POLICIES."""
    settings: RunSettings
    """Of the run."""


def seeded(settings: RunSettings, seed: int) -> RunSettings:
    """The settings of a seed's run: other Semantic IDs and another training, the same split."""
    ids = replace(settings.ids, seed=settings.ids.seed + seed)
    text = replace(settings.text, seed=settings.text.seed + seed)
    return replace(settings, ids=ids, text=text, train=replace(settings.train, seed=settings.train.seed + seed))


def make_runs(dataset: Path, folder: Path, settings: RunSettings, study: StudySettings) -> list[Run]:
    """The runs of all seeds as far as their action spaces, made where they are missing.

    Raises: SettingsError where the split reserves nothing, or items share Semantic IDs; ArtifactError where two runs do
    not hold the same events.
    """
    runs = [_prepare(dataset, folder / name, own) for name, own in run_settings_of(settings, study).items()]
    for run in runs[1:]:
        if run.hashes("dataset", "split") != runs[0].hashes("dataset", "split"):
            raise ArtifactError(f"{run.folder} and {runs[0].folder} hold other events; remove the former")
    return runs


def run_settings_of(settings: RunSettings, study: StudySettings) -> dict[str, RunSettings]:
    """Folder of each seed's run, in the study -> its settings."""
    return {study.run_of(seed): seeded(settings, seed) for seed in range(study.n_starts)}


def _prepare(dataset: Path, out: Path, settings: RunSettings) -> Run:
    """A run as far as its Semantic IDs."""
    run = pipeline.prepare(dataset, out, settings.split)
    if run.split.counts()["align"] == 0:
        raise SettingsError("the log marks no event for alignment; add 'align' to its split column, or drop the column")
    pipeline.make_actions(run, settings.space)
    require(
        run.space().is_unique,
        "items share Semantic IDs, which the study's tests cannot tell apart; use --run.ids.unique",
    )
    return run


def train_starts(folder: Path, settings: RunSettings, study: StudySettings) -> None:
    """Train and evaluate the policies of all runs, `processes` at a time; what is there is looked at here."""
    tasks = []
    made = run_settings_of(settings, study)
    for start in [Start(name, policy, own) for name, own in made.items() for policy in POLICIES]:
        settings = start.settings
        if pipeline.is_trained(open_run(folder / start.run), start.policy, settings.policy, settings.train):
            do_start(folder, start, torch.get_num_threads(), settings.train.device)
        else:
            tasks.append((partial(do_start, folder, start), settings.train.device))
    if tasks:
        do_tasks(tasks, study.processes)


def do_start(folder: Path, start: Start, threads: int, device: str) -> str:
    """Train and evaluate one policy; returns its name.

    The device is no setting here, for another one would make the artefact anew: `auto` takes the current GPU.
    """
    torch.set_num_threads(threads)
    run, settings = open_run(folder / start.run), start.settings
    train = pipeline.train if start.policy == "policy" else pipeline.train_all_at_once
    with torch.cuda.device(device) if device.startswith("cuda") else nullcontext():
        train(run, settings.policy, settings.train)
        pipeline.evaluate(run, settings.evaluate, name=start.policy, device=device)
    return f"{start.run}/{start.policy}"
