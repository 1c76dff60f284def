"""Native text through the whole pipeline: a language model of one's own writes titles, is aligned and compared."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sagerec
from sagerec.actions.semantic_ids.build import SemanticIdSettings
from sagerec.actions.titles import TitleSettings, read_titles
from sagerec.catalogue.dataset import read_dataset
from sagerec.catalogue.splits import SplitSettings
from sagerec.decoding.cases import list_cases
from sagerec.errors import ArtifactError, MissingExtraError, SettingsError
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.policies import small_lm
from sagerec.policies.protocol import AnyPolicy, Policy
from sagerec.policies.registry import PolicySettings, read_policy
from sagerec.policies.registry import inputs as policy_inputs
from sagerec.policies.small_lm import SmallLMSettings, new_language_model, shape_of
from sagerec.report.material import gather
from sagerec.report.model_card import export_model
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import RunSettings, align, audit, evaluate, make_actions, prepare, run_all, train, zero_shot
from sagerec.study import CompareSettings, StudySettings, run_study
from tests.conftest import SMALL_IDS, SMALL_TRAIN
from tests.test_alignment import QUICK

pytest.importorskip("transformers")
SMALL_LM = SmallLMSettings(parameters="60K", vocabulary=400, positions=512)
MEASURED = EvaluateSettings(k=(5, 10), beams=10, bootstrap_samples=100)


@pytest.fixture(scope="module")
def model(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of the store's words."""
    folder = tmp_path_factory.mktemp("lm") / "lm"
    new_language_model(folder, read_dataset(store_folder).texts(), SMALL_LM)
    return folder


def settings_of(model: Path) -> RunSettings:
    return RunSettings(
        split=SplitSettings(reserve="event"),
        actions="text",
        text=TitleSettings(max_tokens=16),
        policy=PolicySettings(kind="causal-lm", model=str(model), max_items=8, free_weight=0.5),
        train=replace(SMALL_TRAIN, epochs=1),
        evaluate=MEASURED,
    )


@pytest.fixture(scope="module")
def text_run(store_folder: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in native text with an aligned policy; tests must not change it."""
    out = tmp_path_factory.mktemp("text") / "run"
    run_all(store_folder, out, settings_of(model))
    align(open_run(out), replace(QUICK, start="supervised"), name="sage")
    return open_run(out)


def test_lists_are_distinct_items_whose_titles_are_unique(text_run: Run) -> None:
    report = text_run.report("evaluation")
    assert report["metrics"]["invalid_rate@10"]["value"] == report["metrics"]["duplicate_rate@10"]["value"] == 0
    assert report["proven_exact"] == 1
    written = read_titles(text_run.folder / "text").written
    assert len(set(written)) == 200
    recommender = sagerec.load(text_run.folder, policy="policy-sage", device="cpu")
    found = recommender.recommend(text_run.data.item_ids.external([3, 9]), k=5)
    assert found["title"].to_list() == [written[i] for i in text_run.data.item_ids.index(found["item_id"])]


def test_alignment_changes_the_policy_and_the_audit_passes(text_run: Run) -> None:
    audit(text_run)
    policies = [text_run.policy(name, device="cpu").state_dict() for name in ("policy", "policy-sage")]
    assert any(not torch.equal(policies[0][name], policies[1][name]) for name in policies[0])
    report = evaluate(text_run, MEASURED, name="policy-sage", device="cpu")
    assert report["metrics"]["recall@10"]["value"] >= 0


def test_free_writing_is_measured(text_run: Run) -> None:
    """Without the trie some texts are no items; with the nearest taken for it, every one is."""
    cases = text_run.split.cases(text_run.data, "valid")
    policy = text_run.policy(device="cpu")
    exact, _ = list_cases(policy, cases, k=5, beams=5, free="exact")
    nearest, _ = list_cases(policy, cases, k=5, beams=5, free="nearest")
    assert (exact < 0).mean() > (nearest < 0).mean()
    assert ((exact == nearest) | (exact < 0)).all()
    report = evaluate(text_run, replace(MEASURED, lists="free", split="valid"), device="cpu")
    assert report["metrics"]["invalid_rate@5"]["value"] == pytest.approx((exact < 0).mean(), abs=0.2)
    # On test it is a report of its own, beside that of the lists with the trie.
    made = evaluate(text_run, MEASURED, device="cpu")
    free = evaluate(text_run, replace(MEASURED, lists="free"), device="cpu")
    assert free["metrics"]["invalid_rate@5"]["value"] > made["metrics"]["invalid_rate@5"]["value"] == 0
    assert text_run.report("evaluation")["metrics"] == made["metrics"]
    rows = {row.name: row for row in gather(text_run.folder).rows}
    assert (rows["supervised"].kind, rows["supervised+free"].kind) == ("start", "start")
    assert list(rows["supervised+free"].against) == ["supervised"]
    legal_only: AnyPolicy = Policy()
    with pytest.raises(SettingsError, match="writes nothing else than items"):
        legal_only.write_freely(torch.zeros(1, 1), torch.ones(1), k=1, beams=1)


def test_alignment_can_write_freely(text_run: Run, tmp_path: Path) -> None:
    """Texts that are no item are counted, earn nothing, and are learnt from; the log knows how many there were."""
    settings = replace(QUICK, epochs=1, reward=("validity=1",), sft_weight=0.0, validations=0)
    run = open_run(shutil.copytree(text_run.folder, tmp_path / "run"))
    align(run, settings, name="free")
    rows = [json.loads(line) for line in (run.folder / "policy-free" / "metrics.jsonl").read_text().splitlines()]
    rounds = [row for row in rows if "invalid_rate" in row]
    assert rounds
    assert all(0 < row["invalid_rate"] == pytest.approx(1 - row["reward/validity"]) for row in rounds)
    one, other = (run.policy(name, device="cpu").state_dict() for name in ("policy", "policy-free"))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    for given in ({"k": 2}, {"top_p": 0.5, "beam_slates": 0}, {"beam_slates": 1}):
        with pytest.raises(SettingsError, match="free writing samples one text a slate"):
            align(run, replace(settings, **given), name="refused")
    legal_only: AnyPolicy = Policy()
    with pytest.raises(SettingsError, match="writes nothing else than items"):
        legal_only.sample_texts(torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, 1), temperature=1.0)


def test_the_saved_folder_is_read_without_the_model_it_came_from(text_run: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = text_run.folder / "policy-sage"
    AutoModelForCausalLM.from_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    settings = text_run.manifest("policy-sage").settings["policy"]
    assert settings["kind"] == "causal-lm"
    read_policy(folder, text_run.space())
    (tmp_path / "manifest.json").write_text((folder / "manifest.json").read_text())
    with pytest.raises(ArtifactError):
        read_policy(tmp_path, text_run.space())


def test_a_policy_is_exported_with_a_card(text_run: Run, tmp_path: Path) -> None:
    """The card has the figures of the evaluation with their intervals, and the folder nothing of the run's records."""
    from transformers import AutoModelForCausalLM

    export_model(text_run, "policy", tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    found = text_run.report("evaluation")["metrics"]["recall@10"]
    assert f"| Recall@10 | {found['value']:.4f} [{found['low']:.4f} – {found['high']:.4f}] |" in card
    assert '"kind": "causal-lm"' in card
    assert not {"manifest.json", "events_used.parquet"} & {p.name for p in (tmp_path / "model").iterdir()}
    assert str(text_run.folder.parent) not in card
    export_model(text_run, "policy-sage", tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for other in (tmp_path / "mine", text_run.folder, text_run.folder / "policy"):
        with pytest.raises(SettingsError, match="left alone"):
            export_model(text_run, "policy", other)
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_a_run_has_one_action_space(text_run: Run) -> None:
    with pytest.raises(SettingsError, match="a run has one action space"):
        make_actions(text_run, SMALL_IDS)
    assert not (text_run.folder / "semantic_ids").exists()


def test_another_model_is_noticed_where_it_is_not_named(text_run: Run, model: Path, tmp_path: Path) -> None:
    """The titles' model is the policy's: its hash is among what the policy is made from, named or not."""
    unnamed = replace(settings_of(model).policy, model=None)
    assert policy_inputs(unnamed, text_run.manifest("text").settings) == policy_inputs(settings_of(model).policy, {})
    zero_shot(text_run, unnamed)


def test_only_language_models_are_exported_or_have_zero_shots(small_run: Run, text_run: Run, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is no language model"):
        export_model(small_run, "policy", tmp_path / "model")
    with pytest.raises(SettingsError, match="expected causal-lm"):
        zero_shot(text_run, PolicySettings())


def test_zero_shot_is_the_model_as_it_comes(text_run: Run, model: Path) -> None:
    from safetensors.torch import load_file

    zero_shot(text_run, settings_of(model).policy)
    weights = (load_file(folder / "model.safetensors") for folder in (text_run.folder / "policy-zero-shot", model))
    assert all(torch.equal(one, other) for one, other in zip(*(own.values() for own in weights), strict=True))
    assert text_run.aligned() == ["policy-sage"]


def test_a_language_model_that_writes_semantic_ids_in_a_study(store_folder: Path, model: Path, tmp_path: Path) -> None:
    """The rows of any study; and Entropy is measured by the clusters that titles have."""
    study = StudySettings(objectives=("sage",), baselines=(), seeds=1, trials=0, bootstrap_samples=100)
    run = replace(settings_of(model), actions="semantic-id", ids=SMALL_IDS)
    align = replace(QUICK, max_contexts=32, slates=4)
    record = run_study(store_folder, tmp_path, CompareSettings(study=study, run=run, align=align))
    assert [row["name"] for row in record["rows"]] == ["supervised", "all-at-once", "sft", "sage"]
    assert record["settings"]["actions"] == "semantic-id"
    assert "<a_0>" in (tmp_path / "run" / "policy-sage-s0" / "tokenizer.json").read_text()


def test_titles_have_the_clusters_of_semantic_ids(text_run: Run, store_folder: Path, tmp_path: Path) -> None:
    """Entropy in native text and over Semantic IDs is of one yardstick."""
    other = prepare(store_folder, tmp_path / "run", SplitSettings(reserve="event"))
    codes = make_actions(other, SemanticIdSettings())
    assert np.array_equal(codes.centroids()[1], text_run.space().centroids()[1])
    assert np.array_equal(codes.first_tokens(), text_run.space().first_tokens())


def test_shapes_of_small_models_are_near_what_is_asked() -> None:
    """By hand: 4096 x 256 + 11 x 5 x 256^2 = 4.65 M of 5 M."""
    assert shape_of(5_000_000, 4096) == (256, 5)
    for wanted in (10**6, 10**7, 10**8):
        width, layers = shape_of(wanted, 4096)
        assert 0.7 < (4096 * width + 11 * layers * width**2) / wanted < 1.4


def test_sizes_that_are_none_are_refused() -> None:
    for text in ("many", "5X", "1", "1000B", ""):
        with pytest.raises(SettingsError, match="expected 10K to 10B"):
            SmallLMSettings(parameters=text)
    assert SmallLMSettings(parameters="0.1m").count == 100_000


def test_without_the_extra_the_first_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    calls: tuple[Any, ...] = (
        lambda: small_lm.train_tokenizer(["a"], 300),
        lambda: sagerec.actions.titles.load_tokenizer(str(tmp_path)),
        lambda: sagerec.policies.language.load_model(str(tmp_path), dtype="float32"),
    )
    for call in calls:
        with pytest.raises(MissingExtraError, match=r'pip install "sagerec\[lm\]"'):
            call()


def test_a_model_without_a_tokenizer_is_refused(store_folder: Path, model: Path, tmp_path: Path) -> None:
    """Of such a folder transformers makes a tokenizer that writes nothing: titles and new codes are refused alike."""
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    run, said = (
        prepare(store_folder, tmp_path / "run", SplitSettings()),
        r"bare', whose tokenizer .*; expected a folder",
    )
    with pytest.raises(SettingsError, match=said):
        make_actions(run, TitleSettings(model=str(bare)))
    make_actions(run, SMALL_IDS)
    with pytest.raises(SettingsError, match=said):
        train(run, PolicySettings(kind="causal-lm", model=str(bare)), SMALL_TRAIN)


def test_a_model_is_found_from_anywhere_and_not_exchanged(
    store_folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative folder is kept by its full path; all events at once are learnt from the model that the policy had."""
    shutil.copytree(model, tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    settings = settings_of(Path("lm"))
    run_all(store_folder, tmp_path / "run", settings)
    run = open_run(tmp_path / "run")
    assert run.manifest("policy").settings["policy"]["model"] == str(tmp_path / "lm")
    assert TitleSettings(model="lm").model == str(tmp_path / "lm")
    assert TitleSettings(model="some/name").model == "some/name"
    monkeypatch.chdir("/")
    shutil.rmtree(tmp_path / "lm")
    other = replace(SMALL_LM, seed=7)
    new_language_model(tmp_path / "lm", read_dataset(store_folder).texts(), other)
    with pytest.raises(ArtifactError, match="made from another model than the one that stands there today"):
        align(run, replace(QUICK, start="all-at-once"), name="mixed")
    assert not (run.folder / "policy-all-at-once").exists()
    align(run, replace(QUICK, start="supervised"), name="own")
