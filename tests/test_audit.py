"""The audit: planted leaks are caught by name, count and first event; and held-out items cannot change what trains."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sagerec.actions.semantic_ids.build import SemanticIds, build_semantic_ids, item_vectors
from sagerec.actions.semantic_ids.embedders import cooccurrence
from sagerec.artifacts import hash_folder, write_artifact
from sagerec.catalogue.audit import (
    EVENTS_USED,
    Finding,
    audit_order,
    audit_stage,
    read_events_used,
    write_events_used,
)
from sagerec.catalogue.dataset import INTERACTIONS, Dataset, read_dataset, write_dataset
from sagerec.catalogue.splits import PARTS, Part, Split, SplitSettings, learnt_counts, make_split
from sagerec.errors import ArtifactError, LeakError
from sagerec.run.folder import Run
from sagerec.run.stages import audit, prepare
from sagerec.training.batches import make_windows
from sagerec.training.supervised import train_policy
from tests.conftest import SMALL_IDS, SMALL_POLICY, SMALL_TRAIN, semantic_ids
from tests.test_dataset import dataset

LOG_IDS = replace(SMALL_IDS, text_weight=0.0, category_weight=0.0)
"""Semantic IDs from the log alone: words cannot leak, and cost the most time."""
ONE_EPOCH = replace(SMALL_TRAIN, epochs=1, validate_every=0)


def make_actions(run: Run, *parts: Part) -> SemanticIds:
    """The Semantic-ID stage, given the events of these parts."""
    events = run.split.sequences(run.data, *parts)
    return build_semantic_ids(
        run.folder / "semantic_ids", run.data, events, LOG_IDS, made_from=run.hashes("dataset", "split")
    )


def make_policy(run: Run, name: str, *parts: Part) -> None:
    """The supervised stage for an epoch, given the events of these parts."""
    made_from = run.hashes("dataset", "split", "semantic_ids")
    events = run.split.sequences(run.data, *parts)
    train_policy(run.folder / name, semantic_ids(run), events, None, SMALL_POLICY, ONE_EPOCH, made_from=made_from)


@pytest.fixture(scope="module")
def clean(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with Semantic IDs of its training events; tests work on copies."""
    run = prepare(store_folder, tmp_path_factory.mktemp("audit") / "run", SplitSettings())
    make_actions(run, "train")
    return run


@pytest.fixture
def run(clean: Run, tmp_path: Path) -> Run:
    """A copy of `clean` to spoil."""
    shutil.copytree(clean.folder, tmp_path / "run")
    return replace(clean, folder=tmp_path / "run")


def leak_message(run: Run, stage: str, counts: str, part: Part, allowed: str = "train") -> str:
    """The expected words, the first event looked up by a plain loop."""
    total = sum(int(word) for word in counts.replace(",", "").split() if word.isdigit())
    row = next(i for i, p in enumerate(run.split.parts) if PARTS[p] == part)
    user, item, time = run.data.events.select("user_id", "item_id", "timestamp").row(row)
    return (
        f"{stage} used {total} events outside {allowed}: {counts}; the first is user {user!r}, item {item!r}, "
        f"time {time}. Give the stage split.sequences(data, 'train') and run it again"
    )


# --- one stage, by hand ---------------------------------------------------------------------------------------------


def small() -> tuple[Dataset, Split]:
    """Users u and v with 4 and 3 events: rows 0 1 train, 2 valid, 3 test; 4 train, 5 valid, 6 test."""
    data = dataset({"u": [("a", 1), ("b", 2), ("c", 3), ("d", 4)], "v": [("b", 1), ("a", 2), ("d", 3)]})
    return data, make_split(data, SplitSettings())


def test_a_clean_stage_by_hand() -> None:
    data, split = small()
    assert audit_stage("ids", np.array([0, 1, 4]), data, split) == Finding(
        "ids", {"train": 3, "align": 0, "valid": 0, "test": 0}, ("train",)
    )
    allowed: tuple[Part, ...] = ("train", "align", "valid")
    assert audit_stage("refit", np.array([0, 1, 2, 4, 5]), data, split, allowed=allowed) == Finding(
        "refit", {"train": 3, "align": 0, "valid": 2, "test": 0}, allowed
    )
    assert audit_stage("none", np.array([], dtype=np.int64), data, split).counts["train"] == 0


def test_a_leaking_stage_by_hand() -> None:
    """Rows 2 and 5 validate, row 6 tests; the first in the order of the log is row 2: user u, item c, time 3."""
    data, split = small()
    with pytest.raises(LeakError) as error:
        audit_stage("ids", np.array([0, 2, 4, 5, 6]), data, split)
    assert str(error.value) == (
        "ids used 3 events outside train: 2 valid, 1 test; the first is user 'u', item 'c', time 3. "
        "Give the stage split.sequences(data, 'train') and run it again"
    )
    with pytest.raises(LeakError) as error:
        audit_stage("policy-refit", np.array([0, 2, 4, 5, 6]), data, split, allowed=("train", "align", "valid"))
    assert str(error.value) == (
        "policy-refit used 1 events outside train, align, valid: 1 test; the first is user 'v', item 'd', time 3. "
        "Give the stage split.sequences(data, 'train') and run it again"
    )


def test_a_reserved_event_is_a_leak_too() -> None:
    """With an event reserved, user u's row 1 aligns; a stage that trained on it saw what alignment must not know."""
    data, _ = small()
    split = make_split(data, SplitSettings(reserve="event"))
    with pytest.raises(
        LeakError, match=r"^policy used 1 events outside train: 1 align; the first is user 'u', item 'b'"
    ):
        audit_stage("policy", np.array([0, 1, 4]), data, split)


def test_events_used_are_saved_sorted_and_once(tmp_path: Path) -> None:
    write_events_used(tmp_path, np.array([5, 2, 5, 0]))
    assert read_events_used(tmp_path).tolist() == [0, 2, 5]


# --- planted leaks --------------------------------------------------------------------------------------------------


def test_semantic_ids_that_saw_validation_are_caught(run: Run) -> None:
    make_actions(run, "train", "valid")
    with pytest.raises(LeakError) as error:
        audit(run)
    n = run.split.counts()["valid"]
    assert n > 100
    assert str(error.value) == leak_message(run, "semantic_ids", f"{n} valid", "valid")


def test_a_policy_that_saw_the_test_is_caught(run: Run) -> None:
    """The Semantic IDs are clean; the policy was given the test events, and the refit as well."""
    n = run.split.counts()["test"]
    make_policy(run, "policy", "train", "test")
    with pytest.raises(LeakError) as error:
        audit(run)
    assert str(error.value) == leak_message(run, "policy", f"{n} test", "test")
    (run.folder / "policy").rename(run.folder / "policy-refit")
    with pytest.raises(LeakError) as error:
        audit(run)
    assert str(error.value) == leak_message(run, "policy-refit", f"{n} test", "test", "train, align, valid")


def test_a_policy_that_saw_validation_is_caught_but_a_refit_may_see_it(run: Run) -> None:
    counts = run.split.counts()
    make_policy(run, "policy", "train", "valid")
    with pytest.raises(LeakError) as error:
        audit(run)
    assert str(error.value) == leak_message(run, "policy", f"{counts['valid']} valid", "valid")
    (run.folder / "policy").rename(run.folder / "policy-refit")
    findings = {finding.stage: finding.counts for finding in audit(run)}
    nothing = {"align": 0, "test": 0}
    assert findings == {
        "semantic_ids": {"train": counts["train"], "valid": 0, **nothing},
        "policy-refit": {"train": counts["train"], "valid": counts["valid"], **nothing},
    }


def test_a_clean_run_passes_and_its_counts_are_those_of_the_split(small_run: Run) -> None:
    """150 users of at least 3 events: one validates and one tests for each; the rest trains both stages."""
    findings = audit(small_run)
    assert [finding.stage for finding in findings] == ["semantic_ids", "policy"]
    for finding in findings:
        assert finding.counts == {"train": small_run.data.n_events - 300, "align": 0, "valid": 0, "test": 0}
        assert finding.allowed == ("train",)


# --- what cannot be audited -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("artefact", "name"), [("split", "parts.parquet"), ("dataset", INTERACTIONS)])
def test_a_changed_split_or_dataset_is_refused(run: Run, artefact: str, name: str) -> None:
    with (run.folder / artefact / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match=f"{artefact}/{name} was changed after it was written"):
        audit(run)


@pytest.mark.parametrize("name", ["ids.safetensors", EVENTS_USED, "trie/token.npy"])
def test_a_changed_file_is_refused(run: Run, name: str) -> None:
    assert len(audit(run)) == 1
    with (run.folder / "semantic_ids" / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError) as error:
        audit(run)
    assert str(error.value) == (
        f"{run.folder}/semantic_ids/{name} was changed after it was written; make {run.folder}/semantic_ids again"
    )


def test_an_artefact_that_does_not_say_what_it_used_is_refused(run: Run) -> None:
    with write_artifact(run.folder / "semantic_ids", "semantic_ids") as fresh:
        (fresh / "ids.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError) as error:
        audit(run)
    assert str(error.value) == (
        f"{run.folder}/semantic_ids/events_used.parquet is missing, so the stage cannot be audited; run it again"
    )


def test_an_artefact_whose_events_cannot_be_read_is_refused(run: Run) -> None:
    with write_artifact(run.folder / "semantic_ids", "semantic_ids") as fresh:
        (fresh / EVENTS_USED).write_bytes(b"no parquet")
    with pytest.raises(ArtifactError) as error:
        audit(run)
    assert str(error.value).startswith(f"{run.folder}/semantic_ids/events_used.parquet cannot be read (")
    assert str(error.value).endswith("); run the stage again")


# --- order in time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "early"),
    [
        (["train", "valid", "train", "test", "train", "test"], "b"),
        (["test", "train", "train", "train", "train", "test"], "a"),
        (["train", "test", "align", "valid", "train", "test"], "b"),
    ],
)
def test_held_out_events_before_training_ones_by_hand(parts: list[str], early: str) -> None:
    """User u's four events a, b, c, d; one of them is held out though a later one trains or aligns."""
    events: dict[str, list[tuple[str, int]]] = {
        "u": [("a", 1), ("b", 2), ("c", 3), ("d", 4)],
        "v": [("a", 1), ("b", 2)],
    }
    data = dataset(events, split=parts)
    with pytest.raises(LeakError) as error:
        audit_order(data, make_split(data, SplitSettings()))
    assert str(error.value) == (
        "1 validation or test events stand before a training event of the same user, the first: user 'u', "
        f"item '{early}'. Training would see the future; mend the split column"
    )


@pytest.mark.parametrize(
    "parts",
    [
        ["train", "align", "valid", "test", "train", "test"],
        ["train", "align", "test", "valid", "test", "test"],
        ["train", "train", "align", "align", "valid", "test"],
    ],
)
def test_held_out_events_after_training_ones_pass(parts: list[str]) -> None:
    events: dict[str, list[tuple[str, int]]] = {
        "u": [("a", 1), ("b", 2), ("c", 3), ("d", 4)],
        "v": [("a", 1), ("b", 2)],
    }
    data = dataset(events, split=parts)
    audit_order(data, make_split(data, SplitSettings()))


def test_a_run_whose_column_holds_the_past_out_is_refused(store_data: Dataset, tmp_path: Path) -> None:
    """The first event of every user tests and the others train: each of the 150 users is one case too early."""
    parts = np.full(store_data.n_events, "train", dtype=object)
    parts[store_data.user_offsets[:-1]] = "test"
    events = store_data.events.with_columns(split=pl.Series(parts.tolist()))
    write_dataset(tmp_path / "log", store_data.items, events)
    run = prepare(tmp_path / "log", tmp_path / "run", SplitSettings())
    with pytest.raises(LeakError, match=r"^150 validation or test events stand before a training event of the same"):
        audit(run)


# --- non-interference -----------------------------------------------------------------------------------------------


def stage_inputs(data: Dataset, split: Split, *parts: Part) -> dict[str, bytes]:
    """Every array that the stages compute with, as bytes, where they are given the events of `parts`."""
    train = split.sequences(data, *parts)
    windows = make_windows(train, SMALL_POLICY.resolved().max_items)
    matrix = cooccurrence(train, data.n_items, LOG_IDS.window)
    arrays: dict[str, Any] = {f"train.{name}": getattr(train, name) for name in ("items", "offsets", "users", "rows")}
    arrays |= {f"windows.{name}": getattr(windows, name) for name in ("items", "begins", "lengths")}
    arrays |= {f"cooccurrence.{name}": getattr(matrix, name) for name in ("data", "indices", "indptr")}
    arrays["item_vectors"] = item_vectors(data, train, LOG_IDS).vectors
    return {name: np.ascontiguousarray(array).tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize(
    "chosen",
    [
        SplitSettings(scheme="leave-one-out"),
        SplitSettings(scheme="global-time"),
        SplitSettings(reserve="event"),
        SplitSettings(reserve="users", reserve_share=0.3),
    ],
    ids=["leave-one-out", "global-time", "reserved events", "reserved users"],
)
def test_other_held_out_items_change_no_input_of_any_stage(
    store_folder: Path, store_data: Dataset, tmp_path: Path, chosen: SplitSettings
) -> None:
    """Every valid, test and aligned item becomes the next item of the catalogue; what trains stays byte for byte.

    The control: a stage that is given the validation events as well does change.
    """
    split = make_split(store_data, chosen)
    held_out = split.mask("align", "valid", "test")
    assert 100 < held_out.sum() < len(held_out)
    other = np.where(held_out, (store_data.event_items + 1) % store_data.n_items, store_data.event_items)
    events = store_data.events.with_columns(item_id=pl.Series(store_data.item_ids.external(other)))
    shutil.copytree(store_folder, tmp_path / "other")
    events.write_parquet(tmp_path / "other" / INTERACTIONS)
    data = read_dataset(tmp_path / "other")
    assert (data.event_items[held_out] != store_data.event_items[held_out]).all()
    assert (make_split(data, chosen).parts == split.parts).all()
    assert stage_inputs(data, split, "train") == stage_inputs(store_data, split, "train")
    leaking, before = stage_inputs(data, split, "train", "valid"), stage_inputs(store_data, split, "train", "valid")
    for name in ("train.items", "windows.items", "cooccurrence.data", "item_vectors"):
        assert leaking[name] != before[name], name
    # What coldness and novelty are measured by knows the reserved events too, which are learnt from, and no others.
    reserved = replace(data, event_items=np.where(split.mask("align"), store_data.event_items, data.event_items))
    assert learnt_counts(reserved, split).tolist() == learnt_counts(store_data, split).tolist()
    assert (learnt_counts(data, split) != learnt_counts(store_data, split)).any() == split.mask("align").any()


def test_other_held_out_items_change_no_byte_of_the_semantic_ids(clean: Run, tmp_path: Path) -> None:
    """From the log with other targets comes the same artefact, file for file."""
    held_out = clean.split.mask("valid", "test")
    other = np.where(held_out, (clean.data.event_items + 1) % clean.data.n_items, clean.data.event_items)
    events = clean.data.events.with_columns(item_id=pl.Series(clean.data.item_ids.external(other)))
    write_dataset(tmp_path / "log", clean.data.items, events)
    run = prepare(tmp_path / "log", tmp_path / "run", SplitSettings())
    assert run.hashes("dataset") != clean.hashes("dataset")
    assert make_actions(run, "train").content_hash == semantic_ids(clean).content_hash
    assert hash_folder(run.folder / "semantic_ids") == hash_folder(clean.folder / "semantic_ids")
