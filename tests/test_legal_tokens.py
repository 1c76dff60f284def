"""The legal-token mask: a distribution over completions, the slow twin, and what it refuses."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.actions.space import make_space
from sagerec.errors import SettingsError, TrieError
from sagerec.integrations.legal_tokens import LegalTokens, in_vocabulary
from tests.tiny_qwen import END, SEQUENCES, SPACE, VOCABULARY


def completions_of(slates: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded with 0 on the right, and which stand."""
    rows = [[*(token for i in slate for token in SEQUENCES[i]), END] for slate in slates]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def slow_logprob(logits: torch.Tensor, slate: tuple[int, ...]) -> list[float]:
    """Token by token: the softmax over the tokens that begin the rest of an item not yet in the slate."""
    found, at = [], 0
    for place, item in enumerate(slate):
        left = [s for i, s in enumerate(SEQUENCES) if i not in slate[:place]]
        for depth, token in enumerate(SEQUENCES[item]):
            legal = sorted({s[depth] for s in left if s[:depth] == SEQUENCES[item][:depth]})
            found.append(float(logits[at, legal].log_softmax(0)[legal.index(token)]))
            at += 1
    return [*found, 0.0]


@given(seed=st.integers(0, 1000), k=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_scores_are_those_of_the_slow_twin_and_sum_to_one(seed: int, k: int) -> None:
    """Over all slates of K items without repeats the probabilities sum to 1, and the entropy is that of the steps."""
    slates = list(permutations(range(len(SEQUENCES)), k))
    ids, counted = completions_of(slates)
    generator = torch.Generator().manual_seed(seed)
    prefix_logits: dict[tuple[int, ...], torch.Tensor] = {}
    logits = torch.empty(*ids.shape, VOCABULARY)
    for row, tokens in enumerate(ids.tolist()):  # one distribution a prefix, as a model has
        for t in range(ids.shape[1]):
            key = tuple(tokens[:t])
            if key not in prefix_logits:
                prefix_logits[key] = torch.randn(VOCABULARY, generator=generator) * 3
            logits[row, t] = prefix_logits[key]
    scored = LegalTokens(SPACE, END, k).score(logits, ids, counted)
    for row in range(0, len(slates), max(1, len(slates) // 20)):
        expected = slow_logprob(logits[row], slates[row])
        found = scored.logprobs[row, : len(expected)].tolist()
        assert found == pytest.approx(expected, abs=1e-5)
    assert float(scored.logprobs.sum(1).exp().sum()) == pytest.approx(1.0, abs=1e-4)
    assert bool((scored.logprobs[~counted] == 0).all())


def test_forced_tokens_count_for_nothing() -> None:
    """Item 7 = (5, 11): its second token and the end are forced. Items 4 and 5 share (4, 13) and part at the third."""
    ids, counted = completions_of([(7,), (4,)])
    legal = LegalTokens(SPACE, END).follow(ids, counted)
    assert legal.free.tolist() == [[True, False, False, False], [True, True, True, False]]
    both = LegalTokens(SPACE, END, 2)
    ids, counted = completions_of([(4, 5)])
    assert both.follow(ids, counted).free.tolist() == [[True, True, True, True, True, False, False]], (
        "after item 4, (4, 13) is followed by 21 alone"
    )


def test_the_next_tokens_leave_out_what_stands_and_end_with_the_end() -> None:
    legal = LegalTokens(SPACE, END, 2)
    ids, _ = completions_of([(7, 0)])

    def after(n: int) -> list[int]:
        return legal.next(ids[:, :n], torch.ones(1, n, dtype=torch.bool))[0].nonzero()[:, 0].tolist()

    assert [after(n) for n in range(6)] == [[2, 3, 4, 5], [11], [2, 3, 4], [10, 11], [END], [END]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([2, 13], "token 13 does not follow state 1: no item of the catalogue begins so"),
        ([2, 10, 3], "token 3 stands where a completion of 1 items ends; expected the end token 1"),
        ([END, 0], "token 1 does not follow state 0"),
    ],
)
def test_a_completion_that_is_none_is_refused(tokens: list[int], message: str) -> None:
    ids = torch.tensor([tokens])
    with pytest.raises(TrieError, match=message):
        LegalTokens(SPACE, END).follow(ids, torch.ones_like(ids, dtype=torch.bool))


def test_an_item_that_stands_twice_is_refused() -> None:
    ids = torch.tensor([[2, 10, 2, 10, END]])
    with pytest.raises(TrieError, match="item 0 stands twice in a completion"):
        LegalTokens(SPACE, END, 2).follow(ids, torch.ones_like(ids, dtype=torch.bool))


def test_completions_are_read_as_items() -> None:
    legal = LegalTokens(SPACE, END, 3)
    assert legal.read([4, 13, 21, 5, 11, 3, 12, END]) == [5, 7, 3]
    assert legal.read([4, 13, 21, 5, 13, 3]) == [5, -1, -1], "what follows a token that is none is not read"
    assert legal.read([4, 13, END]) == [-1, -1, -1]
    assert legal.longest == 10
    with pytest.raises(SettingsError, match="k is 9; expected 1 to 8, the items"):
        LegalTokens(SPACE, END, 9)
    with pytest.raises(SettingsError, match="end is 10, which stands within items; expected the id of a token"):
        LegalTokens(SPACE, 10)


def test_codes_become_ids_of_a_vocabulary() -> None:
    space = make_space(np.array([[0, 1, -1], [0, 2, 5], [3, 0, 1]]))
    ids = in_vocabulary(space, [10, 20, 30])
    assert [ids.sequence(i) for i in range(3)] == [[10, 21], [10, 22, 35], [13, 20, 31]]
    with pytest.raises(SettingsError, match=r"first_ids \[10, 13, 30\] overlap at places 0 and 1 of \[4, 3, 6\] codes"):
        in_vocabulary(space, [10, 13, 30])
    with pytest.raises(SettingsError, match="first_ids has 2 entries; expected 3"):
        in_vocabulary(space, [10, 20])
