"""A policy over titles of uneven length goes through the whole pipeline without a line changed elsewhere."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sagerec
from sagerec.catalogue.splits import SplitSettings
from sagerec.config import to_json
from sagerec.decoding.beam import exact_lists
from sagerec.decoding.rollouts import RolloutSettings, roll_out
from sagerec.decoding.slates import slate_logprobs, write_slates
from sagerec.errors import SettingsError
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.files import read_record
from sagerec.policies.registry import PolicyKind, make_policy, register_policy
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import align, audit, evaluate, make_actions, prepare, train
from sagerec.study import CompareSettings, StudySettings, run_study
from tests.conftest import SMALL_RUN, SMALL_TRAIN
from tests.test_alignment import QUICK, metrics_of
from tests.title_policy import TitleSettings, TitleTable, TitleTableSettings, register, small_title_policy

TITLES = [" ".join(words) for n in (1, 2, 4) for words in itertools.product(("red", "blue", "tea"), repeat=n)][:45]
register()


def item_logprobs(policy: TitleTable, last: int, barred: set[int]) -> torch.Tensor:
    """(N,) the twin: log P of each title after an item, word by word, over the words that lead to a title left."""
    space, found = policy.space, torch.full((policy.space.n_items,), -torch.inf)
    sequences = [space.sequence(item) for item in range(space.n_items)]
    for item in set(range(space.n_items)) - barred:
        total, word = 0.0, policy.words
        for place, token in enumerate(sequences[item]):
            legal = sorted(
                {s[place] for i, s in enumerate(sequences) if i not in barred and s[:place] == sequences[item][:place]}
            )
            logits = policy.table[last, legal] + policy.bigram[word, legal]
            total += float(logits.log_softmax(0)[legal.index(token)].detach())
            word = token
        found[item] = total
    return found


def test_lists_slates_and_rollouts_of_titles_equal_brute_force() -> None:
    policy = small_title_policy(TITLES)
    items, lengths = torch.tensor([[3, 9], [7, 0], [30, 4]]), torch.tensor([2, 1, 2])
    last, excluded = [9, 7, 4], torch.tensor([[3, 9], [7, -1], [30, 4]])
    lists = exact_lists(policy, items, lengths, k=8, beams=8, excluded=excluded)
    assert bool(lists.exact.all())
    for user in range(3):
        scores = item_logprobs(policy, last[user], set())
        scores[excluded[user][excluded[user] >= 0]] = -torch.inf
        torch.testing.assert_close(lists.logprobs[user], scores.topk(8).values, rtol=1e-4, atol=1e-4)
    found = roll_out(policy, items, lengths, RolloutSettings(k=3, slates=4), excluded=excluded)
    for user, slate in itertools.product(range(3), range(4)):
        before, barred = last[user], {i for i in excluded[user].tolist() if i >= 0}
        for place, item in enumerate(found.items[user, slate].tolist()):
            assert item not in barred
            expected = item_logprobs(policy, before, barred)[item]
            assert float(found.scores()[user, slate, place].detach()) == pytest.approx(float(expected), abs=1e-4)
            before, barred = item, barred | {item}
    again = slate_logprobs(policy, items, lengths, found.items, excluded=excluded).tokens
    torch.testing.assert_close(again.logprobs.detach(), found.tokens.logprobs.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(again.item, found.tokens.item)
    assert len({len(policy.space.sequence(item)) for item in range(45)}) == 3


def test_draws_follow_the_distribution_of_titles() -> None:
    """20,000 titles of one context, drawn by one uniform each: shares within 5 standard errors of brute force."""
    policy, n = small_title_policy(TITLES), 20_000
    drawn = write_slates(
        policy, torch.tensor([[3]]), torch.tensor([1]), k=1, slates=n, generator=torch.Generator().manual_seed(0)
    )
    p = item_logprobs(policy, 3, set()).exp().double()
    share = torch.bincount(drawn.items.flatten(), minlength=45).double() / n
    assert bool(((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-4).all())


def test_the_loss_of_titles_is_their_log_probability() -> None:
    policy = small_title_policy(TITLES)
    items, targets = torch.tensor([[3, 9, 0], [7, 2, 5]]), torch.tensor([[9, 4, 0], [2, 5, 11]])
    counted = torch.tensor([[True, True, False], [True, True, True]])
    expected = [item_logprobs(policy, int(i), set())[t] for i, t in zip(items[counted], targets[counted], strict=True)]
    loss = policy.next_item_loss(items, targets, counted)
    assert float(loss.detach()) == pytest.approx(-float(torch.stack(expected).mean()), rel=1e-5)


@pytest.fixture(scope="module")
def title_run(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run over the small store whose policy writes titles, supervised, and aligned with items and with slates."""
    run = prepare(store_folder, tmp_path_factory.mktemp("titles") / "run", SplitSettings(reserve="event"))
    make_actions(run, TitleSettings())
    train(run, TitleTableSettings(), replace(SMALL_TRAIN, learning_rate=0.05, epochs=4))
    common: dict[str, Any] = {"reward": ("click=1",), "sft_weight": 0.0, "validations": 0, "learning_rate": 0.05}
    align(run, replace(QUICK, beam_slates=0, epochs=16, **common))
    align(run, replace(QUICK, k=3, credit="item", epochs=16, **common), name="slates")
    return open_run(run.folder)


def test_titles_are_trained_aligned_evaluated_and_recommended(title_run: Run) -> None:
    settings = EvaluateSettings(k=(5, 10), beams=10, bootstrap_samples=100)
    reports = {n: evaluate(title_run, settings, name=n) for n in ("policy", "policy-sage", "policy-slates")}
    for report in reports.values():
        assert report["proven_exact"] == 1.0
        assert report["metrics"]["invalid_rate@10"]["value"] == report["metrics"]["duplicate_rate@10"]["value"] == 0
    for name in ("policy-sage", "policy-slates"):
        earned = [line["reward/click"] for line in metrics_of(title_run, name)]
        assert np.mean(earned[-3:]) > 1.1 * np.mean(earned[:2]), name
    assert {finding.stage for finding in audit(title_run)} == {"titles", "policy", "policy-sage", "policy-slates"}
    manifest = title_run.manifest("policy").settings["policy"]
    assert manifest == {"kind": "title-table", **to_json(TitleTableSettings())}
    recommender = sagerec.load(title_run.folder, policy="policy-sage")
    history = title_run.data.item_ids.external([1, 2, 3])
    for slate in (False, True):
        table = recommender.recommend(history, k=4, slate=slate)
        assert len(table) == 4
        assert not set(table["item_id"]) & set(history)


def test_a_study_of_titles(store_folder: Path, tmp_path: Path) -> None:
    settings = CompareSettings(
        StudySettings(objectives=("sage",), baselines=("popularity",), seeds=1, trials=1),
        replace(
            SMALL_RUN,
            ids=TitleSettings(),  # type: ignore[arg-type]
            policy=TitleTableSettings(),  # type: ignore[arg-type]
            evaluate=EvaluateSettings(k=(10,), beams=20, bootstrap_samples=100),
        ),
        replace(QUICK, epochs=1, reward=("hit=1", "click=1")),
    )
    record = run_study(store_folder, tmp_path / "study", settings)
    assert [row["name"] for row in record["rows"]] == ["supervised", "all-at-once", "sft", "sage", "popularity"]
    assert "titles" in read_record(tmp_path / "study" / "study.json")["hashes"]


def test_names_that_are_taken_and_unknown_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="a policy of the kind 'lazy-decoder' exists"):
        register_policy(PolicyKind("lazy-decoder", TitleTableSettings, TitleTable))
    with pytest.raises(
        SettingsError,
        match="no policy has settings of type int; expected one of ItemScoresSettings, Lazy",
    ):
        make_policy(small_title_policy(TITLES).space, 3)
