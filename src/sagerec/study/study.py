"""The whole study, and its table."""

import os
import platform
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sagerec import artifacts
from sagerec.actions.clusters import item_clusters
from sagerec.baselines.tuning import evaluate_baseline, sasrec_trials
from sagerec.catalogue.splits import learnt_counts
from sagerec.config import require, to_json
from sagerec.errors import SettingsError
from sagerec.evaluation.tests import Measured, differences, judge, measure, seed_variances, summarise
from sagerec.run import stages as pipeline
from sagerec.run.folder import Run
from sagerec.run.stages import RunSettings, read_lists
from sagerec.study.design import ABLATIONS, CONTROL, REFERENCE, STUDY, CompareSettings
from sagerec.study.jobs import Job, chosen_point, chosen_settings, do_jobs, read_trials, tuning_jobs


def run_study(dataset: Path, folder: Path, settings: CompareSettings) -> dict[str, Any]:
    """Do the whole study, or what is left of it; writes and returns STUDY/study.json.

    Raises: SettingsError where the split reserves nothing.
    """
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
    artifacts.write_json(folder / STUDY, record)
    return record


def describe_study(folder: Path, run: Run, settings: CompareSettings, run_settings: RunSettings) -> dict[str, Any]:
    """The table: every row with intervals, and the tests against the control and against GBPO."""
    study, evaluated = settings.study, run_settings.evaluate
    cases = run.split.cases(run.data, evaluated.split)
    cold = learnt_counts(run.data, run.split) <= evaluated.cold_max_count
    clusters = item_clusters(run.data, run.space(), "coarse")
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
    if "sasrec" in study.baselines:
        trials += sasrec_trials(run, settings.sasrec, settings.sasrec_train, max(study.trials, 1))
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
            "sasrec": to_json(settings.sasrec),
            "sasrec_train": to_json(settings.sasrec_train),
            **{name: to_json(getattr(run_settings, name)) for name in ("split", "ids", "policy", "train", "evaluate")},
        },
        "hashes": run.hashes("dataset", "split", run.actions, "policy"),
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
