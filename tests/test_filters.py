"""Filters against brute force: every item scored, what may not be shown struck out, the K best of the rest."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sagerec.actions.filters import Filters, make_filter, shown, used_up
from sagerec.actions.groups import group_log_softmax
from sagerec.actions.legal import NO_ITEM, bar, items_left
from sagerec.actions.space import ActionSpace, make_space
from sagerec.actions.trie import ROOT, Children
from sagerec.decoding.beam import beam_lists, exact_lists
from sagerec.decoding.slates import slate_logprobs, write_slates
from sagerec.errors import SettingsError
from sagerec.policies.item_scores import ItemScores, ItemScoresSettings
from sagerec.policies.lazy_decoder import LazyDecoder, LazyDecoderSettings
from sagerec.policies.protocol import AnyPolicy, Policy

N, B = 40, 4


def draw_policy(kind: str, seed: int, *, shared: bool) -> AnyPolicy:
    """A policy of random weights over 40 items of two or three codes, of which some share theirs."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, 4, (N, 2)).astype(np.int64)
    key = prefix[:, 0] * 4 + prefix[:, 1]
    third = np.array([(key[:i] == key[i]).sum() for i in range(N)])
    alone = np.bincount(key, minlength=16)[key] == 1
    if shared:
        third //= 2
    codes = np.column_stack([prefix, np.where(alone, -1, third)])
    _, listed = np.unique(codes, axis=0, return_index=True)
    space = make_space(codes, listed=rng.permutation(listed) if shared else None)
    made: AnyPolicy
    if kind == "item-scores":
        made = ItemScores(ItemScoresSettings(width=16, content=False, max_items=12), space)
    else:
        made = LazyDecoder(LazyDecoderSettings(width=16, heads=2, content=False, max_items=12), space)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
    return made.eval()


def histories(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (B,), generator=generator)
    return torch.randint(0, N, (B, 6), generator=generator) * (torch.arange(6) < lengths[:, None]), lengths


@torch.no_grad()
def all_logprobs(policy: AnyPolicy, items: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, N) log-probability of the sequence of every item: the twin, which walks each alone, code by code."""
    trie, found = policy.space.trie, torch.zeros(len(items), N)
    for user in range(len(items)):
        for item in range(N):
            prefix = policy.begin(policy.encode(items[user : user + 1], lengths[user : user + 1]))
            state = torch.tensor([ROOT])
            for token in policy.space.sequence(item):
                children = trie.children(state)
                steps = group_log_softmax(policy.child_logits(prefix, children), children.parent, 1)
                at = children.token.tolist().index(token)
                found[user, item] += steps[at]
                state = children.node[at : at + 1]
                if not bool(trie.is_leaf(state)):
                    prefix = policy.step(prefix, torch.tensor([0]), torch.tensor([token]))
    return found


def draw_filters(space: Any, seed: int, shares: list[float]) -> Filters:
    """A random filter for each share of the catalogue, given to the rows by turns."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(N, generator=generator) < share for share in shares]
    return Filters(tuple(make_filter(space, mask) for mask in masks), torch.arange(B) % len(masks))


@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["item-scores", "lazy-decoder"]),
    shared=st.booleans(),
    k=st.integers(1, 12),
    beams=st.integers(1, 12),
    barred=st.integers(0, 15),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
@settings(max_examples=25, deadline=None)
def test_filtered_lists_equal_brute_force(
    seed: int, kind: str, shared: bool, k: int, beams: int, barred: int, shares: list[float]
) -> None:
    """Scores, proof and items; with items barred besides, and with sequences that several items share."""
    policy = draw_policy(kind, seed, shared=shared)
    space, (items, lengths) = policy.space, histories(seed)
    filters = draw_filters(space, seed, shares)
    generator = torch.Generator().manual_seed(seed)
    out = torch.stack([torch.randperm(N, generator=generator)[:barred] for _ in range(B)])
    lists = exact_lists(
        policy, items, lengths, k=k, beams=beams, excluded=used_up(space, out, filters), filters=filters
    )
    names = shown(space, lists.items, out, filters)
    assert bool(lists.exact.all())
    scores = all_logprobs(policy, items, lengths)
    leaves = space.leaf(torch.arange(N)).tolist()
    for user in range(B):
        allowed = filters.filters[int(filters.which[user])].allowed.clone()
        allowed[out[user]] = False
        best: dict[int, float] = {leaves[i]: float(scores[user, i]) for i in allowed.nonzero()[:, 0].tolist()}
        expected = sorted(best.values(), reverse=True)[:k]
        found = names[user][names[user] != NO_ITEM].tolist()
        assert lists.logprobs[user, : len(expected)].tolist() == pytest.approx(expected, abs=2e-4)
        assert len(found) == len(expected)
        assert bool(allowed[found].all())
        assert [float(scores[user, i]) for i in found] == pytest.approx(expected, abs=2e-4)
        assert len({leaves[i] for i in found}) == len(found)
        for listed, name in zip(lists.items[user].tolist(), found, strict=False):
            assert leaves[listed] == leaves[name]
            assert name == listed or not bool(allowed[listed])


@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["item-scores", "lazy-decoder"]),
    greedy=st.booleans(),
    k=st.integers(1, 4),
)
@settings(max_examples=10, deadline=None)
def test_filtered_slates_hold_what_is_open_and_renormalise_over_it(seed: int, kind: str, greedy: bool, k: int) -> None:
    """Each token is normalised over the open ones: the shares of all slates of one item add up to 1."""
    policy = draw_policy(kind, seed, shared=False)
    items, lengths = histories(seed)
    filters = draw_filters(policy.space, seed, [0.5, 0.3])
    out = torch.arange(3).expand(B, -1)
    if int(items_left(policy.space, out, filters).min()) < k:
        with pytest.raises(SettingsError, match=f"k is {k} and the filters leave"):
            write_slates(policy, items, lengths, k=k, excluded=out, filters=filters)
        return
    slates = write_slates(
        policy,
        items,
        lengths,
        k=k,
        slates=3,
        temperature=0.0 if greedy else 1.0,
        excluded=out,
        filters=filters,
        generator=torch.Generator().manual_seed(seed),
    )
    again = slate_logprobs(policy, items, lengths, slates.items, excluded=out, filters=filters)
    torch.testing.assert_close(slates.tokens.logprobs, again.tokens.logprobs.detach(), rtol=1e-4, atol=1e-4)
    for user in range(B):
        allowed = filters.filters[int(filters.which[user])].allowed.clone()
        allowed[:3] = False
        for slate in slates.items[user].tolist():
            assert bool(allowed[slate].all())
            assert len(set(slate)) == k
        singles = allowed.nonzero()[:, 0].view(1, -1, 1)
        one = slate_logprobs(
            policy,
            items[user : user + 1],
            lengths[user : user + 1],
            singles,
            excluded=out[:1],
            filters=filters.of_rows(torch.tensor([user])),
        )
        total = torch.zeros(singles.shape[1]).index_add(0, one.tokens.item, one.tokens.logprobs.detach())
        assert float(total.exp().sum()) == pytest.approx(1, abs=1e-4)
    if greedy:
        first = exact_lists(policy, items, lengths, k=1, excluded=out, filters=filters)
        assert slates.items[:, 0, 0].tolist() == first.items[:, 0].tolist()


def test_open_sequences_are_counted_by_hand() -> None:
    """Sequences 00, 01, 1, 20, 21, where items 0 and 5 share 00; allowed: items 1, 2 and 5.

    Nodes: root, 0, 1, 2, 00, 01, 20, 21. Open: 3 at the root (00 for item 5, 01, 1), 2 under 0, 1 at 1, none under 2.
    """
    codes = np.array([[0, 0], [0, 1], [1, -1], [2, 0], [2, 1], [0, 0]])
    space = make_space(codes, listed=np.arange(5))
    one = make_filter(space, torch.tensor([False, True, True, False, False, True]))
    assert one.open.tolist() == [3, 2, 1, 0, 1, 1, 0, 0]
    filters = Filters((one,), torch.zeros(1, dtype=torch.int64))
    out = torch.tensor([[1, 5]])
    assert used_up(space, out, filters).tolist() == [[1, 5]]  # 0 may not be shown, so 00 is closed
    assert items_left(space, out, filters).tolist() == [1]
    assert (bar(space, out, filters).keys % space.trie.n_nodes).tolist() == [1, 4, 5]  # and 0, whose items are gone
    everything = Filters((make_filter(space, torch.ones(6, dtype=torch.bool)),), filters.which)
    assert used_up(space, out, everything).tolist() == [[1, NO_ITEM]]  # 0 is left
    listed = torch.tensor([[0, NO_ITEM]])
    assert shown(space, listed, torch.tensor([[0]]), everything).tolist() == [[5, NO_ITEM]]
    assert shown(space, listed, out, everything).tolist() == [[0, NO_ITEM]]
    assert shown(space, listed, torch.tensor([[1]]), filters).tolist() == [[5, NO_ITEM]]


def test_a_filter_of_everything_changes_nothing_and_one_of_nothing_leaves_nothing() -> None:
    policy = draw_policy("item-scores", 0, shared=False)
    items, lengths = histories(0)
    plain = exact_lists(policy, items, lengths, k=5)
    which = torch.zeros(B, dtype=torch.int64)
    everything = Filters((make_filter(policy.space, torch.ones(N, dtype=torch.bool)),), which)
    assert torch.equal(exact_lists(policy, items, lengths, k=5, filters=everything).items, plain.items)
    nothing = Filters((make_filter(policy.space, torch.zeros(N, dtype=torch.bool)),), which)
    empty = exact_lists(policy, items, lengths, k=5, filters=nothing)
    assert bool((empty.items == NO_ITEM).all())
    assert bool(empty.exact.all())


class Table(Policy[int, int]):
    """A policy whose nodes have given probabilities, whatever the history."""

    def __init__(self, space: ActionSpace, shares: list[float]) -> None:
        super().__init__()
        self.space, self.max_items = space, 9
        self.logits = nn.Parameter(torch.tensor(shares).log())

    def encode(self, items: torch.Tensor, lengths: torch.Tensor, *, slates: int = 1) -> int:
        return 0

    def begin(self, context: int) -> int:
        return 0

    def step(self, prefix: int, rows: torch.Tensor, tokens: torch.Tensor) -> int:
        return 0

    def child_logits(self, prefix: int, children: Children) -> torch.Tensor:
        return self.logits[children.node]


def test_a_prefix_whose_best_item_is_closed_says_nothing_of_the_list() -> None:
    """Items 00, 01, 10, 11 of .7, .05, .15 and .1, the first closed. The best that may be shown is 10, of .15, though
    prefix 0 holds two items of .375 on average: were that a bound, prefix 1, of .25, would be lost, and 01 the best.
    """
    space = make_space(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]))
    # Nodes: root, 0, 1, 00, 01, 10, 11.
    policy = Table(space, [1, 0.75, 0.25, 0.7 / 0.75, 0.05 / 0.75, 0.6, 0.4])
    one = make_filter(space, torch.tensor([False, True, True, True]))
    filters = Filters((one,), torch.zeros(1, dtype=torch.int64))
    for k in (1, 2):
        history = torch.zeros(1, 1, dtype=torch.int64)
        lists = exact_lists(policy, history, torch.ones(1), k=k, beams=2, filters=filters)
        assert lists.items.tolist() == [[2, 3][:k]]
        assert lists.logprobs.exp().tolist() == [pytest.approx([0.15, 0.1][:k], abs=1e-6)]


def test_a_narrow_beam_claims_no_wrong_filtered_list() -> None:
    """Over many contexts narrow beams err, and no list called exact does."""
    wrong = claimed = 0
    for seed in range(6):
        policy = draw_policy("lazy-decoder", seed, shared=False)
        items, lengths = histories(seed)
        filters = draw_filters(policy.space, seed, [0.4])
        with torch.no_grad():
            context = policy.encode(items, lengths)
            truth = exact_lists(policy, items, lengths, k=3, beams=N, filters=filters).items
            for beams in (3, 5):
                lists = beam_lists(policy, context, B, k=3, beams=beams, filters=filters)
                right = (lists.items == truth).all(dim=1)
                assert bool(right[lists.exact].all())
                wrong, claimed = wrong + int((~right).sum()), claimed + int(lists.exact.sum())
    assert wrong > 0
    assert claimed > 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_frozen_policy_gives_the_same_lists(shared: bool) -> None:
    policy = draw_policy("item-scores", 3, shared=shared)
    items, lengths = histories(3)
    before = exact_lists(policy, items, lengths, k=7)
    policy.freeze()
    after = exact_lists(policy, items, lengths, k=7)
    assert torch.equal(before.items, after.items)
    torch.testing.assert_close(before.logprobs, after.logprobs)
