"""A task of the benchmark in memory: what each of its samples asks for, and what the items' map knows of it.

Shapes: n samples, H keys of all histories together.
"""

import logging
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sagerec.errors import DatasetError
from sagerec.recif.items import asked_ids, asked_items, keys_in, read_generation
from sagerec.recif.layout import LABEL, RECOMMENDATION, TASKS, TEXT, ItemMap, read_item_map, read_samples, task_path

logger = logging.getLogger(__name__)
YES, NO = "是", "否"
MAP_OF = {"product": "sid2iid.json"}
"""The map of a task's items, where it is not sid2pid.json."""


@dataclass(frozen=True, slots=True)
class Histories:
    """The keys of the items in the prompts of a task."""

    keys: np.ndarray
    """(H,) int64, sample after sample, in the order of the text."""
    offsets: np.ndarray
    """(n + 1,) int64 bounds of the samples in `keys`."""


@dataclass(frozen=True, slots=True)
class Task:
    """The samples of a task, in the order of its rows."""

    name: str
    """Of TASKS."""
    rows: np.ndarray
    """(n,) int64 place of each in the file, ascending."""
    users: np.ndarray
    """(n,) int64 user of each; one without `uid` is a user of its own."""
    items: list[list[str]] = field(default_factory=list)
    """(n) items that are asked for; of the recommendation tasks."""
    ids: list[list[object]] = field(default_factory=list)
    """(n) ids that are asked for."""
    labels: np.ndarray | None = None
    """(n,) 1 yes, 0 no, -1 neither; of label_pred."""
    answers: list[str] = field(default_factory=list)
    """(n) texts that are asked for; of the tasks that a judge reads."""
    histories: Histories | None = None
    """Where they are asked for."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows that the published loader leaves out, by reason."""
    map: ItemMap | None = None
    """Of its items; None where the benchmark has none."""
    notes: tuple[str, ...] = ()
    """What is wrong with it."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The tasks that a folder holds."""

    folder: Path
    """Laid out as `benchmark_data`."""
    tasks: dict[str, Task]
    """In the order of TASKS."""
    left_out: dict[str, str]
    """Task -> why it is not there."""
    files: tuple[Path, ...]
    """What was read."""


def read_benchmark(folder: Path, *, with_histories: bool = False) -> Benchmark:
    """The tasks of a folder; those that are absent or damaged are named, and left out.

    Raises: DatasetError where none can be read.
    """
    maps: dict[str, ItemMap | str] = {}
    tasks: dict[str, Task] = {}
    left_out: dict[str, str] = {}
    files: list[Path] = []
    for name in TASKS:
        path = task_path(folder, name)
        if not path.is_file():
            left_out[name] = f"absent: no {path.relative_to(folder)}"
            continue
        try:
            known = _map_of(folder, name, maps, files) if name in RECOMMENDATION else None
            tasks[name] = read_task(path, name, known, with_history=with_histories and name not in TEXT)
        except DatasetError as error:
            left_out[name] = str(error)
            logger.warning("%s is left out: %s", name, error)
            continue
        files.append(path)
    if not tasks:
        raise DatasetError(
            f"{folder} holds no task that can be read ({'; '.join(left_out.values())}); expected "
            f"TASK/TASK_test.parquet, as in benchmark_data, of {', '.join(TASKS)}"
        )
    return Benchmark(folder, tasks, left_out, tuple(files))


def _map_of(folder: Path, task: str, read: dict[str, ItemMap | str], files: list[Path]) -> ItemMap | str:
    """The map of a task's items, read once; where it cannot be, why."""
    name = MAP_OF.get(task, "sid2pid.json")
    if name not in read:
        path = folder / name
        try:
            read[name] = read_item_map(path) if path.is_file() else f"{name} is absent"
            files += [path] if path.is_file() else []
        except DatasetError as error:
            read[name] = str(error)
    return read[name]


def read_task(path: Path, name: str, known: ItemMap | str | None = None, *, with_history: bool = False) -> Task:
    """A task's samples. `known` is the map of its items, or why there is none. Raises: DatasetError."""
    skipped: Counter[str] = Counter()
    rows, users, labels = array("q"), array("q"), array("b")
    items: list[list[str]] = []
    ids: list[list[object]] = []
    answers: list[str] = []
    keys, offsets = array("q"), array("q", [0])
    codes: dict[object, int] = {}
    without_ids = 0
    for sample in read_samples(path, skipped):
        rows.append(sample.row)
        users.append(codes.setdefault(("row", sample.row) if sample.user is None else str(sample.user), len(codes)))
        if name in RECOMMENDATION:
            items.append(asked_items(sample.answer))
            ids.append(asked_ids(sample.ids or ()))
            without_ids += sample.ids is None
        elif name == LABEL:
            labels.append(1 if YES in sample.answer else 0 if NO in sample.answer else -1)
        else:
            answers.append(sample.answer)
        if with_history:
            keys.extend(keys_in(sample.prompt))
            offsets.append(len(keys))
    notes = []
    if without_items := sum(not asked for asked in items):
        notes.append(f"{without_items:,} answers name no item and count as misses")
    if without_ids:
        notes.append(f"{without_ids:,} rows have no answer_pid or answer_iid: their pid metrics are 0, as published")
    if isinstance(known, str):
        notes.append(f"no pid metrics, Cold-Recall and existing items: {known}")
    return Task(
        name=name,
        rows=np.array(rows, dtype=np.int64),
        users=np.array(users, dtype=np.int64),
        items=items,
        ids=ids,
        labels=np.array(labels, dtype=np.int8) if name == LABEL else None,
        answers=answers,
        histories=_histories(keys, offsets) if with_history else None,
        skipped=dict(skipped),
        map=known if isinstance(known, ItemMap) else None,
        notes=tuple(notes),
    )


def _histories(keys: "array[int]", offsets: "array[int]") -> Histories:
    return Histories(np.array(keys, dtype=np.int64), np.array(offsets, dtype=np.int64))


def asked_keys(items: list[str]) -> list[int]:
    """The keys of items that are asked for, without what is no item."""
    return [key for item in items if (key := read_generation(item)[1]) >= 0]
