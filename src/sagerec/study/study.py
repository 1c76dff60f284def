"""The whole study, and its table."""

import os
import platform
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sagerec import artifacts
from sagerec.baselines.tuning import evaluate_baseline, sasrec_trials
from sagerec.config import require, to_json
from sagerec.errors import SettingsError
from sagerec.evaluation.per_case import make_yardstick
from sagerec.evaluation.tests import differences, judge, measure, seed_variances, summarise
from sagerec.files import locked, write_record
from sagerec.run import stages as pipeline
from sagerec.run.folder import Run
from sagerec.run.stages import RunSettings, read_lists
from sagerec.study.design import (
    CONTROL,
    DETERMINISTIC,
    NOTES,
    START,
    STUDY,
    CompareSettings,
    comparisons,
)
from sagerec.study.jobs import Job, chosen_point, chosen_settings, do_jobs, read_trials, tuning_jobs
from sagerec.training.alignment import criterion_value
from sagerec.training.settings import parse_criterion


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
    run = pipeline.prepare(dataset, folder / "run", run_settings.split)
    if run.split.counts()["align"] == 0:
        raise SettingsError("the log marks no event for alignment; add 'align' to its split column, or drop the column")
    pipeline.make_actions(run, run_settings.ids)
    require(
        run.space().is_unique,
        "items share Semantic IDs, which the study's tests cannot tell apart; use --run.ids.unique",
    )
    pipeline.train(run, run_settings.policy, run_settings.train)
    pipeline.evaluate(run, run_settings.evaluate, device=run_settings.train.device)
    for baseline in study.baselines:
        tuned: dict[str, Any] = {
            "model": settings.sasrec,
            "training": settings.sasrec_train,
            "trials": max(study.trials, 1),
        }
        evaluate_baseline(run, baseline, run_settings.evaluate, **(tuned if baseline == "sasrec" else {}))
    (folder / "trials").mkdir(exist_ok=True)
    do_jobs(folder, tuning_jobs(study, settings.align), study, run_settings)
    rows = []
    for objective, n_seeds in study.rows().items():
        chosen = chosen_settings(folder, objective, study, settings.align)
        rows += [Job("row", objective, replace(chosen, seed=seed), f"{objective}-s{seed}") for seed in range(n_seeds)]
    do_jobs(folder, rows, study, run_settings)
    pipeline.audit(run)
    record = describe_study(folder, run, settings, run_settings)
    write_record(folder / STUDY, record)
    return record


def describe_study(folder: Path, run: Run, settings: CompareSettings, run_settings: RunSettings) -> dict[str, Any]:
    """The table: every row with intervals, its criterion on test, and the comparisons that `design` names."""
    study, evaluated = settings.study, run_settings.evaluate
    cases, aligned = run.split.cases(run.data, evaluated.split), settings.align.resolved()
    yardstick = make_yardstick(
        run.data, run.split, run.space(), cold_max_count=evaluated.cold_max_count, store=run.store()
    )
    assert yardstick.cold is not None
    sources = {START: [""]} | {o: [f"-{o}-s{s}" for s in range(n)] for o, n in study.rows().items()}
    sources |= {name: [f"-{name}"] for name in study.baselines}
    found = {
        name: measure(
            [read_lists(run, s) for s in suffixes],
            cases,
            yardstick,
            run.data.n_items,
            is_random=name not in DETERMINISTIC,
        )
        for name, suffixes in sources.items()
    }
    kinds = {CONTROL: "control", START: "start"} | dict.fromkeys(study.baselines, "baseline")
    kinds |= dict.fromkeys(study.ablation_rows, "ablation")
    weights = parse_criterion(aligned.criterion)
    start = {name: float(values[0]) for name, values in found[START].by_seed.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, measured in found.items():
        rows[name] = {
            "name": name,
            "kind": kinds.get(name, "objective"),
            "note": NOTES.get(name, ""),
            "seeds": list(range(measured.seeds)),
            "metrics": summarise(measured, samples=study.bootstrap_samples, seed=0),
            "by_seed": {metric: values.tolist() for metric, values in measured.by_seed.items()},
            "criterion": criterion_on_test(measured.by_seed, start, weights),
            "against": {},
        }
        if name in study.rows():
            rows[name]["settings"] = to_json(chosen_settings(folder, name, study, settings.align).resolved())
            rows[name]["seconds"] = [run.manifest(f"policy{s}").sizes["seconds"] for s in sources[name]]
    pairs, seeds = comparisons(list(found)), seed_variances(list(found.values()))
    for name, rival in pairs:
        rows[name]["against"][rival] = differences(found[name], found[rival], seeds, seed=0)
    tests = [test for name, rival in pairs for test in rows[name]["against"][rival].values()]
    judged = judge(tests)
    trials = [
        {key: trial[key] for key in ("objective", "settings", "metrics", "criterion", "seconds")}
        | {"split": "valid", "chosen": trial["settings"] == chosen_point(folder, objective, study)}
        for objective in study.rows()
        for trial in read_trials(folder, objective)[: study.trials]
    ]
    if "sasrec" in study.baselines:
        trials += sasrec_trials(run, settings.sasrec, settings.sasrec_train, max(study.trials, 1))
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
        "settings": {
            "study": to_json(study),
            "align": to_json(aligned) | {"reward_module": aligned.reward_sources},
            "sasrec": to_json(settings.sasrec),
            "sasrec_train": to_json(settings.sasrec_train),
            **{name: to_json(getattr(run_settings, name)) for name in ("split", "ids", "policy", "train", "evaluate")},
        },
        "hashes": run.hashes("dataset", "split", run.actions, "policy"),
        "versions": artifacts.package_versions(),
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def criterion_on_test(
    by_seed: dict[str, np.ndarray], start: dict[str, float], weights: dict[str, float]
) -> dict[str, Any]:
    """The criterion by which validation chooses, on test: its mean over the seeds and each seed's.

    sum_m weight_m x metric_m / metric_m of the supervised start (`criterion_value`); a metric that no case counts for
    is 0, as on validation.
    """

    def named(values: dict[str, float]) -> dict[str, float]:
        return {f"valid_{name}@10": values.get(f"{name}@10", 0.0) for name in weights}

    each = [
        criterion_value(named(dict(zip(by_seed, values, strict=True))), named(start), weights)
        for values in np.stack(list(by_seed.values()), axis=1).tolist()
    ]
    return {"value": float(np.mean(each)), "by_seed": each}


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
