"""Systems on the benchmark: files of predictions and policies of a run, scored side by side into one record and table.

1. read the tasks that the folder holds
2. score each system's predictions as they come
3. means and intervals of each task, and the differences between systems on the same rows
4. write `recif.json` and `recif.md`
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sagerec.artifacts import hash_file
from sagerec.config import at_least, check_fields, require, to_json
from sagerec.evaluation.intervals import bootstrap_mean
from sagerec.files import write_record, write_text
from sagerec.progress import progress_bar
from sagerec.recif.layout import RECOMMENDATION, TEXT
from sagerec.recif.markdown import benchmark_markdown
from sagerec.recif.predictions import Prediction, read_predictions, write_predictions
from sagerec.recif.scores import Scores, add_prediction, difference, start_scores, summarise
from sagerec.recif.tasks import Benchmark, Task

logger = logging.getLogger(__name__)
RECORD, TABLE = "recif.json", "recif.md"
REPORTED_EVERY = 256


@dataclass(frozen=True, slots=True)
class RecifSettings:
    """What is measured."""

    cold_max_count: int = 5
    """Items that occur at most so often in what a run learnt, or else by `count` of the benchmark's map, are cold."""
    seed: int = 0
    """Seed of the resamples of the users."""

    def __post_init__(self) -> None:
        check_fields(self, cold_max_count=at_least(0))


class Judge(Protocol):
    """Reads texts, for item_understand and rec_reason."""

    @property
    def name(self) -> str:
        """In the record."""
        ...

    def judge(self, task: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, list[float]]:
        """A metric's name, and its value for each pair of what a system wrote and what is asked for."""
        ...


class System(Protocol):
    """Who answers."""

    @property
    def name(self) -> str:
        """A row of the table."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """How its predictions were made."""
        ...

    @property
    def learnt(self) -> Mapping[int, int] | None:
        """Key -> events that it learnt from; None where that is not known."""
        ...

    def predictions(self, benchmark: Benchmark, faults: Counter[str]) -> Iterator[Prediction]:
        """Its predictions, in any order; what is wrong with them is counted."""
        ...


@dataclass(frozen=True, slots=True)
class PredictionsFile:
    """Somebody's predictions."""

    path: Path
    """JSON lines or Parquet."""
    learnt: Mapping[int, int] | None = None
    """Not known."""

    @property
    def name(self) -> str:
        return self.path.name.partition(".")[0]

    @property
    def about(self) -> dict[str, Any]:
        return {"predictions": self.path.name, "decoding": "as given"}

    def predictions(self, benchmark: Benchmark, faults: Counter[str]) -> Iterator[Prediction]:
        """Those of the file."""
        return read_predictions(self.path, faults)


def score_system(
    system: System, benchmark: Benchmark, settings: RecifSettings, save_to: Path | None = None
) -> tuple[dict[str, Scores], Counter[str]]:
    """A system's scores of each task, and what was wrong with its predictions, which `save_to` gets too."""
    found = {
        name: start_scores(task, cold_max_count=settings.cold_max_count, learnt=system.learnt)
        for name, task in benchmark.tasks.items()
    }
    faults: Counter[str] = Counter()
    predictions = system.predictions(benchmark, faults)
    if save_to is not None:
        predictions = write_predictions(save_to, predictions)
    total = sum(map(len, benchmark.tasks.values()))
    with progress_bar(f"rows of {system.name}", total) as bar:
        for done, prediction in enumerate(predictions):
            add_prediction(found, prediction, faults)
            if done % REPORTED_EVERY == 0:
                bar.update(min(done, total))
    for fault, count in faults.items():
        if count:
            logger.warning("%s: %s %s", system.name, f"{count:,}", fault)
    return found, faults


def summarise_task(scores: Scores, judge: Judge | None, rng: np.random.Generator) -> dict[str, Any]:
    """The figures of a task; of texts, what the judge says."""
    found = summarise(scores, rng)
    task = scores.task
    if task.name in TEXT:
        if judge is None:
            found["notes"].append("no judge is configured (--judge-folder or --judge-url), so it is not measured")
        elif len(task):
            found["metrics"], found["intervals"] = judged(task, scores.texts, judge, rng)
            found["judge"] = judge.name
    return found


def judged(
    task: Task, texts: Mapping[int, str], judge: Judge, rng: np.random.Generator
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The mean of what a judge says of a task's texts, 0 where there is none, and its interval."""
    at = sorted(texts)
    name, values = judge.judge(task.name, [(texts[i], task.answers[i]) for i in at])
    every = np.zeros(len(task))
    every[at] = values
    interval = bootstrap_mean(every, task.users, rng=rng)
    return {name: interval.value}, {name: [interval.low, interval.high]}


def evaluate_systems(
    benchmark: Benchmark,
    systems: Sequence[System],
    out: Path,
    settings: RecifSettings | None = None,
    *,
    judge: Judge | None = None,
    save_predictions: bool = False,
) -> dict[str, Any]:
    """Score systems on a benchmark and write record and table to the folder `out`; returns the record.

    Raises: SettingsError for two systems of one name; DatasetError where predictions cannot be read.
    """
    settings = settings or RecifSettings()
    names = [system.name for system in systems]
    require(len(set(names)) == len(names), f"systems are {', '.join(names)}; expected a name each, by which files go")
    scored: dict[str, dict[str, Scores]] = {}
    found: dict[str, dict[str, Any]] = {}
    for system in systems:
        save_to = out / f"{system.name}.predictions.jsonl" if save_predictions else None
        scored[system.name], faults = score_system(system, benchmark, settings, save_to)
        rng = np.random.default_rng(settings.seed)
        found[system.name] = {
            "system": system.name,
            **system.about,
            "cold_by": "events learnt from" if system.learnt is not None else "count of the benchmark's map",
            "faults": {fault: count for fault, count in faults.items() if count},
            "tasks": {task: summarise_task(scores, judge, rng) for task, scores in scored[system.name].items()},
        }
    record: dict[str, Any] = {
        "benchmark": benchmark.folder.name,
        "made_from": {path.relative_to(benchmark.folder).as_posix(): hash_file(path) for path in benchmark.files},
        "settings": to_json(settings),
        "left_out": benchmark.left_out,
    }
    if len(systems) == 1:
        record |= found[names[0]]
    else:
        record |= {"systems": found, "differences": differences(scored, settings)}
    write_record(out / RECORD, record)
    write_text(out / TABLE, benchmark_markdown(record))
    return record


def differences(scored: Mapping[str, Mapping[str, Scores]], settings: RecifSettings) -> list[dict[str, Any]]:
    """Every later system minus every earlier one, by task and metric, on the same rows."""
    rng = np.random.default_rng(settings.seed)
    rows = []
    for first, second in combinations(scored, 2):
        for task in (name for name in RECOMMENDATION if name in scored[first]):
            pair = scored[first][task], scored[second][task]
            shared = [name for name in pair[0].columns if name in pair[1].columns]
            ends = {name: difference(*pair, name, rng) for name in shared}
            metrics = {name: asdict(interval) for name, interval in ends.items() if interval is not None}
            rows.append({"system": second, "against": first, "task": task, "metrics": metrics})
    return rows
