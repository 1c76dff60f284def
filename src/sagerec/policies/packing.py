"""Token trees that share a context: the continuations of a user, laid into one row, each seeing only its own way.

A language model reads a row a user. Its columns are what was read before (the context, and what hangs on it) and the
new tokens; a mask lets each new token see what its anchor sees, the tokens on its way, and itself. So G slates of a
user cost one context, and prefixes that slates share are read once.

Shapes: B users, G slates of each, K places, R anchors (states), S columns read before, M new tokens, Q the most new
tokens of a user.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sagerec.actions.space import ActionSpace
from sagerec.policies.protocol import states_before


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


class SlateTree(NamedTuple):
    """What is read of slates: the whole of all items but the last, and of each the tokens that its logits hang on."""

    tree: Tree
    """After one state a user."""
    states: Tensor
    """(B (1 + G (K - 1)),) the token at which each state stands that begins an item, -1 for the context's end."""
    prefixes: Tensor
    """(F,) the token at which each prefix stands, item after item."""


def slate_tree(space: ActionSpace, base: Tensor, slates: Tensor, reach: Tensor) -> SlateTree:
    """The tree of slates (B, G, K), of whose items (B G K) `reach` tokens are asked for; what is shared stands once.

    `base` (L,) is the vocabulary id of each depth's token 0.
    """
    batch, n_slates, k = slates.shape
    paths = space.paths(slates.flatten())
    place = torch.arange(slates.numel(), device=slates.device) % k
    wanted = paths.depth < reach[paths.owner]
    kept = (wanted | (place < k - 1)[paths.owner]).nonzero()[:, 0]
    state = states_before(slates).flatten()
    owner, depth, node = paths.owner[kept], paths.depth[kept], paths.node[kept]
    # Tokens after one state along one way of the trie are one token.
    key, index = torch.unique(state[owner] * space.trie.n_nodes + node, return_inverse=True)
    count = torch.bincount(owner, minlength=slates.numel())
    last = index[(count.cumsum(0) - 1).clamp(min=0)] if len(index) else index.new_zeros(slates.numel())
    # Before the first token of an item stands the last one of the item before it in the slate.
    before = torch.where(depth > 0, index.roll(1), torch.where(place[owner] > 0, last[(owner - 1).clamp(min=0)], -1))
    length = space.lengths(slates).flatten(0, 1)
    begin = (length.cumsum(1) - length).flatten()
    tree = Tree(
        torch.empty_like(key).index_put((index,), space.trie.token[node].long() + base[depth]),
        torch.empty_like(key).index_put((index,), owner // (n_slates * k)),
        torch.empty_like(key).index_put((index,), before),
        torch.empty_like(key).index_put((index,), begin[owner] + depth),
    )
    states = torch.full((batch, 1 + n_slates * (k - 1)), -1, device=slates.device)
    states[:, 1:] = last.view(batch, n_slates, k)[:, :, :-1].flatten(1)
    return SlateTree(tree, states.flatten(), index[wanted[kept]])


def share_rows(lengths: Tensor, read: int) -> tuple[Tensor, int]:
    """The row (B G,) in which each slate is read whose items have `lengths` (B, G, K), and the rows of a user.

    A row holds about as many tokens as were `read` of the history: with fewer its copies would cost more, with more
    what the slates of a row do not see of each other. Long slates stand beside short ones, so that little is padding.
    """
    width = lengths.sum(dim=2)
    n_users, n_slates = width.shape
    least = min(n_slates, max(1, -(-int(width.sum(dim=1).max()) // max(1, read))))
    n_rows = next(n for n in range(least, n_slates + 1) if n_slates % n == 0)
    rank = width.argsort(dim=1).argsort(dim=1)
    turn, at = rank // n_rows, rank % n_rows
    row = torch.where(turn % 2 == 1, n_rows - 1 - at, at)
    return (torch.arange(n_users, device=row.device)[:, None] * n_rows + row).flatten(), n_rows
