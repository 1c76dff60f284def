"""The beam list: the K most probable next items of each user, found exactly.

Log-probabilities only fall along a path, so a list is proven exact when its K-th item is at least as probable as the
best prefix that the beam ever dropped. Users without that proof are decoded again, not encoded again, with all prefixes
that the K-th item found does not beat: the result equals brute-force scoring of the whole catalogue, at the price of a
beam. Prefixes that can no longer reach the list are not followed, which costs nothing of the proof.

A policy that scores all items at once needs no beam: its lists are the best of them. On a GPU the beam has static
shapes (`static_beam`).

Shapes: B users, W beams, R live prefixes, M legal continuations, K places, X excluded items of each user.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sagerec.actions.filters import Filters
from sagerec.actions.groups import group_log_softmax, pad_groups
from sagerec.actions.legal import NO_ITEM, bar
from sagerec.actions.trie import ROOT
from sagerec.decoding.static_beam import static_lists
from sagerec.errors import NumericalError, SettingsError
from sagerec.policies.protocol import ContextT, ItemTable, Policy, PrefixT

BLOCK = 64
"""Neighbouring scores of which the highest is looked at first."""
ROUNDING = 1e-3
"""Nats by which sums of float32 log-probabilities may be off."""


class BeamLists(NamedTuple):
    """The top K of each user, best first."""

    items: Tensor
    """(B, K) int64 items (rows of the trie), -1 where the catalogue has fewer than K."""
    logprobs: Tensor
    """(B, K) log-probability of each in nats, -inf where there is none."""
    exact: Tensor
    """(B,) bool: proven to be the true top K."""


@torch.no_grad()
def beam_lists(
    policy: Policy[ContextT, PrefixT],
    context: ContextT,
    n_users: int,
    *,
    k: int,
    beams: int,
    excluded: Tensor | None = None,
    filters: Filters | None = None,
    least: Tensor | None = None,
) -> BeamLists:
    """One pass of beam search for B = `n_users` contexts of one slate each.

    `excluded` (B, X) item indices that are left out of the lists (-1 = none), such as the history; `filters`, of B
    rows, close what may not be listed at all. `least` (B,) is a log-probability that each list's last item is known to
    reach.

    Raises: SettingsError where fewer beams than places are asked for.
    """
    if beams < k:
        raise SettingsError(f"beams is {beams} and k is {k}; expected at least as many beams as places")
    if (table := policy.score_items(context)) is not None:
        return best_of(table, k, excluded, filters, policy)
    if policy.has_static_shapes:
        given: dict[str, Any] = {"k": k, "beams": beams, "excluded": excluded, "filters": filters}
        return BeamLists(*static_lists(policy, context, n_users, **given))
    trie, device = policy.space.trie, policy.device
    user = torch.arange(n_users, device=device)
    states = torch.full((n_users,), ROOT, device=device)
    scores = torch.zeros(n_users, device=device)
    pruned = torch.full((n_users,), -math.inf, device=device)
    items = torch.full((n_users, k), NO_ITEM, device=device)
    logprobs = torch.full((n_users, k), -math.inf, device=device)
    barred = None
    if excluded is not None or filters is not None:
        out = torch.full((n_users, 0), NO_ITEM, device=device) if excluded is None else excluded
        barred = bar(policy.space, out, filters)
    n_excluded = torch.zeros_like(user) if excluded is None else (excluded >= 0).sum(dim=1)
    prefix = policy.begin(context)
    while len(states):
        children = trie.children(states)
        step = group_log_softmax(policy.child_logits(prefix, children), children.parent, len(states))
        totals = scores[children.parent] + step
        if barred is not None:
            totals = totals.masked_fill(~barred.leaves_free(user, states, children), -math.inf)
        owner, listed = user[children.parent], None
        if least is not None:
            listed = (~(totals < least[owner] - ROUNDING)).nonzero()[:, 0]  # what is no number stays
            totals, owner = totals[listed], owner[listed]
        # One more than the beams, to know the best prefix that is dropped.
        rows, position = pad_groups(totals, owner, n_users, -math.inf)
        child_at = torch.zeros(rows.numel(), dtype=torch.int64, device=device)
        child_at[position] = torch.arange(len(totals), device=device)
        best, place = rows.topk(min(beams + 1, rows.shape[1]), dim=1)
        pruned = pruned.masked_fill(best[:, 0].isnan(), math.nan)  # which stands before all numbers and proves nothing
        if best.shape[1] > beams:
            pruned = torch.maximum(pruned, best[:, beams])
            best, place = best[:, :beams], place[:, :beams]
        live = best > -math.inf
        chosen = child_at[(place + user_offsets(n_users, rows.shape[1], device))[live]]
        owner, score = live.nonzero()[:, 0], totals[chosen]
        chosen = chosen if listed is None else listed[chosen]
        node = children.node[chosen]

        # Where one item is left, the remaining codes have probability 1: the item is found without writing them.
        ends = trie.is_decided(node)
        if bool(ends.any()):
            items, logprobs = merge(items, logprobs, trie.only_item(node[ends]), score[ends], owner[ends])
        # The items found are in the lists already; each prefix that is still open holds another one.
        bounds = torch.full_like(best, -math.inf)
        bounds[live] = (score - trie.size[node].log()).masked_fill(ends, -math.inf)
        if filters is not None:  # of a prefix with closed items the best may be one of these
            bounds[live] = bounds[live].masked_fill(filters.size(owner, node) < trie.size[node], -math.inf)
        floor = list_floor(torch.cat([bounds, logprobs], dim=1), k + n_excluded)
        grows = ~ends & (score >= floor[owner] - ROUNDING)
        states, scores, user = node[grows], score[grows], owner[grows]
        if len(states):
            prefix = policy.step(prefix, children.parent[chosen][grows], children.token[chosen][grows])
    return BeamLists(items, logprobs, logprobs[:, -1] >= pruned)


def list_floor(bounds: Tensor, needed: Tensor) -> Tensor:
    """A log-probability (B,) that the last item of each list reaches at least: no lower prefix need be followed.

    `bounds` (B, W) are lower bounds on the best item under each of W disjoint prefixes (score - log of the number of
    items: the best is no worse than the mean), and the log-probabilities of items found. Of the `needed` (B,) highest,
    K plus the number of excluded items, at least K belong to items that may be listed.
    """
    inside = needed <= bounds.shape[1]
    ranked = bounds.topk(int(needed.clamp(max=bounds.shape[1]).max()), dim=1).values
    floor = ranked.gather(1, (needed.clamp(max=ranked.shape[1]) - 1)[:, None]).squeeze(1)
    return torch.where(inside, floor, -math.inf)


def user_offsets(n_users: int, width: int, device: torch.device) -> Tensor:
    """(B, 1) where each user's row begins in a flattened (B, width) table."""
    return torch.arange(n_users, device=device)[:, None] * width


def merge(items: Tensor, logprobs: Tensor, found: Tensor, scores: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """The best K of lists (B, K) and newly found items (n,) with scores (n,) of users `owner` (n,), ascending."""
    n_users, k = items.shape
    new_scores, position = pad_groups(scores, owner, n_users, -math.inf)
    new_items = torch.full((new_scores.numel(),), NO_ITEM, device=items.device)
    new_items[position] = found
    all_scores = torch.cat([logprobs, new_scores], dim=1)
    all_items = torch.cat([items, new_items.view_as(new_scores)], dim=1)
    best, place = all_scores.topk(k, dim=1)
    return all_items.gather(1, place), best


@torch.no_grad()
def exact_lists(
    policy: Policy[ContextT, PrefixT],
    items: Tensor,
    lengths: Tensor,
    *,
    k: int,
    beams: int = 50,
    excluded: Tensor | None = None,
    filters: Filters | None = None,
    widen: bool = True,
) -> BeamLists:
    """The top K of users with histories (B, T) and lengths (B,), each proven exact unless `widen` is off.

    `excluded` and `filters` as of `beam_lists`: what they leave out takes no place. As many users are decoded together
    as the policy says (`most_users`). Those whose list is not proven are decoded again: with all prefixes that their
    K-th item so far does not beat, which proves the list, or with twice the beams while fewer than K are found, and in
    static shapes.

    Raises: NumericalError where log-probabilities are not numbers, unless `widen` is off.
    """
    if len(items) > policy.most_users:
        parts = []
        for rows in torch.split(torch.arange(len(items), device=items.device), policy.most_users):
            out = None if excluded is None else excluded[rows]
            of_rows = None if filters is None else filters.of_rows(rows)
            given: dict[str, Any] = {"k": k, "beams": beams, "excluded": out, "filters": of_rows, "widen": widen}
            parts.append(exact_lists(policy, items[rows], lengths[rows], **given))
        return BeamLists(*(torch.cat(values) for values in zip(*parts, strict=True)))
    context, beams = policy.encode(items, lengths), max(beams, k)
    lists = beam_lists(policy, context, len(items), k=k, beams=beams, excluded=excluded, filters=filters)
    while widen and len(users := (~lists.exact).nonzero()[:, 0]):
        if beams >= policy.space.n_sequences:  # nothing was dropped
            raise NumericalError(f"log-probabilities of {len(users)} users are not numbers; expected finite weights")
        least = lists.logprobs[users, -1]
        # In static shapes a table has a place for each beam, used or not.
        follows_all = bool((least > -math.inf).all()) and not policy.has_static_shapes
        beams = max(k, policy.space.n_sequences) if follows_all else 2 * beams
        own = policy.of_users(context, users)
        again = beam_lists(
            policy,
            policy.encode(items[users], lengths[users]) if own is None else own,
            len(users),
            k=k,
            beams=beams,
            excluded=None if excluded is None else excluded[users],
            filters=None if filters is None else filters.of_rows(users),
            least=least,
        )
        lists = BeamLists(*(old.index_copy(0, users, new) for old, new in zip(lists, again, strict=True)))
    return lists


def best_of(
    table: ItemTable, k: int, excluded: Tensor | None, filters: Filters | None, policy: Policy[Any, Any]
) -> BeamLists:
    """The K highest scores (B, n) of sequences that are not left out, with their shares of the softmax over all."""
    logprobs = table.scores.log_softmax(dim=1)
    sound = ~logprobs[:, 0].isnan()  # one score that is no number, or infinite, makes all shares of a row none
    if filters is not None:
        leaf = policy.space.leaf(table.items)
        closed = torch.stack([one.open[leaf] == 0 for one in filters.filters])
        logprobs = logprobs.masked_fill(closed[filters.which], -math.inf)
    n = logprobs.shape[1]
    # To whole blocks, with a column at least to which what is no item goes.
    wide = F.pad(logprobs, (0, BLOCK - n % BLOCK), value=-math.inf)
    if excluded is not None and excluded.shape[1]:
        wide = wide.scatter(1, torch.where(excluded >= 0, table.columns[excluded.clamp(min=0)], n), -math.inf)
    best, place = highest(wide, min(k, n))
    items = table.items[place.clamp(max=n - 1)].masked_fill(best == -math.inf, NO_ITEM)
    missing = k - best.shape[1]
    items, best = F.pad(items, (0, missing), value=NO_ITEM), F.pad(best, (0, missing), value=-math.inf)
    return BeamLists(items, best, sound)


def highest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk` of values (B, n) in whole blocks: the K highest lie in the K blocks whose highest are highest, so that
    only these are sorted.
    """
    blocks = values.view(len(values), -1, BLOCK)
    if blocks.shape[1] <= k:
        return values.topk(k, dim=1)
    chosen = blocks.amax(dim=2).topk(k, dim=1).indices
    best, place = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1).topk(k, dim=1)
    block = torch.div(place, BLOCK, rounding_mode="floor")
    return best, chosen.gather(1, block) * BLOCK + place % BLOCK
