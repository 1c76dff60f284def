"""Tasks in parallel processes, that end with the process that started them."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context, parent_process
from typing import TypeAlias

import torch

from sagerec.progress import progress_bar

logger = logging.getLogger(__name__)
Task: TypeAlias = Callable[[int, str], str]
"""Does something with so many threads on a device, and returns its name."""


def do_tasks(tasks: Sequence[tuple[Task, str]], processes: int) -> None:
    """Run tasks on the devices that they ask for, `processes` at a time; of those on `auto` each has the next GPU."""
    threads = max(1, torch.get_num_threads() // processes)
    gpus = torch.cuda.device_count()
    devices = [
        wanted if wanted != "auto" else f"cuda:{i % gpus}" if gpus else "cpu" for i, (_, wanted) in enumerate(tasks)
    ]
    calls = [partial(task, threads, device) for (task, _), device in zip(tasks, devices, strict=True)]
    with progress_bar("study", len(calls)) as bar:
        for done, name in enumerate(_finished(calls, processes), start=1):
            bar.update(done, name)
            logger.info("%s is done; %d of %d left", name, len(calls) - done, len(calls))


def _end_with_parent() -> None:
    """End this process when the one that started it does: nothing trains on for a study that was killed."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def worker_pool(processes: int) -> ProcessPoolExecutor:
    """Fresh processes that end with this one."""
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _finished(calls: Sequence[Callable[[], str]], processes: int) -> Iterator[str]:
    """Names of tasks as they are done: here one after another, or in several processes."""
    if processes == 1:
        yield from (call() for call in calls)
        return
    with worker_pool(processes) as pool:
        try:
            for future in as_completed([pool.submit(call) for call in calls]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
