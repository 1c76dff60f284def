"""Filters: which items a request may be shown, closed prefix by prefix in the trie.

A filter counts, once, the sequences that each node still leads to: a pass from the leaves up that costs the nodes of
the trie, whatever the filter. Decoding then asks one number a child, so that a category of a million items costs no
more than an item, and a list holds the K most probable of what is left instead of what is left of the K most probable.

Probabilities stay those of the whole catalogue: a filter leaves out, and changes no score of the rest. Where items
share a sequence, it is open while one of them may be shown.

Shapes: N items, R rows (users, or slates), X items of a row, K places, m nodes asked about, F filters.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import ROOT, Trie

NO_ITEM = -1


@dataclass(frozen=True, slots=True, eq=False)
class Filter:
    """What may be shown."""

    allowed: Tensor
    """(N,) bool."""
    open: Tensor
    """(nodes,) int32 sequences of allowed items at or under each node of the trie."""

    @property
    def n_bytes(self) -> int:
        """Memory of both."""
        return sum(t.numel() * t.element_size() for t in (self.allowed, self.open))


def make_filter(space: ActionSpace, allowed: Tensor) -> Filter:
    """The filter of a mask (N,) bool of items."""
    assert allowed.shape == (space.n_items,), allowed.shape
    if bool(allowed.all()):
        return Filter(allowed, space.trie.size)
    trie = space.trie
    found = torch.zeros(trie.n_nodes, dtype=torch.int32, device=space.device)
    found[space.leaf(allowed.nonzero()[:, 0])] = 1
    for begin, end in reversed(levels(trie)):
        bounds = trie.first_child[begin : end + 1].long()
        first, last = int(bounds[0]), int(bounds[-1])
        below = torch.cat([found.new_zeros(1), found[first:last].cumsum(0, dtype=torch.int32)])
        found[begin:end] += below[bounds[1:] - first] - below[bounds[:-1] - first]
    return Filter(allowed, found)


def levels(trie: Trie) -> list[tuple[int, int]]:
    """First node of each depth, and the one after its last."""
    starts = [ROOT, 1]
    while starts[-1] < trie.n_nodes:
        starts.append(int(trie.first_child[starts[-1]]))
    return list(pairwise(starts))


@dataclass(frozen=True, slots=True, eq=False)
class Filters:
    """A filter for each of R rows; rows may share one."""

    filters: tuple[Filter, ...]
    """F filters over one trie."""
    which: Tensor
    """(R,) int64 the filter of each row."""

    def size(self, rows: Tensor, nodes: Tensor) -> Tensor:
        """(m,) int64 open sequences under `nodes` (m,) for `rows` (m,)."""
        if len(self.filters) == 1:
            return self.filters[0].open[nodes].long()
        which, found = self.which[rows], self.filters[0].open[nodes].long()
        for number, one in enumerate(self.filters[1:], start=1):
            found = torch.where(which == number, one.open[nodes].long(), found)
        return found

    def repeated(self, times: int) -> "Filters":
        """Each row `times` over, its copies one after another."""
        return replace(self, which=self.which.repeat_interleave(times))

    def of_rows(self, rows: Tensor) -> "Filters":
        """The filters of `rows` (R',)."""
        return replace(self, which=self.which[rows])


def used_up(space: ActionSpace, items: Tensor, filters: Filters) -> Tensor:
    """Of the distinct items (R, X) that a row leaves out, -1 = none, those whose sequence is closed by that.

    The others, which become -1, share their sequence with an item that the row may be shown still.
    """
    if space.is_unique:
        return items
    leaf = space.leaf(items.clamp(min=0))
    every = space.leaf(torch.arange(space.n_items, device=space.device))
    found = items.clone()
    for row in range(len(items)):
        allowed = filters.filters[int(filters.which[row])].allowed
        ours = items[row] >= 0
        left = torch.bincount(every[allowed], minlength=space.trie.n_nodes)
        out = items[row, ours]
        left -= torch.bincount(leaf[row, ours][allowed[out]], minlength=space.trie.n_nodes)
        found[row, ours & (left[leaf[row]] > 0)] = NO_ITEM
    return found


def shown(space: ActionSpace, listed: Tensor, items: Tensor, filters: Filters) -> Tensor:
    """What stands in the places of lists (R, K) whose rows leave out items (R, X), -1 = none.

    An item that stands for others of its sequence gives way, where it may not be shown itself, to the first of those
    that may.
    """
    if space.is_unique:
        return listed
    order = space.leaf(torch.arange(space.n_items, device=space.device)).sort(stable=True)
    found = listed.clone()
    for row, place in (listed >= 0).nonzero().tolist():
        allowed = filters.filters[int(filters.which[row])].allowed
        leaf = space.leaf(listed[row, place])
        begin, end = torch.searchsorted(order.values, leaf), torch.searchsorted(order.values, leaf, right=True)
        group = order.indices[begin:end]
        group = group[allowed[group] & ~torch.isin(group, items[row])]
        if not bool((group == listed[row, place]).any()):
            found[row, place] = group[0]
    return found
