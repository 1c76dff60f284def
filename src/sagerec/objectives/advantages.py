"""Advantages: how the rewards of the slates of one context become one signed number a slate.

The second of an objective's four parts (ratio, advantage, bound, aggregation). Every function is detached from the
policy: rewards carry no gradient.

Shapes: B contexts, G slates of each, M rewards. `group` (B, G) holds integer ids where groups are ragged or do not
lie row by row; without it a row is a group. Standard deviations divide by n - 1, as TRL and verl do. One that
overflows makes NaN, never 0.
"""

import math

import torch
from torch import Tensor


def centre_groups(values: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values (B, G, M) less their group's mean, and the group's deviation, in a shape that broadcasts against them.

    A group of one has deviation 0.
    """
    if group is None:
        rows = values.transpose(1, 2).contiguous()  # reduced over neighbours in memory, several times as fast
        rows = rows - rows.mean(dim=2, keepdim=True)
        deviation = torch.linalg.vector_norm(rows, dim=2, keepdim=True) / math.sqrt(max(values.shape[1] - 1, 1))
        return rows.transpose(1, 2), deviation.transpose(1, 2)
    _, ids = torch.unique(group.flatten(), return_inverse=True)
    rows = values.flatten(0, 1)
    size = torch.bincount(ids).to(values.dtype)[:, None]
    sums = values.new_zeros(len(size), values.shape[2])
    rows = rows - (sums.index_add(0, ids, rows) / size)[ids]
    deviation = (sums.index_add(0, ids, rows.square()) / (size - 1).clamp(min=1)).sqrt_()
    return rows.view_as(values), deviation[ids].view_as(values)


def summed(rewards: Tensor, weights: Tensor) -> Tensor:
    """Raw advantage A = sum_m w_m R_m: rewards (B, G, M), weights (M,) -> (B, G)."""
    return rewards @ weights


def ternary(rewards: Tensor, weights: Tensor) -> Tensor:
    """A = the nearest of -1, 0 and 1 to S = sum_m w_m R_m, not normalised. -> (B, G).

    OneRec-V2 (arXiv 2508.20900): +1 for what is watched longer than most, -1 for a dislike, else 0; with the reward
    `watch` alone this is that. To round the sum of several rewards is a reading: a hit counts, a dense reward of weight
    .1 does not.
    """
    total = summed(rewards, weights)
    return torch.add(total.clamp(-1, 1).round_(), total, alpha=0.0)  # infinity times 0 is NaN


def mean_centred(rewards: Tensor, weights: Tensor, group: Tensor | None = None) -> Tensor:
    """A = S - mean_g S with S = sum_m w_m R_m, without a deviation. Dr.GRPO (arXiv 2503.20783). -> (B, G)."""
    return centre_groups(summed(rewards, weights).unsqueeze(-1), group)[0].squeeze(-1)


def group_normalised(rewards: Tensor, weights: Tensor, group: Tensor | None = None, *, eps: float = 1e-4) -> Tensor:
    """A = (S - mean_g S) / (std_g S + eps) with S = sum_m w_m R_m: sum first, then normalise. -> (B, G).

    GRPO (arXiv 2402.03300). Different rewards with one sum give one advantage: the collapse that `decoupled` avoids.
    """
    centred, deviation = centre_groups(summed(rewards, weights).unsqueeze(-1), group)
    return torch.add(centred / (deviation + eps), deviation, alpha=0.0).squeeze(-1)  # infinity times 0 is NaN


def decoupled(
    rewards: Tensor,
    weights: Tensor,
    group: Tensor | None = None,
    *,
    eps: float = 1e-4,
    tokens: Tensor | None = None,
) -> Tensor:
    """A = norm_batch( sum_m w_m (R_m - mean_g R_m) / (std_g R_m + eps) ): normalise each reward, then sum. -> (B, G).

    GDPO (arXiv 2601.05242), SAGE. norm_batch subtracts the mean over all B * G slates and divides by their deviation
    + eps; with `tokens` (B, G), the counted tokens of each slate, both are taken over tokens, as verl does. A reward
    that is constant in a group adds 0 there. The batch is the global one: give all slates of a step at once.
    """
    centred, deviation = centre_groups(rewards, group)
    scale = torch.add(weights / (deviation + eps), deviation, alpha=0.0)  # infinity times 0 is NaN
    total = (centred * scale).sum(dim=2)
    if tokens is None:
        total -= total.mean()
        spread = torch.linalg.vector_norm(total).div_(math.sqrt(max(total.numel() - 1, 1)))
        return torch.add(total.div_(spread + eps), spread, alpha=0.0)
    share = tokens.to(total.dtype)
    total -= (share * total).sum() / share.sum().clamp(min=1)
    spread = ((share * total.square()).sum() / (share.sum() - 1).clamp(min=1)).sqrt()
    return torch.add(total / (spread + eps), spread, alpha=0.0)
