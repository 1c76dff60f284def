"""Baselines of a run: fitted on its split, tuned on validation, evaluated in the harness of the policies.

Each learns from the training events and the reserved ones, as the control of a study does.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sagerec import artifacts, files
from sagerec.baselines.item_knn import item_knn_lists
from sagerec.baselines.popularity import popularity_lists
from sagerec.baselines.sasrec import TUNED, SasRecSettings, read_sasrec, resolved_settings, train_sasrec
from sagerec.catalogue.splits import Cases, Part, Sequences
from sagerec.config import from_json, grid_points
from sagerec.errors import SettingsError, TrainingError
from sagerec.evaluation.evaluate import EvaluateSettings, excludes_history
from sagerec.evaluation.per_case import validation_means
from sagerec.run.folder import Run
from sagerec.run.stages import making, report_lists
from sagerec.training.settings import TrainSettings

logger = logging.getLogger(__name__)
BaselineName = Literal["popularity", "item-knn", "sasrec"]
LEARNS_FROM: tuple[Part, ...] = ("train", "align")
"""The parts whose events baselines learn."""
ListCases = Callable[[Cases], np.ndarray]
"""Cases -> lists (n, K) of items."""
KNN_GRID = [{"neighbours": neighbours, "decay": decay} for neighbours in (50, 200) for decay in (1.0, 0.7, 0.4)]
"""Settings of item-kNN among which validation chooses."""
SASREC_GRID: dict[str, tuple[Any, ...]] = {"dropout": (0.2, 0.4), "width": (64, 128)}
"""Settings of SASRec among which validation chooses, where it is tuned."""


def evaluate_baseline(
    run: Run,
    name: BaselineName,
    settings: EvaluateSettings,
    *,
    model: SasRecSettings | None = None,
    training: TrainSettings | None = None,
    trials: int = 1,
    refit: bool = False,
) -> dict[str, Any]:
    """Fit and evaluate a baseline on the split of the run; writes and returns its report.

    `model` and `training` are those of SASRec. With `trials` above 1 it is trained with so many points of SASREC_GRID,
    the first the given settings, and the best on validation is kept. With `refit` it is trained once more, on the
    validation events too, for as many epochs as were best: a row of its own, `sasrec-refit`, on test alone.

    Raises: SettingsError for more trials than the grid has points, `trials` or `refit` of another baseline, `trials`
    without validation cases, or `refit` with another split than test.
    """
    if name != "sasrec" and (refit or trials != 1):
        raise SettingsError(f"trials is {trials} and refit {refit} for {name}; expected them for sasrec alone")
    if refit and settings.split != "test":
        raise SettingsError(
            f"refit learns from the validation events, and the split is {settings.split}; expected test"
        )
    data, events = run.data, run.split.sequences(run.data, *LEARNS_FROM)
    exclude = excludes_history(run.split.sequences(data, "train"), settings)
    made_from, k, folder = run.hashes("dataset", "split"), max(settings.k), run.folder / "sasrec"
    if name == "sasrec":
        tune_sasrec(run, model or SasRecSettings(), training or TUNED, trials, exclude_history=exclude)
        if refit:
            folder = refit_sasrec(run, exclude_history=exclude)
        made_from = {folder.name: artifacts.read_manifest(folder, "sasrec").content_hash}

    def lists() -> tuple[np.ndarray, float]:
        cases = run.split.cases(data, settings.split)
        shared: dict[str, Any] = {"n_items": data.n_items, "k": k, "exclude_history": exclude}
        if name == "sasrec":
            found = read_sasrec(folder, data.n_items).lists(cases, k=k, exclude_history=exclude)
        elif name == "popularity":
            found = popularity_lists(events, cases, **shared)
        else:
            sample = run.split.cases(data, "valid").sample(5000, np.random.default_rng(settings.seed))
            found = _tuned_knn(events, sample, shared)(cases)
        return found, 1.0

    stem = f"evaluation-{name}-refit" if refit else f"evaluation-{name}"
    return report_lists(run, stem, settings, lists, run.space(), made_from | run.hashes(run.actions))


def _tuned_knn(events: Sequences, sample: Cases, shared: dict[str, Any]) -> ListCases:
    """Item-kNN with the settings of KNN_GRID whose Recall@10 on `sample` is best, the first ones without a sample."""

    def knn(cases: Cases, setting: dict[str, Any]) -> np.ndarray:
        return item_knn_lists(events, cases, max_items=50, **shared, **setting)

    def recall(setting: dict[str, Any]) -> float:
        k = min(10, shared["k"])
        return validation_means(knn(sample, setting), sample, ("recall",), k=k)[f"valid_recall@{k}"]

    best = max(KNN_GRID, key=recall) if len(sample) else KNN_GRID[0]
    logger.info("item-kNN: validation chose %s", best)
    return lambda cases: knn(cases, best)


def sasrec_grid(model: SasRecSettings, trials: int) -> list[dict[str, Any]]:
    """The settings to try: the given ones, then the other points of SASREC_GRID.

    Raises: SettingsError where there are fewer than `trials`.
    """
    points = grid_points(SASREC_GRID, {name: getattr(model, name) for name in SASREC_GRID})
    if not 1 <= trials <= len(points):
        raise SettingsError(f"trials is {trials}; expected 1 to {len(points)}, the settings that SASRec has to try")
    return points[:trials]


def tune_sasrec(
    run: Run,
    model: SasRecSettings,
    training: TrainSettings,
    trials: int,
    *,
    exclude_history: bool,
) -> None:
    """Train RUN/sasrec-N for each point of the grid, and copy the best to RUN/sasrec; one alone is trained there.

    A trial that diverges loses. Raises: TrainingError where all do; SettingsError where nothing could choose.
    """
    points, made_from = sasrec_grid(model, trials), run.hashes("dataset", "split")
    folders = [run.folder / (f"sasrec-{number}" if trials > 1 else "sasrec") for number in range(trials)]
    validation = run.split.cases(run.data, "valid")
    if trials > 1 and not len(validation):
        raise SettingsError(f"trials is {trials}, and no validation case is there that could choose; expected 1")
    failed: TrainingError | None = None
    for folder, point in zip(folders, points, strict=True):
        try:
            fit_sasrec(
                folder,
                run,
                LEARNS_FROM,
                validation,
                replace(model, **point),
                training,
                made_from,
                exclude_history=exclude_history,
            )
        except TrainingError as error:
            if trials == 1:
                raise
            logger.warning("%s failed: %s", folder.name, error)
            shutil.rmtree(folder, ignore_errors=True)
            failed = error
    if trials > 1:
        tried = {folder: found for folder in folders if (found := _manifest(folder)) is not None}
        if not tried:
            raise TrainingError(f"all {trials} trials of SASRec failed, the last: {failed}")
        best = max(tried, key=lambda folder: float(tried[folder].sizes["best_valid_recall@10"]))
        logger.info("SASRec: validation chose %s", points[folders.index(best)])
        target = run.folder / "sasrec"
        kept = _manifest(target)
        if kept is None or kept.content_hash != tried[best].content_hash:
            with files.replace_folder(target) as fresh:
                shutil.copytree(best, fresh, dirs_exist_ok=True)


def refit_sasrec(run: Run, *, exclude_history: bool) -> Path:
    """Train RUN/sasrec-refit with the settings of RUN/sasrec, on every event but the test's; returns the folder."""
    manifest, folder = artifacts.read_manifest(run.folder / "sasrec", "sasrec"), run.folder / "sasrec-refit"
    model = from_json(SasRecSettings, manifest.settings["model"])
    training = from_json(TrainSettings, manifest.settings["train"])
    training = replace(training, epochs=int(manifest.sizes["best_epoch"]), validate_every=0)
    made_from = run.hashes("dataset", "split") | {"sasrec": manifest.content_hash}
    fit_sasrec(folder, run, (*LEARNS_FROM, "valid"), None, model, training, made_from, exclude_history=exclude_history)
    return folder


def fit_sasrec(
    folder: Path,
    run: Run,
    parts: tuple[Part, ...],
    validation: Cases | None,
    model: SasRecSettings,
    training: TrainSettings,
    made_from: dict[str, str],
    *,
    exclude_history: bool,
) -> None:
    """Train SASRec into `folder`, unless what is there fits."""
    resolved = resolved_settings(model, training, parts=parts, exclude_history=exclude_history)
    with making(folder, "sasrec", made_from=made_from, settings=resolved, seed=training.seed) as needed:
        if needed:
            train_sasrec(
                folder,
                run.data.n_items,
                run.split.sequences(run.data, *parts),
                validation,
                model,
                training,
                parts=parts,
                exclude_history=exclude_history,
                made_from=made_from,
            )


def _manifest(folder: Path) -> artifacts.Manifest | None:
    """The manifest of an artefact, None where there is none."""
    return artifacts.read_manifest(folder, "sasrec") if (folder / artifacts.MANIFEST).is_file() else None


def sasrec_trials(run: Run, model: SasRecSettings, trials: int) -> list[dict[str, Any]]:
    """What `tune_sasrec` found, in the form of a study's trials; the criterion is Recall@10, 0 of one that diverged."""
    found = []
    kept = run.manifest("sasrec").content_hash
    for number, point in enumerate(sasrec_grid(model, trials)):
        manifest = _manifest(run.folder / (f"sasrec-{number}" if trials > 1 else "sasrec"))
        recall = 0.0 if manifest is None else float(manifest.sizes["best_valid_recall@10"] or 0.0)
        found.append(
            {
                "objective": "sasrec",
                "settings": point,
                "metrics": {"recall@10": recall},
                "criterion": recall,
                "seconds": 0.0 if manifest is None else manifest.sizes["seconds"],
                "split": "valid",
                "chosen": manifest is not None and manifest.content_hash == kept,
            }
        )
    return found
