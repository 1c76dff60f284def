"""Item scores: what lies under a node, and that the codes are the softmax over items, written token by token."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sagerec.actions.filters import Filters, make_filter
from sagerec.actions.groups import group_log_softmax
from sagerec.actions.semantic_ids.quantisers import separate
from sagerec.actions.space import ActionSpace, make_space
from sagerec.actions.trie import ROOT
from sagerec.decoding.beam import exact_lists
from sagerec.decoding.slates import Slates, slate_logprobs, write_slates
from sagerec.errors import NumericalError, SettingsError
from sagerec.policies import item_scores
from sagerec.policies.history_encoder import grow_weights
from sagerec.policies.item_scores import ItemScores, ItemScoresSettings, leaf_order
from sagerec.policies.lazy_decoder import LazyDecoderSettings
from sagerec.policies.protocol import AnyPolicy
from sagerec.policies.registry import PolicySettings, describe_policy
from tests.test_policy import N, assert_append_equals_encoding_anew, histories
from tests.test_policy import small_policy as decoder_policy


def small_space(*, variable_length: bool = False, shared: bool = False) -> ActionSpace:
    """60 items under 4 x 4 codes and a last one, of up to nine items; with vectors."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 4, (N, 2)).astype(np.int32)
    vectors = rng.normal(size=(N, 5)).astype(np.float32)
    if shared:
        _, listed = np.unique(pairs, axis=0, return_index=True)
        return make_space(pairs, listed=listed, vectors=vectors)
    codes = separate(pairs, rng.integers(0, 9, N))
    if variable_length:
        alone = np.bincount(codes[:, 0] * 4 + codes[:, 1], minlength=16)[codes[:, 0] * 4 + codes[:, 1]] == 1
        codes[alone, 2] = -1
    return make_space(codes, vectors=vectors)


def small_policy(*, variable_length: bool = False, shared: bool = False, **settings: Any) -> ItemScores:
    """A policy with random weights, scaled so that its distribution is far from flat, and counts of 0 to 59."""
    torch.manual_seed(0)
    shape = ItemScoresSettings(**{"width": 16, "max_items": 12, **settings})
    policy = ItemScores(shape, small_space(variable_length=variable_length, shared=shared))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
        policy.count(torch.arange(N).float())
    return policy.eval()


def scores_of(policy: ItemScores, items: Tensor, lengths: Tensor) -> Tensor:
    """(B, N) x . v - tau log(1 + n) of every item that lists show, -inf for the others: by the formula."""
    listed = torch.from_numpy(policy.space.listed_as(np.arange(N)))
    events = torch.zeros(N).index_add(0, listed, policy.popularity)
    states = policy.encode(items, lengths).hidden[:, 0]
    events = events.clamp(max=policy.settings.tilt_events)
    scores = states @ policy.item_vectors(torch.arange(N)).T - policy.settings.popularity_tilt * (1 + events).log()
    return scores.masked_fill(listed != torch.arange(N), -torch.inf)


def logprobs_by_tokens(policy: ItemScores, items: Tensor, lengths: Tensor) -> Tensor:
    """(B, N) log-probability of every item, walked token by token through the protocol's calls."""
    found = torch.full((len(items), N), -torch.inf)
    trie, prefix = policy.space.trie, policy.begin(policy.encode(items, lengths))
    states, scores, user = torch.full((len(items),), ROOT), torch.zeros(len(items)), torch.arange(len(items))
    while len(states):
        children = trie.children(states)
        step = group_log_softmax(policy.child_logits(prefix, children), children.parent, len(states))
        total, owner = scores[children.parent] + step, user[children.parent]
        ends = trie.is_leaf(children.node)
        found[owner[ends], trie.item[children.node[ends]].long()] = total[ends]
        prefix = policy.step(prefix, children.parent[~ends], children.token[~ends])
        states, scores, user = children.node[~ends], total[~ends], owner[~ends]
    return found


def test_leaves_by_hand() -> None:
    """Sequences 1 0 | 0 2 1 | 0 2 0 | 2 | 0 1 in order: items 4, 2, 1, 0, 3; node 0 2 begins after item 4."""
    sequences = np.array([[1, 0, -1], [0, 2, 1], [0, 2, 0], [2, -1, -1], [0, 1, -1]])
    items, first = leaf_order(make_space(sequences).trie)
    assert items.tolist() == [4, 2, 1, 0, 3]
    # Root; 0, 1, 2; 0 1, 0 2, 1 0; 0 2 0, 0 2 1.
    assert first.tolist() == [0, 0, 3, 4, 0, 1, 3, 1, 2]


@pytest.mark.parametrize("settings", [{}, {"variable_length": True}, {"shared": True}, {"popularity_tilt": 0.0}])
@pytest.mark.parametrize("table", [2**22, 100])
def test_the_tokens_of_an_item_multiply_to_its_share_of_the_softmax(
    settings: dict[str, Any], table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp(LSE of the child - LSE of the node) telescopes along the way; in chunks of few states too."""
    monkeypatch.setattr(item_scores, "LARGEST_TABLE", table)
    policy = small_policy(**settings)
    with torch.no_grad():
        expected = scores_of(policy, *histories()).log_softmax(1)
        torch.testing.assert_close(logprobs_by_tokens(policy, *histories()), expected, rtol=1e-4, atol=1e-4)


def test_the_tilt_takes_from_popular_items_by_the_formula() -> None:
    """Log P - log P' of two items changes by tau (log(1 + n) - log(1 + n')); of 50 events 20 count."""
    plain, tilted = small_policy(popularity_tilt=0.0), small_policy(popularity_tilt=0.7, tilt_events=20)
    tilted.load_state_dict(plain.state_dict())
    with torch.no_grad():
        one, other = (logprobs_by_tokens(p, *histories()) for p in (plain, tilted))
    moved = (one[:, 3] - one[:, 50]) - (other[:, 3] - other[:, 50])
    torch.testing.assert_close(moved, torch.full((5,), 0.7 * math.log(4 / 21)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shared", [False, True])
def test_training_minimises_the_softmax_without_the_tilt(shared: bool) -> None:
    policy = small_policy(shared=shared)
    items, targets = torch.tensor([[3, 9, 0], [7, 2, 5]]), torch.tensor([[9, 4, 0], [2, 5, 11]])
    counted = torch.tensor([[True, True, False], [True, True, True]])
    plain = small_policy(shared=shared, popularity_tilt=0.0)
    expected = 0.0
    for row, place in counted.nonzero().tolist():
        logprobs = scores_of(plain, items[row : row + 1], torch.tensor([place + 1])).log_softmax(1)
        expected -= float(logprobs.detach()[0, policy.space.listed_as(targets[row, place : place + 1].numpy())[0]]) / 5
    assert float(policy.next_item_loss(items, targets, counted)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("table", [2**22, 100])
def test_gradients_of_the_root_equal_the_slow_twin(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a dense log-sum-exp with every score written down; in chunks that backward computes again too."""
    monkeypatch.setattr(item_scores, "LARGEST_TABLE", table)
    policy = small_policy()
    context, first = policy.encode(*histories()), policy.space.first_tokens()
    inputs = [policy.item_codes.weight, policy.get_parameter("encoder.0.query.weight")]
    fast = policy.root_logits(policy.begin(context))
    scores = scores_of(policy, *histories())
    slow = torch.stack([scores[:, first == token].logsumexp(1) for token in np.unique(first)], dim=1)
    weights = torch.linspace(-1, 1, slow.numel()).view_as(slow)
    gradients = [torch.autograd.grad((sums * weights).sum(), inputs, retain_graph=True) for sums in (fast, slow)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_sums_read_off_the_table_of_scores_equal_those_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of the same slates and their gradients, with the table and without."""
    policy = small_policy(reads_slate=True)
    items, lengths = histories()
    slates = torch.arange(30).view(5, 2, 3)
    wanted = [policy.item_codes.weight, policy.get_parameter("encoder.0.query.weight")]
    found, gradients = [], []
    for table in (2**22, 4 * N):
        monkeypatch.setattr(item_scores, "LARGEST_TABLE", table)
        held = policy.begin(policy.encode(items, lengths)).scores
        assert (held is None) == (table == 4 * N)
        logprobs = slate_logprobs(policy, items, lengths, slates).tokens.logprobs
        found.append(logprobs)
        gradients.append(torch.autograd.grad((logprobs * torch.linspace(-1, 1, len(logprobs))).sum(), wanted))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_lists_are_the_top_of_the_softmax() -> None:
    policy = small_policy()
    items, lengths = histories()
    with torch.no_grad():
        lists = exact_lists(policy, items, lengths, k=7, beams=8)
        expected = scores_of(policy, items, lengths).log_softmax(1).topk(7, dim=1)
    assert torch.equal(lists.items, expected.indices)
    torch.testing.assert_close(lists.logprobs, expected.values, rtol=1e-4, atol=1e-4)


def test_a_slate_that_is_not_read_is_the_beam_list_written_item_by_item() -> None:
    """The most probable item, then the most probable of the others, …; the first with its share of the softmax."""
    policy = small_policy()
    items, lengths = histories()
    with torch.no_grad():
        slate = write_slates(policy, items, lengths, k=6, temperature=0.0)
        expected = scores_of(policy, items, lengths).log_softmax(1)
    assert torch.equal(slate.items[:, 0], expected.topk(6, dim=1).indices)
    torch.testing.assert_close(slate.scores()[:, 0, 0], expected.amax(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reads_slate", [False, True])
def test_slates_are_scored_in_one_pass_as_they_are_written(reads_slate: bool) -> None:
    """`extend` and `follow` against `append` and `step`, three slates of three on a shared history."""
    policy = small_policy(reads_slate=reads_slate)
    items, lengths = histories()
    torch.manual_seed(3)
    with torch.no_grad():
        written = write_slates(policy, items, lengths, k=3, slates=3, uniforms=torch.rand(5, 3, 3))
    scored = slate_logprobs(policy, items, lengths, written.items)
    assert torch.equal(written.tokens.item, scored.tokens.item)
    torch.testing.assert_close(written.tokens.logprobs, scored.tokens.logprobs.detach(), rtol=1e-4, atol=1e-4)
    assert scored.tokens.logprobs.requires_grad


@pytest.mark.parametrize("reads_slate", [False, True])
@pytest.mark.parametrize("n", [2, 3])
def test_the_last_item_of_a_catalogue_is_no_choice(n: int, reads_slate: bool) -> None:
    """All items share their first code, and a slate has all of them: for the last, no code is left to choose."""
    space = make_space(np.array([[0, 0, last] for last in range(n)], dtype=np.int32))
    settings = ItemScoresSettings(width=8, heads=2, content=False, reads_slate=reads_slate)
    policy, items, lengths = ItemScores(settings, space).eval(), torch.tensor([[0], [1]]), torch.tensor([1, 1])
    written = write_slates(policy, items, lengths, k=n, slates=2, generator=torch.Generator().manual_seed(0))
    scored = slate_logprobs(policy, items, lengths, written.items).tokens
    assert torch.equal(written.tokens.item, scored.item)
    torch.testing.assert_close(scored.logprobs.detach(), written.tokens.logprobs, rtol=1e-4, atol=1e-5)


def plackett_luce(policy: ItemScores, items: Tensor, lengths: Tensor, slates: Tensor) -> Tensor:
    """(B, G, K) log-probability of each item of slates (B, G, K) given those before it: item by item, over all items.

    s_i - log of the sum of exp(s_j) over the items j that do not stand in the slate yet.
    """
    found = []
    for user, own in enumerate(slates):
        for slate in own.tolist():
            history = torch.cat([items[user, : lengths[user]], torch.tensor(slate, dtype=torch.int64)])
            for place, item in enumerate(slate):
                read = int(lengths[user]) + (place if policy.settings.reads_slate else 0)
                scores = scores_of(policy, history[None, :read], torch.tensor([read]))[0]
                left = torch.ones(N, dtype=torch.bool).index_fill(0, torch.tensor(slate[:place], dtype=torch.int64), 0)
                found.append(scores[item] - scores[left].logsumexp(0))
    return torch.stack(found).view(slates.shape)


@pytest.mark.parametrize("settings", [{}, {"reads_slate": True}, {"variable_length": True}, {"shared": True}])
@pytest.mark.parametrize("table", [2**22, 300])
def test_a_slate_draws_items_without_replacement_from_the_softmax(
    settings: dict[str, Any], table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of sampled slates of five, and gradients, against the sum over all items that are left."""
    monkeypatch.setattr(item_scores, "LARGEST_TABLE", table)
    policy, (items, lengths) = small_policy(**settings), histories(batch=2)
    with torch.no_grad():  # the neighbours of what was drawn are likely, so that a share that they get is seen
        policy.get_parameter("encoder_norm.weight").mul_(0.3)
    written = write_slates(policy, items, lengths, k=5, slates=2, generator=torch.Generator().manual_seed(1))
    scored = slate_logprobs(policy, items, lengths, written.items).tokens
    expected = plackett_luce(policy, items, lengths, written.items)
    torch.testing.assert_close(written.scores(), expected.detach(), rtol=1e-4, atol=1e-4)
    found = Slates(written.items, scored).scores()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    inputs = [policy.item_codes.weight, policy.get_parameter("encoder.0.query.weight")]
    gradients = [torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_is_drawn_does_not_drain_its_cluster() -> None:
    """Shares .6 and .1 under one code, .3 under another: after the first item the second place is 1/4 to 3/4.

    Kept in the sum of its code, the share of the first would go to its neighbour, which had .7 then.
    """
    policy = ItemScores(ItemScoresSettings(width=4, content=False), make_space(np.array([[0, 0], [0, 1], [1, 0]])))
    prefix = policy.begin(policy.encode(torch.tensor([[0]]), torch.tensor([1])))
    prefix = prefix._replace(scores=torch.tensor([[0.6, 0.1, 0.3]]).log())
    torch.testing.assert_close(policy.root_logits(prefix).exp(), torch.tensor([[0.7, 0.3]]))
    left = policy.without(prefix, torch.tensor([[0, -1]]))
    torch.testing.assert_close(policy.root_logits(left).softmax(1), torch.tensor([[0.25, 0.75]]))


def test_all_items_in_one_slate_have_finite_gradients() -> None:
    """The last places have clusters without an item left, whose sums are asked for all the same."""
    policy, (items, lengths) = small_policy(), histories()
    generator = torch.Generator().manual_seed(0)
    written = write_slates(policy, items[:2], lengths[:2], k=N, slates=2, generator=generator)
    assert torch.equal(written.items.sort(dim=2).values, torch.arange(N).expand(2, 2, N))
    scored = slate_logprobs(policy, items[:2], lengths[:2], written.items).tokens
    torch.testing.assert_close(Slates(written.items, scored).scores(), written.scores(), rtol=1e-4, atol=1e-3)
    (gradient,) = torch.autograd.grad(scored.logprobs.sum(), [policy.item_codes.weight])
    assert bool(gradient.isfinite().all())


def test_appending_to_a_shared_history_equals_encoding_each_slate_anew() -> None:
    assert_append_equals_encoding_anew(small_policy(encoder_layers=2, reads_slate=True))


def test_later_items_and_padding_change_nothing_and_the_order_does() -> None:
    policy = small_policy()
    items, lengths = histories(longest=8)
    with torch.no_grad():
        states, _ = policy.encode_all(items)
        changed = items.clone()
        changed[:, 5:] = (changed[:, 5:] + 7) % N
        other, _ = policy.encode_all(changed)
        torch.testing.assert_close(states[:, :5], other[:, :5])
        padded = torch.cat([items, torch.full((5, 3), 11)], dim=1)
        torch.testing.assert_close(policy.encode(padded, lengths).hidden, policy.encode(items, lengths).hidden)
        policy.get_parameter("encoder.0.query.weight").mul_(0.1)  # attention to more than one item
        one, two = (policy.encode(torch.tensor([order]), torch.tensor([3])).hidden for order in ([1, 2, 3], [2, 1, 3]))
    assert not torch.allclose(one, two, atol=1e-3)


def test_gradient_reaches_every_parameter() -> None:
    policy = small_policy().train()
    items = torch.randint(0, N, (20, 6), generator=torch.Generator().manual_seed(0))
    policy.next_item_loss(items[:, :-1], items[:, 1:], torch.ones(20, 5, dtype=torch.bool)).backward()  # type: ignore[no-untyped-call]
    # The key's bias moves all scores of a query alike, but for the rotation; it need not be reached.
    untouched = [n for n, p in policy.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert untouched == []


def test_a_sum_of_far_lower_scores_stays_finite() -> None:
    """Scores 0 and -200: exp(-200) is 0 in float32, and the sum under the second child is taken for the floor."""
    policy = ItemScores(ItemScoresSettings(width=4, content=False), make_space(np.array([[0], [1]])))
    found = policy._root_sums(torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 0], [-200, 0]]), torch.zeros(2))
    assert found.tolist() == [[0.0, pytest.approx(math.log(1e-30))]]


def test_new_items_begin_without_an_embedding_and_are_not_rare() -> None:
    before = np.array([[0, 0], [0, 1], [1, 0]])
    after = np.array([[0, 0], [0, 1], [1, 0], [0, 2], [0, 3]])
    shape = ItemScoresSettings(width=4, content=False)
    small, large = (ItemScores(shape, make_space(codes)) for codes in (before, after))
    small.count(torch.tensor([3.0, 2.0, 1.0]))
    large.load_weights(small.state_dict())
    assert large.popularity.tolist() == [3, 2, 1, 3, 3]
    assert large.item_embedding is not None
    assert large.item_embedding.weight[3:].eq(0).all()
    assert grow_weights(small.state_dict(), large)["item_codes.weight"].shape == (6, 4)


def test_settings_of_the_command_line_are_those_of_the_kind() -> None:
    assert PolicySettings().resolved() == ItemScoresSettings()
    assert PolicySettings(kind="lazy-decoder", width=64).resolved() == LazyDecoderSettings(width=64)
    assert describe_policy(PolicySettings(dropout=0.1)) == describe_policy(ItemScoresSettings(dropout=0.1))
    with pytest.raises(SettingsError, match="decoder_layers is no setting of the policy 'item-scores'"):
        PolicySettings(decoder_layers=2)
    with pytest.raises(SettingsError, match="popularity_tilt is no setting of the policy 'lazy-decoder'"):
        PolicySettings(kind="lazy-decoder", popularity_tilt=0.1)


def test_what_a_frozen_policy_keeps_moves_with_its_weights() -> None:
    """Onto the meta device, for want of another one in every machine."""
    policy = small_policy()
    policy.freeze()
    policy.to("meta")
    assert policy.frozen is not None
    assert {kept.device.type for kept in policy.frozen} == {"meta"}


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("k", [5, N + 10])
def test_lists_of_weights_that_are_not_numbers_are_refused(k: int, filtered: bool) -> None:
    """They were proven exact, and held the items of the first codes or none."""
    policies: list[AnyPolicy] = [small_policy(), decoder_policy()]
    for policy in policies:
        filters = None
        if filtered:
            one = make_filter(policy.space, torch.arange(N) % 2 == 0)
            filters = Filters((one,), torch.zeros(5, dtype=torch.int64))
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.fill_(math.nan)
        with pytest.raises(NumericalError, match="of 5 users are not numbers; expected finite weights"):
            exact_lists(policy, *histories(), k=k, beams=k, filters=filters)


def test_items_left_out_of_slates_count_once() -> None:
    """One that is named 59 times, or 15 that share nine of 16 sequences, leave room for a slate."""
    items, lengths = torch.tensor([[3, 3]]), torch.tensor([2])
    again = write_slates(small_policy(), items, lengths, k=5, slates=2, excluded=torch.full((1, 59), 3)).items
    assert all(len(set(slate) - {3}) == 5 for slate in again[0].tolist())
    shared, out = small_policy(shared=True), np.arange(15)
    left = set(shared.space.listed_as(np.arange(N)).tolist()) - set(shared.space.listed_as(out).tolist())
    excluded = torch.from_numpy(out)[None]
    found = write_slates(shared, items, lengths, k=len(left), slates=1, excluded=excluded).items
    assert sorted(found.flatten().tolist()) == sorted(left)
    with pytest.raises(SettingsError, match="expected a smaller slate"):
        write_slates(shared, items, lengths, k=len(left) + 1, slates=1, excluded=excluded)


def test_slates_of_weights_that_are_not_numbers_are_refused() -> None:
    policy = small_policy()
    with torch.no_grad():
        policy.item_codes.weight.fill_(torch.nan)
        with pytest.raises(NumericalError, match="slates are not numbers; expected finite weights"):
            write_slates(policy, *histories(), k=2, slates=3)
