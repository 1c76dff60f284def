"""Target lists: what teaches a policy that reads its slate what a slate is.

A history is cut from a training window at random. Its list holds the user's next events first, and then a teacher's:
the policy's own beam list so far, re-ranked for variety by maximal marginal relevance (Carbonell and Goldstein 1998),
one item after another with the highest log P - variety * (items of its coarse cluster before it). Order is free: after
some of the list, in any order, the loss is

    -log sum_j P(j | history, the items before), j over the events that are left, or, where none is, over all that is.

Shapes: B users, T history items, E next events, C candidates, K places of a list, p of them written.
"""

import torch
from torch import Tensor

from sagerec.actions.legal import NO_ITEM
from sagerec.catalogue.profiles import first_item, is_word
from sagerec.decoding.beam import beam_lists
from sagerec.decoding.slates import Slates, slate_logprobs
from sagerec.policies.protocol import AnyPolicy

LIST_ITEMS, NEXT_EVENTS, CANDIDATES = 10, 3, 20
"""Items of a list; of these next events, at most; items that the teacher names."""


def rerank(items: Tensor, logprobs: Tensor, cluster: Tensor, *, variety: float) -> Tensor:
    """(B, C) candidates (B, C) with log-probabilities (B, C), -1 and -inf = none, in the order of marginal relevance.

    `cluster` (N,) of each item; `variety` nats are taken off for each item of the same cluster before.
    """
    alike = (cluster[items.clamp(min=0)][:, :, None] == cluster[items.clamp(min=0)][:, None]).float()
    relevance, order = logprobs, []
    for _ in range(items.shape[1]):
        best = relevance.argmax(dim=1, keepdim=True)
        order.append(best)
        row = alike.gather(1, best[:, :, None].expand(-1, -1, items.shape[1])).squeeze(1)
        relevance = (relevance - variety * row).scatter(1, best, -torch.inf)
    return items.gather(1, torch.cat(order, dim=1))


def join_lists(events: Tensor, taught: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """(B, k) the first k distinct of next events (B, E) and taught items (B, C), -1 = none; and which are events."""
    both = torch.cat([events, taught], dim=1)
    earlier = torch.ones(both.shape[1], both.shape[1], dtype=torch.bool, device=both.device).tril(-1)
    good = (both >= 0) & ~((both[:, :, None] == both[:, None]) & earlier).any(dim=2)
    order = (~good).long().argsort(dim=1, stable=True)[:, :k]
    return both.masked_fill(~good, NO_ITEM).gather(1, order), order < events.shape[1]


def cut(items: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (B,) of histories cut at random from windows (B, T), and up to E next events (B, E), -1 = none."""
    most = (counted * torch.arange(1, items.shape[1] + 1, device=items.device)).amax(dim=1)
    first = first_item(items)
    most_items = most - first
    kept = 1 + (torch.rand(len(items), device=items.device) * most_items).long().clamp(max=most_items - 1)
    lengths = first + kept
    place = lengths[:, None] - 1 + torch.arange(NEXT_EVENTS, device=items.device)
    events = targets.gather(1, place.clamp(max=items.shape[1] - 1))
    return lengths, events.masked_fill(place >= most[:, None], NO_ITEM)


def list_loss(
    policy: AnyPolicy,
    items: Tensor,
    targets: Tensor,
    counted: Tensor,
    cluster: Tensor,
    *,
    variety: float,
    repeats: bool,
) -> Tensor:
    """Mean over windows (B, T) of the loss above in nats, with gradient, at one place for the whole batch.

    `cluster` (N,) is of the teacher's items; with `repeats` a list may hold what the user had.
    """
    lengths, events = cut(items, targets, counted)
    canonical = policy.space.trie.item[policy.space.leaf(events.clamp(min=0))].long()
    events = canonical.masked_fill(events < 0, NO_ITEM)
    past = (torch.arange(items.shape[1], device=items.device) < lengths[:, None]) & ~is_word(items)
    history = items.masked_fill(~past, NO_ITEM)
    if not repeats:
        had = policy.space.trie.item[policy.space.leaf(history.clamp(min=0))].masked_fill(~past, NO_ITEM)
        events = events.masked_fill((events[:, :, None] == had[:, None]).any(dim=2), NO_ITEM)
    excluded = None if repeats else history
    training = policy.training
    policy.eval()
    with torch.no_grad():
        context = policy.encode(items, lengths)
        named = beam_lists(policy, context, len(items), k=CANDIDATES, beams=CANDIDATES, excluded=excluded)
    policy.train(training)
    taught = rerank(named.items, named.logprobs, cluster, variety=variety)
    listed, is_event = join_lists(events, taught, k=LIST_ITEMS)
    whole = int((listed >= 0).sum(dim=1).min())
    if not whole:
        return items.new_zeros((), dtype=torch.float32)
    shuffled = torch.rand(len(listed), whole, device=items.device).argsort(dim=1)
    listed, is_event = listed.gather(1, shuffled), is_event.gather(1, shuffled)
    written = int(torch.randint(whole, ()))
    return rest_loss(
        policy, items, lengths, listed[:, :written], listed[:, written:], is_event[:, written:], excluded=excluded
    )


def rest_loss(
    policy: AnyPolicy,
    items: Tensor,
    lengths: Tensor,
    before: Tensor,
    rest: Tensor,
    is_event: Tensor,
    *,
    excluded: Tensor | None,
) -> Tensor:
    """Mean of -log sum_j P(j | history (B, T), items before (B, p)) over those of the rest (B, K - p) that are events,
    or over all where none is.
    """
    slates = torch.cat([before[:, None].expand(-1, rest.shape[1], -1), rest[:, :, None]], dim=2)
    tokens = slate_logprobs(policy, items, lengths, slates, excluded=excluded).tokens
    logprobs = Slates(slates, tokens).scores()[:, :, -1]
    wanted = is_event | ~is_event.any(dim=1, keepdim=True)
    return -logprobs.masked_fill(~wanted, -torch.inf).logsumexp(dim=1).mean()
