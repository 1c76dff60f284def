"""Progress on a terminal; nothing elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(description: str, total: int, *, completed: int = 0) -> Iterator["Bar"]:
    """A bar with count, time and time left on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield Bar(progress, progress.add_task(description, total=total, completed=completed), description)


class Bar:
    """One running task of a progress display."""

    def __init__(self, progress: Progress, task: Any, description: str) -> None:
        self._progress, self._task, self._description = progress, task, description

    def update(self, completed: int, note: str = "", *, total: int | None = None) -> None:
        """Set how much is done, a short note behind the description, and how much there is once it is known."""
        description = f"{self._description} {note}".rstrip()
        self._progress.update(self._task, completed=completed, total=total, description=description)
