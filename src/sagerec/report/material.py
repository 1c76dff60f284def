"""What a report is made of: a run or a study folder, read into records. What is not there is left out.

A study folder holds `study.json` (rows, verdicts, trials), `run/`, a run folder, and `run-sSEED/`, those of the other
seeds: the page shows the first, and what the alignments of all have logged.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl

from sagerec import artifacts
from sagerec.baselines.tuning import BaselineName
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.evaluation.per_case import make_yardstick
from sagerec.evaluation.tests import differences, measure, seed_variances
from sagerec.files import read_record
from sagerec.report.drawing import MOST_SERIES, Style
from sagerec.run.folder import ALL_AT_ONCE, Run, open_run
from sagerec.study.design import START, STUDY
from sagerec.study.folder import SEED, run_folders, stale_study
from sagerec.training.tracking import METRICS, read_metrics


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table."""

    name: str
    """What was measured."""
    kind: str
    """start, reference, aligned, baseline, other; in a study also control, objective, ablation, beside."""
    metrics: dict[str, dict[str, float]]
    """Metric -> value, low, high, and seed_std where there are several seeds."""
    seeds: tuple[int, ...] = ()
    """Seeds that it joins."""
    against: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Rival -> metric -> difference, low, high, covers, p_value, p_holm, verdict; no p with the verdict `one seed`."""
    note: str = ""
    """What a reader of its figures must know."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """An aligned policy and what it logged."""

    name: str
    """Its folder, such as policy-sage."""
    group: str
    """What it is called in plots; seeds of one objective share it."""
    settings: dict[str, Any]
    """Of the alignment."""
    manifest: artifacts.Manifest
    """Of the artefact."""
    lines: list[dict[str, Any]]
    """Lines of metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class Material:
    """All that the page may show."""

    folder: Path
    """Run or study."""
    study: dict[str, Any]
    """study.json; empty for a run."""
    run: Run | None
    """The run folder, None for a study without one."""
    rows: list[Row]
    """Of the table, on test."""
    reports: dict[str, dict[str, Any]]
    """Name -> evaluation report of the run."""
    aligned: list[Aligned]
    """Aligned policies of the run, in the order of the plots."""
    styles: dict[str, Style]
    """Name or group -> how it is drawn."""
    notes: list[str]
    """What was left out, and why."""
    k: int
    """The cut of the table's metrics."""

    def style(self, name: str) -> Style:
        """How a series is drawn; one without a style of its own is drawn as the last."""
        return self.styles.get(name, Style(MOST_SERIES - 1))


def stem(name: str) -> str:
    """What the report of a shown name is called: the other way of `shown_name`."""
    system, plus, lists = name.partition("+")
    return f"{'evaluation' if system == START else f'evaluation-{system}'}{plus}{lists}"


def gather(folder: Path) -> Material:
    """Read a run or a study folder. Raises: ArtifactError where it is neither, or a file of it is damaged."""
    study: dict[str, Any] = {}
    notes: list[str] = []
    if (folder / STUDY).is_file():
        study = read_record(folder / STUDY)
        runs = [open_run(path) for path in run_folders(folder)]
        if (stale := stale_study(folder)) is not None:
            notes.append(f"Stale: {stale}.")
            study = {}
    else:
        runs = [open_run(folder)]
    run = runs[0] if runs else None
    reports = {} if run is None else read_reports(run, notes)
    k = shown_k(study, reports)
    aligned = read_aligned(runs, study, notes)
    own = set() if run is None else set(run.aligned())
    if unmeasured := [p.name for p in aligned if p.name in own and shown_name(p.name) not in reports]:
        notes.append(
            f"Without a test report: {', '.join(unmeasured)}. For one: sagerec evaluate {run.folder if run else ''} "
            f"--policy {unmeasured[0]}"
        )
    rows = [study_row(values) for values in study.get("rows", [])]
    if not rows and run is not None:
        rows = run_rows(run, reports, aligned, k)
    notes += [f"{row.name}: {row.note}." for row in rows if row.note]
    names = [START, *(policy.group for policy in aligned), *(row.name for row in rows if row.name not in (START,))]
    names += [str(trial.get("objective")) for trial in study.get("trials", [])]
    styles = {name: Style(number) for number, name in enumerate(dict.fromkeys(names)) if number < MOST_SERIES}
    return Material(folder, study, run, rows, reports, aligned, styles, notes, k)


def shown_k(study: Mapping[str, Any], reports: Mapping[str, dict[str, Any]]) -> int:
    """10 where it was measured, else the largest cut."""
    metrics: set[str] = set()
    for row in study.get("rows", []):
        metrics |= set(row.get("metrics", {}))
    for report in reports.values():
        metrics |= set(report["metrics"])
    cuts = {int(found[1]) for name in metrics if (found := re.fullmatch(r"recall@(\d+)", name))}
    return 10 if 10 in cuts or not cuts else max(cuts)


def shown_name(stem: str) -> str:
    """`evaluation-sage` or `policy-sage` as `sage`, the plain ones as `supervised`; `+free` stays."""
    system, plus, lists = stem.partition("+")
    return f"{system.partition('-')[2] or START}{plus}{lists}"


def read_reports(run: Run, notes: list[str]) -> dict[str, dict[str, Any]]:
    """The test reports that fit the artefacts of today, by the name that is shown."""
    found = {}
    for path in sorted(run.folder.glob("evaluation*.json")):
        report = run.report(path.stem)
        if report["split"] != "test":
            continue
        if stale := run.outdated(report["made_from"], grown=False):
            notes.append(
                f"Stale: {path.name} measures an earlier {' and '.join(stale)}; evaluate again to have it here."
            )
        else:
            found[shown_name(path.stem)] = report
    return {name: found[name] for name in sorted(found, key=lambda name: (name != START, name))}


def read_aligned(runs: Sequence[Run], study: Mapping[str, Any], notes: list[str]) -> list[Aligned]:
    """Aligned policies with what they logged: a study's by objective, a run's by age."""
    objectives = [str(name) for name in study.get("objectives", [])]
    found = []
    for run, name in ((each, name) for each in runs for name in each.aligned()):
        manifest = run.manifest(name)
        if "align" not in manifest.settings or not (run.folder / name / METRICS).is_file():
            continue
        if (reason := run.stale(name)) is not None:
            notes.append(f"Stale: {reason}.")
            continue
        short = shown_name(name)
        group = SEED.sub("", short) if SEED.sub("", short) in objectives else short
        lines = read_metrics(run.folder / name)
        found.append(Aligned(name, group, manifest.settings["align"], manifest, lines))

    def place(policy: Aligned) -> tuple[int, str, str]:
        known = objectives.index(policy.group) if policy.group in objectives else len(objectives)
        return known, "" if objectives else policy.manifest.created, policy.name

    found.sort(key=place)
    groups = list(dict.fromkeys(policy.group for policy in found))
    if left := groups[MOST_SERIES - 1 :]:
        notes.append(f"The plots of training leave out {', '.join(left)}: they hold {MOST_SERIES - 1} policies.")
    return [policy for policy in found if policy.group not in left]


def study_row(values: Mapping[str, Any]) -> Row:
    """A row of study.json."""
    metrics = {name: value for name, value in values.get("metrics", {}).items() if value is not None}
    seeds = tuple(int(seed) for seed in values.get("seeds", ()))
    return Row(
        str(values["name"]),
        str(values.get("kind", "")),
        metrics,
        seeds,
        values.get("against", {}),
        str(values.get("note", "")),
    )


def run_rows(run: Run, reports: Mapping[str, dict[str, Any]], aligned: list[Aligned], k: int) -> list[Row]:
    """A row a report, compared with the supervised policy and with the one of all events at once, on the same cases."""
    seeds = {policy.group: policy.manifest.seed for policy in aligned}
    against = differences_to_start(run, reports, k)
    rows = []
    for name, report in reports.items():
        system = name.partition("+")[0]
        kind = "aligned" if f"policy-{system}" in run.aligned() else "other"
        kind = dict.fromkeys(get_args(BaselineName), "baseline").get(system, kind)
        kind = {START: "start", ALL_AT_ONCE: "reference"}.get(system, kind)
        seed = seeds.get(system)
        note = "slates, one item written after another" if report["settings"].get("lists") == "slate" else ""
        rows.append(Row(name, kind, report["metrics"], () if seed is None else (seed,), against.get(name, {}), note))
    kinds, drawn = ("start", "reference", "aligned", "baseline", "other"), list(seeds)
    order = {name: place for place, name in enumerate(drawn)}
    return sorted(rows, key=lambda row: (kinds.index(row.kind), order.get(row.name, len(drawn))))


def differences_to_start(
    run: Run, reports: Mapping[str, dict[str, Any]], k: int
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Name -> the supervised policy, and the one of all events at once -> metric -> the difference to it with its 95 %
    interval over users, no verdict: a run has one seed of each. What answers other cases, or too few places, is left
    out.

    Empty where items share Semantic IDs: their accuracy is no function of the list alone.
    """
    if START not in reports or f"recall@{k}_optimistic" in reports[START]["metrics"]:
        return {}
    cases = run.split.cases(run.data, "test")
    tables = {name: pl.read_parquet(run.lists_path(stem(name))) for name in reports}
    lists = {
        name: table["items"].to_numpy().astype(np.int64)
        for name, table in tables.items()
        if np.array_equal(table["event_row"].to_numpy(), cases.rows)
    }
    most = reports[START]["settings"].get("cold_max_count", EvaluateSettings().cold_max_count)
    yardstick = make_yardstick(run.data, run.split, run.space(), cold_max_count=most, store=run.store())
    found = {
        name: measure([part], cases, yardstick, run.data.n_items, k=k)
        for name, part in lists.items()
        if part.shape[1] >= k
    }
    if START not in found:
        return {}
    seeds = seed_variances(list(found.values()))
    references = [name for name in (START, ALL_AT_ONCE) if name in found]
    return {
        name: {other: differences(measured, found[other], seeds, seed=0) for other in references if other != name}
        for name, measured in found.items()
        if name != START
    }
