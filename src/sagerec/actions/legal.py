"""Which continuations are legal: the one distribution that training, sampling, lists and losses use.

A token is legal where the trie has it. In a slate it must also lead to an item that does not stand there yet and that
the user did not have, and sampler and loss renormalise over exactly these tokens. A list of the K best items needs no
renormalisation: it skips what is barred.

Shapes: R rows (users, or slates), X items of a row, P used-up nodes, S prefixes, M legal continuations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sagerec.actions.filters import NO_ITEM as NO_ITEM
from sagerec.actions.filters import Filters
from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import ROOT, Children, Trie


@dataclass(frozen=True, slots=True)
class Barred:
    """The nodes of the trie under which no item is left, for each row.

    Of an item alone under its prefix the shallowest such node is held: no choice lies below it.
    """

    trie: Trie
    """The trie."""
    keys: Tensor
    """(P,) int64, ascending: row x nodes of the trie + node."""
    filters: Filters | None = None
    """What each row may be shown at all; its closed nodes are not among the keys."""

    @property
    def closes(self) -> bool:
        """Whether anything is closed."""
        return len(self.keys) > 0 or self.filters is not None

    def repeated(self, times: int) -> "Barred":
        """Each row `times` over, its copies one after another."""
        row, node = self.keys // self.trie.n_nodes, self.keys % self.trie.n_nodes
        rows = row[:, None] * times + torch.arange(times, device=row.device)
        keys = (rows * self.trie.n_nodes + node[:, None]).flatten().sort().values
        return Barred(self.trie, keys, None if self.filters is None else self.filters.repeated(times))

    def with_items(self, space: ActionSpace, items: Tensor) -> "Barred":
        """Each of the R rows with more items (R, X), -1 for none."""
        return _close(self.trie, torch.cat([self.keys, _keys(space, items)]), self.filters)

    def under(self, rows: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Position among `states` (S,), and place among its siblings, (m,) each, of every used-up child.

        `rows` (S,) says whose.
        """
        at, place = self._among_keys(rows, states)
        if self.filters is None:
            return at, place
        children = self.trie.children(states)
        closed = self.filters.size(rows[children.parent], children.node) == 0
        parent = children.parent[closed]
        places = children.node[closed] - self.trie.first_child[states[parent]]
        return torch.cat([at, parent]), torch.cat([place, places])

    def _among_keys(self, rows: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """What `under` finds among the keys.

        The children of a node are consecutive, so the used-up ones are a run of the keys: the
        cost is theirs, whatever the number of children.
        """
        if len(self.keys) == 0:
            return states.new_zeros(0), states.new_zeros(0)
        first, end = self.trie.first_child[states].long(), self.trie.first_child[states + 1].long()
        base = rows * self.trie.n_nodes
        low, high = torch.searchsorted(self.keys, base + first), torch.searchsorted(self.keys, base + end)
        at = torch.repeat_interleave(high - low)
        index = torch.arange(len(at), device=at.device) - ((high - low).cumsum(0) - (high - low))[at] + low[at]
        return at, self.keys[index] - base[at] - first[at]

    def leaves_free(self, rows: Tensor, states: Tensor, children: Children) -> Tensor:
        """(M,) bool: an item is left under each of the `children`, which are all those of `states` (S,)."""
        free = torch.ones_like(children.node, dtype=torch.bool)
        if self.filters is not None:
            free = self.filters.size(rows[children.parent], children.node) > 0
        at, place = self._among_keys(rows, states)
        count = self.trie.first_child[states + 1].long() - self.trie.first_child[states]
        free[(count.cumsum(0) - count)[at] + place] = False
        return free


def bar(space: ActionSpace, items: Tensor, filters: Filters | None = None) -> Barred:
    """What is used up where the items (R, X) of each row, -1 for none, are barred, of what `filters` leave.

    Items that share a sequence are barred together.
    """
    return _close(space.trie, _keys(space, items), filters)


def items_left(space: ActionSpace, items: Tensor, filters: Filters) -> Tensor:
    """(R,) sequences that are left of what `filters` leave where the items (R, X) of each row are barred."""
    rows = torch.arange(len(items), device=items.device)
    keys = _open_keys(space.trie, torch.unique(_keys(space, items)), filters)
    gone = torch.bincount(keys // space.trie.n_nodes, minlength=len(items))
    return filters.size(rows, torch.full_like(rows, ROOT)) - gone


def _keys(space: ActionSpace, items: Tensor) -> Tensor:
    """Keys of the nodes at which items (R, X) are the only ones left."""
    row, column = (items >= 0).nonzero(as_tuple=True)
    return row * space.trie.n_nodes + space.decided[items[row, column]]


def _sizes(trie: Trie, keys: Tensor, filters: Filters | None) -> Tensor:
    """(m,) int64 sequences under the nodes of keys (m,) that the filter of their row leaves."""
    node = keys % trie.n_nodes
    return trie.size[node].long() if filters is None else filters.size(keys // trie.n_nodes, node)


def _open_keys(trie: Trie, keys: Tensor, filters: Filters | None) -> Tensor:
    """Those of keys (m,) under which the filter of their row leaves anything."""
    return keys if filters is None else keys[_sizes(trie, keys, filters) > 0]


def _close(trie: Trie, keys: Tensor, filters: Filters | None = None) -> Barred:
    """Barred nodes and all that they use up: a node is, when its used-up children hold as many items as it.

    A level of parents at a time: those that are not full wait, with what they hold, for children that may still fill.
    """
    found = _open_keys(trie, torch.unique(keys), filters)
    fresh, waiting, held = found, keys[:0], keys[:0]
    parts = [found]
    while len(fresh):
        node = fresh % trie.n_nodes
        inner = node != ROOT
        parents = fresh[inner] - node[inner] + trie.parents(node[inner])
        waiting, owner = torch.unique(torch.cat([waiting, parents]), return_inverse=True)
        more = torch.cat([held, _sizes(trie, fresh[inner], filters)])
        held = torch.zeros_like(waiting).index_add_(0, owner, more)
        full = held == _sizes(trie, waiting, filters)
        # A node that was given as used up already adds nothing.
        fresh = waiting[full]
        fresh = fresh[~torch.isin(fresh, found)]
        waiting, held = waiting[~full], held[~full]
        parts.append(fresh)
    return Barred(trie, torch.cat(parts).sort().values, filters)
