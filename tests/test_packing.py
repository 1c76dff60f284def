"""Token trees laid into rows: columns, ways and masks against slow twins."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.policies.packing import Tree, chains, lay_out, mask, share_rows, table, ways


def test_by_hand() -> None:
    """Two users: after state 0 the tokens 5 -> 6 and 5 -> 7, after state 1 the token 8."""
    tree = Tree(*map(torch.tensor, ([5, 6, 7, 8], [0, 0, 0, 1], [-1, 0, 0, -1], [0, 1, 1, 0])))
    rows = lay_out(torch.tensor([0, 0, 0, 1]), 2)
    assert table(tree.token, rows).tolist() == [[5, 6, 7], [8, 0, 0]]
    own = ways(tree, rows)
    assert own.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0]]
    seen = torch.tensor([[True, False]] * 3 + [[True, True]])
    sees = mask(seen, own, rows)[:, 0].int()
    assert sees[0].tolist() == [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 1]]
    assert sees[1].tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100)), min_size=1, max_size=20), st.integers(0, 9))
def test_ways_equal_following_the_parents(drawn: list[tuple[int, int]], seed: int) -> None:
    parent: list[int] = []
    depth: list[int] = []
    anchor: list[int] = []
    for i, (state, choice) in enumerate(drawn):
        before = [j for j in range(i) if anchor[j] == state]
        parent.append(-1 if not before or choice % 3 == 0 else before[choice % len(before)])
        depth.append(0 if parent[-1] < 0 else depth[parent[-1]] + 1)
        anchor.append(state)
    tree = Tree(torch.arange(len(drawn)), *map(torch.tensor, (anchor, parent, depth)))
    rows = lay_out(torch.tensor(anchor), 4)
    own = ways(tree, rows)
    for i in range(len(drawn)):
        expected, at = set(), i
        while at >= 0:
            expected.add(int(rows.slot[at]))
            at = parent[at]
        assert set(own[i].nonzero()[:, 0].tolist()) == expected


def test_chains_begin_anew_for_each_sequence() -> None:
    tree = chains(torch.arange(5), torch.tensor([2, 0]), torch.tensor([3, 2]))
    assert tree.anchor.tolist() == [2, 2, 2, 0, 0]
    assert tree.parent.tolist() == [-1, 0, 1, -1, 3]
    assert tree.depth.tolist() == [0, 1, 2, 0, 1]


def test_slates_share_rows_of_like_width() -> None:
    """Of four slates of 2, 6, 4 and 8 tokens after 10, two rows hold 2 + 8 and 4 + 6; after 5 each has its own."""
    lengths = torch.tensor([[[1, 1], [3, 3], [2, 2], [4, 4]], [[1, 1]] * 4])
    row, n_rows = share_rows(lengths, 10)
    assert n_rows == 2
    assert row[:4].tolist() == [0, 1, 1, 0]
    assert row[4:].bincount().tolist() == [0, 0, 2, 2]
    assert share_rows(lengths, 5)[0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert share_rows(lengths, 1000)[1] == 1
