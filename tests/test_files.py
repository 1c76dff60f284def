"""Whole or not there: atomic writes, locks between processes, and what a killed process leaves."""

import logging
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sagerec.errors import ArtifactError
from sagerec.files import (
    locked,
    read_json,
    read_record,
    recover,
    refuse_other,
    replace_folder,
    write_record,
    write_text,
)
from tests.conftest import ENVIRONMENT
from tests.kills import leftovers, run_until


def fill(folder: Path, text: str) -> None:
    with replace_folder(folder) as fresh:
        (fresh / "a.txt").write_text(text)
        (fresh / "deep").mkdir()
        (fresh / "deep" / "b.txt").write_text(text * 2)


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_survives_a_kill_before_every_operation(tmp_path: Path) -> None:
    """Old or new, never none; and the next writer, or reader, leaves nothing lying about."""
    target = tmp_path / "thing"
    fill(target, "old")
    done, operations = run_until(lambda: fill(target, "new"), tmp_path)
    assert done
    assert operations >= 8
    kept = set()
    for number in range(1, operations + 1):
        fill(target, "old")
        done, _ = run_until(lambda: fill(target, "new"), tmp_path, number)
        assert not done, f"operation {number} was not reached"
        recover(target)  # what a reader does where the folder is not there
        kept.add(content(target)["a.txt"])
        fill(target, "newer")
        assert content(target) == {"a.txt": "newer", "deep/b.txt": "newernewer"}
        assert leftovers(tmp_path) == []
    assert kept == {"old", "new"}


def test_a_file_survives_a_kill_before_every_operation(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    _, operations = run_until(lambda: write_record(path, {"a": 2}), tmp_path)
    assert operations >= 4
    for number in range(1, operations + 1):
        write_record(path, {"a": 1})
        run_until(lambda: write_record(path, {"a": 2}), tmp_path, number)
        assert read_record(path)["a"] in (1, 2)
        write_record(path, {"a": 3})
        assert leftovers(tmp_path) == []


def test_a_folder_is_readable_as_its_umask_has_it(tmp_path: Path) -> None:
    """Weights are for whoever may read the folder: the library that writes them gives them to their owner alone."""
    before = os.umask(0o027)
    try:
        with replace_folder(tmp_path / "out") as fresh:
            (fresh / "in").mkdir()
            save_file({"w": np.zeros(2)}, fresh / "in" / "w.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "in" / "w.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    def fail() -> None:
        with replace_folder(tmp_path / "thing") as fresh:
            (fresh / "a.txt").write_text("half")
            raise OSError("full")

    fill(tmp_path / "thing", "old")
    with pytest.raises(OSError, match="full"):
        fail()
    assert content(tmp_path / "thing")["a.txt"] == "old"
    assert leftovers(tmp_path) == []


def test_a_lock_may_be_taken_again_by_its_holder(tmp_path: Path) -> None:
    with locked(tmp_path / "x"), locked(tmp_path / "x"):
        write_text(tmp_path / "x", "text")
        assert leftovers(tmp_path) == [".x.lock"]
    assert leftovers(tmp_path) == []


HOLD = """
import sys, time
from pathlib import Path
from sagerec.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_the_second_waits_and_says_for_whom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "thing"
    command = [sys.executable, "-c", HOLD, str(target), "1"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        caplog.set_level(logging.INFO)
        with locked(target):
            assert holder.wait(timeout=30) == 0
            assert leftovers(tmp_path) == [".thing.lock"], "its lock, and not the file that the holder took away"
    assert f"{target} is being written by process {holder.pid} on " in caplog.text
    assert leftovers(tmp_path) == []


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    command = [sys.executable, "-c", HOLD, str(target), "60"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()
    begun = time.monotonic()
    fill(target, "new")
    assert time.monotonic() - begun < 10
    assert leftovers(tmp_path) == []


def add_lines(path: Path, times: int) -> None:
    """Read, add, write: without the lock, lines of others get lost."""
    for _ in range(times):
        with locked(path):
            write_text(path, path.read_text() + f"{os.getpid()}\n" if path.exists() else "")


def test_writers_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add_lines, args=(path, 30)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(path.read_text().splitlines()) == 120
    assert leftovers(tmp_path) == []


def test_a_record_that_was_edited_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_record(path, {"value": 0.5, "rows": (1, 2)})
    assert read_record(path) == {"value": 0.5, "rows": [1, 2]}
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        read_record(path)
    for text in ("[]", "null", "3", '"x"', "{}", '{"content_hash": 3}', '{"value": 1}'):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=r"x\.json (holds|was changed)"):
            read_record(path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b"1" * 5000, b"{'a': 1}"])
def test_what_is_no_json_is_told_in_a_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"^\S+x\.json is not JSON"):
        read_json(tmp_path / "x.json")


def test_only_what_bears_the_mark_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page"
    refuse_other(path, "MARK", "a page")
    path.write_bytes(b"\xff precious")
    with pytest.raises(ArtifactError, match="exists and is not a page, so it is left alone"):
        refuse_other(path, "MARK", "a page")
    path.write_text("x MARK x")
    refuse_other(path, "MARK", "a page")
    with pytest.raises(ArtifactError, match="is a folder"):
        refuse_other(tmp_path, "MARK", "a page")
