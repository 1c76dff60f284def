"""Softmax and padding over groups of uneven size: the continuations of many prefixes, listed one after another.

Shapes: M values, W the size of the largest group.
"""

import torch
from torch import Tensor


def _are_equal_runs(groups: Tensor, n_groups: int) -> bool:
    """Whether ascending groups (M,) all have the same size, as at the root, where a reshape does the work."""
    width, rest = divmod(len(groups), max(n_groups, 1))
    if rest or width == 0:
        return False
    runs = torch.arange(n_groups, device=groups.device)
    return bool((groups.view(n_groups, width) == runs[:, None]).all())


def group_logsumexp(values: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """(n_groups,) log sum_same exp(value) of values (M,) in ascending groups (M,) of 0 … n_groups-1, none empty."""
    if _are_equal_runs(groups, n_groups):
        return values.view(n_groups, -1).logsumexp(dim=1)
    top = torch.full((n_groups,), -torch.inf, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce(0, groups, values.detach(), "amax")
    return torch.zeros_like(top).index_add(0, groups, (values - top[groups]).exp()).log() + top


def group_log_softmax(logits: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Log-softmax of logits (M,) within ascending groups (M,) of 0 … n_groups-1: logit - log sum_same exp(logit)."""
    if _are_equal_runs(groups, n_groups):
        return logits.view(n_groups, -1).log_softmax(dim=1).flatten()
    return logits - group_logsumexp(logits, groups, n_groups)[groups]


def pad_groups(values: Tensor, groups: Tensor, n_groups: int, fill: float) -> tuple[Tensor, Tensor]:
    """Lay values (M,), whose groups (M,) ascend, into rows (n_groups, W) padded with `fill`; W the largest group.

    Returns the rows and the position in them, (M,), of each value.
    """
    if _are_equal_runs(groups, n_groups):
        return values.view(n_groups, -1), torch.arange(len(values), device=values.device)
    counts = torch.bincount(groups, minlength=n_groups)
    begins = counts.cumsum(0) - counts
    width = max(int(counts.max()), 1)
    place = torch.arange(len(values), device=values.device) - begins[groups]
    position = groups * width + place
    rows = torch.full((n_groups * width,), fill, dtype=values.dtype, device=values.device)
    return rows.scatter(0, position, values).view(n_groups, width), position
