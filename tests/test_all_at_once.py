"""The reference: one supervised policy on training and reserved events together."""

from dataclasses import replace
from pathlib import Path

import pytest

from sagerec.cli import main
from sagerec.errors import LeakError, SettingsError
from sagerec.report.material import gather
from sagerec.run.folder import Run
from sagerec.run.stages import align, audit, evaluate, train_all_at_once
from tests.conftest import SMALL_POLICY, SMALL_RUN, SMALL_TRAIN
from tests.test_alignment import QUICK, base_run, run

__all__ = ["base_run", "run"]


def test_it_learns_the_reserved_events_and_no_held_out_one(run: Run) -> None:
    train_all_at_once(run, SMALL_POLICY, SMALL_TRAIN)
    counts = {finding.stage: finding.counts for finding in audit(run)}
    assert counts["policy"] == run.split.counts() | {"align": 0, "valid": 0, "test": 0}
    assert counts["policy-all-at-once"] == run.split.counts() | {"valid": 0, "test": 0}
    assert run.manifest("policy-all-at-once").settings == run.manifest("policy").settings
    (run.folder / "policy-all-at-once").rename(run.folder / "policy-moved")
    (run.folder / "policy").rename(run.folder / "kept")
    (run.folder / "policy-moved").rename(run.folder / "policy")
    with pytest.raises(LeakError, match=r"policy used .* events outside train"):
        audit(run)


def test_it_is_a_reference_and_no_aligned_policy(run: Run) -> None:
    """It stands after the supervised policy in a report, and no alignment takes its name."""
    train_all_at_once(run, SMALL_POLICY, SMALL_TRAIN)
    for name in ("policy", "policy-all-at-once"):
        evaluate(run, SMALL_RUN.evaluate, name=name, device="cpu")
    assert run.aligned() == []
    assert [(row.name, row.kind) for row in gather(run.folder).rows] == [
        ("supervised", "start"),
        ("all-at-once", "reference"),
    ]
    with pytest.raises(SettingsError, match="name is 'all-at-once', which is taken"):
        align(run, replace(QUICK, epochs=1), name="all-at-once")


def test_the_command_line_trains_it_beside_the_policy(run: Run, small_run: Run) -> None:
    small = ["--policy.width", "16", "--policy.heads", "2", "--train.epochs", "1", "--train.device", "cpu"]
    assert main(["train", str(run.folder), *small, "--all-at-once"]) == 0
    assert (run.folder / "policy-all-at-once" / "model.safetensors").is_file()
    before = set(Path(small_run.folder).iterdir())
    with pytest.raises(SettingsError, match=r"the split reserves no event.*--split.reserve event"):
        train_all_at_once(small_run, SMALL_POLICY, SMALL_TRAIN)
    assert set(Path(small_run.folder).iterdir()) == before


def test_an_alignment_starts_from_it_and_makes_it_where_it_does_not_fit(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the settings of RUN/policy but for the device; several processes do not make it side by side."""
    settings = replace(QUICK, start="all-at-once", epochs=1, max_contexts=32, validations=0)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SettingsError, match="several processes need the policy that they start from"):
            align(run, settings)
    assert not (run.folder / "policy-all-at-once").exists()
    name = align(run, settings)
    made = run.manifest("policy-all-at-once")
    assert run.manifest(name).made_from["policy-all-at-once"] == made.content_hash
    train_all_at_once(run, SMALL_POLICY, replace(SMALL_TRAIN, device="auto"))
    elsewhere = run.manifest("policy-all-at-once").content_hash
    align(run, settings)
    assert run.manifest("policy-all-at-once").content_hash == elsewhere, "made on another device, it serves"
    train_all_at_once(run, SMALL_POLICY, replace(SMALL_TRAIN, epochs=1))
    align(run, settings)
    assert run.manifest("policy-all-at-once").settings["train"]["epochs"] == SMALL_TRAIN.epochs
