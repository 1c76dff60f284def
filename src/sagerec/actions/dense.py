"""Dense twins of the ragged listings: tables whose shapes hang on the trie and the batch alone.

No value is read from the device, so that a GPU is never waited for and a step can be compiled and captured. Rows are
padded to the children of the state that has most at their depth; on a CPU, where padding costs what a kernel's start
does not, the ragged listings of `trie` and `legal` do the same work.

Shapes: R states, C children of the state that has most at their depth, X items that a row leaves out, U such rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sagerec.actions.filters import NO_ITEM, Filters, levels
from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import ROOT, Children, Trie

NOWHERE = -1


def wants_static(device: torch.device) -> bool:
    """Whether steps on the device should have static shapes: on a GPU, and where they are compiled."""
    return device.type != "cpu" or torch.compiler.is_compiling()


def level_widths(trie: Trie) -> tuple[int, ...]:
    """Children of the state that has most, for each depth that has any."""
    counts = trie.first_child[1:] - trie.first_child[:-1]
    widths = [int(counts[begin:end].max()) for begin, end in levels(trie)]
    return tuple(width for width in widths if width)


def node_at(space: ActionSpace, items: Tensor, depth: int) -> Tensor:
    """(…) state after token `depth` (from 0) of items (…), NOWHERE after the end of a sequence or for no item."""
    known = items.clamp(min=0)
    at = space.offsets[known] + depth
    inside = (items >= 0) & (at < space.offsets[known + 1])
    return torch.where(inside, space.nodes[at.clamp(max=len(space.nodes) - 1)].long(), NOWHERE)


class ChildTable(NamedTuple):
    """The children of R states, each listed with as many places as the widest has."""

    children: Children
    """R x C of them; where there is none, the root under token 0."""
    first: Tensor
    """(R,) int64 first child of each state."""
    legal: Tensor
    """(R, C) bool: there is one."""


def list_children(trie: Trie, states: Tensor, width: int) -> ChildTable:
    """The children of states (R,), at most `width` each; NOWHERE has none."""
    known = states.clamp(min=0)
    first = trie.first_child[known].long()
    count = torch.where(states >= 0, trie.first_child[known + 1] - first, 0)
    place = torch.arange(width, device=states.device)
    legal = place < count[:, None]
    node = torch.where(legal, first[:, None] + place, ROOT)
    token = torch.where(legal, trie.token[node].long(), 0)
    parent = torch.arange(len(states), device=states.device)[:, None].expand_as(node)
    return ChildTable(Children(parent.flatten(), node.flatten(), token.flatten()), first, legal)


def spend(space: ActionSpace, items: Tensor, filters: Filters | None = None) -> Tensor:
    """Items (U, X) that rows leave out, once each: -1 for those whose sequence stands there already or is closed."""
    leaf = torch.where(items >= 0, space.leaf(items.clamp(min=0)), NOWHERE)
    order = leaf.argsort(dim=1, stable=True)
    leaf, items = leaf.gather(1, order), items.gather(1, order)
    again = torch.zeros_like(leaf, dtype=torch.bool)
    again[:, 1:] = leaf[:, 1:] == leaf[:, :-1]
    if filters is not None:
        rows = torch.arange(len(items), device=items.device)[:, None].expand_as(items)
        again |= filters.size(rows.flatten(), leaf.clamp(min=0).flatten()).view_as(items) == 0
    return items.masked_fill(again, NO_ITEM)


def open_children(
    space: ActionSpace,
    table: ChildTable,
    states: Tensor,
    depth: int,
    *,
    spent: Tensor | None,
    rows: Tensor,
    filters: Filters | None = None,
) -> Tensor:
    """(R, C) bool: the child is there, and an item is left under it.

    The children stand after token `depth` (from 0) of states (R,); `rows` (R,) says which of the rows of `spent` (U, X)
    and of `filters` each state has.
    """
    node = table.children.node.view_as(table.legal)
    size = space.trie.size[node].long()
    if filters is not None:
        size = filters.size(rows[table.children.parent], node.flatten()).view_as(node)
    if spent is None:
        return table.legal & (size > 0)
    out = spent[rows]
    child = node_at(space, out, depth)
    here = child >= 0
    if depth:
        here &= node_at(space, out, depth - 1) == states[:, None]
    width = table.legal.shape[1]
    place = torch.where(here, child - table.first[:, None], width)
    counts = torch.zeros(len(states), width + 1, dtype=torch.int64, device=states.device)
    held = counts.scatter_add(1, place, torch.ones_like(place))[:, :width]
    return table.legal & (held < size)
