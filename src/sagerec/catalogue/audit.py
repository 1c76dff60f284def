"""The audit: proof that no stage before evaluation used an event that it must not see.

Each stage saves the rows of the events that it was given, taken from the arrays it computed with (`EventsUsed`,
one bit an event). The audit compares them with the split. It is a check on what went in, so a stage that
is given one row too many is caught, whoever gave it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sagerec.artifacts import UNREADABLE
from sagerec.catalogue.dataset import Dataset
from sagerec.catalogue.splits import PARTS, Part, Split
from sagerec.errors import ArtifactError, LeakError

EVENTS_USED = "events_used.parquet"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one stage saw."""

    stage: str
    """Name of the stage."""
    counts: dict[Part, int]
    """Events of each part that the stage used."""
    allowed: tuple[Part, ...]
    """Parts that it may use."""
    stale: bool = False
    """Whether it was made from what has been made again since, and so was not checked."""


def write_events_used(folder: Path, rows: np.ndarray) -> None:
    """Save the rows (of `Dataset.events`) that a stage was given."""
    pl.DataFrame({"row": np.unique(rows).astype(np.int64)}).write_parquet(folder / EVENTS_USED)


def read_events_used(folder: Path) -> np.ndarray:
    """The rows that a stage was given. Raises: ArtifactError where the stage did not say, or the file is damaged."""
    path = folder / EVENTS_USED
    if not path.is_file():
        raise ArtifactError(f"{path} is missing, so the stage cannot be audited; run it again")
    try:
        return pl.read_parquet(path)["row"].to_numpy()
    except UNREADABLE as error:
        raise ArtifactError(f"{path} cannot be read ({error}); run the stage again") from error


def audit_stage(
    stage: str, rows: np.ndarray, data: Dataset, split: Split, *, allowed: tuple[Part, ...] = ("train",)
) -> Finding:
    """Check that `rows` lie in the parts `allowed`.

    Raises: LeakError with the number of foreign events and the first of them.
    """
    parts = split.parts[rows]
    counts = {part: int((parts == i).sum()) for i, part in enumerate(PARTS)}
    foreign = np.flatnonzero(~np.isin(parts, [PARTS.index(part) for part in allowed]))
    if len(foreign):
        event = data.events.row(int(rows[foreign[0]]), named=True)
        raise LeakError(
            f"{stage} used {len(foreign)} events outside {', '.join(allowed)}: "
            f"{', '.join(f'{n} {part}' for part, n in counts.items() if n and part not in allowed)}; the first is "
            f"user {event['user_id']!r}, item {event['item_id']!r}, time {event['timestamp']}. "
            "Give the stage split.sequences(data, 'train') and run it again"
        )
    return Finding(stage=stage, counts=counts, allowed=allowed)


def audit_order(data: Dataset, split: Split) -> None:
    """Check that every history lies in the past: no test or validation event stands before a training event.

    Raises: LeakError. Leave-one-out and global-time splits hold it by construction; a column may not.
    """
    last = np.zeros(data.n_users, dtype=np.int64)
    trained = np.flatnonzero(split.mask("train", "align"))
    np.maximum.at(last, data.event_users[trained], trained)
    held_out = np.flatnonzero(split.mask("valid", "test"))
    early = held_out[held_out < last[data.event_users[held_out]]]
    if len(early):
        event = data.events.row(int(early[0]), named=True)
        raise LeakError(
            f"{len(early)} validation or test events stand before a training event of the same user, the first: user "
            f"{event['user_id']!r}, item {event['item_id']!r}. Training would see the future; mend the split column"
        )
