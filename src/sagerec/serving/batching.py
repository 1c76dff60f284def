"""What arrives together is decoded together: a bounded queue, and one thread that decodes.

While nothing is being decoded, the first job waits a moment for others; while something is, what arrives waits for it.
A batch holds jobs of one group, the one that waited longest first, as many as memory has room for.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Groupable(Protocol):
    """What a batch is made of."""

    @property
    def group(self) -> tuple[Any, ...]:
        """Jobs of one group are decoded together."""
        ...


class QueueFullError(Exception):
    """No room for more; `retry_seconds` says when to come back."""

    def __init__(self, waiting: int, most: int, retry_seconds: int) -> None:
        super().__init__(f"{waiting} queries would wait, of at most {most}; come back in {retry_seconds} s")
        self.retry_seconds = retry_seconds


@dataclass(slots=True, eq=False)
class _Entry:
    job: Any
    future: "asyncio.Future[Any]"
    since: float


class Batcher:
    """The queue and its thread, for the event loop that makes it."""

    def __init__(
        self,
        decode: Callable[[Sequence[Any]], list[Any]],
        *,
        most_rows: Callable[[Any], int],
        queue: int,
        wait_seconds: float,
        patience_seconds: float = math.inf,
        on_batch: Callable[[int, float, float], None] = lambda rows, waited, took: None,
    ) -> None:
        """`decode` answers jobs of one group; `most_rows` says how many like one go together. `queue` jobs may wait,
        and none where those before it will take longer than `patience_seconds`. `on_batch` is told rows, seconds that
        the oldest waited, and seconds of decoding.
        """
        self._decode, self._most_rows, self._on_batch = decode, most_rows, on_batch
        self._queue, self._wait_seconds, self._patience_seconds = queue, wait_seconds, patience_seconds
        self._loop = asyncio.get_running_loop()
        self._entries: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._awaited = 1
        self._seconds_a_row = 0.0
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._entries)

    def check_room(self, jobs: int) -> None:
        """Raise QueueFullError where so many more jobs may not wait."""
        waiting = len(self._entries)
        seconds = waiting * self._seconds_a_row
        if waiting + jobs > self._queue or seconds > self._patience_seconds:
            raise QueueFullError(waiting + jobs, self._queue, max(1, math.ceil(seconds)))

    def submit(self, jobs: Sequence[Groupable]) -> "list[asyncio.Future[Any]]":
        """A future for each job; cancel it to take the job back. Raises: QueueFullError, and takes none of them."""
        with self._changed:
            self.check_room(len(jobs))
            now = time.monotonic()
            entries = [_Entry(job, self._loop.create_future(), now) for job in jobs]
            self._entries.extend(entries)
            if len(self._entries) >= self._awaited:
                self._changed.notify()
        return [entry.future for entry in entries]

    def forget(self) -> None:
        """Let jobs go that were taken back: they hold no room."""
        with self._changed:
            self._entries = deque(entry for entry in self._entries if not entry.future.cancelled())

    def stop(self) -> None:
        """Answer what waits, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                idle = not self._entries
                while not self._entries:
                    if self._stopping:
                        return
                    self._changed.wait()
                if idle and self._wait_seconds and not self._stopping:
                    self._awaited = self._most_rows(self._entries[0].job)
                    self._changed.wait(self._wait_seconds)
                    self._awaited = 1
                batch = self._take()
            if batch:
                self._answer(batch)

    def _take(self) -> list[_Entry]:
        """The oldest job and others of its group; jobs that were taken back go."""
        taken: list[_Entry] = []
        rest: deque[_Entry] = deque()
        group, most = None, 0
        for entry in self._entries:
            if entry.future.cancelled():
                continue
            if not taken:
                group, most = entry.job.group, self._most_rows(entry.job)
            if len(taken) < most and entry.job.group == group:
                taken.append(entry)
            else:
                rest.append(entry)
        self._entries = rest
        return taken

    def _answer(self, batch: list[_Entry]) -> None:
        started = time.monotonic()
        results: list[Any]
        try:
            results = self._decode([entry.job for entry in batch])
        except Exception as error:  # what fails in one batch must not end the thread
            results = [error] * len(batch)
        took = time.monotonic() - started
        self._seconds_a_row = 0.8 * self._seconds_a_row + 0.2 * took / len(batch)
        self._on_batch(len(batch), started - batch[0].since, took)
        done = list(zip(batch, results, strict=True))
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, done)


def _deliver(done: list[tuple[_Entry, Any]]) -> None:
    for entry, result in done:
        if entry.future.done():
            continue
        if isinstance(result, Exception):
            entry.future.set_exception(result)
        else:
            entry.future.set_result(result)
