"""Where a stage writes its metrics: `metrics.jsonl` always, TensorBoard, MLflow and Weights & Biases if asked; and
progress on a terminal.

Every logged metric is defined in `docs/metrics.md`.
"""

import importlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from sagerec.config import require
from sagerec.errors import ArtifactError, MissingExtraError
from sagerec.training import parallel

logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
PROJECT = "sagerec"
"""Experiment of MLflow, project of Weights & Biases."""
TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class Tracker(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record named values of a step."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonLines:
    """One JSON object a line; lines after `resume_step` of an earlier, killed run are dropped, and damaged ones."""

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                step = _step_of(line)  # None for the line that was being written when the run was killed
                if step is None:
                    logger.warning("%s: a line that cannot be read is left out", path)
                elif step <= resume_step:
                    kept.append(line + "\n")
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> int | None:
    """The step of a line of metrics, None where it is none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if type(step) is int else None


class TensorBoard:
    """Scalars for TensorBoard (extra `tensorboard`), in `folder`/tensorboard."""

    def __init__(self, folder: Path, resume_step: int, name: str) -> None:
        writer = _import("torch.utils.tensorboard", "tensorboard", "TensorBoard")
        self._writer = writer.SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """A run of MLflow (extra `mlflow`), where MLFLOW_TRACKING_URI says; without it, as MLflow chooses.

    A resumed training goes on in the run that it had; its id is kept in `folder`/mlflow.txt.
    """

    def __init__(self, folder: Path, resume_step: int, name: str) -> None:
        self._client = _import("mlflow.tracking", "mlflow", "MLflow").MlflowClient()
        self._metric = _import("mlflow.entities", "mlflow", "MLflow").Metric
        path = folder / "mlflow.txt"
        if resume_step >= 0 and path.is_file():
            self._run = path.read_text(encoding="utf-8")
        else:
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = self._client.create_experiment(PROJECT) if found is None else found.experiment_id
            self._run = self._client.create_run(experiment, run_name=name).info.run_id
            path.write_text(self._run, encoding="utf-8")

    def log(self, step: int, values: dict[str, Any]) -> None:
        at = int(time.time() * 1000)
        metrics = [self._metric(_plain(name), value, at, step) for name, value in _numbers(values).items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WandB:
    """A run of Weights & Biases (extra `wandb`), its files in RUN/wandb; WANDB_MODE=offline sends nothing.

    They stand beside the artefact, for syncing them later changes them. A resumed training goes on in the run that it
    had; its id is kept in `folder`/wandb.txt.
    """

    def __init__(self, folder: Path, resume_step: int, name: str) -> None:
        wandb = _import("wandb", "wandb", "Weights & Biases")
        path = folder / "wandb.txt"
        known = path.read_text(encoding="utf-8") if resume_step >= 0 and path.is_file() else None
        self._run = wandb.init(project=PROJECT, name=name, dir=str(folder.parent), id=known, resume="allow")
        path.write_text(str(self._run.id), encoding="utf-8")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(_numbers(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _import(module: str, extra: str, product: str) -> Any:
    """An optional module. Raises: MissingExtraError naming the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{product} is not installed; install it with: pip install 'sagerec[{extra}]', or leave {extra} out of "
            "the setting track"
        ) from error


def _plain(name: str) -> str:
    """`valid_recall@10` as `valid_recall_at_10`: MLflow takes letters, digits and _-. :/ alone."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_").replace("*", "_x_"))


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The values that a curve can be drawn of."""
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


TRACKERS: dict[TrackerName, Callable[[Path, int, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


def open_trackers(folder: Path, *, track: Sequence[TrackerName] = (), resume_step: int) -> Trackers:
    """The trackers of a stage that works in `folder`: metrics.jsonl, and those of `track`; none but on the first rank.

    Raises: MissingExtraError for one that is not installed.
    """
    if parallel.rank():
        return Trackers([])
    folder.mkdir(parents=True, exist_ok=True)
    name = "/".join(folder.resolve().parts[-2:]).removesuffix(".training")
    chosen: list[Tracker] = [TRACKERS[other](folder, resume_step, name) for other in dict.fromkeys(track)]
    return Trackers([JsonLines(folder / METRICS, resume_step), *chosen])


def keep_records(work: Path, fresh: Path) -> None:
    """Copy what the trackers left in a stage's working folder into its artefact."""
    shutil.copy(work / METRICS, fresh / METRICS)
    if (work / "tensorboard").exists():
        shutil.copytree(work / "tensorboard", fresh / "tensorboard")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of an artefact's metrics.jsonl. Raises: ArtifactError for one that is not JSON."""
    path = folder / METRICS
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} holds a line that is not JSON ({error}); make the policy again") from error


def check_trackers(track: Sequence[str]) -> None:
    """Raise SettingsError for a tracker that is not one of TRACKERS."""
    for name in track:
        require(name in TRACKERS, f"track holds {name!r}; expected some of {', '.join(TRACKERS)}")
