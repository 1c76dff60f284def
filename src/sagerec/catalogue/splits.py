"""Splits: which events train, align, validate and test, and the views of the log that each stage gets.

Every event belongs to one part. A stage asks for `sequences(...)` (all events of some parts, user by user: what
training learns from) or `cases(...)` (one target with the history before it: what alignment and evaluation
answer). Both carry the rows of the events that they hold, so that the audit can prove what a stage saw.

Shapes: E events, S sequences, n cases.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from sagerec.artifacts import UNREADABLE, read_manifest, write_artifact
from sagerec.catalogue.dataset import SPLIT, TIMESTAMP, Dataset
from sagerec.config import check_fields, require, to_json
from sagerec.errors import ArtifactError, DatasetError, SettingsError

Part = Literal["train", "align", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "align", "valid", "test")


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """How the log is divided."""

    scheme: Literal["auto", "leave-one-out", "global-time", "column"] = "auto"
    """leave-one-out: a user's last event tests, the one before validates; global-time: the last share of the time
    line tests, the one before validates; column: the log's own `split` column; auto: the column where there is one,
    else leave-one-out."""
    reserve: Literal["none", "event", "users"] = "none"
    """What supervised training leaves for alignment: nothing, the event of each user before validation, or all
    training events of a share of users."""
    reserve_share: float = 0.1
    """Share of users reserved by `--split.reserve users`."""
    valid_share: float = 0.1
    """Share of all events, by time, that validates under global-time."""
    test_share: float = 0.1
    """Share of all events, by time, that tests under global-time."""
    seed: int = 0
    """Seed of the draw of reserved users."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 < self.reserve_share < 1, f"reserve_share is {self.reserve_share}; expected between 0 and 1")
        require(
            self.valid_share >= 0 and self.test_share > 0 and self.valid_share + self.test_share < 1,
            f"valid_share {self.valid_share} and test_share {self.test_share}: expected positive, below 1 together",
        )


@dataclass(frozen=True, slots=True)
class Sequences:
    """Items that users took, in order: what a stage trains on."""

    items: np.ndarray
    """(E',) int32 item indices, sequence after sequence."""
    offsets: np.ndarray
    """(S + 1,) int64 bounds of the sequences in `items`."""
    users: np.ndarray
    """(S,) int32 user index of each sequence."""
    rows: np.ndarray
    """(E',) int64 row of each event in `Dataset.events`."""
    profiles: pl.Series | None = field(default=None, kw_only=True)
    """(U,) who each user of the log is, as of `Dataset`."""

    def __len__(self) -> int:
        return len(self.users)

    def has_repeats(self) -> bool:
        """Whether any user took an item twice; where none did, lists may leave out the history."""
        sequence = np.repeat(np.arange(len(self), dtype=np.int64), np.diff(self.offsets))
        pairs = sequence * (int(self.items.max(initial=0)) + 1) + self.items
        return len(np.unique(pairs)) < len(pairs)

    def excludes_history(self, choice: Literal["auto", "keep", "exclude"]) -> bool:
        """Whether lists leave out the history: as chosen, or, on `auto`, where no sequence repeats an item."""
        return choice == "exclude" or (choice == "auto" and not self.has_repeats())


@dataclass(frozen=True, slots=True)
class Cases:
    """Questions: a history and the item that came next."""

    users: np.ndarray
    """(n,) int32 user index."""
    targets: np.ndarray
    """(n,) int32 item index that came next."""
    rows: np.ndarray
    """(n,) int64 row of the target event in `Dataset.events`."""
    starts: np.ndarray
    """(n,) int64 row at which the user's history begins."""
    event_items: np.ndarray
    """(E,) int32 items of all events; the history of case j is event_items[starts[j]:rows[j]]."""
    profiles: pl.Series | None = field(default=None, kw_only=True)
    """(U,) who each user of the log is, as of `Dataset`."""

    def __len__(self) -> int:
        return len(self.users)

    def histories(self, index: np.ndarray, max_items: int) -> tuple[np.ndarray, np.ndarray]:
        """The last `max_items` items before each target of the cases `index`.

        Returns: items (b, T) int64 padded with 0 on the right, T the longest of them, and lengths (b,) int64.
        """
        ends = self.rows[index]
        begins = np.maximum(self.starts[index], ends - max_items)
        lengths = ends - begins
        places = begins[:, None] + np.arange(max(int(lengths.max(initial=0)), 1))
        inside = places < ends[:, None]
        return np.where(inside, self.event_items[np.where(inside, places, 0)], 0).astype(np.int64), lengths

    def taken(self, index: np.ndarray) -> np.ndarray:
        """(b, X) int64 the distinct items that the users of the cases `index` had before, -1 after the last: all of
        them, however far back, for what a user had is what lists leave out.
        """
        history, lengths = self.histories(index, int((self.rows[index] - self.starts[index]).max(initial=0)))
        ordered = np.sort(np.where(np.arange(history.shape[1]) < lengths[:, None], history, -1), axis=1)[:, ::-1]
        repeats = np.zeros(ordered.shape, dtype=bool)
        repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        kept = np.sort(np.where(repeats, -1, ordered), axis=1)[:, ::-1]
        return np.ascontiguousarray(kept[:, : max(int((kept >= 0).sum(axis=1).max(initial=0)), 1)])

    def sample(self, size: int, rng: np.random.Generator) -> "Cases":
        """At most `size` of the cases, drawn without replacement, in the order of the log."""
        if len(self) <= size:
            return self
        return self.take(np.sort(rng.choice(len(self), size=size, replace=False)))

    def take(self, index: np.ndarray | slice) -> "Cases":
        """Some of the cases."""
        parts = {name: getattr(self, name)[index] for name in ("users", "targets", "rows", "starts")}
        return replace(self, **parts)


@dataclass(frozen=True, slots=True)
class Split:
    """The part of every event."""

    parts: np.ndarray
    """(E,) uint8, position in PARTS."""
    scheme: str
    """leave-one-out, global-time or column."""

    def mask(self, *parts: Part) -> np.ndarray:
        """(E,) bool: the event belongs to one of `parts`."""
        return np.isin(self.parts, [PARTS.index(part) for part in parts])

    def counts(self) -> dict[str, int]:
        """Number of events in each part."""
        return {part: int((self.parts == i).sum()) for i, part in enumerate(PARTS)}

    def sequences(self, data: Dataset, *parts: Part) -> Sequences:
        """The events of `parts`, user by user; users without any are left out."""
        rows = np.flatnonzero(self.mask(*parts))
        users = data.event_users[rows]
        first = np.flatnonzero(np.diff(users, prepend=-1))
        return Sequences(
            items=data.event_items[rows],
            offsets=np.append(first, len(rows)).astype(np.int64),
            users=users[first],
            rows=rows.astype(np.int64),
            profiles=data.profiles,
        )

    def cases(self, data: Dataset, part: Part) -> Cases:
        """One case for each event of `part` that has a history; the history is all that the user did before."""
        rows = np.flatnonzero(self.mask(part))
        starts = data.user_offsets[data.event_users[rows]]
        rows, starts = rows[rows > starts], starts[rows > starts]
        return Cases(
            users=data.event_users[rows],
            targets=data.event_items[rows],
            rows=rows.astype(np.int64),
            starts=starts,
            event_items=data.event_items,
            profiles=data.profiles,
        )


LEARNT: tuple[Part, ...] = ("train", "align")
"""The parts that the rows of a comparison have learnt from once they are aligned."""


def learnt_counts(data: Dataset, split: Split) -> np.ndarray:
    """(N,) int64 interactions of each item in the parts LEARNT: what popularity and coldness are measured by."""
    return np.bincount(data.event_items[split.mask(*LEARNT)], minlength=data.n_items)


def make_split(data: Dataset, settings: SplitSettings) -> Split:
    """Divide the log.

    Raises: DatasetError where the scheme needs a column that the log lacks or leaves a part empty.
    """
    scheme = settings.scheme
    if scheme == "auto":
        scheme = "column" if SPLIT in data.events.columns else "leave-one-out"
    if scheme == "column":
        parts = _from_column(data)
    elif scheme == "leave-one-out":
        parts = _leave_one_out(data)
    else:
        parts = _global_time(data, settings)
    parts = _reserve(data, parts, settings)
    split = Split(parts=parts, scheme=scheme)
    for part in ("train", "test"):
        if split.counts()[part] == 0:
            raise DatasetError(
                f"the {scheme} split leaves no event for {part} (users have "
                f"{data.n_events / data.n_users:.1f} events on average); expected users with at least 3 events"
            )
    return split


def _from_column(data: Dataset) -> np.ndarray:
    if SPLIT not in data.events.columns:
        raise DatasetError(
            "scheme 'column' needs a column 'split' in interactions.parquet (train, align, valid, test); "
            "add it, or choose leave-one-out or global-time"
        )
    codes = data.events[SPLIT].replace_strict({part: i for i, part in enumerate(PARTS)}, return_dtype=pl.UInt8)
    return codes.to_numpy().copy()


def _leave_one_out(data: Dataset) -> np.ndarray:
    """The last event of a user tests, the one before validates; users with fewer than 3 events only train."""
    parts = np.zeros(data.n_events, dtype=np.uint8)
    lengths = np.diff(data.user_offsets)
    ends = data.user_offsets[1:][lengths >= 3]
    parts[ends - 1] = PARTS.index("test")
    parts[ends - 2] = PARTS.index("valid")
    return parts


def _global_time(data: Dataset, settings: SplitSettings) -> np.ndarray:
    """The last shares of the time line; events of the same time never fall on both sides of a cut."""
    times = data.events[TIMESTAMP].rank("dense").to_numpy()  # ranks: some types of time have no numpy form
    ordered, last = np.sort(times), len(times) - 1
    first_test = ordered[min(int(len(times) * (1 - settings.test_share)), last)]
    first_valid = ordered[min(int(len(times) * (1 - settings.test_share - settings.valid_share)), last)]
    parts = np.zeros(data.n_events, dtype=np.uint8)
    parts[times >= first_valid] = PARTS.index("valid")
    parts[times >= first_test] = PARTS.index("test")
    return parts


def _reserve(data: Dataset, parts: np.ndarray, settings: SplitSettings) -> np.ndarray:
    """Move training events to `align`, as `settings.reserve` says; a log that marks its own keeps them."""
    train, align = PARTS.index("train"), PARTS.index("align")
    if settings.reserve == "none" or (parts == align).any():
        return parts
    parts = parts.copy()
    rows = np.flatnonzero(parts == train)
    users = data.event_users[rows]
    if settings.reserve == "event":
        last_of_user = np.flatnonzero(np.diff(users, append=-1))
        has_more = np.bincount(users, minlength=data.n_users)[users[last_of_user]] >= 2
        parts[rows[last_of_user[has_more]]] = align
    else:
        trained = np.unique(users)
        count = round(settings.reserve_share * len(trained))
        if count == 0:
            raise SettingsError(
                f"reserve_share {settings.reserve_share} of {len(trained)} users is none; give a larger share"
            )
        chosen = np.random.default_rng(settings.seed).choice(trained, size=count, replace=False)
        parts[rows[np.isin(users, chosen)]] = align
    return parts


def write_split(folder: Path, split: Split, settings: SplitSettings, dataset_hash: str) -> None:
    """Save a split as an artefact."""
    with write_artifact(
        folder,
        "split",
        made_from={"dataset": dataset_hash},
        settings=to_json(settings),
        seed=settings.seed,
        sizes={"scheme": split.scheme, **split.counts()},
    ) as fresh:
        pl.DataFrame({"part": split.parts}).write_parquet(fresh / "parts.parquet")


def read_split(folder: Path) -> Split:
    """Read a split back. Raises: ArtifactError."""
    manifest = read_manifest(folder, "split")
    try:
        parts = pl.read_parquet(folder / "parts.parquet")["part"].to_numpy()
    except UNREADABLE as error:
        raise ArtifactError(f"{folder / 'parts.parquet'} cannot be read ({error}); make the split again") from error
    return Split(parts=parts, scheme=str(manifest.sizes["scheme"]))
