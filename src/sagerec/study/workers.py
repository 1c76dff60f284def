"""Tasks in parallel processes: in a pool that ends with the process that started it, or on the ranks of `torchrun`.

There the first rank does the study and hands its tasks out; each rank does every n-th, as a process of its own.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from datetime import timedelta
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from sagerec.config import require
from sagerec.errors import SagerecError, TrainingError
from sagerec.progress import progress_bar
from sagerec.training import parallel

logger = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""How long a rank waits for the others: as long as their tasks may take."""
Task: TypeAlias = Callable[[int, str], str]
"""Does something with so many threads on a device, and returns its name."""


def do_tasks(tasks: Sequence[tuple[Task, str]], processes: int) -> None:
    """Run tasks on the devices that they ask for, `processes` at a time; of those on `auto` each has the next GPU.

    Raises: TrainingError where one fails on another rank.
    """
    if dist.is_initialized():
        _share(tasks)
        problems = [(rank, problem) for rank, problem in enumerate(_do_own(tasks)) if problem is not None]
        if problems:
            raise TrainingError(f"process {problems[0][0]} of the study: {problems[0][1]}")
        return
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


def over_ranks(study: Callable[[], T], processes: int) -> T | None:
    """What `study` returns, which is done here; under torchrun by the first rank, and None on the others, which do
    their part of its tasks until it has ended.
    """
    if parallel.launched() == 1:
        return study()
    require(processes == 1, f"processes is {processes}, and torchrun starts {parallel.launched()}; leave it out")
    dist.init_process_group("gloo", timeout=PATIENCE)
    if dist.get_rank():
        while (tasks := _share(None)) is not None:
            _do_own(tasks)
        return None
    try:
        with parallel.alone():
            return study()
    finally:
        with suppress(RuntimeError):  # where a rank is lost
            _share(None)


def _do_own(tasks: Sequence[tuple[Task, str]]) -> list[str | None]:
    """Do this rank's part of tasks; of each rank, what went wrong."""
    problem: str | None = None
    try:
        with parallel.alone():
            for task, wanted in tasks[dist.get_rank() :: dist.get_world_size()]:
                name = task(torch.get_num_threads(), parallel.rank_device(wanted))
                logger.info("%s is done; the other processes do theirs", name)
    except SagerecError as error:
        problem = str(error)
    except Exception as error:
        logger.exception("a task failed")
        problem = repr(error)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return found


def _share(tasks: Any) -> Any:
    """The first rank's tasks, on every rank; None where there are no more."""
    box = [tasks]
    dist.broadcast_object_list(box, src=0)
    return box[0]
