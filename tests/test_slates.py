"""Lists and slates against brute force: every item scored, every slate's probability recomputed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.actions.groups import group_log_softmax, pad_groups
from sagerec.actions.legal import NO_ITEM
from sagerec.catalogue.splits import Cases
from sagerec.decoding.beam import beam_lists, exact_lists
from sagerec.decoding.cases import distinct_rows, list_cases
from sagerec.decoding.slates import slate_logprobs, write_slates
from sagerec.errors import SettingsError
from tests.test_policy import N, all_logprobs, histories, small_policy


@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 12),
    beams=st.integers(1, 12),
    barred=st.integers(0, 20),
    ends=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_exact_lists_equal_brute_force(seed: int, k: int, beams: int, barred: int, ends: bool) -> None:
    """Also with `barred` items excluded, and with codes of different lengths."""
    policy = small_policy(seed=seed, variable_length=ends)
    items, lengths = histories(seed)
    generator = torch.Generator().manual_seed(seed)
    excluded = torch.stack([torch.randperm(N, generator=generator)[:barred] for _ in range(len(items))])
    with torch.no_grad():
        scores = all_logprobs(policy, policy.encode(items, lengths).hidden[:, 0]).scatter(1, excluded, -torch.inf)
        lists = exact_lists(policy, items, lengths, k=k, beams=beams, excluded=excluded)
    best = scores.topk(k, dim=1)
    torch.testing.assert_close(lists.logprobs, best.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.gather(1, lists.items), best.values, rtol=1e-4, atol=1e-4)
    assert bool(lists.exact.all())


def test_a_narrow_beam_errs_and_never_claims_a_wrong_list() -> None:
    """Over many contexts a beam of k makes mistakes; every list that it calls exact is the true one."""
    wrong = claimed = 0
    for seed in range(8):
        policy = small_policy(seed=seed)
        items, lengths = histories(seed, batch=20)
        with torch.no_grad():
            context = policy.encode(items, lengths)
            truth = all_logprobs(policy, context.hidden[:, 0]).topk(2, dim=1)
            for beams in (2, 6, 10):
                lists = beam_lists(policy, context, len(items), k=2, beams=beams)
                right = (lists.items == truth.indices).all(dim=1)
                assert bool(right[lists.exact].all())
                wrong += int((~right).sum())
                claimed += int(lists.exact.sum())
    assert wrong > 0, "the test needs contexts on which a narrow beam errs"
    assert claimed > 0, "the test needs lists that are proven"


def test_excluded_items_are_left_out_and_the_rest_keeps_its_order() -> None:
    policy = small_policy()
    items, lengths = histories()
    with torch.no_grad():
        scores = all_logprobs(policy, policy.encode(items, lengths).hidden[:, 0])
        top = scores.topk(12, dim=1)
        excluded = torch.cat([top.indices[:, ::2], torch.full((5, 1), NO_ITEM)], dim=1)
        lists = exact_lists(policy, items, lengths, k=6, beams=6, excluded=excluded)
    assert torch.equal(lists.items, top.indices[:, 1::2])
    torch.testing.assert_close(lists.logprobs, top.values[:, 1::2], rtol=1e-4, atol=1e-4)


def test_lists_longer_than_the_catalogue_end_with_no_item() -> None:
    policy = small_policy()
    items, lengths = histories(batch=2)
    lists = exact_lists(policy, items, lengths, k=N + 3, excluded=torch.arange(10).expand(2, -1))
    assert (lists.items == NO_ITEM).sum(dim=1).tolist() == [13, 13]
    assert bool((lists.logprobs[:, N - 10 :] == -torch.inf).all())
    assert all(sorted(row[row != NO_ITEM].tolist()) == list(range(10, N)) for row in lists.items)


def test_too_few_beams_are_refused() -> None:
    policy = small_policy()
    with pytest.raises(SettingsError, match="beams is 3 and k is 5"):
        beam_lists(policy, policy.encode(*histories()), 5, k=5, beams=3)


def slow_slate_logprob(policy: object, history: list[int], slate: list[int]) -> float:
    """The twin: log P of a slate from full encodings and brute force over the items that are left, code by code.

    Each code is renormalised over the codes under which an item is left that is not in the slate.
    """
    total, before = 0.0, list(history)
    codes = policy.codes.tolist()  # type: ignore[attr-defined]
    taken: set[int] = set()
    for item in slate:
        context = policy.encode(torch.tensor([before]), torch.tensor([len(before)]))  # type: ignore[attr-defined]
        hidden = context.hidden[:, 0]
        for level in range(len(codes[item])):
            # P(code | prefix) over the free items: raw log-probabilities of each next code, renormalised.
            raw = {}
            for other in range(N):
                if other not in taken and codes[other][:level] == codes[item][:level]:
                    step = policy.target_logprobs(hidden, torch.tensor([other]))  # type: ignore[attr-defined]
                    raw[codes[other][level]] = float(step[0, level])
            total += raw[codes[item][level]] - float(torch.tensor(list(raw.values())).logsumexp(0))
        taken.add(item)
        before.append(item)
    return total


def test_slates_are_distinct_and_their_logprobs_are_those_of_the_slow_twin() -> None:
    policy = small_policy()
    items, lengths = histories(batch=2, longest=5)
    generator = torch.Generator().manual_seed(0)
    slates = write_slates(policy, items, lengths, k=4, slates=2, generator=generator)
    assert slates.items.shape == (2, 2, 4)
    assert slates.scores().shape == (2, 2, 4)
    with torch.no_grad():
        for user in range(2):
            for slate in range(2):
                chosen = slates.items[user, slate].tolist()
                assert len(set(chosen)) == 4
                expected = slow_slate_logprob(policy, items[user, : lengths[user]].tolist(), chosen)
                assert float(slates.scores()[user, slate].sum()) == pytest.approx(expected, abs=1e-3)


def test_a_slate_may_be_the_whole_catalogue() -> None:
    """The last items can be written only if a prefix is closed as soon as its items are used up."""
    policy = small_policy()
    slates = write_slates(policy, *histories(batch=3), k=N, slates=2, generator=torch.Generator().manual_seed(0))
    assert bool((slates.items.sort(dim=2).values == torch.arange(N)).all())


def test_greedy_takes_the_most_probable_item_and_excluded_items_never_appear() -> None:
    """Place by place, against the top of a beam list after history and slate so far."""
    policy = small_policy(seed=4)
    items, lengths = histories(4)
    excluded = torch.arange(0, N, 2).expand(5, -1)
    greedy = write_slates(policy, items, lengths, k=5, temperature=0.0, excluded=excluded)
    assert bool((greedy.items % 2 == 1).all())
    scored = slate_logprobs(policy, items, lengths, greedy.items, excluded=excluded).tokens
    torch.testing.assert_close(greedy.tokens.logprobs, scored.logprobs.detach())
    for user in range(5):
        whole, out = items[user, : lengths[user]].tolist(), excluded[0].tolist()
        for item in greedy.items[user, 0].tolist():
            history = torch.tensor([whole])
            best = exact_lists(policy, history, torch.tensor([len(whole)]), k=1, excluded=torch.tensor([out]))
            assert int(best.items[0, 0]) == item
            whole, out = [*whole, item], [*out, item]
    again = write_slates(policy, items, lengths, k=5, temperature=0.0, excluded=excluded)
    assert torch.equal(greedy.items, again.items)


def test_samples_follow_the_distribution() -> None:
    """20,000 single items of one context: each share lies within 5 standard errors of its probability."""
    policy = small_policy(seed=2)
    items, lengths = histories(2, batch=1)
    n = 20_000
    drawn = write_slates(policy, items, lengths, k=1, slates=n, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = all_logprobs(policy, policy.encode(items, lengths).hidden[:, 0])[0].exp().double()
    share = torch.bincount(drawn.items.flatten(), minlength=N).double() / n
    error = (p * (1 - p) / n).sqrt()
    assert bool(((share - p).abs() <= 5 * error + 1e-4).all())
    assert float(p.max()) > 2 * float(p.min())


def test_same_generator_same_slates_and_bad_settings_are_refused() -> None:
    policy = small_policy()
    items, lengths = histories()
    first = write_slates(policy, items, lengths, k=3, slates=2, generator=torch.Generator().manual_seed(7))
    second = write_slates(policy, items, lengths, k=3, slates=2, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first.items, second.items)
    with pytest.raises(SettingsError, match="temperature is -1"):
        write_slates(policy, items, lengths, k=1, temperature=-1)
    with pytest.raises(SettingsError, match="k is 55 with 10 excluded items, and the catalogue has 60"):
        write_slates(policy, items, lengths, k=55, excluded=torch.arange(10).expand(5, -1))


def test_list_cases_gives_each_case_its_own_list_whatever_the_batch() -> None:
    policy = small_policy()
    rng = np.random.default_rng(0)
    event_items = rng.integers(0, N, 40).astype(np.int32)
    starts, rows = np.array([0, 0, 15, 15, 30]), np.array([3, 14, 20, 29, 31])
    cases = Cases(np.array([0, 0, 1, 1, 2]), event_items[rows], rows, starts, event_items)
    together, exact = list_cases(policy, cases, k=5, beams=8, batch_size=64)
    alone, _ = list_cases(policy, cases, k=5, beams=8, batch_size=1)
    assert np.array_equal(together, alone)
    assert exact.all()
    fresh, _ = list_cases(policy, cases, k=5, beams=8, exclude_history=True)
    for case in range(5):
        history = set(event_items[max(starts[case], rows[case] - 12) : rows[case]].tolist())
        assert not history & set(fresh[case].tolist())
    slates, _ = list_cases(policy, cases, k=5, greedy_slates=True)
    assert all(len(set(row.tolist())) == 5 for row in slates)


def test_group_functions_by_hand() -> None:
    """Groups (0, 0, 2): softmax of (0, ln 3) is (1/4, 3/4); a group of one is 1; group 1 is empty."""
    logits = torch.tensor([0.0, 1.0986123, 5.0])
    groups = torch.tensor([0, 0, 2])
    result = group_log_softmax(logits, groups, 3).exp()
    torch.testing.assert_close(result, torch.tensor([0.25, 0.75, 1.0]))
    rows, position = pad_groups(torch.tensor([7.0, 8.0, 9.0]), groups, 3, -1.0)
    assert rows.tolist() == [[7, 8], [-1, -1], [9, -1]]
    assert position.tolist() == [0, 1, 4]
    assert distinct_rows(torch.tensor([[4, 2, 4, -1], [1, 2, 3, 0]])).tolist() == [[-1, 2, 4, -1], [0, 1, 2, 3]]
