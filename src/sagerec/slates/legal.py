"""Which continuations are legal, and their log-probabilities: the one distribution that everything uses.

A token is legal where the trie has it. In a slate it must also lead to an item that does not stand there yet, and
sampler and loss renormalise over exactly these tokens. A list of the K best items needs no renormalisation: it
skips what is excluded.

Shapes: R prefixes, M legal continuations, X excluded items of each row, L codes per item, B users, K places.
"""

import torch
from torch import Tensor

from sagerec.core.trie import Children, Trie


def has_free_item(trie: Trie, children: Children, excluded: Tensor) -> Tensor:
    """(M,) bool: some item under the child is not excluded.

    `excluded` (R, X) holds, for each row, the states of the excluded items at the children's depth (-1 = none, or an
    item whose codes end before). A child is exhausted when as many excluded items lie under it as items.
    """
    if excluded.shape[1] == 0:
        return torch.ones_like(children.node, dtype=torch.bool)
    matches = (excluded[children.parent] == children.node[:, None]).sum(dim=1)
    return matches < trie.size[children.node]


def group_log_softmax(logits: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Log-softmax of logits (M,) within groups (M,) of 0 … n_groups-1: logit - log sum_{same group} exp(logit)."""
    top = torch.full((n_groups,), -torch.inf, dtype=logits.dtype, device=logits.device)
    top = top.scatter_reduce(0, groups, logits.detach(), "amax")
    shifted = logits - top[groups]
    total = torch.zeros_like(top).index_add(0, groups, shifted.exp())
    return shifted - total.log()[groups]


def pad_groups(values: Tensor, groups: Tensor, n_groups: int, fill: float) -> tuple[Tensor, Tensor]:
    """Lay values (M,), whose groups (M,) ascend, into rows (n_groups, W) padded with `fill`; W the largest group.

    Returns the rows and the position in them, (M,), of each value.
    """
    counts = torch.bincount(groups, minlength=n_groups)
    begins = counts.cumsum(0) - counts
    width = max(int(counts.max()), 1)
    place = torch.arange(len(values), device=values.device) - begins[groups]
    position = groups * width + place
    rows = torch.full((n_groups * width,), fill, dtype=values.dtype, device=values.device)
    return rows.scatter(0, position, values).view(n_groups, width), position
