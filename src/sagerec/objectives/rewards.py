"""Rewards: what a slate earns, as pure functions of the slate, the logged target and facts of the catalogue.

A reward gives one value an item (B, G, K), or one a slate (B, G), in [0, 1] where not said otherwise. Rewards
multiply: `cold*hit` pays for hits that are cold, `novelty*similarity` for novelty that is relevant, which keeps a dense
reward from drowning a sparse one. Where a slate's value is wanted, an item reward is summed over the places if a
factor says so (a hit is somewhere in the slate), else averaged.

Everything is keyed by the row of the target's event (`sample_ids`), never by text.

Shapes: B users, G slates of each, K places, T history items, N items, D width of vectors, C clusters an item is in, Q
clusters, M rewards.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sagerec.errors import RewardError

VECTORS, CATEGORIES, COLLABORATIVE = "vectors", "categories", "collaborative"
"""What a reward may need beside slates and targets; other needs are names of feedback."""


@dataclass(frozen=True, slots=True)
class Membership:
    """The clusters of every item."""

    cluster: Tensor
    """(N, C) int64 clusters of an item, -1 after the last."""
    share: Tensor
    """(N, C) float share of the item in each; the shares of an item sum to 1."""
    n_clusters: int
    """Q."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the catalogue, on the device of the slates."""

    cold: Tensor
    """(N,) bool: the item has few training interactions."""
    novelty: Tensor
    """(N,) -log2 of the item's share of the training interactions (add-one), over the largest."""
    clusters: Membership
    """By which diversity is measured."""
    vectors: Tensor | None = None
    """(N, D) content vectors of length 1."""
    categories: Membership | None = None
    """Categories, where the catalogue has them."""


@dataclass(frozen=True, slots=True)
class RewardInputs:
    """A batch of slates and what is known of their users."""

    sample_ids: Tensor
    """(B,) row of each target's event in the log."""
    slates: Tensor
    """(B, G, K) items."""
    targets: Tensor
    """(B,) the item that the user took next."""
    logprobs: Tensor
    """(B, G) log-probability of each slate when it was written, in nats."""
    facts: Facts
    """Of the catalogue."""
    feedback: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> (B, G, K): what users answer to each item (click, like, …), and `collaborative` scores."""


Function = Callable[[RewardInputs], Tensor]


@dataclass(frozen=True, slots=True)
class Reward:
    """A named reward."""

    function: Function
    """RewardInputs -> (B, G, K) or (B, G)."""
    pool: Literal["sum", "mean"] = "mean"
    """How the items' values become the slate's."""
    needs: str | None = None
    """`categories` or `vectors` of the facts, or a name in the feedback; None for none."""


def cluster_shares(slates: Tensor, clusters: Membership) -> Tensor:
    """(B, G, Q) share of each cluster in slates (B, G, K): the mean over the items of their shares."""
    cluster, share = clusters.cluster[slates], clusters.share[slates]
    mass = share.new_zeros(*slates.shape[:2], clusters.n_clusters)
    known = cluster >= 0
    mass.scatter_add_(2, cluster.clamp(min=0).flatten(2), (share * known).flatten(2))
    return mass / slates.shape[2]


def slate_diversity(slates: Tensor, clusters: Membership) -> Tensor:
    """H(S) = -sum_q p_q log p_q / log K in [0, 1], p_q the share of cluster q in the slate: (B, G, K) -> (B, G).

    With K = 1 the group of G slates takes the slate's place, and its H is every slate's. Items in several clusters can
    spread over more than K of them; H is held at 1. A single item in a single group has 0.
    """
    group, k = slates.shape[1:]
    if k == 1 and group == 1:
        return torch.zeros(slates.shape[:2], device=slates.device)
    if k == 1:
        return slate_diversity(slates.transpose(1, 2), clusters).expand(-1, group)
    shares = cluster_shares(slates, clusters)
    entropy = -torch.xlogy(shares, shares).sum(dim=2)
    return (entropy / math.log(k)).clamp(max=1.0)


def slate_coldness(slates: Tensor, cold: Tensor) -> Tensor:
    """Share of cold items, (B, G) from slates (B, G, K) and cold (N,) bool."""
    return cold[slates].float().mean(dim=2)


def hit(x: RewardInputs) -> Tensor:
    """1 for the target, else 0. (B, G, K)."""
    return (x.slates == x.targets[:, None, None]).float()


def rank(x: RewardInputs) -> Tensor:
    """1 / log2(place + 1) for the target, places from 1: the slate's NDCG. (B, G, K)."""
    return hit(x) / torch.arange(2, x.slates.shape[2] + 2, device=x.slates.device).log2()


def ranking(x: RewardInputs) -> Tensor:
    """0 for the target, -1 / log2(rank + 1) over the sum of these for a miss: confident misses cost most. In [-1, 0].

    The rank is the place in the slate; with K = 1, that of the slate in its group by log-probability. A list without
    the target costs nothing, as in MiniOneRec (arXiv 2510.24431): it would push down its best guesses. (B, G, K).
    """
    if x.slates.shape[2] == 1:
        place = x.logprobs.argsort(dim=1, descending=True).argsort(dim=1).unsqueeze(2) + 1
    else:
        place = torch.arange(1, x.slates.shape[2] + 1, device=x.slates.device).expand(x.slates.shape)
    cost, found = 1 / (place + 1.0).log2(), hit(x)
    dimension = 1 if x.slates.shape[2] == 1 else 2
    return -(1 - found) * found.amax(dim=dimension, keepdim=True) * cost / cost.sum(dim=dimension, keepdim=True)


def similarity(x: RewardInputs) -> Tensor:
    """Cosine of content vectors with the target's, 0 where negative. (B, G, K)."""
    assert x.facts.vectors is not None
    cosine = torch.einsum("bgkd,bd->bgk", x.facts.vectors[x.slates], x.facts.vectors[x.targets])
    return cosine.clamp(0.0, 1.0)


def category(x: RewardInputs) -> Tensor:
    """Overlap with the target's categories, sum_q min(share_q, target's share_q). (B, G, K)."""
    membership = x.facts.categories
    assert membership is not None
    own, theirs = membership.cluster[x.slates], membership.cluster[x.targets][:, None, None, None]
    same = (own.unsqueeze(-1) == theirs) & (own >= 0).unsqueeze(-1)
    shared = torch.minimum(membership.share[x.slates].unsqueeze(-1), membership.share[x.targets][:, None, None, None])
    return (shared * same).sum(dim=(3, 4))


def cold(x: RewardInputs) -> Tensor:
    """1 for a cold item: for any of them alone, as `cold*hit` or `cold*similarity` for relevant ones. (B, G, K)."""
    return x.facts.cold[x.slates].float()


def novelty(x: RewardInputs) -> Tensor:
    """Self-information of the item's popularity, scaled to [0, 1]. (B, G, K)."""
    return x.facts.novelty[x.slates]


def diversity(x: RewardInputs) -> Tensor:
    """H of the slate (`slate_diversity`); with K = 1, 1 - the share of the item's clusters in its group. (B, G).

    The group's own H is the same for all its slates and would move nothing; what an item adds to it does.
    """
    if x.slates.shape[2] > 1:
        return slate_diversity(x.slates, x.facts.clusters)
    shares = cluster_shares(x.slates.transpose(1, 2), x.facts.clusters)[:, 0]
    clusters = x.facts.clusters
    cluster, share = clusters.cluster[x.slates[:, :, 0]], clusters.share[x.slates[:, :, 0]]
    common = shares[:, None].expand(-1, cluster.shape[1], -1).gather(2, cluster.clamp(min=0))
    return 1 - (common * share * (cluster >= 0)).sum(dim=2)


def validity(x: RewardInputs) -> Tensor:
    """1 for an item of the catalogue, 0 where the text that was written is none (-1). (B, G, K)."""
    return (x.slates >= 0).float()


def answered(name: str) -> Function:
    """The reward that users give themselves: their `name` (click, like, …) for each item."""

    def reward(x: RewardInputs) -> Tensor:
        return x.feedback[name]

    return reward


REWARDS: dict[str, Reward] = {
    "hit": Reward(hit, "sum"),
    "rank": Reward(rank, "sum"),
    "ranking": Reward(ranking, "sum"),
    "similarity": Reward(similarity, needs=VECTORS),
    "category": Reward(category, needs=CATEGORIES),
    "collaborative": Reward(answered(COLLABORATIVE), needs=COLLABORATIVE),
    "cold": Reward(cold),
    "novelty": Reward(novelty),
    "diversity": Reward(diversity),
    "validity": Reward(validity),
    "click": Reward(answered("click"), needs="click"),
    "like": Reward(answered("like"), needs="like"),
    "dislike": Reward(answered("dislike"), needs="dislike"),
    "follow": Reward(answered("follow"), needs="follow"),
    "watch": Reward(answered("watch"), needs="watch"),
}
"""Every reward by name; `register_reward` adds one's own."""


def register_reward(
    name: str, function: Function, *, pool: Literal["sum", "mean"] = "mean", replace: bool = False
) -> None:
    """Make a function of `RewardInputs` a reward, which returns (B, G, K) or (B, G).

    Raises: RewardError for a name that is taken (unless `replace`), or that an expression could not hold.
    """
    if not name or any(sign in name for sign in "*= "):
        raise RewardError(f"reward name {name!r}; expected one without spaces, '*' and '='")
    if name in REWARDS and not replace:
        raise RewardError(f"reward {name!r} exists; choose another name, or give replace=True")
    REWARDS[name] = Reward(function, pool)


def parse_rewards(expressions: Sequence[str]) -> dict[str, float]:
    """`("hit=1", "cold*hit=0.5")` as expression -> weight.

    Raises: RewardError for a malformed one, an unknown name, or one that stands twice.
    """
    weights: dict[str, float] = {}
    for text in expressions:
        expression, equals, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not math.isfinite(weight):
            raise RewardError(f"reward {text!r}; expected NAME=WEIGHT or NAME*NAME=WEIGHT, such as hit=1")
        for name in expression.split("*"):
            if name not in REWARDS:
                raise RewardError(f"unknown reward {name!r}; expected some of {', '.join(REWARDS)}")
        if expression in weights:
            raise RewardError(f"reward {expression!r} stands twice; give it one weight")
        weights[expression] = weight
    if not weights:
        raise RewardError("no reward is given; expected at least one, such as hit=1")
    return weights


def needs_of(expression: str) -> set[str]:
    """What the factors of an expression need of facts and feedback."""
    return {needs for name in expression.split("*") if (needs := REWARDS[name].needs) is not None}


def compute_rewards(expressions: Sequence[str], x: RewardInputs, *, per_item: bool = False) -> Tensor:
    """Rewards (B, G, M) of slates, or (B, G, K, M) of their items.

    A slate reward among items counts for each of them.

    Raises: RewardError where a reward has a wrong shape or is not finite.
    """
    columns = []
    for expression in expressions:
        names = expression.split("*")
        value = torch.ones((), device=x.slates.device)
        for name in names:
            factor = REWARDS[name].function(x)
            if factor.shape not in (x.slates.shape, x.slates.shape[:2]) or not bool(factor.isfinite().all()):
                raise RewardError(
                    f"reward {name!r} gave shape {tuple(factor.shape)}, finite: {bool(factor.isfinite().all())}; "
                    f"expected finite values of shape {tuple(x.slates.shape)} or {tuple(x.slates.shape[:2])}"
                )
            value = value * (factor if factor.ndim == 3 else factor.unsqueeze(2))
        value = value.float().expand(x.slates.shape) if per_item else value.float()
        if not per_item:
            pools_by_sum = value.shape[2] > 1 and any(REWARDS[name].pool == "sum" for name in names)
            value = value.sum(dim=2) if pools_by_sum else value.mean(dim=2)
        columns.append(value)
    return torch.stack(columns, dim=-1)


def shaped_watch_time(
    watch_seconds: Tensor,
    duration_seconds: Tensor,
    users: Tensor,
    dislikes: Tensor | None = None,
    *,
    quantile: float = 0.75,
) -> Tensor:
    """Watch time free of the films' lengths: +1 for the user's top quarter, -1 for a dislike, else 0. (E,).

    An event's percentile is taken among the user's events whose duration lies in the same bucket of log2 seconds: it is
    the share of them that were watched no longer, itself included. OneRec-V2 (arXiv 2508.20900).

    Args: watch_seconds, duration_seconds (E,) above 0; users (E,) ids; dislikes (E,) bool.
    """
    bucket = duration_seconds.clamp(min=1).log2().floor().long()
    _, group = torch.unique(torch.stack([users.long(), bucket], dim=1), dim=0, return_inverse=True)
    by_time = watch_seconds.argsort(stable=True)
    order = by_time[group[by_time].argsort(stable=True)]
    size = torch.bincount(group)
    first = (size.cumsum(0) - size)[group[order]]
    place = torch.empty_like(group)
    place[order] = torch.arange(len(group), device=group.device) - first + 1
    shaped = (place / size[group] > quantile).float()
    return shaped if dislikes is None else torch.where(dislikes, -1.0, shaped)
