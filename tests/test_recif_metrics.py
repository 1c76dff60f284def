"""RecIF-Bench's items and metrics, on cases worked by hand and against slow twins."""

from collections import Counter
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.recif import metrics
from sagerec.recif.items import (
    NO_KEY,
    after_thought,
    asked_ids,
    asked_items,
    codes_of,
    itemic_text,
    key_of,
    keys_in,
    make_key,
    named_item,
    read_generation,
)
from tests.recif_files import A, B, C, tag

SYMBOLS = st.sampled_from("abcd")


@pytest.mark.parametrize(
    ("generation", "named"),
    [
        (tag(A), A),
        (f"<|sid_begin|>{A}", A),  # no end tag
        (A, A),  # no tag: the prompt ended with the begin tag
        (f"  {A} \n", A),
        (f"<think>x {tag(B)}</think>\n{tag(A)}", A),
        (f"<think>a</think>b</think>\n<|sid_begin|>{A}", A),  # the last thought counts
        (tag(A, B), A),  # one generation names one item, the first
        (tag("", B), B),  # an empty body is passed over
        (f"<|sid_begin|> {A} <|sid_end|>", A),
        (f"答案：{tag(A)}", "答案："),  # published oddity: text before the tag is what is named
        (f"{A}<|sid_end|>", f"{A}<|sid_end|>"),  # an end tag alone is no tag
        ("<|sid_begin|><|sid_end|>", "<|sid_begin|><|sid_end|>"),
        (f"{tag(A)}</think>", ""),
        ("", ""),
    ],
)
def test_what_a_generation_names(generation: str, named: str) -> None:
    assert named_item(generation) == named
    assert read_generation(generation) == (named, key_of(generation))


@settings(deadline=None)
@given(st.lists(st.sampled_from([A, B, "<|sid_begin|>", "<|sid_end|>", "</think>", " ", "x", "<s_a_1>"]), max_size=6))
def test_the_short_way_of_reading_is_the_long_one(parts: list[str]) -> None:
    text = "".join(parts)
    assert read_generation(text) == (named_item(text), key_of(text))


def test_what_an_answer_asks_for() -> None:
    """Each item once, in order; here an end tag is needed, and an empty body is none."""
    assert asked_items(tag(A, B, A)) == [A, B]
    assert asked_items(f"<|sid_begin|>{A}<|sid_end|>text<|sid_begin|>{B}") == [A]
    assert asked_items(tag("", B)) == [B]
    assert asked_items("是") == []
    assert asked_ids([0, 7, 5, 7, 0]) == [7, 5]
    assert asked_ids([]) == []


def test_keys_of_items() -> None:
    """340 · 8192² = 340 · 67,108,864 = 22,817,013,760, and 6566 · 8192 + 5603 = 53,794,275."""
    key = 22_817_013_760 + 6566 * 8192 + 5603
    assert make_key(340, 6566, 5603) == key == 22_870_808_035
    assert codes_of(key) == (340, 6566, 5603)
    assert itemic_text((340, 6566, 5603)) == "<|sid_begin|><s_a_340><s_b_6566><s_c_5603><|sid_end|>"
    assert key_of("<think>" + tag(B) + "</think>" + tag(A)) == make_key(1, 1, 1)
    assert key_of(f"答案：{tag(A)}") == make_key(1, 1, 1)  # by id, text before the tag does no harm
    assert key_of("<s_a_1><s_b_2>") == NO_KEY
    assert key_of(f"<s_a_{10**30}><s_b_1><s_c_1>") == NO_KEY
    assert keys_in(f"{tag(A)} 点赞 {tag(B, C)}") == [make_key(n, n, n) for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("predicted", "truth", "k", "expected"),
    [
        ("ab", "b", 1, (False, False, 0.0)),
        ("ab", "b", 2, (True, True, 1.0)),
        ("aab", "b", 2, (False, False, 0.0)),  # a repeat wastes a place
        ("ba", "ab", 1, (True, False, 0.5)),  # the second item is hit, the first is not
        ("bbb", "ab", 3, (True, False, 0.5)),  # one item hit thrice is one item
        ("cd", "ab", 2, (False, False, 0.0)),
        ("abcd", "abc", 32, (True, True, 1.0)),
        ("", "a", 1, (False, False, 0.0)),
        ("a", "", 1, (False, False, 0.0)),
    ],
)
def test_metrics_of_a_sample(predicted: str, truth: str, k: int, expected: tuple[bool, bool, float]) -> None:
    said, asked = list(predicted), list(truth)
    found = metrics.passes(said, asked, k), metrics.passes_first(said, asked, k), metrics.recall(said, asked, k)
    assert found == expected


@settings(deadline=None)
@given(st.lists(SYMBOLS, max_size=6), st.lists(SYMBOLS, max_size=4, unique=True), st.integers(1, 6))
def test_metrics_of_a_sample_against_loops(predicted: list[str], truth: list[str], k: int) -> None:
    any_hit, first_hit, hit = False, False, set()
    for place, item in enumerate(predicted):
        if place < k:
            any_hit |= item in truth
            first_hit |= bool(truth) and item == truth[0]
            hit |= {item} & set(truth)
    assert metrics.passes(predicted, truth, k) == any_hit
    assert metrics.passes_first(predicted, truth, k) == first_hit
    assert metrics.recall(predicted, truth, k) == (len(hit) / len(truth) if truth else 0.0)


def test_mean_is_the_sum_in_order() -> None:
    """Ten times a tenth is not 1 when it is added up in order, and is by NumPy's halves of 128 places and more."""
    values = np.full(1000, 0.1)
    total = 0.0
    for value in values:
        total += value
    assert metrics.mean_in_order(values) == total / 1000
    assert metrics.mean_in_order(values) != values.mean()
    assert metrics.mean_in_order(np.zeros(0)) == 0.0


def test_score_of_yes() -> None:
    """.7 / (.7 + .1) = .875; an absent token counts 1e-10; two zeros are no score."""
    assert metrics.yes_score(0.7, 0.1) == 0.7 / (0.7 + 0.1)
    assert metrics.yes_score(None, 0.1) == 1e-10 / (1e-10 + 0.1)
    assert metrics.yes_score(0.3, None) == 0.3 / (0.3 + 1e-10)
    assert metrics.yes_score(None, None) == 0.5
    assert metrics.yes_score(0.0, 0.0) is None
    assert metrics.yes_score(0.0, 0.2) == 0.0


def test_auc_by_hand() -> None:
    """Yes at .9 and .4, no at .4 and .1: of 4 pairs 3 are right and one is a tie, (3 + .5) / 4."""
    assert metrics.auc(np.array([0.9, 0.4, 0.4, 0.1]), np.array([1, 1, 0, 0])) == 0.875
    assert metrics.auc(np.array([0.9, 0.1]), np.array([1, 1])) == 0.5
    assert metrics.auc(np.zeros(0), np.zeros(0)) == 0.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=2, max_size=12))
def test_auc_against_all_pairs(table: list[tuple[float, bool]]) -> None:
    scores, labels = np.array([s for s, _ in table]), np.array([int(y) for _, y in table])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert metrics.auc(scores, labels) == pytest.approx(np.mean(pairs) if pairs else 0.5)


@settings(deadline=None)
@given(st.lists(SYMBOLS, max_size=10))
def test_entropy_in_bits(clusters: list[str]) -> None:
    shares = [count / len(clusters) for count in Counter(clusters).values()]
    assert metrics.entropy_bits(clusters) == pytest.approx(sum(-p * log2(p) for p in shares))
    assert metrics.entropy_bits(["a", "a", "b", "b"]) == 1.0


def test_cold_recall_and_repeats() -> None:
    """Cold are 5 and 6; 5 is among the first two: .5. Of a, a, b one place of three repeats."""
    assert metrics.cold_recall([7, 5, 6], frozenset({5, 6}), 2) == 0.5
    assert metrics.repeated_share(["a", "a", "b"], 32) == pytest.approx(1 / 3)
    assert metrics.repeated_share([], 32) == 0.0


def test_after_thought() -> None:
    assert after_thought(" x </think> y ") == "y"
    assert after_thought(" x ") == "x"
