"""The study: objectives under equal conditions, tuned with equal effort, tested with the same users.

    STUDY/run/            a run: dataset, split, Semantic IDs, one supervised policy, and policy-ROW-sSEED for each row
    STUDY/trials/         one JSON a trial of the tuning: settings, validation metrics, criterion
    STUDY/study.json      the table: rows with intervals, tests between them, what was run

One supervised policy; then for each objective the same number of trials over its own settings, the first those that all
share (which were found on sage: docs/log.md), all with one seed and the same events, rewards, rollouts and budget; the
settings that win by the criterion on validation run with every seed and are evaluated on test. The control `sft` is
always there. Every trial and row is a job that is skipped where its result is there, so a study that was stopped goes
on; jobs run in parallel processes. Baselines learn from the training events alone: the reserved ones are alignment's.
"""

import logging
import os
import platform
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from sagerec import artifacts
from sagerec import run as pipeline
from sagerec.catalogue.splits import train_counts
from sagerec.core.objectives import find_objective
from sagerec.errors import SettingsError, TrainingError
from sagerec.evaluation.compare import Measured, differences, judge, measure, seed_variances, summarise
from sagerec.progress import progress_bar
from sagerec.run import BaselineName, Run, RunSettings
from sagerec.semantic_ids.clusters import item_clusters
from sagerec.settings import require, to_json
from sagerec.training.align_settings import AlignSettings
from sagerec.training.tracking import METRICS

logger = logging.getLogger(__name__)
STUDY, CONTROL, REFERENCE = "study.json", "sft", "gbpo"
ABLATIONS = ("sage_no_boost", "sage_no_penalty", "sage_coupled", "sage_token", "sage_bound")
COMMON_GRID: dict[str, tuple[Any, ...]] = {"learning_rate": (8e-4, 4e-4, 1.6e-3)}
"""What every objective may choose."""
OWN_GRID: dict[str, dict[str, tuple[Any, ...]]] = {
    "sage": {"boost": (4.0, 8.0), "entropy_penalty": (4.0, 2.0)},
    "gbpo": {"sft_weight": (0.7, 1.4)},
    "gdpo": {"clip_high": (0.2, 0.28), "sft_weight": (0.7, 1.4)},
    "grpo": {"clip_high": (0.2, 0.28), "sft_weight": (0.7, 1.4)},
    "dapo": {"clip_high": (0.28, 0.4), "sft_weight": (0.7, 1.4)},
    "gspo": {"clip_high": (4e-4, 4e-2), "sft_weight": (0.7, 1.4)},
    "cispo": {"cap": (5.0, 2.0), "sft_weight": (0.7, 1.4)},
    "ecpo": {"clip_high": (0.2, 0.28), "sft_weight": (0.7, 1.4)},
}
"""What an objective may choose of its own; the first values are the defaults."""


@dataclass(frozen=True, slots=True)
class StudySettings:
    """What is compared, and how."""

    objectives: tuple[str, ...] = ("sage", "gbpo")
    """Rows of the table of objectives that run with every seed; the control `sft` is added."""
    single: tuple[str, ...] = ()
    """Objectives that run with the first seed alone."""
    ablations: tuple[str, ...] = ()
    """Rows that take the settings that won for sage, with the first seed alone; `all` for the paper's."""
    baselines: tuple[BaselineName, ...] = ("popularity", "item-knn")
    """Baselines beside them."""
    seeds: int = 3
    """Seeds 0, 1, … of the alignments."""
    trials: int = 3
    """Trials of each objective's settings, the first with the defaults; 0 takes the defaults untried."""
    processes: int = 1
    """Jobs at a time, each with its share of the cores; on several GPUs, each on the next."""
    bootstrap_samples: int = 2000
    """Resamples of the users."""

    def __post_init__(self) -> None:
        for name in ("objectives", "single", "ablations"):
            # As people write lists: sage,gbpo and sage gbpo are the same.
            words = [word for text in getattr(self, name) for word in text.split(",") if word]
            object.__setattr__(self, name, tuple(words))
        for name in (*self.objectives, *self.single, *self.ablation_rows):
            find_objective(name)
        require(self.seeds >= 1, f"seeds is {self.seeds}; expected at least 1")
        require(self.trials >= 0, f"trials is {self.trials}; expected 0 or above")
        require(self.processes >= 1, f"processes is {self.processes}; expected at least 1")
        require(self.bootstrap_samples >= 100, f"bootstrap_samples is {self.bootstrap_samples}; expected at least 100")

    @property
    def ablation_rows(self) -> tuple[str, ...]:
        return ABLATIONS if self.ablations == ("all",) else self.ablations

    def rows(self) -> dict[str, int]:
        """Row -> number of seeds, in the order of the table."""
        found = dict.fromkeys((CONTROL, *self.objectives), self.seeds)
        return found | {name: 1 for name in (*self.single, *self.ablation_rows) if name not in found}


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


def grid(objective: str, trials: int, align: AlignSettings, seed: int = 0) -> list[dict[str, Any]]:
    """The settings to try: what `align` and the objective's row say, then a random order of the grid's other points.

    Raises: SettingsError where the grid has fewer points than trials.
    """
    row, axes = find_objective(objective), COMMON_GRID | OWN_GRID.get(objective, {})
    given = {name: getattr(align, name) if getattr(align, name) is not None else getattr(row, name) for name in axes}
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    others = [point for point in points if point != given]
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
            chosen = replace(align, objective=objective, seed=0, **point)
            found.append(Job("trial", objective, chosen, f"{objective}-{number}"))
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
        return replace(align, objective=objective, **point)
    return replace(align, objective=objective, **chosen_point(folder, objective, settings))


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
    return [artifacts.read_json(path) for path in paths if path.stem.rpartition("-")[0] == objective]


def do_job(folder: Path, job: Job, run_settings: RunSettings, threads: int, device: str) -> str:
    """Run one job in a process of its own; returns its name."""
    torch.set_num_threads(threads)
    run = pipeline.open_run(folder / "run")
    settings = replace(job.settings, device=device)
    if job.kind == "row":
        pipeline.align(run, settings, name=job.name)
        pipeline.evaluate(run, run_settings.evaluate, name=f"policy-{job.name}", device=device)
        return job.name
    axes = COMMON_GRID | OWN_GRID.get(job.objective, {})
    record: dict[str, Any] = {
        "objective": job.objective,
        "settings": {axis: getattr(job.settings, axis) for axis in axes},
        "align": job.settings.what(),
        "made_from": run.hashes("dataset", "split", "semantic_ids", "policy"),
        "metrics": {},
    }
    path = folder / "trials" / f"{job.name}.json"
    try:
        name = pipeline.align(run, settings, name=f"trial-{job.name}")
    except TrainingError as error:
        # Settings that do not hold are a result: the trial loses.
        logger.warning("%s failed: %s", job.name, error)
        artifacts.write_json(
            path, record | {"criterion": 0.0, "kept_round": None, "seconds": 0.0, "failed": str(error)}
        )
        return job.name
    manifest, where = run.manifest(name), run.folder / name
    lines = [pl.read_ndjson(where / METRICS, infer_schema_length=None)]
    validated = lines[0].filter(pl.col("criterion").is_not_null()) if "criterion" in lines[0].columns else None
    kept: dict[str, Any] = {}
    if validated is not None and len(validated):
        kept = validated.filter(pl.col("round") == manifest.sizes["kept_round"]).row(0, named=True)
    sizes = {key: manifest.sizes[key] for key in ("criterion", "kept_round", "seconds")}
    measured = {k.removeprefix("valid_"): v for k, v in kept.items() if k.startswith("valid_")}
    artifacts.write_json(path, record | sizes | {"metrics": measured})
    shutil.rmtree(where)
    return job.name


def is_done(folder: Path, job: Job, run: Run, run_settings: RunSettings) -> bool:
    """Whether a job's result is there and fits."""
    made_from = run.hashes("dataset", "split", "semantic_ids", "policy")
    if job.kind == "trial":
        path = folder / "trials" / f"{job.name}.json"
        if not path.is_file():
            return False
        saved = artifacts.read_json(path)
        return bool(saved["align"] == job.settings.what() and saved["made_from"] == made_from)
    path = run.folder / f"evaluation-{job.name}.json"
    policy = run.folder / f"policy-{job.name}"
    if not (path.is_file() and (policy / artifacts.MANIFEST).is_file()):
        return False
    manifest, saved = run.manifest(policy.name), artifacts.read_json(path)
    same = manifest.settings["align"] == job.settings.what()
    fits = saved["made_from"] == {policy.name: manifest.content_hash}
    return bool(
        same and fits and manifest.made_from == made_from and saved["settings"] == to_json(run_settings.evaluate)
    )


def do_jobs(folder: Path, jobs: Sequence[Job], settings: StudySettings, run_settings: RunSettings) -> None:
    """Run the jobs that are not done, `processes` at a time."""
    run = pipeline.open_run(folder / "run")
    left = [job for job in jobs if not is_done(folder, job, run, run_settings)]
    for job in jobs:
        if job.kind == "trial" and job not in left:
            shutil.rmtree(run.folder / f"policy-trial-{job.name}", ignore_errors=True)  # a kill may have left it
    if not left:
        return
    logger.info("%d of %d jobs are done; %d to do", len(jobs) - len(left), len(jobs), len(left))
    threads = max(1, torch.get_num_threads() // settings.processes)
    gpus = torch.cuda.device_count()
    devices = [
        job.settings.device if job.settings.device != "auto" else f"cuda:{i % gpus}" if gpus else "cpu"
        for i, job in enumerate(left)
    ]
    with (
        progress_bar("study", len(left)) as bar,
        ProcessPoolExecutor(settings.processes, mp_context=get_context("spawn")) as pool,
    ):
        waiting = {
            pool.submit(do_job, folder, job, run_settings, threads, device)
            for job, device in zip(left, devices, strict=True)
        }
        for done, future in enumerate(as_completed(waiting), start=1):
            try:
                name = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            bar.update(done, name)
            logger.info("%s is done; %d of %d left", name, len(left) - done, len(left))


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """Settings of the whole study."""

    study: StudySettings = field(default_factory=StudySettings)
    """What is compared."""
    run: RunSettings = field(default_factory=RunSettings)
    """The supervised stage; its split reserves one event a user unless it says otherwise."""
    align: AlignSettings = field(default_factory=AlignSettings)
    """What all alignments share."""

    def __post_init__(self) -> None:
        for name in ("boost", "boost_form", "boost_scope", "entropy_penalty", "clip_low", "clip_high", "cap"):
            require(
                getattr(self.align, name) is None,
                f"{name} is set for all objectives, which would make one of another; leave it to the trials",
            )
        require(
            self.align.validations > 0 or self.study.trials < 2,
            "validations is 0, so that no trial could win; expected at least 1",
        )
        require(
            self.run.evaluate.split == "test" and max(self.run.evaluate.k) >= 10,
            f"the study tests lists of 10 on test; expected --run.evaluate.split test and a k of at least 10, got "
            f"{self.run.evaluate.split} and {self.run.evaluate.k}",
        )


def compare(dataset: Path, folder: Path, settings: CompareSettings) -> dict[str, Any]:
    """Do the whole study, or what is left of it; writes and returns STUDY/study.json.

    Raises: SettingsError where the split reserves nothing.
    """
    run_settings, study = settings.run, settings.study
    if run_settings.split.reserve == "none":
        run_settings = replace(run_settings, split=replace(run_settings.split, reserve="event"))
    run = pipeline.prepare(dataset, folder / "run", run_settings.split)
    if run.split.counts()["align"] == 0:
        raise SettingsError("the log marks no event for alignment; add 'align' to its split column, or drop the column")
    pipeline.make_ids(run, run_settings.ids)
    require(
        run.ids().is_unique, "items share Semantic IDs, which the study's tests cannot tell apart; use --run.ids.unique"
    )
    pipeline.train(run, run_settings.policy, run_settings.train)
    pipeline.evaluate(run, run_settings.evaluate, device=run_settings.train.device)
    (folder / "trials").mkdir(exist_ok=True)
    do_jobs(folder, tuning_jobs(study, settings.align), study, run_settings)
    rows = []
    for objective, n_seeds in study.rows().items():
        chosen = chosen_settings(folder, objective, study, settings.align)
        rows += [Job("row", objective, replace(chosen, seed=seed), f"{objective}-s{seed}") for seed in range(n_seeds)]
    do_jobs(folder, rows, study, run_settings)
    for baseline in study.baselines:
        pipeline.evaluate_baseline(run, baseline, run_settings.evaluate)
    pipeline.audit(run)
    record = describe_study(folder, run, settings, run_settings)
    artifacts.write_json(folder / STUDY, record)
    return record


def read_lists(run: Run, name: str) -> np.ndarray:
    """The lists (U, K) of a report of the run."""
    table = pl.read_parquet(run.folder / f"evaluation{name}.lists.parquet")
    return table["items"].to_numpy().astype(np.int64)


def describe_study(folder: Path, run: Run, settings: CompareSettings, run_settings: RunSettings) -> dict[str, Any]:
    """The table: every row with intervals, and the tests against the control and against GBPO."""
    study, evaluated = settings.study, run_settings.evaluate
    cases = run.split.cases(run.data, evaluated.split)
    cold = train_counts(run.data, run.split) <= evaluated.cold_max_count
    clusters = item_clusters(run.data, run.ids(), "coarse")
    n_items, samples, store = run.data.n_items, study.bootstrap_samples, run.store()
    sources = {"supervised": [""]} | {o: [f"-{o}-s{s}" for s in range(n)] for o, n in study.rows().items()}
    sources |= {name: [f"-{name}"] for name in study.baselines}
    found = {
        name: measure([read_lists(run, s) for s in suffixes], cases, cold, clusters, n_items, store=store)
        for name, suffixes in sources.items()
    }
    kinds = {CONTROL: "control", "supervised": "start"} | dict.fromkeys(study.baselines, "baseline")
    kinds |= dict.fromkeys(study.ablation_rows, "ablation")
    rows, tests = [], []
    seeds = seed_variances(list(found.values()))
    for name, measured in found.items():
        row: dict[str, Any] = {
            "name": name,
            "kind": kinds.get(name, "objective"),
            "seeds": list(range(len(sources[name]))),
            "metrics": summarise(measured, n_items, samples=samples, seed=0),
            "by_seed": {metric: values.tolist() for metric, values in measured.by_seed.items()},
            "against": {},
        }
        if name in study.rows():
            row["settings"] = to_json(chosen_settings(folder, name, study, settings.align).resolved())
            row["seconds"] = [run.manifest(f"policy{s}").sizes["seconds"] for s in sources[name]]
        for other in references(name, found):
            row["against"][other] = differences(measured, found[other], n_items, seeds, seed=0)
            tests += row["against"][other].values()
        rows.append(row)
    judge(tests)
    trials = [
        {key: trial[key] for key in ("objective", "settings", "metrics", "criterion", "seconds")}
        | {"split": "valid", "chosen": trial["settings"] == chosen_point(folder, objective, study)}
        for objective in study.rows()
        for trial in read_trials(folder, objective)[: study.trials]
    ]
    return {
        "title": f"{', '.join(study.objectives)} and the control {CONTROL}",
        "dataset": run.manifest("dataset").sizes,
        "cases": len(cases),
        "cold_cases": int(cold[cases.targets].sum()),
        "objectives": [CONTROL, *study.objectives],
        "seeds": list(range(study.seeds)),
        "rows": rows,
        "trials": trials,
        "tests": len(tests),
        "settings": {
            "study": to_json(study),
            "align": to_json(settings.align.resolved()),
            **{name: to_json(getattr(run_settings, name)) for name in ("split", "ids", "policy", "train", "evaluate")},
        },
        "hashes": run.hashes("dataset", "split", "semantic_ids", "policy"),
        "versions": artifacts.package_versions(),
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def references(name: str, found: dict[str, Measured]) -> list[str]:
    """What a row is tested against: the control and GBPO; an ablation against sage too."""
    others = [other for other in (CONTROL, REFERENCE) if other in found and other != name]
    return [*others, "sage"] if name in ABLATIONS and "sage" in found else others


def hardware() -> str:
    """Processor, cores and GPUs."""
    path, model = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if path.is_file():
        names = [
            line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{os.cpu_count()} cores of {model}", *gpus])
