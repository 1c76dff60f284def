"""The co-occurrence prior: what the users of the items before took too, added to the item scores.

An item-kNN inside the policy's one distribution. After items x_1 … x_t,

    K_t = decay K_{t-1} + row of x_t,   row of j: c_ij / (sqrt(n_i n_j) + shrink)  for each neighbour i of j,
    p_i = a (n_i + 1)^q log(1 + b K_t(i)),

with the counts of `actions.neighbours` and three learnt scalars a, b and q. It joins the score s_i of item i and so the
log-sum-exp of every trie node above it (`item_scores`).

*Leave one out.* On the sequences that were counted, a target occurs with the items before it if only because of this
very sequence; a policy trained on that believes the prior too much. There each pair of the sequence's own items counts
one less, which is exact, for a sequence adds one to a pair. (Of a sequence longer than `max_items` the items outside
the window keep their own counts, as candidates that are never targets of that window.)

K is not dense: a state's is held over the items that its user's history has for neighbours. It has no gradient; p is
computed from it where it is asked for.

Shapes: B users, G states of each, S items that these may see, m neighbours, U distinct neighbours of a user's items, N
leaves, R rows (states).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sagerec.actions.neighbours import SHRINK, Neighbours

DECAY = 0.8
"""What a step back in the sequence leaves of an item's weight."""
ALL = slice(None)
SHARPNESS = 20.0
"""b before training."""


class Prior(NamedTuple):
    """The prior of R states; p is computed where it is asked for."""

    places: Tensor
    """(B, U) int64 places of the leaves that have a prior, ascending; N after the last."""
    sums: Tensor
    """(B * G, U) float32 K of the leaves at these places, 0 after the last."""
    rows: Tensor
    """(R,) int64 row of each state in `sums`."""
    popularity: Tensor
    """(N + 1,) float32 log(n + 1) of the leaves, and 0."""
    scalars: Tensor
    """(3,) log a, log b and q."""

    @property
    def n_leaves(self) -> int:
        return len(self.popularity) - 1

    def of_rows(self, rows: Tensor) -> "Prior":
        """That of some states."""
        return self._replace(rows=self.rows[rows])

    def users(self, states: Tensor | slice = ALL) -> Tensor:
        """Row of each of some states in `places`."""
        return self.rows[states] // (len(self.sums) // len(self.places))

    def table(self, states: slice = ALL) -> tuple[Tensor, Tensor]:
        """Places (U, r), and p there, of some of the states; where a state has fewer, p is 0 at the last leaf."""
        places = self.places[self.users(states)].T
        return places.clamp(max=self.n_leaves - 1), self._value(self.sums[self.rows[states]].T, places)

    def add_to(self, scores: Tensor, states: slice = ALL) -> Tensor:
        """Scores (N, r) of all leaves after some of the states, with the prior of each added in place."""
        return scores.scatter_add_(0, *self.table(states))

    def at(self, states: Tensor, places: Tensor) -> Tensor:
        """(M,) the prior of leaves at places (M,) after states (M,), 0 where there is none."""
        n_users, width = self.places.shape
        begin = torch.arange(n_users, device=places.device)[:, None] * (self.n_leaves + 1)
        keys = (begin + self.places).flatten()
        user = self.users(states)
        wanted = user * (self.n_leaves + 1) + places
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        column = (found - user * width).clamp(min=0, max=width - 1)
        return self._value(self.sums[self.rows[states], column] * (keys[found] == wanted), places)

    def _value(self, sums: Tensor, places: Tensor) -> Tensor:
        """P = a (n + 1)^q log(1 + b K)."""
        log_a, log_b, q = self.scalars
        found: Tensor = (log_a + q * self.popularity[places]).exp() * (sums * log_b.exp()).log1p()
        return found


class CoOccurrence(nn.Module):
    """The prior's scalars, and the counts that it reads."""

    near: Tensor
    counts: Tensor
    item_counts: Tensor
    leaf_counts: Tensor
    leaf_popularity: Tensor
    place: Tensor

    def __init__(self, neighbours: Neighbours, leaves: Tensor) -> None:
        """`leaves` (N,) items at the leaves, in their order. Items that share another's leaf are not its neighbours."""
        super().__init__()
        self.n_leaves = len(leaves)
        leaf_counts = torch.cat(
            [torch.from_numpy(neighbours.item_counts).to(leaves.device)[leaves], leaves.new_zeros(1)]
        )
        place = torch.full((len(neighbours.items),), self.n_leaves, device=leaves.device)
        place[leaves] = torch.arange(self.n_leaves, device=leaves.device)
        items = torch.from_numpy(neighbours.items).to(leaves.device).long()
        item_counts = torch.from_numpy(neighbours.item_counts).to(leaves.device).float()
        near = torch.where(items >= 0, place[items.clamp(min=0)], self.n_leaves)
        tables = {
            "near": near.int(),
            "counts": torch.from_numpy(neighbours.counts).to(leaves.device),
            "item_counts": item_counts,
            "leaf_counts": leaf_counts.float(),
            "leaf_popularity": leaf_counts.float().log1p(),
            "place": place,
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(SHARPNESS)))
        self.popularity = nn.Parameter(torch.zeros(()))

    def forward(self, items: Tensor, visible: Tensor, own: Tensor | None = None) -> Prior:
        """The prior of states that see of items (B, S) those that `visible` (B, G, S) names, in their order.

        `own` (B, X) are the items, -1 = none, of a sequence that was counted and is left out.
        """
        places, summed = self.sums(items, visible, own)
        sums = summed.flatten(0, 1)
        scalars = torch.stack([self.log_scale, self.log_sharpness, self.popularity])
        return Prior(places, sums, torch.arange(len(sums), device=items.device), self.leaf_popularity, scalars)

    @torch.no_grad()
    def sums(self, items: Tensor, visible: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """The places (B, U) that items (B, S) lead to, N after the last, and K (B, G, U) there."""
        batch, device = len(items), items.device
        near = self.near[items].long().masked_fill(~visible.any(dim=1)[:, :, None], self.n_leaves)  # (B, S, m)
        flat = near.flatten(1)
        marked = torch.zeros(batch, self.n_leaves + 1, dtype=torch.bool, device=device).scatter(1, flat, True)
        user, place = marked[:, : self.n_leaves].nonzero(as_tuple=True)
        size = torch.bincount(user, minlength=batch)
        column = torch.arange(len(user), device=device) - (size.cumsum(0) - size)[user]
        places = torch.full((batch, max(int(size.max()), 1)), self.n_leaves, device=device)
        places[user, column] = place
        counts = self.counts[items].float()
        if own is not None:
            mine = torch.where(own >= 0, self.place[own.clamp(min=0)], self.n_leaves)
            inside = torch.zeros_like(marked).scatter(1, mine, True)
            counts = (counts - inside.gather(1, flat).view_as(counts).float()).clamp(min=0)
        root = (self.leaf_counts[near] * self.item_counts[items][:, :, None]).sqrt()
        shares = torch.where(near < self.n_leaves, counts / (root + SHRINK), 0.0)
        slot = torch.searchsorted(places, flat).clamp(max=places.shape[1] - 1).view_as(near)
        table = shares.new_zeros(batch, items.shape[1], places.shape[1]).scatter_add(2, slot, shares)
        seen = visible.float()
        after = seen.flip(2).cumsum(dim=2).flip(2) - seen
        with torch.autocast(device.type, enabled=False):
            return places, torch.bmm(seen * DECAY**after, table)
