"""Every file of a run, damaged in every way: one line, or the same answer; never a traceback, never another answer."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagerec import load
from sagerec.artifacts import MANIFEST
from sagerec.catalogue.splits import SplitSettings
from sagerec.errors import SagerecError
from sagerec.report.page import write_report
from sagerec.run.folder import open_run
from sagerec.run.stages import align, audit, diagnose_lists, evaluate, run_all
from sagerec.training.settings import AlignSettings
from tests.conftest import SMALL_RUN

Damage = Callable[[bytes, np.random.Generator], bytes | None]


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data)))]


def flip_bit(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def append(data: bytes, rng: np.random.Generator) -> bytes:
    return data + b"\0"


def change_dtype(data: bytes, rng: np.random.Generator) -> bytes | None:
    """A valid .npy of the same values as 64-bit integers, which no file of ours holds."""
    if not data.startswith(b"\x93NUMPY"):
        return None
    array = np.load(io.BytesIO(data), allow_pickle=False)
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.int8 if array.dtype == np.int64 else np.int64))
    return buffer.getvalue()


def change_value(data: bytes, rng: np.random.Generator) -> bytes | None:
    """Valid JSON with one value, anywhere, of another type."""
    try:
        values = json.loads(data)
    except ValueError:
        return None
    places = list(_places(values))
    holder, key = places[int(rng.integers(len(places)))]
    others: list[Any] = [None, "text", -1, 1e9, [], {}, True]
    holder[key] = next(v for v in rng.permutation(np.array(others, dtype=object)) if v != holder[key])
    return json.dumps(values).encode()


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    for key in range(len(values)) if isinstance(values, list) else values:
        yield values, key
        if isinstance(values[key], (dict, list)):
            yield from _places(values[key])


def be_another_object(data: bytes, rng: np.random.Generator) -> bytes | None:
    return [b"[]", b"null", b"3", b"{}"][int(rng.integers(4))] if data[:1] in (b"{", b"[") else None


DAMAGES: tuple[Damage, ...] = (truncate, flip_bit, flip_bit, append, change_dtype, change_value, be_another_object)


@pytest.fixture(scope="module")
def whole(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an aligned policy, its report too, and nothing that has a random part left to compute."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_all(store_folder, folder, replace(SMALL_RUN, split=SplitSettings(reserve="event")))
    run = open_run(folder)
    align(run, AlignSettings(epochs=1, slates=4, round_users=64, batch_users=32, max_contexts=32))
    evaluate(run, SMALL_RUN.evaluate, name="policy-sage")
    return folder


def answers(folder: Path) -> dict[str, Any]:
    """What a user is told by every reader of a run: an answer, or the line of an error."""
    found: dict[str, Any] = {}

    def ask(name: str, question: Callable[[], Any]) -> None:
        try:
            found[name] = question()
        except SagerecError as error:
            found[name] = error

    def recommend(policy: str) -> Any:
        recommender = load(folder, policy=policy)
        return recommender.recommend(recommender.item_ids.external([3, 5, 8]), k=5).rows()

    ask("policy", lambda: recommend("policy"))
    ask("policy-sage", lambda: recommend("policy-sage"))
    ask(
        "diagnose",
        lambda: {n: d.outcomes for n, d in diagnose_lists(open_run(folder), ["policy", "policy-sage"]).items()},
    )
    ask("audit", lambda: [finding.counts for finding in audit(open_run(folder))])
    ask("report", lambda: write_report(folder).read_text())
    return found


@pytest.mark.parametrize("damage", range(len(DAMAGES)))
def test_a_damaged_file_is_told_or_changes_nothing(whole: Path, tmp_path: Path, damage: int) -> None:
    """In every file that a run is read from; at least the manifest's and the file's own reader must have told."""
    right = answers(whole)
    assert not [a for a in right.values() if isinstance(a, SagerecError)], right
    rng = np.random.default_rng(damage)
    folder, told = tmp_path / "run", 0
    shutil.copytree(whole, folder)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.suffix not in (".html", ".svg"))
    for name in files:
        data = (whole / name).read_bytes()
        if (changed := DAMAGES[damage](data, rng)) is None or changed == data:
            continue
        (folder / name).write_bytes(changed)
        for question, answer in answers(folder).items():
            if isinstance(answer, SagerecError):
                assert "\n" not in str(answer).strip()
                told += 1
            else:
                assert answer == right[question], (name, question, answer)
        shutil.copy2(whole / name, folder / name)
    assert told >= len(files) if damage < 4 else told


def test_a_copy_is_as_good_as_the_original(whole: Path, tmp_path: Path) -> None:
    """Other times of change, the same bytes."""
    shutil.copytree(whole, tmp_path / "run", copy_function=shutil.copyfile)
    assert answers(tmp_path / "run") == answers(whole)


def test_a_missing_file_is_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for name in (
        "policy/model.safetensors",
        "semantic_ids/ids.safetensors",
        "dataset/items.parquet",
        f"split/{MANIFEST}",
    ):
        (tmp_path / "run" / name).rename(tmp_path / "kept")
        with pytest.raises(SagerecError, match=name.split("/")[-1].replace(".", r"\.")):
            load(tmp_path / "run")
        (tmp_path / "kept").rename(tmp_path / "run" / name)
