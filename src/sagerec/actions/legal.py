"""Which continuations are legal, and their log-probabilities: the one distribution that everything uses.

A token is legal where the trie has it. In a slate it must also lead to an item that does not stand there yet, and
sampler and loss renormalise over exactly these tokens. A list of the K best items needs no renormalisation: it
skips what is excluded.

Shapes: R prefixes, M legal continuations, X excluded items of each row, n items, L codes per item.
"""

import torch
from torch import Tensor

from sagerec.actions.trie import ROOT, Children, Trie

NO_ITEM = -1


def excluded_paths(trie: Trie, codes: Tensor, excluded: Tensor) -> Tensor:
    """States (R, X, L + 1) along the codes (N, L) of excluded items (R, X); -1 for no item and after an item's end.

    Items that share their codes count once a row: what is barred is an ID.
    """
    flat = excluded.flatten()
    known = flat >= 0
    paths = torch.full((len(flat), codes.shape[1] + 1), NO_ITEM, device=excluded.device)
    paths[known] = trie.walk(codes[flat[known]])
    if len(codes) > int(trie.size[ROOT]):
        ids = paths[:, -1].view(excluded.shape)
        known &= ~((ids[:, :, None] == ids[:, None, :]).tril(-1).any(dim=2)).flatten()
        paths[~known] = NO_ITEM
    own = codes[flat[known]]
    ended = torch.zeros_like(paths, dtype=torch.bool)
    ended[known, 1:] = own < 0
    return paths.masked_fill(ended, NO_ITEM).view(*excluded.shape, paths.shape[1])


def used_up(trie: Trie, states: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Row and place among its siblings, (m,) each, of every child of states (R,) whose items are all excluded.

    `excluded` (R, X) holds, for each row, the states of the excluded items at the children's depth (-1 = none, or an
    item whose codes end before). A child is used up when as many excluded items lie under it as items. The cost is
    that of the excluded items, whatever the number of children.
    """
    ordered = excluded.sort(dim=1).values
    first = trie.first_child[states].long()[:, None]
    end = trie.first_child[states + 1].long()[:, None]
    number = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    inside = (ordered >= first) & (ordered < end)
    row, column = (inside & (number >= trie.size[ordered.clamp(min=0)])).nonzero(as_tuple=True)
    return row, ordered[row, column] - first[row, 0]


def has_free_item(trie: Trie, states: Tensor, children: Children, excluded: Tensor) -> Tensor:
    """(M,) bool: some item under the child is not excluded; `children` are all those of states (R,). See `used_up`."""
    free = torch.ones_like(children.node, dtype=torch.bool)
    if excluded.shape[1]:
        row, place = used_up(trie, states, excluded)
        count = trie.first_child[states + 1].long() - trie.first_child[states]
        free[(count.cumsum(0) - count)[row] + place] = False
    return free
