"""The trie against a plain set of prefixes, its errors, and its file form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.actions.trie import PADDING, ROOT, Trie, build_trie, read_trie, write_trie
from sagerec.errors import ArtifactError, TrieError

HAND = np.array([[0, 1, -1], [0, 2, 5], [3, -1, -1], [0, 2, 1]])


def padded(rows: list[tuple[int, ...]]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([list(row) + [PADDING] * (width - len(row)) for row in rows])


def slow_children(rows: list[tuple[int, ...]], prefix: tuple[int, ...]) -> list[int]:
    """The twin: every token that follows `prefix` in some row."""
    n = len(prefix)
    return sorted({row[n] for row in rows if row[:n] == prefix and len(row) > n})


def prefix_free(rows: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Distinct rows, without those that begin another."""
    distinct = sorted(set(rows))
    return [r for r in distinct if not any(o != r and o[: len(r)] == r for o in distinct)]


sequences = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple), min_size=1, max_size=30).map(
    prefix_free
)


def test_hand_built_trie() -> None:
    """Four items: 01, 025, 3, 021. Depth 1 holds 0 and 3; depth 2, 01 and 02; depth 3, 021 and 025.

    Numbered by depth: root 0; nodes 1 (0) and 2 (3); 3 (01) and 4 (02); 5 (021) and 6 (025).
    """
    trie = build_trie(HAND)
    assert trie.token.tolist() == [-1, 0, 3, 1, 2, 1, 5]
    assert trie.first_child.tolist() == [1, 3, 5, 5, 5, 7, 7, 7]
    assert trie.item.tolist() == [-1, -1, 2, 0, -1, 3, 1]
    assert trie.size.tolist() == [4, 3, 1, 1, 2, 1, 1]
    assert trie.max_children == 2
    allowed = trie.allowed(torch.tensor([0, 1, 4]))
    assert [row.nonzero()[:, 0].tolist() for row in allowed] == [[0, 3], [1, 2], [1, 5]]
    assert trie.walk(torch.from_numpy(HAND)).tolist() == [[0, 1, 3, 3], [0, 1, 4, 6], [0, 2, 2, 2], [0, 1, 4, 5]]


@given(rows=sequences)
@settings(max_examples=150, deadline=None)
def test_children_advance_and_items_equal_the_slow_twin(rows: list[tuple[int, ...]]) -> None:
    trie = build_trie(padded(rows))
    prefixes = {row[:n] for row in rows for n in range(len(row))}
    state_of: dict[tuple[int, ...], int] = {(): ROOT}
    for prefix in sorted(prefixes, key=len):
        state = torch.tensor([state_of[prefix]])
        children = trie.children(state)
        assert children.token.tolist() == slow_children(rows, prefix)
        assert torch.equal(trie.advance(state.expand(len(children.token)), children.token), children.node)
        for token, node in zip(children.token.tolist(), children.node.tolist(), strict=True):
            state_of[(*prefix, token)] = node
    for prefix, node in state_of.items():
        assert int(trie.size[node]) == sum(row[: len(prefix)] == prefix for row in rows)
    for index, row in enumerate(rows):
        assert int(trie.item[state_of[row]]) == index
    assert trie.n_nodes == len(state_of)


def test_children_of_many_states_at_once_are_those_of_each() -> None:
    trie = build_trie(HAND)
    together = trie.children(torch.tensor([4, 0, 4, 1]))
    assert together.parent.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert together.node.tolist() == [5, 6, 1, 2, 5, 6, 3, 4]


@pytest.mark.parametrize("width", range(1, 18))
def test_advance_finds_every_child_and_no_other_whatever_their_number(width: int) -> None:
    """Even tokens follow the state, odd ones and those past the end do not; other states in the batch are narrower."""
    trie = build_trie(np.array([[0, 2 * token] for token in range(width)] + [[1, 0]]))
    states, tokens = torch.full((width + 1,), 1), 2 * torch.arange(width + 1)
    states[-1], tokens[-1] = 2, 0
    assert trie.token[trie.advance(states, tokens)].tolist() == tokens.tolist()
    for wrong in (*range(1, 2 * width, 2), 2 * width):
        with pytest.raises(TrieError, match=f"token {wrong} does not follow state 1"):
            trie.advance(torch.tensor([2, 1]), torch.tensor([0, wrong]))
    assert trie.advance(states[:0], tokens[:0]).tolist() == []


def test_unknown_prefix_and_dead_end_are_errors_never_an_unconstrained_step() -> None:
    trie = build_trie(HAND)
    with pytest.raises(TrieError, match="token 4 does not follow state 1"):
        trie.advance(torch.tensor([1, 1]), torch.tensor([2, 4]))
    with pytest.raises(TrieError, match="state 3 is a dead end: it holds item 0"):
        trie.allowed(torch.tensor([0, 3]))
    with pytest.raises(TrieError, match=r"outside 0 … 6"):
        trie.children(torch.tensor([7]))
    with pytest.raises(TrieError, match="does not follow"):
        trie.walk(torch.tensor([[3, 0, -1]]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2], [1, 2]], r"items 0 and 1 have sequences \[1, 2\] and \[1, 2\]"),
        ([[1, -1], [1, 2]], r"items 0 and 1 have sequences \[1\] and \[1, 2\]"),
        ([[-1, 2]], "needs a first token"),
        ([[1, -1, 2]], "padding before its last token"),
    ],
)
def test_bad_sequences_are_refused(rows: list[list[int]], message: str) -> None:
    with pytest.raises(TrieError, match=message):
        build_trie(np.array(rows))


def test_empty_catalogue_is_refused() -> None:
    with pytest.raises(TrieError, match="the catalogue is empty"):
        build_trie(np.zeros((0, 3), dtype=int))


def test_wide_vocabularies_use_wide_tokens() -> None:
    trie = build_trie(np.array([[40000, 1], [2, 70000]]))
    assert trie.token.dtype == torch.int32
    assert trie.vocabulary == 70001
    assert trie.walk(torch.tensor([[40000, 1]]))[0, -1] == 4


@pytest.mark.parametrize("memory_map", [True, False])
def test_round_trip_through_files(tmp_path: Path, memory_map: bool) -> None:
    trie = build_trie(HAND)
    write_trie(tmp_path / "trie", trie)
    same = read_trie(tmp_path / "trie", memory_map=memory_map)
    for name in ("first_child", "token", "item", "size"):
        assert torch.equal(getattr(trie, name), getattr(same, name))
    assert same.max_children == trie.max_children
    states = torch.tensor([0, 1])
    assert torch.equal(same.allowed(states), trie.allowed(states))


def test_damaged_files_are_an_error(tmp_path: Path) -> None:
    write_trie(tmp_path, build_trie(HAND))
    (tmp_path / "token.npy").write_bytes(b"\x93NUMPY broken")
    with pytest.raises(ArtifactError, match=r"token\.npy cannot be read"):
        read_trie(tmp_path)
    (tmp_path / "token.npy").unlink()
    with pytest.raises(ArtifactError, match="make the Semantic IDs again"):
        read_trie(tmp_path)


def test_a_trie_may_label_its_leaves() -> None:
    trie = build_trie(HAND[:2], np.array([7, 9]))
    assert isinstance(trie, Trie)
    assert sorted(trie.item[trie.item >= 0].tolist()) == [7, 9]
