"""The LazyDecoder: a distribution over items, causal, and the same through its cache as without."""

from typing import Any

import numpy as np
import pytest
import torch

from sagerec.actions.groups import group_log_softmax
from sagerec.actions.semantic_ids.quantisers import separate
from sagerec.actions.space import make_space
from sagerec.actions.trie import ROOT
from sagerec.errors import SettingsError
from sagerec.policies.history_encoder import HistoryEncoder
from sagerec.policies.layers import FastDropout
from sagerec.policies.lazy_decoder import LazyDecoder, LazyDecoderSettings

N = 60


def small_policy(*, seed: int = 0, variable_length: bool = False, **settings: Any) -> LazyDecoder:
    """A policy over 60 items with random weights, scaled so that its distribution is far from flat."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    codes = separate(rng.integers(0, 4, (N, 2)).astype(np.int32), rng.integers(0, 9, N))
    if variable_length:
        # Items alone under their first two codes end there.
        alone = np.bincount(codes[:, 0] * 4 + codes[:, 1], minlength=16)[codes[:, 0] * 4 + codes[:, 1]] == 1
        codes[alone, 2] = -1
    shape = LazyDecoderSettings(width=16, heads=2, encoder_layers=2, dropout=0.1, max_items=12, **settings)
    policy = LazyDecoder(shape, make_space(codes, vectors=torch.randn(N, 5).numpy()))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
    return policy.eval()


def histories(seed: int = 0, batch: int = 5, longest: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(0, N, (batch, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator)
    return items * (torch.arange(longest) < lengths[:, None]), lengths


def all_logprobs(policy: LazyDecoder, hidden: torch.Tensor) -> torch.Tensor:
    """(B, N) log-probability of every item after encoder states (B, D): the brute-force twin."""
    columns = [policy.target_logprobs(hidden, torch.full((len(hidden),), i)).sum(dim=1) for i in range(N)]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("settings", [{}, {"content": False}, {"item_embedding": True}, {"decoder_layers": 2}])
def test_item_probabilities_sum_to_one(settings: dict[str, Any]) -> None:
    policy = small_policy(**settings)
    items, lengths = histories()
    with torch.no_grad():
        total = all_logprobs(policy, policy.encode(items, lengths).hidden[:, 0]).exp().sum(dim=1)
    torch.testing.assert_close(total, torch.ones(5), rtol=0, atol=1e-5)


def test_later_items_and_padding_change_nothing_before_them() -> None:
    policy = small_policy()
    items, lengths = histories(longest=8)
    with torch.no_grad():
        states, _ = policy.encode_all(items)
        changed = items.clone()
        changed[:, 5:] = (changed[:, 5:] + 7) % N
        other, _ = policy.encode_all(changed)
        torch.testing.assert_close(states[:, :5], other[:, :5])
        assert not torch.allclose(states[:, 5], other[:, 5])
        padded = torch.cat([items, torch.full((5, 3), 11)], dim=1)
        torch.testing.assert_close(policy.encode(padded, lengths).hidden, policy.encode(items, lengths).hidden)


def test_order_of_the_history_matters() -> None:
    policy = small_policy()
    with torch.no_grad():
        one = policy.encode(torch.tensor([[1, 2, 3]]), torch.tensor([3])).hidden
        two = policy.encode(torch.tensor([[2, 1, 3]]), torch.tensor([3])).hidden
    assert not torch.allclose(one, two, atol=1e-3)


def assert_append_equals_encoding_anew(policy: HistoryEncoder[Any]) -> None:
    """G slates of two items on one cached history against B * G full encodings: the slow twin of `append`."""
    items, lengths = histories(batch=4, longest=6)
    slates = torch.randint(0, N, (4, 3, 2), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        context = policy.encode(items, lengths, slates=3)
        for place in range(2):
            context = policy.append(context, slates[:, :, place])
        for user in range(4):
            for slate in range(3):
                whole = torch.cat([items[user, : lengths[user]], slates[user, slate]])[None]
                alone = policy.encode(whole, torch.tensor([whole.shape[1]])).hidden[0, 0]
                torch.testing.assert_close(context.hidden[user, slate], alone, rtol=1e-4, atol=1e-5)


def test_appending_to_a_shared_history_equals_encoding_each_slate_anew() -> None:
    assert_append_equals_encoding_anew(small_policy())


@pytest.mark.parametrize("variable_length", [False, True])
def test_stepwise_decoding_gives_the_training_logprobs(variable_length: bool) -> None:
    """Walking an item's codes by begin/step/child_logits equals `target_logprobs`, which training uses."""
    policy = small_policy(variable_length=variable_length)
    items, lengths = histories()
    targets = torch.tensor([3, 17, 42, 5, 59])
    with torch.no_grad():
        context = policy.encode(items, lengths)
        expected = policy.target_logprobs(context.hidden[:, 0], targets)
        for user in range(5):
            prefix = policy.begin(policy.encode(items[user : user + 1], lengths[user : user + 1]))
            state = torch.tensor([ROOT])
            for level, code in enumerate(policy.codes[targets[user]].tolist()):
                if code < 0:
                    assert expected[user, level] == 0
                    break
                children = policy.space.trie.children(state)
                steps = group_log_softmax(policy.child_logits(prefix, children), children.parent, 1)
                at = children.token.tolist().index(code)
                torch.testing.assert_close(steps[at], expected[user, level], rtol=1e-4, atol=1e-5)
                state = children.node[at : at + 1]
                if not bool(policy.space.trie.is_leaf(state)):
                    prefix = policy.step(prefix, torch.tensor([0]), torch.tensor([code]))
    if variable_length:
        assert bool((policy.codes < 0).any())


def test_gradient_reaches_every_parameter() -> None:
    policy = small_policy(item_embedding=True).train()
    items, lengths = histories(batch=40)
    loss = -policy.target_logprobs(policy.encode(items, lengths).hidden[:, 0], torch.arange(40)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    untouched = [n for n, p in policy.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert untouched == []


def test_listed_as_names_the_item_that_holds_a_shared_id() -> None:
    space = make_space(np.array([[0, 0], [0, 1], [0, 0], [1, 0]]), listed=np.array([2, 1, 3]))
    assert space.listed_as(np.arange(4)).tolist() == [2, 1, 2, 3]
    assert not space.is_unique


def test_fast_dropout_keeps_the_mean_and_the_stated_share() -> None:
    """Rate 0.2 is rounded to 51/256 = 0.1992: that share is zero, the rest is scaled by 256/205."""
    torch.manual_seed(0)
    dropout = FastDropout(0.2).train()
    x = torch.ones(200_003)
    y = dropout(x)
    assert abs(float((y == 0).float().mean()) - 51 / 256) < 0.004
    assert y.unique().tolist() == pytest.approx([0.0, 256 / 205])
    assert abs(float(y.mean()) - 1) < 0.01
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 30, "heads": 4}, "width is 30; expected a multiple of twice the 4 heads"),
        ({"dropout": 1.0}, "dropout is 1.0; expected from 0 to below 1"),
        ({"encoder_layers": 0}, "encoder_layers is 0"),
        ({"max_items": 0}, "max_items is 0"),
    ],
)
def test_bad_shapes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        LazyDecoderSettings(**settings)


def test_content_needs_vectors() -> None:
    with pytest.raises(SettingsError, match="the items have no vectors"):
        LazyDecoder(LazyDecoderSettings(), make_space(np.array([[0], [1]])))


@pytest.mark.parametrize("settings", [{}, {"decoder_layers": 2}])
@pytest.mark.parametrize("variable_length", [False, True])
def test_following_whole_sequences_equals_stepping_token_by_token(
    settings: dict[str, Any], variable_length: bool
) -> None:
    """Outputs and gradients of one teacher-forced pass, for sequences of 0 to 2 codes, against `step`."""
    policy = small_policy(variable_length=variable_length, **settings)
    prefix = policy.begin(policy.encode(*histories()))
    rows, lengths = torch.tensor([4, 0, 0, 2, 1]), torch.tensor([2, 0, 1, 2, 1])
    codes = policy.codes[torch.tensor([3, 17, 42, 5, 59])]
    tokens = torch.cat([row[:n] for row, n in zip(codes, lengths, strict=True)])
    followed = policy.follow(prefix, rows, tokens, lengths)
    assert [len(p.output) for p in followed] == [4, 2]
    first = policy.step(prefix, rows[lengths >= 1], codes[lengths >= 1, 0])
    second = policy.step(first, torch.tensor([0, 2]), codes[lengths >= 2, 1])
    for one, other in zip(followed, (first, second), strict=True):
        assert one.level == other.level
        torch.testing.assert_close(one.output, other.output, rtol=1e-4, atol=1e-5)
    gradients = []
    for found in (followed[1].output, second.output):
        weights = torch.linspace(-1, 1, found.numel()).view_as(found)
        gradients.append(torch.autograd.grad((found * weights).sum(), policy.prefix_codes.weight, retain_graph=True)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
