"""Where a stage writes its metrics: `metrics.jsonl` always, TensorBoard if asked; and progress on a terminal.

Every logged metric is defined in `docs/metrics.md`.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from sagerec.errors import MissingExtraError
from sagerec.progress import Bar, progress_bar

__all__ = ["METRICS", "Bar", "JsonLines", "TensorBoard", "Tracker", "Trackers", "open_trackers", "progress_bar"]
METRICS = "metrics.jsonl"


class Tracker(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record named values of a step."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonLines:
    """One JSON object a line; lines after `resume_step` of an earlier, killed run are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    values = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line that was being written when the run was killed
                if values["step"] <= resume_step:
                    kept.append(line + "\n")
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard (extra `tensorboard`)."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "TensorBoard is not installed; install it with: pip install 'sagerec[tensorboard]'"
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def open_trackers(folder: Path, *, tensorboard: bool, resume_step: int) -> Trackers:
    """The trackers of a stage that works in `folder`."""
    trackers: list[Tracker] = [JsonLines(folder / METRICS, resume_step)]
    if tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard", resume_step))
    return Trackers(trackers)
