"""Baselines of a run: fitted on its split, tuned on validation, evaluated in the harness of the policies.

Each learns from the training events and the reserved ones, as the control of a study does.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sagerec import artifacts
from sagerec.catalogue.splits import Cases, Sequences
from sagerec.core.metrics import first_rank, recall_at
from sagerec.errors import SettingsError
from sagerec.evaluation.baselines import item_knn_lists, popularity_lists
from sagerec.evaluation.evaluate import EvaluateSettings, excludes_history
from sagerec.evaluation.sasrec import TUNED, SasRecSettings, read_sasrec, train_sasrec
from sagerec.run import Run, is_needed, report_lists
from sagerec.settings import to_json
from sagerec.training.loop import TrainSettings

logger = logging.getLogger(__name__)
BaselineName = Literal["popularity", "item-knn", "sasrec"]
Lists = Callable[[Cases], np.ndarray]
"""Cases -> lists (n, K) of items."""
KNN_GRID = [{"neighbours": neighbours, "decay": decay} for neighbours in (50, 200) for decay in (1.0, 0.7, 0.4)]
"""Settings of item-kNN among which validation chooses."""
SASREC_GRID: dict[str, tuple[Any, ...]] = {"learning_rate": (2e-3, 1e-3), "dropout": (0.5, 0.3)}
"""Settings of SASRec among which validation chooses, where it is tuned."""


def evaluate_baseline(
    run: Run,
    name: BaselineName,
    settings: EvaluateSettings,
    *,
    model: SasRecSettings | None = None,
    training: TrainSettings | None = None,
    trials: int = 1,
) -> dict[str, Any]:
    """Fit and evaluate a baseline on the split of the run; writes and returns its report.

    `model` and `training` are those of SASRec. With `trials` above 1 it is trained with so many points of SASREC_GRID,
    the first the given settings, and the best on validation is kept.

    Raises: SettingsError for more trials than the grid has points.
    """
    data, events = run.data, run.split.sequences(run.data, "train", "align")
    exclude = excludes_history(run.split.sequences(data, "train"), settings)
    made_from, k = run.hashes("dataset", "split"), max(settings.k)
    if name == "sasrec":
        tune_sasrec(run, events, model or SasRecSettings(), training or TUNED, trials, exclude_history=exclude)
        made_from = run.hashes("sasrec")

    def lists() -> tuple[np.ndarray, float]:
        cases = run.split.cases(data, settings.split)
        shared: dict[str, Any] = {"n_items": data.n_items, "k": k, "exclude_history": exclude, "max_items": 50}
        if name == "sasrec":
            found = read_sasrec(run.folder / "sasrec", data.n_items).lists(cases, k=k, exclude_history=exclude)
        elif name == "popularity":
            found = popularity_lists(events, cases, **shared)
        else:
            sample = run.split.cases(data, "valid").sample(5000, np.random.default_rng(settings.seed))
            found = _tuned_knn(events, sample, shared)(cases)
        return found, 1.0

    return report_lists(run, f"evaluation-{name}", settings, lists, run.ids(), made_from)


def _tuned_knn(events: Sequences, sample: Cases, shared: dict[str, Any]) -> Lists:
    """Item-kNN with the settings of KNN_GRID whose Recall@10 on `sample` is best, the first ones without a sample."""

    def knn(cases: Cases, setting: dict[str, Any]) -> np.ndarray:
        return item_knn_lists(events, cases, **shared, **setting)

    def recall(setting: dict[str, Any]) -> float:
        return float(recall_at(first_rank(knn(sample, setting), sample.targets), min(10, shared["k"])).mean())

    best = max(KNN_GRID, key=recall) if len(sample) else KNN_GRID[0]
    logger.info("item-kNN: validation chose %s", best)
    return lambda cases: knn(cases, best)


def sasrec_grid(model: SasRecSettings, training: TrainSettings, trials: int) -> list[dict[str, Any]]:
    """The settings to try: the given ones, then the other points of SASREC_GRID.

    Raises: SettingsError where there are fewer than `trials`.
    """
    given = {"learning_rate": training.learning_rate, "dropout": model.dropout}
    points = [dict(zip(SASREC_GRID, values, strict=True)) for values in product(*SASREC_GRID.values())]
    points = [given, *(point for point in points if point != given)]
    if not 1 <= trials <= len(points):
        raise SettingsError(f"trials is {trials}; expected 1 to {len(points)}, the settings that SASRec has to try")
    return points[:trials]


def tune_sasrec(
    run: Run,
    events: Sequences,
    model: SasRecSettings,
    training: TrainSettings,
    trials: int,
    *,
    exclude_history: bool,
) -> None:
    """Train RUN/sasrec-N for each point of the grid, and copy the best to RUN/sasrec; one alone is trained there."""
    points, made_from = sasrec_grid(model, training, trials), run.hashes("dataset", "split")
    folders = [run.folder / (f"sasrec-{number}" if trials > 1 else "sasrec") for number in range(trials)]
    for folder, point in zip(folders, points, strict=True):
        own_model = replace(model, dropout=point["dropout"])
        own_training = replace(training, learning_rate=point["learning_rate"])
        resolved = {"model": to_json(own_model), "train": to_json(own_training)}
        if is_needed(folder, "sasrec", made_from=made_from, settings=resolved, seed=own_training.seed):
            train_sasrec(
                folder,
                run.data.n_items,
                events,
                run.split.cases(run.data, "valid"),
                own_model,
                own_training,
                exclude_history=exclude_history,
                made_from=made_from,
            )
    if trials > 1:
        best = max(folders, key=lambda folder: _validated(folder)["best_valid_recall@10"] or 0.0)
        logger.info("SASRec: validation chose %s", dict(points[folders.index(best)]))
        _copy(best, run.folder / "sasrec")


def _validated(folder: Path) -> dict[str, Any]:
    return artifacts.read_manifest(folder, "sasrec").sizes


def _copy(source: Path, target: Path) -> None:
    """Copy an artefact beside its new place, then put it there."""
    fresh = target.with_name(target.name + ".copy")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def sasrec_trials(run: Run, trials: int) -> list[dict[str, Any]]:
    """What `tune_sasrec` found, in the form of a study's trials; empty where it was not tuned."""
    found = []
    for number in range(trials if trials > 1 else 0):
        folder = run.folder / f"sasrec-{number}"
        if not (folder / artifacts.MANIFEST).is_file():
            return []
        manifest = artifacts.read_manifest(folder, "sasrec")
        recall = manifest.sizes["best_valid_recall@10"] or 0.0
        found.append(
            {
                "objective": "sasrec",
                "settings": {
                    "learning_rate": manifest.settings["train"]["learning_rate"],
                    "dropout": manifest.settings["model"]["dropout"],
                },
                "metrics": {"recall@10": recall},
                "criterion": recall,
                "seconds": manifest.sizes["seconds"],
                "split": "valid",
                "chosen": manifest.content_hash == run.manifest("sasrec").content_hash,
            }
        )
    return found
