"""Rollouts: slates and their log-probabilities under one distribution, with the prompt computed once."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.actions.legal import NO_ITEM, bar
from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import ROOT
from sagerec.decoding.rollouts import RolloutSettings, roll_out
from sagerec.decoding.slates import Slates, slate_logprobs, write_slates
from sagerec.errors import SettingsError
from sagerec.policies.history_encoder import Context
from tests.test_policy import N, all_logprobs, histories, small_policy
from tests.test_slates import slow_slate_logprob


def slow_has_free_item(policy: object, states: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    """The twin: for every child of every state, count the excluded items under it one by one."""
    space = policy.space  # type: ignore[attr-defined]
    children, free = space.trie.children(states), []
    for parent, node in zip(children.parent.tolist(), children.node.tolist(), strict=True):
        under = [i for i in set(excluded[parent].tolist()) - {NO_ITEM} if node in way(space, i)]
        free.append(len(under) < int(space.trie.size[node]))
    return torch.tensor(free)


def way(space: ActionSpace, item: int) -> list[int]:
    """The states on the way of an item's sequence."""
    nodes: list[int] = space.paths(torch.tensor([item])).node.tolist()
    return nodes


@given(seed=st.integers(0, 1000), barred=st.integers(0, 30), ends=st.booleans())
@settings(max_examples=30, deadline=None)
def test_used_up_prefixes_are_those_of_a_count_over_all_children(seed: int, barred: int, ends: bool) -> None:
    policy = small_policy(seed=seed % 5, variable_length=ends)
    generator = torch.Generator().manual_seed(seed)
    excluded = torch.stack([torch.randperm(N, generator=generator)[:barred] for _ in range(6)])
    excluded = torch.where(torch.rand(excluded.shape, generator=generator) < 0.2, NO_ITEM, excluded)
    closed, rows = bar(policy.space, excluded), torch.arange(6)
    grown = bar(policy.space, excluded[:, :0]).with_items(policy.space, excluded)
    assert torch.equal(closed.keys, grown.keys)
    trie, states = policy.space.trie, torch.full((6,), ROOT)
    for _ in range(2):
        children = trie.children(states)
        found = closed.leaves_free(rows, states, children)
        assert torch.equal(found, slow_has_free_item(policy, states, excluded))
        twice = closed.repeated(2).leaves_free(2 * rows + 1, states, children)
        assert torch.equal(found, twice)
        inner = children.node[~trie.is_leaf(children.node)]
        if len(inner) == 0:
            break
        states = inner[torch.randint(len(inner), (6,), generator=generator)]


@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 4),
    beam=st.booleans(),
    temperature=st.sampled_from([0.7, 1.0, 1.5]),
    barred=st.integers(0, 5),
    ends=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_stored_logprobs_are_those_that_the_loss_recomputes(
    seed: int, k: int, beam: bool, temperature: float, barred: int, ends: bool
) -> None:
    policy = small_policy(seed=seed % 7, variable_length=ends).eval()
    items, lengths = histories(seed, batch=3)
    excluded = torch.stack([torch.randperm(N)[:barred] for _ in range(3)]) if barred else None
    how = RolloutSettings(k=k, slates=3, beam_slates=int(beam), temperature=temperature)
    found = roll_out(policy, items, lengths, how, excluded=excluded)
    again = slate_logprobs(policy, items, lengths, found.items, temperature=temperature, excluded=excluded).tokens
    assert torch.equal(found.tokens.item, again.item)
    torch.testing.assert_close(found.tokens.logprobs, again.logprobs.detach(), rtol=1e-4, atol=1e-5)
    assert found.items.shape == (3, 3, k)
    assert all(len(set(slate)) == k for user in found.items.tolist() for slate in user)
    if excluded is not None:
        assert not bool((found.items.flatten(1)[:, :, None] == excluded[:, None]).any())
    if k == 1 and not ends and temperature == 1.0 and excluded is None:
        scores = all_logprobs(policy, policy.encode(items, lengths).hidden[:, 0])
        expected = scores.gather(1, found.items[:, :, 0])
        torch.testing.assert_close(found.scores()[:, :, 0], expected, rtol=1e-4, atol=1e-4)


def test_slates_in_one_pass_equal_the_slow_twin_and_item_by_item_writing() -> None:
    """K = 4 items in a tree of columns, against full encodings of each history with brute force over the items left."""
    policy = small_policy().eval()
    items, lengths = histories(batch=2, longest=5)
    slates = torch.tensor([[[3, 9, 1, 7], [3, 1, 9, 0]], [[5, 4, 3, 2], [10, 11, 12, 13]]])
    found = Slates(slates, slate_logprobs(policy, items, lengths, slates).tokens).scores().detach()
    for user in range(2):
        history = items[user, : lengths[user]].tolist()
        for slate in range(2):
            with torch.no_grad():
                expected = slow_slate_logprob(policy, history, slates[user, slate].tolist())
            assert float(found[user, slate].sum()) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    # `extend` gives the states that `append` gives item by item.
    extended = policy.extend(policy.encode(items, lengths), slates[:, :, :-1])
    context = policy.encode(items, lengths, slates=2)
    for place in range(3):
        context = policy.append(context, slates[:, :, place])
        torch.testing.assert_close(extended.hidden[:, 1 + place :: 3], context.hidden, rtol=1e-4, atol=1e-5)


def test_gradient_of_shared_prompts_equals_that_of_separate_ones() -> None:
    """One pass over users with G slates each, against every slate in a batch of its own."""
    policy = small_policy().eval()
    items, lengths = histories(batch=3)
    slates = roll_out(policy, items, lengths, RolloutSettings(k=2, slates=4, beam_slates=0)).items
    weights = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(1))
    found = Slates(slates, slate_logprobs(policy, items, lengths, slates).tokens).scores()
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    together = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    for g in range(4):
        own = slates[:, g : g + 1]
        found = Slates(own, slate_logprobs(policy, items, lengths, own).tokens).scores()
        (found * weights[:, g : g + 1]).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, together[name], rtol=1e-3, atol=1e-5)


def test_a_users_slates_do_not_hang_on_the_batch() -> None:
    policy = small_policy().eval()
    items, lengths = histories(batch=4)
    uniforms = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = write_slates(policy, items, lengths, k=2, slates=3, uniforms=uniforms)
    part = write_slates(policy, items[2:], lengths[2:], k=2, slates=3, uniforms=uniforms[2:])
    assert torch.equal(whole.items[2:], part.items)


def test_temperature_shapes_the_draws() -> None:
    """20,000 draws of the first code at temperature .5 against softmax(2 logits)."""
    policy = small_policy().eval()
    items, lengths = histories(batch=1)
    found = write_slates(policy, items, lengths, k=1, slates=20_000, temperature=0.5)
    prefix = policy.begin(policy.encode(items, lengths))
    expected = (policy.root_logits(prefix)[0].detach() / 0.5).softmax(0)
    first = policy.codes[found.items.flatten()][:, 0]
    tokens = policy.space.trie.children(torch.tensor([ROOT])).token
    share = torch.stack([(first == token).float().mean() for token in tokens])
    assert float((share - expected).abs().max()) < 4 * math.sqrt(0.25 / 20_000)


def test_top_p_draws_among_the_most_probable_alone() -> None:
    """With top_p near 0 only the most probable code is left at each step: all slates are one."""
    policy = small_policy().eval()
    items, lengths = histories(batch=3)
    narrow = write_slates(policy, items, lengths, k=3, slates=4, top_p=1e-6)
    assert torch.equal(narrow.items, narrow.items[:, :1].expand(-1, 4, -1))
    root = policy.root_logits(policy.begin(policy.encode(items, lengths)))
    first = policy.space.trie.children(torch.tensor([ROOT])).token[root.argmax(dim=1)]
    assert torch.equal(policy.codes[narrow.items[:, 0, 0], 0], first)
    wide = write_slates(policy, items, lengths, k=1, slates=500, top_p=0.5).items.flatten(1)
    free = write_slates(policy, items, lengths, k=1, slates=500).items
    assert len(set(wide.flatten().tolist())) < len(set(free.flatten().tolist()))


def test_beam_slates_are_the_most_probable_items() -> None:
    policy = small_policy().eval()
    items, lengths = histories(batch=3)
    scores = all_logprobs(policy, policy.encode(items, lengths).hidden[:, 0])
    found = roll_out(policy, items, lengths, RolloutSettings(slates=N, beam_slates=N)).items[:, :, 0]
    assert torch.equal(found, scores.topk(N, dim=1).indices)
    half = roll_out(policy, items, lengths, RolloutSettings(slates=5, beam_slates=3)).items[:, :, 0]
    assert torch.equal(half[:, 2:], scores.topk(3, dim=1).indices)  # the samples stand first
    mixed = roll_out(policy, items, lengths, RolloutSettings(k=3, slates=2)).items
    assert torch.equal(mixed[:, 1, 0], scores.argmax(dim=1))


def test_beam_slates_read_each_history_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The context of the beam serves the scoring of its slates too."""
    policy, calls = small_policy().eval(), []
    encode = policy.encode

    def counting(items: torch.Tensor, lengths: torch.Tensor) -> Context:
        calls.append(len(items))
        return encode(items, lengths)

    monkeypatch.setattr(policy, "encode", counting)
    roll_out(policy, *histories(batch=3), RolloutSettings(slates=4, beam_slates=4))
    assert calls == [3]


@pytest.mark.parametrize("ends", [False, True])
def test_a_token_counts_where_several_were_legal(ends: bool) -> None:
    """The twin: item by item, the codes under which an item is left that neither history nor slate bars."""
    policy = small_policy(variable_length=ends).eval()
    items, lengths = histories(batch=3)
    excluded = torch.arange(0, N, 3).expand(3, -1)
    codes = [policy.space.sequence(item) for item in range(N)]
    for beams in (0, 1):
        found = roll_out(policy, items, lengths, RolloutSettings(k=2, slates=3, beam_slates=beams), excluded=excluded)
        for user, slate in itertools.product(range(3), range(3)):
            barred = set(range(0, N, 3))
            for place, item in enumerate(found.items[user, slate].tolist()):
                number = (user * 3 + slate) * 2 + place
                free = 0
                for level in range(len(codes[item])):
                    legal = {
                        codes[i][level]
                        for i in range(N)
                        if i not in barred and codes[i][:level] == codes[item][:level] and len(codes[i]) > level
                    }
                    free += len(legal) > 1
                assert int((found.tokens.item == number).sum()) == free, (item, barred)
                barred.add(item)


def test_impossible_rollouts_are_refused() -> None:
    with pytest.raises(SettingsError, match="beam_slates is 5; expected 0 to 1 with k = 2"):
        RolloutSettings(k=2, slates=8, beam_slates=5)
    with pytest.raises(SettingsError, match="top_p is 0"):
        RolloutSettings(top_p=0)
    with pytest.raises(SettingsError, match=r"temperature is 0; expected 0\.001 to 1,000"):
        RolloutSettings(temperature=0)
    policy = small_policy().eval()
    with pytest.raises(SettingsError, match=r"a beam of \d+ items does not fit this catalogue"):
        roll_out(policy, *histories(batch=2), RolloutSettings(slates=N + 1, beam_slates=N + 1))
