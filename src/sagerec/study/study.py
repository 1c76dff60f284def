"""The whole study, and its table."""

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sagerec import artifacts
from sagerec.baselines.tuning import evaluate_baseline, sasrec_trials
from sagerec.config import to_json
from sagerec.evaluation.per_case import make_yardstick
from sagerec.evaluation.tests import block_variances, differences, judge, measure, seed_variances, summarise
from sagerec.files import locked, write_record
from sagerec.run import stages as pipeline
from sagerec.run.folder import ALL_AT_ONCE, Run
from sagerec.run.stages import RunSettings, read_lists
from sagerec.study.beside import Sources, read_beside, row_sources
from sagerec.study.design import (
    CONTROL,
    DETERMINISTIC,
    NOTES,
    START,
    STUDY,
    CompareSettings,
    comparisons,
    name_beside,
)
from sagerec.study.jobs import chosen_point, chosen_settings, do_jobs, read_trials, row_jobs, tuning_jobs
from sagerec.study.starts import make_runs, train_starts
from sagerec.training.alignment import criterion_value
from sagerec.training.settings import parse_criterion

STAGES = ("split", "ids", "text", "policy", "train", "evaluate")
"""Whose settings a study saves."""


def run_study(dataset: Path, folder: Path, settings: CompareSettings) -> dict[str, Any]:
    """Do the whole study, or what is left of it; writes and returns STUDY/study.json.

    Raises: SettingsError where the split reserves nothing.
    """
    with locked(folder / STUDY):
        return _run_study(dataset, folder, settings)


def _run_study(dataset: Path, folder: Path, settings: CompareSettings) -> dict[str, Any]:
    run_settings, study = settings.run, settings.study
    if run_settings.split.reserve == "none":
        run_settings = replace(run_settings, split=replace(run_settings.split, reserve="event"))
    beside = read_beside(settings, folder)
    runs = make_runs(dataset, folder, run_settings, study)
    if beside is not None:
        beside.check_events(runs[0])
    train_starts(folder, run_settings, study)
    for baseline in study.baselines:
        tuned: dict[str, Any] = {
            "model": settings.sasrec,
            "training": settings.sasrec_train,
            "trials": max(study.trials, 1),
        }
        evaluate_baseline(runs[0], baseline, run_settings.evaluate, **(tuned if baseline == "sasrec" else {}))
    (folder / "trials").mkdir(exist_ok=True)
    do_jobs(folder, tuning_jobs(study, settings.align), study, run_settings)
    do_jobs(folder, row_jobs(folder, study, settings.align), study, run_settings)
    for run in runs:
        pipeline.audit(run)
    record = describe_study(folder, runs, settings, run_settings)
    write_record(folder / STUDY, record)
    return record


def describe_study(
    folder: Path, runs: Sequence[Run], settings: CompareSettings, run_settings: RunSettings
) -> dict[str, Any]:
    """The table: every row with intervals, its criterion on test, and the comparisons that `design` names.

    All seeds are measured by the yardstick of the first run, whose coarse clusters are those of its Semantic IDs.
    """
    run = runs[0]
    study, evaluated = settings.study, run_settings.evaluate
    cases, aligned = run.split.cases(run.data, evaluated.split), settings.align.resolved()
    yardstick = make_yardstick(
        run.data, run.split, run.space(), cold_max_count=evaluated.cold_max_count, store=run.store()
    )
    assert yardstick.cold is not None
    policies = row_sources(runs, study)
    beside = read_beside(settings, folder)
    others = {} if beside is None else beside.sources
    namesakes = [(row, rival) for row in policies if (rival := name_beside(row, study.beside)) in others]
    sources = policies | {name: [(run, f"-{name}")] for name in study.baselines}
    own_rows = list(sources)
    sources |= others
    found = {
        name: measure(
            [read_lists(*source) for source in each],
            cases,
            yardstick,
            run.data.n_items,
            is_random=name not in DETERMINISTIC,
        )
        for name, each in sources.items()
    }
    kinds = {CONTROL: "control", START: "start", ALL_AT_ONCE: "reference"} | dict.fromkeys(study.baselines, "baseline")
    kinds |= dict.fromkeys(study.ablation_rows, "ablation") | dict.fromkeys(others, "beside")
    weights = parse_criterion(aligned.criterion)
    start = found[START if aligned.start == "supervised" else ALL_AT_ONCE].by_seed
    starts = [dict(zip(start, v, strict=True)) for v in seed_by_seed(start)]
    rows: dict[str, dict[str, Any]] = {}
    for name, measured in found.items():
        rows[name] = {
            "name": name,
            "kind": kinds.get(name, "objective"),
            "note": NOTES.get(name, ""),
            "seeds": list(range(measured.seeds)),
            "metrics": summarise(measured, samples=study.bootstrap_samples, seed=0),
            "by_seed": {metric: values.tolist() for metric, values in measured.by_seed.items()},
            "criterion": criterion_on_test(measured.by_seed, starts, weights),
            "against": {},
        }
        if name not in study.baselines:
            rows[name]["seconds"] = [own.manifest(f"policy{s}").sizes["seconds"] for own, s in sources[name]]
        if name in study.rows():
            rows[name]["settings"] = to_json(chosen_settings(folder, name, study, settings.align).resolved())
    own = [found[name] for name in own_rows]
    seeds, blocks = seed_variances(own), None if study.share_start else block_variances(own)
    pairs = comparisons(own_rows)
    for name, rival in pairs:
        rows[name]["against"][rival] = differences(found[name], found[rival], seeds, seed=0, blocks=blocks)
    for name, rival in namesakes:  # seeds of two studies share no start
        both = seed_variances([found[name], found[rival]])
        rows[name]["against"][rival] = differences(found[name], found[rival], both, seed=0)
    pairs += namesakes
    tests = [test for name, rival in pairs for test in rows[name]["against"][rival].values()]
    judged = judge(tests)
    trials = [
        {key: trial[key] for key in ("objective", "settings", "metrics", "criterion", "seconds")}
        | {"split": "valid", "chosen": trial["settings"] == chosen_point(folder, objective, study)}
        for objective in study.rows()
        for trial in read_trials(folder, objective)[: study.trials]
    ]
    if "sasrec" in study.baselines:
        trials += sasrec_trials(run, settings.sasrec, max(study.trials, 1))
    return {
        "title": f"{', '.join(study.objectives)} and the control {CONTROL}",
        "dataset": run.manifest("dataset").sizes,
        "cases": len(cases),
        "cold_cases": int(yardstick.cold[cases.targets].sum()),
        "objectives": [CONTROL, *study.objectives],
        "seeds": list(range(study.seeds)),
        "rows": list(rows.values()),
        "trials": trials,
        "comparisons": [list(pair) for pair in pairs],
        "tests": judged,
        "one_seed": len(tests) - judged,
        **({} if beside is None else {"beside": beside.made}),
        "settings": {
            "study": to_json(study),
            "align": to_json(aligned) | {"reward_module": aligned.reward_sources},
            "actions": run_settings.actions,
            "sasrec": to_json(settings.sasrec),
            "sasrec_train": to_json(settings.sasrec_train),
            **{name: to_json(getattr(run_settings, name)) for name in STAGES},
        },
        "hashes": hashes_of(runs, policies),
        "versions": artifacts.package_versions(),
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def hashes_of(runs: Sequence[Run], policies: Sources) -> dict[str, Any]:
    """Content hashes of what the rows were measured on: of the first run, and under its name of each other."""
    used = {own.folder: [f"policy{s}" for each in policies.values() for o, s in each if o is own] for own in runs}
    first, *others = runs
    found: dict[str, Any] = first.hashes("dataset", "split", first.actions, *used[first.folder])
    return found | {own.folder.name: own.hashes(own.actions, *used[own.folder]) for own in others}


def criterion_on_test(
    by_seed: dict[str, np.ndarray], starts: Sequence[dict[str, float]], weights: dict[str, float]
) -> dict[str, Any]:
    """The criterion by which validation chooses, on test: its mean over the seeds and each seed's.

    sum_m weight_m x metric_m / metric_m of what the seed's alignments start from (`criterion_value`), or of the one
    that all share; a metric that no case counts for is 0, as on validation.
    """

    def named(values: dict[str, float]) -> dict[str, float]:
        return {f"valid_{name}@10": values.get(f"{name}@10", 0.0) for name in weights}

    each = [
        criterion_value(named(dict(zip(by_seed, values, strict=True))), named(starts[seed % len(starts)]), weights)
        for seed, values in enumerate(seed_by_seed(by_seed))
    ]
    return {"value": float(np.mean(each)), "by_seed": each}


def seed_by_seed(by_seed: dict[str, np.ndarray]) -> list[list[float]]:
    """Metric -> (S,) as the values of all metrics of each seed."""
    found: list[list[float]] = np.stack(list(by_seed.values()), axis=1).tolist()
    return found


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
