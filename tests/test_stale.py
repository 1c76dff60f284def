"""What was made from an artefact that has been made again is named, and never evaluated, reported or compared."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sagerec import load
from sagerec.baselines.tuning import evaluate_baseline
from sagerec.catalogue.splits import SplitSettings
from sagerec.cli import main
from sagerec.errors import ArtifactError
from sagerec.files import write_record
from sagerec.report.markdown import write_results
from sagerec.report.material import gather
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import align, audit, diagnose_lists, evaluate, make_actions, prepare, refit, run_all, train
from sagerec.training.settings import AlignSettings
from tests.conftest import SMALL_IDS, SMALL_POLICY, SMALL_RUN, SMALL_TRAIN

ALIGN = AlignSettings(
    start="supervised", epochs=1, slates=4, round_users=64, batch_users=32, max_contexts=32, validations=0
)


@pytest.fixture
def run(store_folder: Path, tmp_path: Path) -> Run:
    """An aligned policy with its report; then the supervised policy is trained again, with another rate."""
    settings = replace(SMALL_RUN, split=SplitSettings(reserve="event"))
    run_all(store_folder, tmp_path / "run", settings)
    run = open_run(tmp_path / "run")
    align(run, ALIGN)
    evaluate(run, SMALL_RUN.evaluate, name="policy-sage")
    assert not gather(run.folder).notes
    train(run, SMALL_POLICY, replace(SMALL_TRAIN, learning_rate=0.01))
    evaluate(run, SMALL_RUN.evaluate)
    return open_run(run.folder)


def test_an_aligned_policy_of_an_earlier_one_is_stale_everywhere(
    run: Run, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.stale("policy") is None
    said = "policy-sage was made from an earlier policy; make it again"
    assert run.stale("policy-sage") == said
    with pytest.raises(ArtifactError, match=f"stale: {said}"):
        evaluate(run, SMALL_RUN.evaluate, name="policy-sage")
    with pytest.raises(ArtifactError, match="an earlier artefact; evaluate policy-sage again"):
        diagnose_lists(run, ["policy", "policy-sage"])
    material = gather(run.folder)
    assert [row.name for row in material.rows] == ["supervised"]
    assert material.aligned == []
    notes = " ".join(material.notes)
    assert f"Stale: {said}." in notes
    assert "Stale: evaluation-sage.json measures an earlier policy-sage" in notes
    findings = {finding.stage: finding.stale for finding in audit(run)}
    assert findings == {"semantic_ids": False, "policy": False, "policy-sage": True}
    assert main(["audit", str(run.folder)]) == 0
    assert capsys.readouterr().out.count("stale") == 4, "a word for each part of the log"
    caplog.set_level(logging.WARNING)
    load(run.folder, policy="policy-sage")
    assert f"stale: {said}" in caplog.text
    align(run, ALIGN)
    assert run.stale("policy-sage") is None, "the same command makes it again"


def test_another_split_makes_all_that_follows_stale(store_folder: Path, run: Run) -> None:
    prepare(store_folder, run.folder, SplitSettings(reserve="users"))
    run = open_run(run.folder)
    for name in ("semantic_ids", "policy"):
        assert run.stale(name) == f"{name} was made from an earlier split" + (
            " and semantic_ids; make it again" if name == "policy" else "; make it again"
        )
    with pytest.raises(ArtifactError, match="policy was made from an earlier split and semantic_ids"):
        align(run, ALIGN, name="other")
    make_actions(run, SMALL_IDS)
    assert run.stale("semantic_ids") is None
    assert run.stale("policy") is not None


def test_a_refit_and_a_baseline_of_earlier_ones_are_stale(run: Run) -> None:
    refit(run, SMALL_POLICY, replace(SMALL_TRAIN, learning_rate=0.01))
    evaluate(run, SMALL_RUN.evaluate, name="policy-refit")
    evaluate_baseline(run, "popularity", SMALL_RUN.evaluate)
    assert {row.name for row in gather(run.folder).rows} == {"supervised", "refit", "popularity"}
    train(run, SMALL_POLICY, SMALL_TRAIN)
    make_actions(run, replace(SMALL_IDS, seed=5))
    run = open_run(run.folder)
    assert run.stale("policy-refit") == "policy-refit was made from an earlier semantic_ids and policy; make it again"
    assert gather(run.folder).rows == []


def test_a_study_of_an_earlier_policy_is_stale(run: Run, tmp_path: Path) -> None:
    hashes = run.hashes("dataset", "split", "semantic_ids", "policy")
    shutil.copytree(run.folder, tmp_path / "run-s1")
    other = hashes | {"policy": "of another seed"}
    write_record(tmp_path / "study.json", {"title": "Old", "rows": [], "hashes": hashes | {"run-s1": other}})
    assert "study.json is of an earlier policy" in " ".join(gather(tmp_path).notes), "that of another seed"
    write_record(tmp_path / "study.json", {"title": "Old", "rows": [], "hashes": hashes | {"run-s1": hashes}})
    assert not [note for note in gather(tmp_path).notes if "study.json" in note]
    train(run, SMALL_POLICY, SMALL_TRAIN)
    said = f"{tmp_path}/study.json is of an earlier policy; make it again with: sagerec compare"
    material = gather(tmp_path)
    assert f"Stale: {said}." in material.notes
    assert material.study == {}
    with pytest.raises(ArtifactError, match=f"stale: {said}"):
        write_results(tmp_path / "results.md", {"Old": tmp_path})
