"""The batcher: who is decoded with whom, bounds, jobs taken back, failures."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from sagerec.serving.batching import Batcher, QueueFullError


@dataclass(frozen=True)
class Word:
    """A job: words of one length are of one group."""

    text: str

    @property
    def group(self) -> tuple[Any, ...]:
        return (len(self.text),)


class Decoder:
    """Answers in capitals, once it may; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.may = threading.Event()

    def __call__(self, jobs: Sequence[Word]) -> list[str]:
        self.batches.append([job.text for job in jobs])
        assert self.may.wait(10)
        if any(job.text == "bad" for job in jobs):
            raise ValueError("a bad word")
        return [job.text.upper() for job in jobs]


def words(*texts: str) -> list[Word]:
    return [Word(text) for text in texts]


def make(decoder: Decoder, *, most: int = 3, queue: int = 6, wait_seconds: float = 0.0) -> Batcher:
    return Batcher(decoder, most_rows=lambda job: most, queue=queue, wait_seconds=wait_seconds)


async def started(decoder: Decoder, batches: int) -> None:
    """Return once so many batches have begun."""
    while len(decoder.batches) < batches:
        await asyncio.sleep(0.001)


def test_jobs_of_a_group_go_together_the_oldest_first() -> None:
    async def work() -> None:
        decoder = Decoder()
        batcher = make(decoder)
        futures = batcher.submit(words("a"))
        await started(decoder, 1)
        futures += batcher.submit(words("bb", "c", "dd", "ee", "ff"))
        decoder.may.set()
        assert await asyncio.gather(*futures) == ["A", "BB", "C", "DD", "EE", "FF"]
        assert decoder.batches == [["a"], ["bb", "dd", "ee"], ["c"], ["ff"]]
        await asyncio.to_thread(batcher.stop)

    asyncio.run(work())


def test_an_idle_batcher_waits_a_moment_for_more() -> None:
    async def work() -> None:
        decoder = Decoder()
        decoder.may.set()
        batcher = make(decoder, wait_seconds=5.0)
        futures = batcher.submit(words("a", "b"))
        await asyncio.sleep(0.05)
        assert decoder.batches == []
        futures += batcher.submit(words("c"))  # full: no more waiting
        assert await asyncio.wait_for(asyncio.gather(*futures), 2) == ["A", "B", "C"]
        assert decoder.batches == [["a", "b", "c"]]
        await asyncio.to_thread(batcher.stop)

    asyncio.run(work())


def test_a_full_queue_takes_none_of_what_does_not_fit() -> None:
    async def work() -> None:
        decoder = Decoder()
        batcher = make(decoder, queue=2)
        first = batcher.submit(words("a"))
        await started(decoder, 1)
        second = batcher.submit(words("b"))
        with pytest.raises(QueueFullError, match="3 queries would wait, of at most 2; come back in 1 s") as full:
            batcher.submit(words("c", "d"))
        assert full.value.retry_seconds == 1
        third = batcher.submit(words("e"))
        decoder.may.set()
        assert await asyncio.gather(*first, *second, *third) == ["A", "B", "E"]
        assert decoder.batches == [["a"], ["b", "e"]]
        await asyncio.to_thread(batcher.stop)

    asyncio.run(work())


def test_no_job_waits_where_those_before_it_take_too_long() -> None:
    async def work() -> None:
        decoder = Decoder()
        batcher = Batcher(decoder, most_rows=lambda job: 1, queue=99, wait_seconds=0, patience_seconds=1.0)
        first = batcher.submit(words("a"))
        await started(decoder, 1)
        batcher._seconds_a_row = 0.6
        second = batcher.submit(words("b"))  # 0 wait
        third = batcher.submit(words("c"))  # 0.6 s
        with pytest.raises(QueueFullError) as full:
            batcher.submit(words("d"))  # 1.2 s
        assert full.value.retry_seconds == 2
        decoder.may.set()
        assert await asyncio.gather(*first, *second, *third) == ["A", "B", "C"]
        await asyncio.to_thread(batcher.stop)

    asyncio.run(work())


def test_what_is_taken_back_holds_no_room() -> None:
    async def work() -> None:
        decoder = Decoder()
        batcher = make(decoder, queue=2)
        first = batcher.submit(words("a"))
        await started(decoder, 1)
        for future in batcher.submit(words("b", "c")):
            future.cancel()
        batcher.forget()
        assert batcher.waiting == 0
        second = batcher.submit(words("d", "e"))
        decoder.may.set()
        assert await asyncio.gather(*first, *second) == ["A", "D", "E"]
        await asyncio.to_thread(batcher.stop)

    asyncio.run(work())


def test_what_is_taken_back_is_not_decoded_and_a_failure_ends_its_batch_alone() -> None:
    async def work() -> None:
        decoder = Decoder()
        batcher = make(decoder)
        first = batcher.submit(words("a"))
        await started(decoder, 1)
        gone, bad, other = batcher.submit(words("b", "bad", "oh"))
        gone.cancel()
        decoder.may.set()
        assert await asyncio.gather(*first) == ["A"]
        with pytest.raises(ValueError, match="a bad word"):
            await bad
        assert await other == "OH"
        assert decoder.batches == [["a"], ["bad"], ["oh"]]
        await asyncio.to_thread(batcher.stop)

    asyncio.run(work())


def test_stopping_answers_what_waits() -> None:
    async def work() -> None:
        decoder = Decoder()
        batcher = make(decoder, most=1)
        futures = batcher.submit(words("a", "b", "c"))
        await started(decoder, 1)
        stopping = asyncio.create_task(asyncio.to_thread(batcher.stop))
        decoder.may.set()
        await stopping
        assert await asyncio.gather(*futures) == ["A", "B", "C"]

    asyncio.run(work())
