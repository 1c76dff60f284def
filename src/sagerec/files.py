"""Files and folders that are whole or not there: written beside their place under a lock, then renamed.

Beside NAME may stand `.NAME.lock` (held by the process that writes it), `.NAME.fresh` (what it writes) and `.NAME.old`
(what that takes the place of). Who locks NAME next brings a replacement that was cut short to its end and clears the
rest away, so that nothing stays that a killed process left.
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging import getLogger
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sagerec.errors import ArtifactError

logger = getLogger(__name__)
CONTENT_HASH = "content_hash"
_held = threading.local()


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold a file or folder for writing; another process that wants it waits, and says for whom.

    What a killed process left beside it is put right first. A process may lock again what it holds.
    """
    target = target.absolute()
    held: set[Path] = _held.__dict__.setdefault("targets", set())
    if target in held:
        yield
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _acquire(target)
    held.add(target)
    try:
        _settle(target)
        yield
    finally:
        held.discard(target)
        _beside(target, "lock").unlink(missing_ok=True)
        lock.release()


def _acquire(target: Path) -> FileLock:
    """The lock of `target`, once it is free; the file of a lock goes when it is released."""
    path = _beside(target, "lock")
    while True:
        opened: list[int] = []
        lock = FileLock(path, on_acquired=opened.append)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = _read_holder(path)
            logger.info("%s is being written by %s; waiting until it is done", target, holder)
            lock.acquire()
        if _is_at(opened[0], path):
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:500]
            with suppress(OSError):  # a full disk: who holds it is not told
                os.ftruncate(opened[0], 0)
                os.pwrite(opened[0], f"process {os.getpid()} on {platform.node()}: {command}".encode(), 0)
            return lock
        lock.release()  # the one before let it go, and its file, while this one waited


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") or "another process"
    except OSError:
        return "another process"


def _settle(target: Path) -> None:
    """Finish a replacement that was cut short between its two renames, and clear away the rest."""
    fresh, old = _beside(target, "fresh"), _beside(target, "old")
    if old.exists() and not target.exists():
        (fresh if fresh.exists() else old).replace(target)
    for path in (fresh, old):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(target: Path) -> None:
    """Bring a replacement of `target` that was cut short to its end; readers call it where the target is not there."""
    if not target.exists() and _beside(target, "old").exists():
        with locked(target):
            pass


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Give a fresh folder beside `target`; on success it takes target's place, on failure it is removed."""
    with locked(target):
        fresh, old = _beside(target, "fresh"), _beside(target, "old")
        try:
            fresh.mkdir()
            yield fresh
            readable = fresh.stat().st_mode & 0o666  # safetensors are written for their owner alone
            for path in fresh.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    path.chmod(readable)
            if target.exists():
                target.replace(old)
            fresh.replace(target)
        finally:
            _settle(target)


@contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write; on success it takes target's place, so that none reads half a file."""
    with locked(target):
        fresh = _beside(target, "fresh")
        try:
            yield fresh
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text, whole or not at all."""
    with replace_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def refuse_other(path: Path, mark: str, what: str) -> None:
    """Raise ArtifactError where `path` exists and holds no `mark`: only what was written here is replaced."""
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; expected the name of {what} to write")
    if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
        raise ArtifactError(f"{path} exists and is not {what}, so it is left alone; give another name or remove it")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises: ArtifactError where the file is missing, cannot be read, or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(f"{path} is not JSON ({error}); remove it and run the stage again") from error


def digest(values: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object that says its own hash, so that no edit of it is read as a result."""
    plain = json.loads(json.dumps(values))
    write_json(path, plain | {CONTENT_HASH: digest(plain)})


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote. Raises: ArtifactError where it is missing, no such record, or was changed."""
    values = read_json(path)
    if not isinstance(values, dict) or CONTENT_HASH not in values:
        got = f"an object without {CONTENT_HASH}" if isinstance(values, dict) else type(values).__name__
        raise ArtifactError(f"{path} holds {got}; expected a record that this version wrote: make it again")
    saved = values.pop(CONTENT_HASH)
    if saved != digest(values):
        raise ArtifactError(f"{path} was changed after it was written; remove it and make it again")
    return values
