"""Where free tokens stand: slates of any numbers of tokens as a table of units, which the loss takes.

A unit is a slate, or, where each item is credited with what it earns, an item, whose group is its place.

Shapes: B contexts of a minibatch, G slates of each, K places, F free tokens of all slates. Units: B' = B of G slates
each, or B K of G items each; T the most free tokens of a unit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sagerec.actions.space import ActionSpace
from sagerec.decoding.slates import FreeTokens


def as_units(x: Tensor, per_item: bool) -> Tensor:
    """(B, G, K, …) as units: (B, G, K …) for slates; for items (B K, G, …), the group of an item being its place."""
    return x.transpose(1, 2).flatten(0, 1) if per_item else x.flatten(2)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the free tokens of slates stand in a table of units, so that one unit's tokens are one row."""

    place: Tensor
    """(F,) int64 position of each token in the flattened table."""
    mask: Tensor
    """(B', G, T) bool: the places that hold one."""

    def part(self, rows: slice) -> "Layout":
        """Of the units `rows`, all those of some contexts."""
        cells = self.mask[0].numel()
        begin, end = rows.start * cells, rows.stop * cells
        if len(self.place) == self.mask.numel():  # every place of the table has a token, whether it counts or not
            return Layout(self.place[begin:end] - begin, self.mask[rows])
        first, last = (int(self.mask[:row].sum()) for row in (rows.start, rows.stop))
        return Layout(self.place[first:last] - begin, self.mask[rows])

    def fill(self, values: Tensor) -> Tensor:
        """Values (F,) of the tokens as a table (B', G, T), 0 where there is none."""
        return values.new_zeros(self.mask.numel()).index_put((self.place,), values).view(self.mask.shape)


def lay_out(tokens: FreeTokens, slates: tuple[int, int, int], *, per_item: bool) -> Layout:
    """The layout of the free tokens of slates (B, G, K) by units: slates, or items with the place as their group."""
    batch, group, k = slates
    if tokens.counted is not None:  # as many places an item: where each stands hangs on nothing else
        places = len(tokens.item) // (batch * group * k)
        at = torch.arange(len(tokens.item), device=tokens.item.device).view(batch, group, k, places)
        order = as_units(at, per_item)
        place = torch.empty_like(tokens.item).scatter(0, order.flatten(), torch.arange(at.numel(), device=at.device))
        return Layout(place, tokens.counted[order.flatten()].view(order.shape))
    unit = tokens.item // k
    if per_item:
        unit = (tokens.item // (group * k) * k + tokens.item % k) * group + unit % group
    counts = torch.bincount(unit, minlength=batch * group * (k if per_item else 1))
    longest = max(int(counts.max()), 1)
    order = unit.argsort(stable=True)
    rank = torch.empty_like(unit)
    rank[order] = torch.arange(len(unit), device=unit.device) - (counts.cumsum(0) - counts)[unit[order]]
    mask = torch.arange(longest, device=unit.device) < counts[:, None]
    return Layout(unit * longest + rank, mask.view(-1, group, longest))


def most_choices(space: ActionSpace) -> int:
    """Free tokens of the item that has most of them."""
    paths = space.paths(torch.arange(space.n_items, device=space.device))
    free = torch.bincount(paths.owner, space.has_choice(paths.parent).double(), minlength=1)
    return max(int(free.max()), 1)
