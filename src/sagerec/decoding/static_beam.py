"""The beam list in static shapes, for a GPU: the twin of `beam.beam_lists`, level by level over padded tables.

Nothing is read from the device until the lists are there. Prefixes that can no longer reach the list are followed on,
which changes no list and no proof: what they push out of the beam lies below them, and so below the list.

Shapes: B users, W beams, C children of the state that has most, K places, X items that a user leaves out.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sagerec.actions.dense import NOWHERE, list_children, open_children, spend
from sagerec.actions.filters import Filters
from sagerec.actions.legal import NO_ITEM
from sagerec.actions.trie import ROOT, Trie
from sagerec.policies.protocol import ContextT, Policy, PrefixT


class Beam(NamedTuple):
    """What is kept of each user after some tokens."""

    states: Tensor
    """(B, W) int64, NOWHERE where there is no prefix."""
    scores: Tensor
    """(B, W) log-probability of each in nats."""
    items: Tensor
    """(B, K) int64 items found so far, best first, -1 for none."""
    logprobs: Tensor
    """(B, K) of each in nats, -inf for none."""
    pruned: Tensor
    """(B,) log-probability of the best prefix that was dropped."""


def begin_beam(n_users: int, k: int, device: torch.device) -> Beam:
    """The empty prefix of every user."""
    none = torch.full((n_users, k), -math.inf, device=device)
    items = torch.full((n_users, k), NO_ITEM, device=device)
    root = torch.full((n_users, 1), ROOT, device=device)
    return Beam(root, torch.zeros(n_users, 1, device=device), items, none, none[:, 0])


def beam_step(
    policy: Policy[ContextT, PrefixT],
    prefix: PrefixT,
    beam: Beam,
    depth: int,
    *,
    beams: int,
    spent: Tensor | None = None,
    filters: Filters | None = None,
) -> tuple[Beam, Tensor, Tensor]:
    """One more token of every prefix: the beam after it, and the rows (B W,) and tokens (B W,) that `step` takes.

    `spent` (B, X) is what `dense.spend` says of the items that are left out.
    """
    trie, (n_users, width) = policy.space.trie, beam.states.shape
    states = beam.states.flatten()
    user = torch.arange(n_users, device=states.device)[:, None]
    table = list_children(trie, states, policy.widths[depth])
    logits = policy.child_logits(prefix, table.children).view_as(table.legal)
    # A row without children keeps numbers, for its score says that it is none.
    legal = table.legal | (states < 0)[:, None]
    steps = logits.masked_fill(~legal, -math.inf).log_softmax(dim=1)
    rows = user.expand_as(beam.states).flatten()
    left = open_children(policy.space, table, states, depth, spent=spent, rows=rows, filters=filters)
    totals = (beam.scores.flatten()[:, None] + steps).masked_fill(~left, -math.inf).view(n_users, -1)
    best, place = totals.topk(min(beams + 1, totals.shape[1]), dim=1)
    pruned = beam.pruned.masked_fill(best[:, 0].isnan(), math.nan)  # stands before all numbers and proves nothing
    if best.shape[1] > beams:
        pruned, best, place = torch.maximum(pruned, best[:, beams]), best[:, :beams], place[:, :beams]
    node = table.children.node.view(n_users, -1).gather(1, place)
    token = table.children.token.view(n_users, -1).gather(1, place)
    live = best > -math.inf
    ends = live & trie.is_decided(node)
    logprobs = torch.cat([beam.logprobs, best.masked_fill(~ends, -math.inf)], dim=1)
    found = torch.cat([beam.items, only_items(trie, node, len(policy.widths) - depth - 1)], dim=1)
    logprobs, at = logprobs.topk(beam.items.shape[1], dim=1)
    items = found.gather(1, at).masked_fill(logprobs == -math.inf, NO_ITEM)
    goes = live & ~ends
    after = Beam(node.masked_fill(~goes, NOWHERE), best.masked_fill(~goes, -math.inf), items, logprobs, pruned)
    parent = user * width + torch.div(place, table.legal.shape[1], rounding_mode="floor")
    return after, parent.flatten(), token.flatten()


def only_items(trie: Trie, states: Tensor, steps: int) -> Tensor:
    """(…) int64 item of states (…) under which there is one, at most `steps` tokens below; else any number."""
    for _ in range(steps):
        states = torch.where(trie.is_leaf(states), states, trie.first_child[states].long())
    return trie.item[states].long()


def static_lists(
    policy: Policy[ContextT, PrefixT],
    context: ContextT,
    n_users: int,
    *,
    k: int,
    beams: int,
    excluded: Tensor | None,
    filters: Filters | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`beam_lists`: items (B, K), their log-probabilities, and whether each list is proven (B,)."""
    spent = None if excluded is None or excluded.shape[1] == 0 else spend(policy.space, excluded, filters)
    beam, prefix = begin_beam(n_users, k, policy.device), policy.begin(context)
    for depth in range(len(policy.widths)):
        beam, rows, tokens = beam_step(policy, prefix, beam, depth, beams=beams, spent=spent, filters=filters)
        if depth + 1 < len(policy.widths):
            prefix = policy.step(prefix, rows, tokens)
    return beam.items, beam.logprobs, beam.logprobs[:, -1] >= beam.pruned
