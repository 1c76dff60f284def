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
