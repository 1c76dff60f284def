"""Token trees that share a context: the continuations of a user, laid into one row, each seeing only its own way.

A language model reads a row a user. Its columns are what was read before (the context, and what hangs on it) and the
new tokens; a mask lets each new token see what its anchor sees, the tokens on its way, and itself. So G slates of a
user cost one context, and prefixes that slates share are read once.

Shapes: B users, R anchors (states), S columns read before, M new tokens, Q the most new tokens of a user.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tree(NamedTuple):
    """M new tokens of several users, each after a state or after another new token; a parent stands before its own."""

    token: Tensor
    """(M,) int64 vocabulary ids."""
    anchor: Tensor
    """(M,) int64 the state that the token's tree hangs on."""
    parent: Tensor
    """(M,) int64 the token before, -1 for the first after the anchor."""
    depth: Tensor
    """(M,) int64 tokens between it and the anchor."""


class Rows(NamedTuple):
    """A tree laid out in a row a user."""

    user: Tensor
    """(M,) int64."""
    slot: Tensor
    """(M,) int64 column of each token among the new ones."""
    width: int
    """Q."""
    n_users: int
    """B."""


def chains(token: Tensor, anchor: Tensor, lengths: Tensor) -> Tree:
    """Sequences laid one after another, of `lengths` (n,) tokens each, after anchors (n,)."""
    owner = torch.repeat_interleave(lengths)
    begin = lengths.cumsum(0) - lengths
    depth = torch.arange(len(token), device=token.device) - begin[owner]
    before = torch.arange(len(token), device=token.device) - 1
    return Tree(token, anchor[owner], torch.where(depth > 0, before, -1), depth)


def lay_out(user: Tensor, n_users: int) -> Rows:
    """Columns for tokens of users (M,), in the order of the tokens."""
    order = user.argsort(stable=True)
    counts = torch.bincount(user, minlength=n_users)
    begin = counts.cumsum(0) - counts
    slot = torch.empty_like(user)
    slot[order] = torch.arange(len(user), device=user.device) - begin[user[order]]
    return Rows(user, slot, int(counts.max()) if len(counts) else 0, n_users)


def ways(tree: Tree, rows: Rows) -> Tensor:
    """(M, Q) bool: the columns of the new tokens on the way to each, itself included."""
    everyone = torch.arange(len(tree.token), device=tree.token.device)
    seen = torch.zeros(len(everyone), rows.width, dtype=torch.bool, device=everyone.device)
    seen[everyone, rows.slot] = True
    for depth in range(1, int(tree.depth.max()) + 1 if len(everyone) else 0):
        now = ((tree.depth == depth) & (tree.parent >= 0)).nonzero()[:, 0]
        seen[now] |= seen[tree.parent[now]]
    return seen


def table(values: Tensor, rows: Rows) -> Tensor:
    """Values (M,) laid into (B, Q), 0 elsewhere."""
    return values.new_zeros(rows.n_users, rows.width).index_put((rows.user, rows.slot), values)


def mask(seen_before: Tensor, seen_new: Tensor, rows: Rows) -> Tensor:
    """(B, 1, Q, S + Q) bool: what each new token sees, of columns (M, S) before and (M, Q) new; padding sees itself."""
    both = torch.cat([seen_before, seen_new], dim=1)
    found = torch.zeros(rows.n_users, rows.width, both.shape[1], dtype=torch.bool, device=both.device)
    itself = torch.arange(rows.width, device=both.device)
    found[:, itself, seen_before.shape[1] + itself] = True
    found[rows.user, rows.slot] = both
    return found[:, None]
