"""The version that a worker answers with, and how it is swapped: whole, at once, and in all workers.

A reload takes a snapshot of the run, reads and warms it up beside the version in use, and only then swaps. The worker
that was asked writes what it serves to STATE/serving.json; the others read it there. Jobs under way keep their version.
"""

import asyncio
import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from sagerec.errors import ArtifactError, SagerecError
from sagerec.files import locked
from sagerec.serving.answers import answer, resolve
from sagerec.serving.queries import Query
from sagerec.serving.settings import ServeSettings
from sagerec.serving.versions import RECORD, Record, Version, open_version, read_record, take_snapshot, write_record

logger = logging.getLogger(__name__)
FOLLOW_SECONDS, RETRY_SECONDS = 0.25, 2.0
"""How often a worker looks for what another has swapped in, and how long after it could not be opened."""


@dataclass(frozen=True, slots=True)
class Swap:
    """What a reload or a rollback did."""

    version: str
    """What answers now."""
    previous: str | None
    """What a rollback brings back."""
    generation: int
    """Swaps so far, of all workers."""
    changed: bool
    """Whether it is another version than before."""
    seconds: float
    """Time it took, while the old version answered."""


class Store:
    """The current version of one worker."""

    def __init__(self, run: Path, state: Path, settings: ServeSettings) -> None:
        self._run, self._state, self._settings = run, state, settings
        self._swapping = asyncio.Lock()
        self._kept: dict[str, Version] = {}
        self._seen = 0
        self.record: Record | None = None
        self.failure = ""

    @property
    def current(self) -> Version | None:
        """The version that answers; None until it has warmed up."""
        return None if self.record is None else self._kept[self.record.current]

    async def follow(self) -> None:
        """Serve what the record names, now and whenever it changes, until cancelled."""
        while True:
            try:
                changed = (self._state / RECORD).stat().st_mtime_ns
                if changed != self._seen:
                    async with self._swapping:
                        record = await asyncio.to_thread(read_record, self._state)
                        await self._serve(record)
                        self._seen = changed
            except (SagerecError, OSError) as error:
                # Another swap may have come in between: the record is read again.
                self.failure = str(error)
                logger.error("the version asked for cannot be opened: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
            await asyncio.sleep(FOLLOW_SECONDS)

    async def reload(self) -> Swap:
        """Serve the run as it is now. Raises: ArtifactError, and the version in use goes on."""
        started = time.monotonic()
        async with self._swapping:
            before = self.record
            record = await asyncio.to_thread(self._take)
            await self._serve(record)
        return _describe(before, record, started)

    async def rollback(self) -> Swap:
        """Serve the version before the current one, which becomes the one before. Raises: ArtifactError."""
        started = time.monotonic()
        async with self._swapping:
            before = self.record
            record = await asyncio.to_thread(self._take_back)
            await self._serve(record)
        return _describe(before, record, started)

    def _take(self) -> Record:
        """Take a snapshot, see that it answers, and tell the other workers."""
        with locked(self._state / RECORD):
            old = read_record(self._state)
            version = take_snapshot(self._run, self._state, self._settings.policy)
            self._open(version)
            if version == old.current:
                return old
            record = Record(old.generation + 1, version, old.current)
            write_record(self._state, record)
            return record

    def _take_back(self) -> Record:
        with locked(self._state / RECORD):
            old = read_record(self._state)
            if old.previous is None:
                raise ArtifactError("there is no earlier version; expected a reload before")
            self._open(old.previous)
            record = Record(old.generation + 1, old.previous, old.current)
            write_record(self._state, record)
            return record

    def _open(self, version: str) -> None:
        """Have a version at hand, warmed up."""
        if version not in self._kept:
            opened = open_version(self._state, version, self._settings.device)
            warm_up(opened, self._settings)
            self._kept[version] = opened

    async def _serve(self, record: Record) -> None:
        """Swap; versions that neither answer nor may come back are let go."""
        await asyncio.to_thread(self._open, record.current)
        changed = self.record is None or self.record.current != record.current
        self.record, self.failure = record, ""
        for version in self._kept.keys() - {record.current, record.previous}:
            del self._kept[version]
        # What lives as long as a version is no rubbish: to look through it again and again stops all for half a second.
        gc.freeze()
        if changed:
            logger.info("serving version %s", record.current)


def warm_up(version: Version, settings: ServeSettings) -> None:
    """Answer a full batch by each policy: what is slow once is slow now, and what cannot answer never serves."""
    for name, policy in version.policies.items():
        job = resolve(version, Query(history=version.catalogue.ids[: policy.max_items], policy=name))
        answer([job] * job.most_rows(settings))


def _describe(before: Record | None, record: Record, started: float) -> Swap:
    return Swap(
        version=record.current,
        previous=record.previous,
        generation=record.generation,
        changed=before is None or before.current != record.current,
        seconds=round(time.monotonic() - started, 3),
    )
