"""Commands in children of their own that kill themselves before a chosen file operation, as a power cut would."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

TOUCHING = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.copyfile"}
"""Audit events of operations that change files, beside opening one for writing."""


def run_until(work: Callable[[], object], folder: Path, operation: int | None = None) -> tuple[bool, int]:
    """Do `work` in a fork that kills itself before the file operation of that number (from 1) below `folder`.

    Returns: whether it ended by itself and well, and how many such operations it began.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        counted = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal counted
            path = arguments[0] if arguments else None
            if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(str(folder)):
                return
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in TOUCHING or writes:
                counted += 1
                if counted == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        with contextlib.suppress(BaseException):
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
            sys.addaudithook(hook)
            work()
            status = 0
        os.write(writer, str(counted).encode())
        os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    counted_by_child = os.read(reader, 20)
    os.close(reader)
    return status == 0, int(counted_by_child or 0)


def leftovers(folder: Path) -> list[str]:
    """Hidden files and unfinished work below a folder."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.startswith(".") or path.name.endswith((".training", ".tmp", ".part"))
    )
