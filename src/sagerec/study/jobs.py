"""Trials and rows as jobs: skipped where their result is there, and run in parallel processes."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sagerec.config import grid_points, to_json
from sagerec.errors import ArtifactError, SettingsError, TrainingError
from sagerec.files import read_record, write_record
from sagerec.objectives.table import find_objective
from sagerec.run import stages as pipeline
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import RunSettings
from sagerec.study.design import COMMON_GRID, OWN_GRID, RUN, StudySettings
from sagerec.study.workers import do_tasks
from sagerec.training.settings import AlignSettings
from sagerec.training.tracking import read_metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One alignment, and what is done with it."""

    kind: str
    """trial: tried on validation, its weights are not kept; row: evaluated on test."""
    objective: str
    """The row of the table of objectives."""
    settings: AlignSettings
    """Its settings."""
    name: str
    """Trial or aligned policy."""
    run: str = RUN
    """Folder of the run, in the study."""


def grid(objective: str, trials: int, align: AlignSettings, seed: int = 0) -> list[dict[str, Any]]:
    """The settings to try: what `align` and the objective's row say, then a random order of the grid's other points.

    Raises: SettingsError where the grid has fewer points than trials.
    """
    row, axes = find_objective(objective), COMMON_GRID | OWN_GRID.get(objective, {})
    given = {name: getattr(align, name) if getattr(align, name) is not None else getattr(row, name) for name in axes}
    _, *others = grid_points(axes, given)
    if trials > 1 + len(others):
        raise SettingsError(
            f"trials is {trials}, and {objective} has {1 + len(others)} settings to try; expected at most as many, so "
            "that every objective is tried as often"
        )
    order = np.random.default_rng(seed).permutation(len(others))
    return [given, *(others[i] for i in order)][:trials]


def tuning_jobs(settings: StudySettings, align: AlignSettings) -> list[Job]:
    """The trials of every objective that is tuned."""
    found = []
    for objective in settings.rows():
        if objective in settings.ablation_rows:
            continue
        for number, point in enumerate(grid(objective, settings.trials, align)):
            chosen = replace(align.for_objective(objective), seed=0, **point)
            found.append(Job("trial", objective, chosen, f"{objective}-{number}"))
    return found


def row_jobs(folder: Path, settings: StudySettings, align: AlignSettings) -> list[Job]:
    """Every row with every seed, each on the run of its seed, with the settings that won."""
    found = []
    for objective, n_seeds in settings.rows().items():
        chosen = chosen_settings(folder, objective, settings, align)
        for seed in range(n_seeds):
            own = replace(chosen, seed=seed)
            found.append(Job("row", objective, own, f"{objective}-s{seed}", settings.run_of(seed)))
    return found


def chosen_settings(folder: Path, objective: str, settings: StudySettings, align: AlignSettings) -> AlignSettings:
    """The settings that won for an objective; an ablation has those of sage."""
    if objective in settings.ablation_rows:
        point = dict(chosen_point(folder, "sage", settings))
        row = find_objective(objective)
        # What the ablation takes away stays away.
        for name in ("boost", "entropy_penalty"):
            if getattr(row, name) == 0 or row.bound != "gradient":
                point.pop(name, None)
    else:
        point = chosen_point(folder, objective, settings)
    return replace(align.for_objective(objective), **point)


def chosen_point(folder: Path, objective: str, settings: StudySettings) -> dict[str, Any]:
    """The trial with the highest criterion; the defaults where there is none."""
    tried = read_trials(folder, objective)[: settings.trials]
    best: dict[str, Any] = max(tried, key=lambda trial: trial["criterion"])["settings"] if tried else {}
    return best


def read_trials(folder: Path, objective: str) -> list[dict[str, Any]]:
    """The finished trials of an objective in their order."""
    paths = sorted(
        (folder / "trials").glob(f"{objective}-[0-9]*.json"), key=lambda path: int(path.stem.rpartition("-")[2])
    )
    return [read_record(path) for path in paths if path.stem.rpartition("-")[0] == objective]


def do_job(folder: Path, job: Job, run_settings: RunSettings, threads: int, device: str) -> str:
    """Run one job; returns its name."""
    torch.set_num_threads(threads)
    run = open_run(folder / job.run)
    settings = replace(job.settings, device=device)  # validated anew, so that this process has the reward modules
    if job.kind == "row":
        pipeline.align(run, settings, name=job.name)
        pipeline.evaluate(run, run_settings.evaluate, name=f"policy-{job.name}", device=device)
        return job.name
    axes = COMMON_GRID | OWN_GRID.get(job.objective, {})
    record: dict[str, Any] = {
        "objective": job.objective,
        "settings": {axis: getattr(job.settings, axis) for axis in axes},
        "align": job.settings.what(),
        "made_from": pipeline.aligned_from(run, job.settings)[1],
        "metrics": {},
    }
    path = folder / "trials" / f"{job.name}.json"
    try:
        name = pipeline.align(run, settings, name=f"trial-{job.name}")
    except TrainingError as error:
        # Settings that do not hold are a result: the trial loses.
        logger.warning("%s failed: %s", job.name, error)
        write_record(path, record | {"criterion": 0.0, "kept_round": None, "seconds": 0.0, "failed": str(error)})
        return job.name
    manifest, where = run.manifest(name), run.folder / name
    validated = [values for values in read_metrics(where) if "criterion" in values]
    kept: dict[str, Any] = next((v for v in validated if v["round"] == manifest.sizes["kept_round"]), {})
    sizes = {key: manifest.sizes[key] for key in ("criterion", "kept_round", "seconds")}
    measured = {k.removeprefix("valid_"): v for k, v in kept.items() if k.startswith("valid_")}
    write_record(path, record | sizes | {"metrics": measured})
    shutil.rmtree(where)
    return job.name


def is_done(folder: Path, job: Job, run: Run, run_settings: RunSettings) -> bool:
    """Whether a job's result is there and fits."""
    made_from = pipeline.aligned_from(run, job.settings)[1]
    if job.kind == "trial":
        path = folder / "trials" / f"{job.name}.json"
        if not path.is_file():
            return False
        saved = read_record(path)
        return bool(saved["align"] == job.settings.what() and saved["made_from"] == made_from)
    policy = f"policy-{job.name}"
    try:
        manifest, saved = run.manifest(policy), run.report(f"evaluation-{job.name}")
    except ArtifactError:
        return False
    same = manifest.settings["align"] == job.settings.what()
    fits = saved["made_from"] == run.hashes(policy, run.actions)
    return bool(
        same and fits and manifest.made_from == made_from and saved["settings"] == to_json(run_settings.evaluate)
    )


def do_jobs(folder: Path, jobs: Sequence[Job], settings: StudySettings, run_settings: RunSettings) -> None:
    """Run the jobs that are not done, `processes` at a time."""
    runs = {name: open_run(folder / name) for name in {job.run for job in jobs}}
    left = [job for job in jobs if not is_done(folder, job, runs[job.run], run_settings)]
    for job in jobs:
        if job.kind == "trial" and job not in left:
            left_over = folder / job.run / f"policy-trial-{job.name}"  # by a kill
            shutil.rmtree(left_over, ignore_errors=True)
    if not left:
        return
    logger.info("%d of %d jobs are done; %d to do", len(jobs) - len(left), len(jobs), len(left))
    tasks = [(partial(do_job, folder, job, run_settings), job.settings.device) for job in left]
    do_tasks(tasks, settings.processes)
