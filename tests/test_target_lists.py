"""Target lists: variety and joining by hand, the loss on what is left by the formula, and that it is learnt."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from sagerec.config import from_json, to_json
from sagerec.errors import SettingsError
from sagerec.policies.item_scores import ItemScoresSettings
from sagerec.policies.lazy_decoder import LazyDecoderSettings
from sagerec.training.settings import TrainSettings
from sagerec.training.supervised import supervised_loss
from sagerec.training.target_lists import cut, join_lists, list_loss, rerank, rest_loss
from tests.test_item_scores import scores_of, small_policy
from tests.test_policy import N, histories


def test_variety_by_hand() -> None:
    """Clusters a a b, log-probabilities -1, -2, -2.5, 1 nat off: item 7, then 9 (-2.5 against -3), then 8; -1 last."""
    items, logprobs = torch.tensor([[7, 8, 9, -1]]), torch.tensor([[-1.0, -2.0, -2.5, -torch.inf]])
    cluster = torch.zeros(10, dtype=torch.int64).index_fill(0, torch.tensor([9]), 1)
    assert rerank(items, logprobs, cluster, variety=1.0)[0, :3].tolist() == [7, 9, 8]
    assert rerank(items, logprobs, cluster, variety=0.0)[0, :3].tolist() == [7, 8, 9]


def test_events_stand_first_and_nothing_twice() -> None:
    listed, is_event = join_lists(torch.tensor([[3, -1, 3]]), torch.tensor([[5, 3, 4, 6]]), k=3)
    assert listed.tolist() == [[3, 5, 4]]
    assert is_event.tolist() == [[True, False, False]]


def test_histories_are_cut_before_a_target() -> None:
    items = torch.arange(1, 7).expand(50, -1)
    counted = torch.tensor([[True] * 6, [True, True] + [False] * 4]).repeat(25, 1)
    lengths, events = cut(items, items + 1, counted)
    assert set(lengths[::2].tolist()) == set(range(1, 7))
    assert set(lengths[1::2].tolist()) == {1, 2}
    most = torch.tensor([6, 2]).repeat(25)
    for length, own, end in zip(lengths.tolist(), events.tolist(), most.tolist(), strict=True):
        expected = list(range(length + 1, end + 2))[:3]
        assert own == expected + [-1] * (3 - len(expected))


def test_the_loss_sums_the_shares_of_what_is_left() -> None:
    """After items 1, 2: -log of P(3) + P(4) where these are events, and of P(3) + P(4) + P(5) where none is.

    P is the softmax over all items but 1 and 2, after the history with both read.
    """
    policy, (items, lengths) = small_policy(reads_slate=True), histories(batch=2)
    is_event = torch.tensor([[True, True, False], [False, False, False]])
    before, rest = torch.tensor([[1, 2]]).expand(2, -1), torch.tensor([[3, 4, 5]]).expand(2, -1)
    expected = 0.0
    for user, wanted in enumerate([[3, 4], [3, 4, 5]]):
        read = torch.cat([items[user, : lengths[user]], before[user]])
        scores = scores_of(policy, read[None], torch.tensor([len(read)]))[0].detach()
        scores[[1, 2]] = -torch.inf
        expected -= float(scores.log_softmax(0)[wanted].logsumexp(0)) / 2
    found = rest_loss(policy, items, lengths, before, rest, is_event, excluded=None)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


def test_target_lists_are_learnt() -> None:
    """Of item i the next is i + 1: after a slate of others that is not to be read as taken, too."""
    policy = small_policy(reads_slate=True, slate_mark=True, popularity_tilt=0.0, dropout=0.0).train()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    items = (torch.arange(32)[:, None] + torch.arange(5)) % N
    counted = torch.ones(32, 5, dtype=torch.bool)
    torch.manual_seed(0)
    found = []
    for _ in range(40):
        loss = list_loss(policy, items, (items + 1) % N, counted, torch.arange(N), variety=0.5, repeats=False)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(float(loss.detach()))
    assert sum(found[-10:]) < 0.7 * sum(found[:10])
    assert policy.training
    assert policy.slate_mark is not None
    assert bool(policy.slate_mark.abs().max() > 0)


def test_a_policy_that_reads_no_slate_is_refused() -> None:
    settings = TrainSettings(list_weight=0.1)
    with pytest.raises(SettingsError, match="list_weight is for policies that read the slate"):
        supervised_loss(small_policy(), settings, repeats=False)
    with pytest.raises(SettingsError, match="slate_mark is on; expected reads_slate on with it"):
        small_policy(slate_mark=True)


@pytest.mark.parametrize("kind", [ItemScoresSettings, LazyDecoderSettings, TrainSettings])
def test_what_was_written_before_these_settings_is_read(kind: type[Any]) -> None:
    older = {k: v for k, v in to_json(kind()).items() if k not in ("slate_mark", "list_weight", "list_variety")}
    assert len(older) < len(fields(kind))
    assert from_json(kind, older) == kind()
