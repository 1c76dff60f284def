"""What every sample of a task is worth to a system, and the task's figures with their intervals.

A system's predictions come in any order; each is scored where it comes, so that memory holds one number a sample and
metric, and not the texts.

Shapes: n samples, m metrics.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from sagerec.evaluation.intervals import Interval, bootstrap_mean, jackknife
from sagerec.evaluation.metrics import FloatArray
from sagerec.recif import metrics
from sagerec.recif.items import LEVEL_SIZE, NO_KEY, read_generation
from sagerec.recif.layout import LABEL, RECOMMENDATION
from sagerec.recif.metrics import KS
from sagerec.recif.predictions import Prediction
from sagerec.recif.tasks import Task, asked_keys

BEYOND_K = 10
"""The cut of Entropy and Cold-Recall, which the benchmark does not have."""
SAMPLES = 1000
"""Resamples of the users."""
OF_RANKS = ("pass", "position1_pass", "recall")
REPEATED, UNKNOWN_TASK, UNKNOWN_ROW = "repeated rows", "unknown tasks", "unknown or skipped rows"


@dataclass(slots=True)
class Scores:
    """A system on a task."""

    task: Task
    """What was asked."""
    columns: dict[str, int] = field(default_factory=dict)
    """Metric -> its column."""
    values: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    """(n, m); NaN where a sample does not count for a metric."""
    given: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """(n,) bool: there is a prediction."""
    texts: dict[int, str] = field(default_factory=dict)
    """Sample -> its first generation; of the tasks that a judge reads."""
    cold: list[frozenset[int]] = field(default_factory=list)
    """(n) cold items among those that are asked for; empty where coldness is not known."""

    def column(self, name: str) -> FloatArray:
        """(n,) a metric's value of every sample."""
        found: FloatArray = self.values[:, self.columns[name]]
        return found


def start_scores(task: Task, *, cold_max_count: int, learnt: Mapping[int, int] | None = None) -> Scores:
    """Scores of a system that has said nothing yet: 0 everywhere.

    Cold is what occurs at most `cold_max_count` times in what was `learnt` (key -> events), else by `count` of the map.
    """
    names: list[str] = []
    if task.name in RECOMMENDATION:
        kinds = ("", "pid_") if task.map is not None else ("",)
        names = [f"{kind}{name}@{k}" for kind in kinds for k in KS for name in OF_RANKS]
        names += [f"entropy@{BEYOND_K}", f"invalid_rate@{max(KS)}", f"duplicate_rate@{max(KS)}"]
        if task.map is not None or learnt is not None:
            names.append(f"cold_recall@{BEYOND_K}")
    elif task.name == LABEL:
        names = ["score"]
    scores = Scores(
        task,
        {name: i for i, name in enumerate(names)},
        np.zeros((len(task), len(names))),
        np.zeros(len(task), dtype=bool),
    )
    if task.name == LABEL:
        scores.values[:] = np.nan
    if (at := scores.columns.get(f"cold_recall@{BEYOND_K}")) is not None:
        scores.cold = [_cold_keys(task, items, cold_max_count, learnt) for items in task.items]
        scores.values[[not cold for cold in scores.cold], at] = np.nan
    return scores


def _cold_keys(task: Task, items: list[str], most: int, learnt: Mapping[int, int] | None) -> frozenset[int]:
    """The cold items among those that are asked for."""
    keys = asked_keys(items)
    if learnt is not None:
        return frozenset(key for key in keys if learnt.get(key, 0) <= most)
    assert task.map is not None
    places = task.map.places(keys)
    return frozenset(k for k, at in zip(keys, places, strict=True) if at < 0 or task.map.counts[at] <= most)


def add_prediction(found: Mapping[str, Scores], prediction: Prediction, faults: Counter[str]) -> None:
    """Score one prediction; one of an unknown task or row, or of a row that has one, is counted and left out."""
    scores = found.get(prediction.task)
    if scores is None:
        faults[UNKNOWN_TASK] += 1
        return
    rows = scores.task.rows
    at = int(rows.searchsorted(prediction.row))
    if at == len(rows) or rows[at] != prediction.row:
        faults[UNKNOWN_ROW] += 1
    elif scores.given[at]:
        faults[REPEATED] += 1
    elif scores.task.name == LABEL:
        if (score := metrics.yes_score(prediction.p_yes, prediction.p_no)) is not None:
            scores.values[at, 0], scores.given[at] = score, True
    elif prediction.predictions:
        scores.given[at] = True
        if scores.task.name in RECOMMENDATION:
            score_recommendations(scores, at, prediction.predictions)
        else:
            scores.texts[at] = prediction.predictions[0]


def score_recommendations(scores: Scores, at: int, generations: list[str]) -> None:
    """The metrics of one sample's generations, best first."""
    task = scores.task
    generations = generations[: max(*KS, BEYOND_K)]
    items, keys = map(list, zip(*map(read_generation, generations), strict=True))
    row: dict[str, float] = {}

    def ranks(kind: str, predicted: list[Any], truth: list[Any]) -> None:
        for k in KS:
            row[f"{kind}pass@{k}"] = metrics.passes(predicted, truth, k)
            row[f"{kind}position1_pass@{k}"] = metrics.passes_first(predicted, truth, k)
            row[f"{kind}recall@{k}"] = metrics.recall(predicted, truth, k)

    ranks("", items, task.items[at])
    exists = [key != NO_KEY for key in keys]
    if task.map is not None:
        places = task.map.places(keys)
        exists = (places >= 0).tolist()
        ids = np.where(places >= 0, task.map.ids[places], 0) if len(task.map.ids) else np.zeros(len(keys), np.int64)
        ranks("pid_", ids.tolist(), task.ids[at])
    row[f"entropy@{BEYOND_K}"] = metrics.entropy_bits(
        [key // LEVEL_SIZE**2 for key in keys[:BEYOND_K] if key != NO_KEY]
    )
    row[f"invalid_rate@{max(KS)}"] = exists[: max(KS)].count(False) / len(exists[: max(KS)])
    row[f"duplicate_rate@{max(KS)}"] = metrics.repeated_share(items, max(KS))
    if scores.cold and scores.cold[at]:
        row[f"cold_recall@{BEYOND_K}"] = metrics.cold_recall(keys, scores.cold[at], BEYOND_K)
    scores.values[at, [scores.columns[name] for name in row]] = list(row.values())


def counting(scores: Scores, name: str) -> np.ndarray:
    """(n,) bool: the samples that a metric is averaged over: all, but for rates of what was said and for cold items."""
    if name.startswith(("invalid_rate", "duplicate_rate")):
        return scores.given
    return ~np.isnan(scores.column(name))


def summarise(scores: Scores, rng: np.random.Generator) -> dict[str, Any]:
    """The figures of a task: samples, what was skipped or is missing, metrics and their 95 % intervals, notes."""
    task = scores.task
    found: dict[str, float] = {}
    ends: dict[str, list[float]] = {}
    notes = list(task.notes)
    if task.name == LABEL:
        _summarise_labels(scores, found, ends, notes, rng)
    for name in scores.columns if task.name in RECOMMENDATION else ():
        chosen = counting(scores, name)
        if chosen.any():
            values = scores.column(name)[chosen]
            found[name] = metrics.mean_in_order(values)
            interval = bootstrap_mean(values, task.users[chosen], samples=SAMPLES, rng=rng)
            ends[name] = [interval.low, interval.high]
    missing = int((~scores.given).sum())
    if missing:
        rule = "are left out of the AUC, as published" if task.name == LABEL else "count as 0"
        notes.append(f"{missing:,} rows have no prediction and {rule}")
    cold = scores.columns.get(f"cold_recall@{BEYOND_K}")
    return {
        "samples": len(task),
        "skipped": sum(task.skipped.values()),
        "skipped_by_reason": task.skipped,
        "missing": missing,
        **({} if cold is None else {"cold_samples": int(counting(scores, f"cold_recall@{BEYOND_K}").sum())}),
        "metrics": found,
        "intervals": ends,
        "notes": notes,
    }


def _summarise_labels(
    scores: Scores, found: dict[str, float], ends: dict[str, list[float]], notes: list[str], rng: np.random.Generator
) -> None:
    """AUC over the rows with a prediction, as published, and over all rows."""
    task = scores.task
    assert task.labels is not None
    labelled = task.labels >= 0
    if without := int((~labelled).sum()):
        notes.append(f"{without:,} answers are neither 是 nor 否 and are left out, as published")
    both = np.column_stack([np.nan_to_num(scores.column("score"), nan=0.5), task.labels])
    chosen = labelled & scores.given
    found["auc"] = _auc(both[chosen])
    found["auc_all_rows"] = _auc(both[labelled])
    users = task.users[chosen]
    if len(np.unique(users)) > 1:
        interval = jackknife(cast(Any, _auc), cast(Any, both[chosen]), users, rng=rng).interval()
        ends["auc"] = [interval.low, interval.high]


def _auc(table: FloatArray) -> float:
    """Of (n, 2) scores and labels."""
    return metrics.auc(table[:, 0], table[:, 1].astype(np.int64))


def difference(first: Scores, second: Scores, name: str, rng: np.random.Generator) -> Interval | None:
    """Second minus first on the samples that count for both, with the interval over users; None where none does."""
    chosen = counting(first, name) & counting(second, name)
    if not chosen.any():
        return None
    values = second.column(name)[chosen] - first.column(name)[chosen]
    return bootstrap_mean(values, first.task.users[chosen], samples=SAMPLES, rng=rng)
