"""Rewards: what a slate earns, as pure functions of the slate, the logged target and facts of the catalogue.

A reward gives one value an item (B, G, K), or one a slate (B, G), in [0, 1] where not said otherwise. Rewards
multiply: `cold*hit` pays for hits that are cold, `novelty*similarity` for novelty that is relevant, which keeps a dense
reward from drowning a sparse one. Where a slate's value is wanted, an item reward is summed over the places if a
factor says so (a hit is somewhere in the slate), else averaged.

Everything is keyed by the row of the target's event (`sample_ids`), never by text. A place whose item is below 0 holds
no item (padding, or text that is no title): it earns 0 of every reward and is in no cluster. One of N or more is an
error.

Shapes: B users, G slates of each, K places, T history items, N items, D width of vectors, C clusters an item is in, Q
clusters, M rewards.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
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
    """(B, G, K) items, below 0 where there is none."""
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


def of_items(table: Tensor, items: Tensor) -> Tensor:
    """Rows of a table (N, …) for items (…), 0 (False) where there is none: a look-up in which -1 is not the last."""
    found = table[items.clamp(min=0)]
    return found * (items >= 0).view(*items.shape, *(1,) * (table.ndim - 1))


def clusters_of(items: Tensor, clusters: Membership) -> tuple[Tensor, Tensor]:
    """Clusters of items (…) and their shares in them, each (…, C): -1 and 0 where there is no item or no more cluster.

    A share counts where its cluster is 0 or above.
    """
    cluster = clusters.cluster[items.clamp(min=0)].masked_fill((items < 0).unsqueeze(-1), -1)
    return cluster, of_items(clusters.share, items) * (cluster >= 0)


def cluster_shares(slates: Tensor, clusters: Membership) -> Tensor:
    """(B, G, Q) share of each cluster in slates (B, G, K): the mean over the items that there are; 0 without any."""
    cluster, share = clusters_of(slates, clusters)
    mass = share.new_zeros(*slates.shape[:2], clusters.n_clusters)
    mass.scatter_add_(2, cluster.clamp(min=0).flatten(2), share.flatten(2))
    return mass / (slates >= 0).sum(dim=2, keepdim=True).clamp(min=1)


def slate_diversity(slates: Tensor, clusters: Membership) -> Tensor:
    """H(S) = -sum_q p_q log p_q / log K in [0, 1], p_q the share of cluster q in the slate: (B, G, K) -> (B, G).

    With K = 1 the group of G slates takes the slate's place, and its H is every slate's. Items in several clusters can
    spread over more than K of them; H is held at 1. A single item in a single group has 0. A place without an item adds
    nothing: H is that of the others, over log K of all places.
    """
    group, k = slates.shape[1:]
    if k == 1 and group == 1:
        return torch.zeros(slates.shape[:2], device=slates.device)
    if k == 1:
        return slate_diversity(slates.transpose(1, 2), clusters).expand(-1, group)
    shares = cluster_shares(slates, clusters)
    entropy = -torch.xlogy(shares, shares).sum(dim=2)
    return (entropy / math.log(k)).clamp(0.0, 1.0)  # shares may sum to 1 + rounding


def slate_coldness(slates: Tensor, cold: Tensor) -> Tensor:
    """Share of cold items, (B, G) from slates (B, G, K) and cold (N,) bool; where there is no item, none is cold."""
    return of_items(cold, slates).float().mean(dim=2)


def hit(x: RewardInputs) -> Tensor:
    """1 for the target, else 0. (B, G, K)."""
    return ((x.slates == x.targets[:, None, None]) & (x.slates >= 0)).float()


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
    missed = (1 - found) * (x.slates >= 0)
    return -missed * found.amax(dim=dimension, keepdim=True) * cost / cost.sum(dim=dimension, keepdim=True)


def similarity(x: RewardInputs) -> Tensor:
    """Cosine of content vectors with the target's, 0 where negative. (B, G, K)."""
    assert x.facts.vectors is not None
    cosine = torch.einsum("bgkd,bd->bgk", of_items(x.facts.vectors, x.slates), x.facts.vectors[x.targets])
    return cosine.clamp(0.0, 1.0)


def category(x: RewardInputs) -> Tensor:
    """Overlap with the target's categories, sum_q min(share_q, target's share_q). (B, G, K)."""
    membership = x.facts.categories
    assert membership is not None
    own, share = clusters_of(x.slates, membership)
    theirs, wanted = (found[:, None, None, None] for found in clusters_of(x.targets, membership))
    return (torch.minimum(share.unsqueeze(-1), wanted) * (own.unsqueeze(-1) == theirs)).sum(dim=(3, 4))


def cold(x: RewardInputs) -> Tensor:
    """1 for a cold item: for any of them alone, as `cold*hit` or `cold*similarity` for relevant ones. (B, G, K)."""
    return of_items(x.facts.cold, x.slates).float()


def novelty(x: RewardInputs) -> Tensor:
    """Self-information of the item's popularity, scaled to [0, 1]. (B, G, K)."""
    return of_items(x.facts.novelty, x.slates)


def diversity(x: RewardInputs) -> Tensor:
    """H of the slate (`slate_diversity`); with K = 1, 1 - the share of the item's clusters in its group, 0 for no item.

    The group's own H is the same for all its slates and would move nothing; what an item adds to it does.
    """
    if x.slates.shape[2] > 1:
        return slate_diversity(x.slates, x.facts.clusters)
    items = x.slates[:, :, 0]
    shares = cluster_shares(x.slates.transpose(1, 2), x.facts.clusters)[:, 0]
    cluster, share = clusters_of(items, x.facts.clusters)
    common = shares[:, None].expand(-1, cluster.shape[1], -1).gather(2, cluster.clamp(min=0))
    return (1 - (common * share).sum(dim=2)) * (items >= 0)


def validity(x: RewardInputs) -> Tensor:
    """1 for an item of the catalogue, 0 where there is none. (B, G, K)."""
    return (x.slates >= 0).float()


def answered(name: str) -> Function:
    """The reward that users give themselves: their `name` (click, like, …) for each item."""

    def reward(x: RewardInputs) -> Tensor:
        return x.feedback[name] * (x.slates >= 0)

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
    "forward": Reward(answered("forward"), needs="forward"),
    "longview": Reward(answered("longview"), needs="longview"),
    "watch": Reward(answered("watch"), needs="watch"),
}
"""Every reward by name; `register_reward` adds one's own."""
BUILT_IN: Mapping[str, Reward] = MappingProxyType(dict(REWARDS))
"""Those of this module."""
MOST_WEIGHT = 1e9
"""Largest size of a reward's weight."""


def register_reward(
    name: str, function: Function, *, pool: Literal["sum", "mean"] = "mean", replace: bool = False
) -> None:
    """Make a function of `RewardInputs` a reward, which returns a tensor (B, G, K) or (B, G) on the slates' device.

    `pool` says how the items' values become the slate's. Where there is no item, the value counts 0.

    Raises: RewardError for a name that is taken (unless `replace`), or that an expression could not hold, for what
    cannot be called, or an unknown `pool`.
    """
    if not isinstance(name, str) or not name or any(sign in "*=" or sign.isspace() for sign in name):
        raise RewardError(f"reward name {name!r}; expected one without spaces, '*' and '='")
    if not callable(function):
        raise RewardError(f"reward {name!r} is a {type(function).__name__}; expected a function of RewardInputs")
    if pool not in ("sum", "mean"):
        raise RewardError(f"pool of the reward {name!r} is {pool!r}; expected sum or mean")
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
        if not equals or not abs(weight) <= MOST_WEIGHT:
            raise RewardError(
                f"reward {text!r}; expected NAME=WEIGHT or NAME*NAME=WEIGHT, such as hit=1, with a weight of at most "
                f"{MOST_WEIGHT:g} in size"
            )
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

    A slate reward among items counts for each of them. A place without an item, and a slate of such places alone, earns
    0 whatever the function gives there.

    Raises: RewardError for an item or target that the catalogue does not have, and where a reward fails, or gives what
    is no tensor of finite numbers of either shape.
    """
    n_items = len(x.facts.cold)
    _check_items("the slates", x.slates, n_items)
    _check_items("the targets", x.targets, n_items, least=0)
    columns = []
    for expression in expressions:
        names = expression.split("*")
        value = torch.ones((), device=x.slates.device)
        for name in names:
            value = value * _call(name, x)
        if not bool(value.isfinite().all()):
            raise RewardError(f"reward {expression!r} overflows float32: its factors are finite, their product is not")
        if per_item:
            value = value.expand(x.slates.shape) * (x.slates >= 0)
        else:
            pools_by_sum = value.shape[2] > 1 and any(REWARDS[name].pool == "sum" for name in names)
            value = value.sum(dim=2) if pools_by_sum else value.mean(dim=2)
        columns.append(value)
    return torch.stack(columns, dim=-1)


def _check_items(where: str, items: Tensor, n_items: int, *, least: int | None = None) -> None:
    """Raise RewardError for an item of N or more, or below `least`."""
    low, high = (int(end) for end in items.aminmax()) if items.numel() else (0, 0)
    if high >= n_items or (least is not None and low < least):
        expected = f"0 to {n_items - 1}" + ("" if least is not None else ", or -1 for none")
        raise RewardError(f"{where} hold item {high if high >= n_items else low}; expected {expected}")


def _call(name: str, x: RewardInputs) -> Tensor:
    """What a reward says, float32, (B, G, K) or (B, G, 1), 0 where there is no item. Raises: RewardError."""
    shapes = f"{tuple(x.slates.shape)} or {tuple(x.slates.shape[:2])}"
    expected = f"expected a tensor of finite real numbers of shape {shapes} on {x.slates.device}"
    try:
        found = REWARDS[name].function(x)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise RewardError(f"reward {name!r} failed ({said}); {expected}") from error
    if not isinstance(found, Tensor):
        mend = "return one" if found is None else "wrap it in torch.as_tensor"
        raise RewardError(f"reward {name!r} gave {type(found).__name__}; {expected}: {mend}")
    if found.shape not in (x.slates.shape, x.slates.shape[:2]) or found.is_complex():
        raise RewardError(f"reward {name!r} gave {found.dtype} of shape {tuple(found.shape)}; {expected}")
    if found.device != x.slates.device:
        raise RewardError(f"reward {name!r} gave a tensor on {found.device}; {expected}")
    there = x.slates >= 0
    if found.ndim == 2:
        found, there = found.unsqueeze(2), there.any(dim=2, keepdim=True)
    value = found.detach().float().masked_fill(~there, 0.0)
    bad = (~value.isfinite()).nonzero()
    if len(bad):
        at = bad[0].tolist()
        raise RewardError(
            f"reward {name!r} gave {found[tuple(at)].item()} for slate {at[:2]}, place {at[2]}; {expected}"
        )
    return value


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
