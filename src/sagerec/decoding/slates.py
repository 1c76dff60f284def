"""Autoregressive slates: K distinct items written one after another, sampled or greedy, and their log-probabilities.

P(i_1 … i_K | u) = prod_k P(i_k | u, i_<k), each token from softmax(logits / temperature) over the legal tokens. The
history is encoded once and shared by a user's G slates, in writing and in the loss; an item that already stands in a
slate is barred in the trie, token by token, and the rest renormalised; a policy whose codes add up items leaves it out
of its sums too, and then draws each item from its distribution over those that are left (Plackett and Luce).

Where only one token is legal its log-probability is 0 under every policy. Such forced tokens are left out of all that
is returned: only free tokens enter ratios, means, objectives and divergences.

Shapes: B users, G slates of each, K places, X excluded items, R prefixes, D draws from each, W continuations of the
prefix that has most, F free tokens of all slates together.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sagerec.actions.dense import NOWHERE, list_children, node_at, open_children, spend
from sagerec.actions.filters import Filters
from sagerec.actions.groups import group_log_softmax, pad_groups
from sagerec.actions.legal import NO_ITEM, Barred, bar, items_left
from sagerec.actions.trie import ROOT
from sagerec.decoding.beam import beam_lists
from sagerec.errors import NumericalError, SettingsError
from sagerec.policies.protocol import ContextT, Policy, PrefixT, items_before, states_before

LEAST_BEAMS = 20
"""Beams of a beam list, at least."""


class FreeTokens(NamedTuple):
    """Log-probabilities of the free tokens of slates (B, G, K): slate by slate, item by item, in the order written."""

    logprobs: Tensor
    """(F,) nats of each."""
    item: Tensor
    """(F,) int64 which item it belongs to, a position in the flattened slates; ascending."""
    counted: Tensor | None = None
    """(F,) bool: it is free, where every item has as many places, one a token of the longest sequence; else None."""


class Slates(NamedTuple):
    """Slates and the log-probabilities of their tokens under the distribution that drew them."""

    items: Tensor
    """(B, G, K) int64 items."""
    tokens: FreeTokens
    """At the temperature of the draw (1 for greedy)."""
    texts: Tensor | None = None
    """(B, G, L) tokens of slates of one item that were written without the trie, -1 after the last; all are free."""

    def scores(self) -> Tensor:
        """(B, G, K) log-probability of each item given those before it, in nats."""
        total = self.tokens.logprobs.new_zeros(self.items.numel())
        return total.index_add(0, self.tokens.item, self.tokens.logprobs).view(self.items.shape)


class SlateLogprobs(NamedTuple):
    """Log-probabilities of given slates, with gradient."""

    tokens: FreeTokens
    """Of their free tokens."""
    entropy: Tensor
    """() mean entropy in nats of the first token, over the contexts and the places of the slates."""


@torch.no_grad()
def write_slates(
    policy: Policy[ContextT, PrefixT],
    items: Tensor,
    lengths: Tensor,
    *,
    k: int,
    slates: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    excluded: Tensor | None = None,
    filters: Filters | None = None,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Slates:
    """Write `slates` slates of `k` distinct items for each history (B, T) with lengths (B,).

    `temperature` 0 is greedy: at each place the item that is most probable before any is barred, as in a beam list,
    found exactly. `top_p` below 1 draws only among the most probable tokens that together hold that share;
    log-probabilities stay those of the whole distribution. `excluded` (B, X) items, -1 = none, never appear, nor what
    `filters`, of B rows, close. An item is the inverse of its distribution function at one of `uniforms` (B, G, K)
    float64 in [0, 1), drawn by `generator` if not given: each token takes what the one before left of it. So a user's
    slates do not hang on who else is in the batch, nor on how long the sequences are.

    Raises: SettingsError where the catalogue minus the excluded has fewer than `k` items, or for a temperature
    below 0 or a `top_p` outside (0, 1].
    """
    if temperature < 0:
        raise SettingsError(f"temperature is {temperature}; expected 0 (greedy) or above")
    if not 0 < top_p <= 1:
        raise SettingsError(f"top_p is {top_p}; expected above 0, at most 1")
    batch, device, space = len(items), policy.device, policy.space
    out = torch.full((batch, 0), NO_ITEM, device=device) if excluded is None else excluded
    most = int((out >= 0).sum(dim=1).max()) if out.numel() else 0
    if k + most > space.n_sequences:  # of which some may stand twice, or share their sequences
        most = max(len(torch.unique(space.leaf(row[row >= 0]))) for row in out) if len(out) else 0
    if k + most > space.n_sequences:
        raise SettingsError(
            f"k is {k} with {most} excluded items, and the catalogue has {space.n_sequences}; expected a smaller slate"
        )
    if filters is not None and (left := int(items_left(space, out, filters).min())) < k:
        raise SettingsError(f"k is {k} and the filters leave {left} items; expected a smaller slate")
    if temperature == 0:
        best = _best_items(policy, policy.encode(items, lengths), out, k, filters)[:, None].expand(-1, slates, -1)
        tokens = slate_logprobs(policy, items, lengths, best, excluded=excluded, filters=filters).tokens
        return Slates(best, tokens)
    if uniforms is None:
        uniforms = torch.rand(batch, slates, k, generator=generator, device=device, dtype=torch.float64)
    context = policy.encode(items, lengths)
    barred, begun = bar(space, out, filters), policy.begin(context)
    prefix, written, parts = begun, [], []
    for place in range(k):
        # All slates of a user share the first place's distribution: one prefix, and a draw for each.
        draws = uniforms[:, :, place] if place == 0 else uniforms[:, :, place].reshape(-1, 1)
        found, tokens = _write_item(policy, prefix, barred, draws, temperature, top_p)
        written.append(found.view(batch, slates))
        parts.append(FreeTokens(tokens.logprobs, tokens.item * k + place))
        if place + 1 < k:
            if place == 0:
                context, barred = policy.encode(items, lengths, slates=slates), barred.repeated(slates)
            barred = barred.with_items(space, found.view(-1, 1))
            grown = policy.append(context, written[-1])
            if place == 0 or grown is not context:  # else the slate is not read, and every place begins alike
                context, begun = grown, policy.begin(grown)
            prefix = policy.without(begun, torch.stack(written, dim=2).flatten(0, 1))
    return Slates(torch.stack(written, dim=2), join_tokens(parts))


def _best_items(
    policy: Policy[ContextT, PrefixT], context: ContextT, excluded: Tensor, k: int, filters: Filters | None
) -> Tensor:
    """(B, K) the most probable item after each of B contexts of one slate, then the most probable after that, …"""
    found = excluded.new_full((len(excluded), 0), NO_ITEM)
    for place in range(k):
        beams, out = LEAST_BEAMS, torch.cat([excluded, found], dim=1)
        lists = beam_lists(policy, context, len(out), k=1, beams=beams, excluded=out, filters=filters)
        while not bool(lists.exact.all()) and beams < policy.space.n_sequences:
            beams *= 2
            lists = beam_lists(policy, context, len(out), k=1, beams=beams, excluded=out, filters=filters)
        found = torch.cat([found, lists.items], dim=1)
        if place + 1 < k:
            context = policy.append(context, lists.items)
    return found


def join_tokens(parts: list[FreeTokens]) -> FreeTokens:
    """The tokens of all parts in the order of their items; those of one item keep theirs."""
    if len(parts) == 1:
        return parts[0]
    item = torch.cat([part.item for part in parts])
    assert all(part.counted is None for part in parts), "tables are not joined"
    order = item.argsort(stable=True)
    return FreeTokens(torch.cat([part.logprobs for part in parts])[order], item[order])


def _write_item(
    policy: Policy[ContextT, PrefixT],
    prefix: PrefixT,
    barred: Barred,
    uniforms: Tensor,
    temperature: float,
    top_p: float,
) -> tuple[Tensor, FreeTokens]:
    """D more items (R, D) from each of R empty prefixes, for which `barred` has a row each; `uniforms` (R, D)."""
    trie, device = policy.space.trie, uniforms.device
    n_rows, draws = uniforms.shape
    found = torch.full((n_rows * draws,), NO_ITEM, device=device)
    left = uniforms.double()  # (live prefixes, draws of each): what of the uniform is not used up
    # Row of the prefix, place in `found`: at the root D draws from each prefix, then one from each.
    source, slot = torch.arange(n_rows, device=device), torch.arange(n_rows * draws, device=device).view(n_rows, draws)
    states = torch.full((n_rows,), ROOT, device=device)
    steps: list[FreeTokens] = []
    while len(states):
        table, first = _legal_table(policy, prefix, states, barred, source, temperature, at_root=not steps)
        if bool(table.isnan().any()):
            raise NumericalError("log-probabilities of slates are not numbers; expected finite weights")
        place, left = _draw(table, left, top_p)
        free = _has_choice(table)
        steps.append(FreeTokens(table.gather(1, place)[free].flatten(), slot[free].flatten()))
        node = (first[:, None] + place).flatten()
        owner = torch.arange(len(states), device=device).repeat_interleave(place.shape[1])
        slot, source, left = slot.flatten(), source[owner], left.flatten()
        ends = trie.is_decided(node)
        found[slot[ends]] = trie.only_item(node[ends])
        goes = ~ends
        states, source, slot, left = node[goes], source[goes], slot[goes].unsqueeze(1), left[goes].unsqueeze(1)
        if len(states):
            prefix = policy.step(prefix, owner[goes], trie.token[states].long())
    return found.view(n_rows, draws), join_tokens(steps)


def _has_choice(table: Tensor) -> Tensor:
    """(R,) bool: more than one column of log-probabilities (R, W) is legal; one that is not a number is."""
    return (table != -math.inf).sum(dim=1) > 1


def _legal_table(
    policy: Policy[ContextT, PrefixT],
    prefix: PrefixT,
    states: Tensor,
    barred: Barred,
    rows: Tensor,
    temperature: float,
    *,
    at_root: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (R, W) of the children of states (R,), -inf where used up or absent; their first nodes (R,).

    `rows` (R,) says which row of `barred` each state has.
    """
    trie = policy.space.trie
    first = trie.first_child[states].long()
    if at_root:
        logits = policy.root_logits(prefix) / temperature
    else:
        children = trie.children(states)
        logits, _ = pad_groups(
            policy.child_logits(prefix, children) / temperature, children.parent, len(states), -math.inf
        )
    if barred.closes:
        logits = logits.index_put(barred.under(rows, states), logits.new_tensor(-math.inf))
    return logits.log_softmax(dim=1), first


def _draw(table: Tensor, uniforms: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Columns (R, D) drawn from log-probabilities (R, W) at uniforms (R, D), and what is left of these.

    The column is the first whose cumulated share exceeds u; what is left is where in that column's share u lies, from
    0 to 1: again uniform, whatever the column.
    """
    shares = table.double().exp()
    if top_p < 1:
        ordered, order = shares.sort(dim=1, descending=True)
        outside = ordered.cumsum(dim=1) - ordered >= top_p
        shares = shares.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), 0.0)
    below = shares.cumsum(dim=1)
    total = below[:, -1:]
    last = (below < total).sum(dim=1, keepdim=True)  # the last column with a share, should u be rounded up to 1
    wanted = uniforms * total
    place = torch.minimum(torch.searchsorted(below, wanted, right=True), last)
    share = shares.gather(1, place)
    left = (wanted - (below.gather(1, place) - share)) / share
    return place, left.clamp(0.0, 1.0 - 2.0**-53)


def slate_logprobs(
    policy: Policy[ContextT, PrefixT],
    items: Tensor,
    lengths: Tensor,
    slates: Tensor,
    *,
    temperature: float = 1.0,
    excluded: Tensor | None = None,
    filters: Filters | None = None,
    context: ContextT | None = None,
) -> SlateLogprobs:
    """Log-probabilities of the free tokens of given slates (B, G, K) after histories (B, T) with lengths (B,).

    The distribution is that of `write_slates`: at the same weights it gives back the log-probabilities that were
    stored. Each history is encoded once, the first token's distribution is computed once for all G slates, and the
    rest of all items is read in one pass. `context` is what `policy.encode` says of the histories, where it is known.
    """
    batch, _, k = slates.shape
    space, device = policy.space, slates.device
    trie = space.trie
    out = torch.full((batch, 0), NO_ITEM, device=device) if excluded is None else excluded
    if k > 1:
        before = items_before(slates)
        filters = None if filters is None else filters.repeated(before.shape[1])
        out = torch.cat([out[:, None].expand(-1, before.shape[1], -1), before], dim=2).flatten(0, 1)
    if policy.has_static_shapes:
        context = policy.encode(items, lengths) if context is None else context
        context = policy.extend(context, slates[:, :, :-1]) if k > 1 else context
        return _static_logprobs(policy, context, slates, out, temperature, filters)
    barred, source, paths = bar(space, out, filters), states_before(slates).flatten(), space.paths(slates.flatten())
    # Tokens that must be read: those before the last place where the trie leaves a choice.
    chosen = ((paths.depth > 0) & space.has_choice(paths.parent)).nonzero()[:, 0]
    reach = torch.zeros(len(source), dtype=torch.int64, device=device)
    reach = reach.scatter_reduce(0, paths.owner[chosen], paths.depth[chosen], "amax")
    prefix, prefixes = policy.read_slates(items, lengths, slates, reach, context=context)
    root = torch.full((len(out),), ROOT, device=device)
    rows = torch.arange(len(out), device=device)
    table, first = _legal_table(policy, prefix, root, barred, rows, temperature, at_root=True)
    firsts = (paths.depth == 0).nonzero()[:, 0]
    logprobs = torch.zeros(len(paths.node), device=device).index_put(
        (firsts,), table[source, paths.node[firsts] - first[0]]
    )
    free = torch.zeros(len(paths.node), dtype=torch.bool, device=device)
    free[firsts] = _has_choice(table)[source]
    for depth, grown in enumerate(prefixes, start=1):
        row = (reach >= depth).cumsum(0) - 1  # of each item among the prefixes of this depth
        at = chosen[paths.depth[chosen] == depth]
        owner, states = paths.owner[at], paths.parent[at]
        children = trie.children(states)
        children = children.select(barred.leaves_free(source[owner], states, children))
        logits = policy.child_logits(grown, children.of_rows(row[owner])) / temperature
        steps = group_log_softmax(logits, children.parent, len(at))
        taken = children.node == paths.node[at][children.parent]
        logprobs = logprobs.index_put((at,), steps[taken])
        free[at] = torch.bincount(children.parent, minlength=len(at)) > 1
    entropy = -(table.exp() * table.clamp(min=torch.finfo(table.dtype).min)).sum(dim=1).mean()
    return SlateLogprobs(FreeTokens(logprobs[free], paths.owner[free]), entropy)


def _static_logprobs(
    policy: Policy[ContextT, PrefixT],
    context: ContextT,
    slates: Tensor,
    out: Tensor,
    temperature: float,
    filters: Filters | None,
) -> SlateLogprobs:
    """`slate_logprobs` in static shapes: a place for each token of the longest sequence, level by level.

    `context` has a state for each row of `out` (U, X), what is left out before it.
    """
    space, items, source = policy.space, slates.flatten(), states_before(slates).flatten()
    spent, prefix = spend(space, out, filters) if out.shape[1] else None, policy.begin(context)
    if slates.shape[2] > 1:
        prefix = policy.without(prefix, items_before(slates).flatten(0, 1))
    every = torch.arange(len(out), device=out.device)
    given: dict[str, Any] = {"spent": spent, "filters": filters}
    root = torch.full_like(every, ROOT)
    table = list_children(space.trie, root, policy.widths[0])
    left = open_children(space, table, root, 0, rows=every, **given)
    logits = (policy.root_logits(prefix) / temperature).masked_fill(~left, -math.inf)
    firsts = logits.log_softmax(dim=1)
    node = node_at(space, items, 0)
    parts = [firsts[source, node - table.first[0]]]
    free = [(left.sum(dim=1) > 1)[source]]
    rows = source
    for depth in range(1, len(policy.widths)):
        prefix = policy.step(prefix, rows, space.trie.token[node.clamp(min=0)].long().clamp(min=0))
        rows = torch.arange(len(items), device=items.device)
        states, node = node, node_at(space, items, depth)
        going = node >= 0
        table = list_children(space.trie, states.masked_fill(~going, NOWHERE), policy.widths[depth])
        left = open_children(space, table, states, depth, rows=source, **given)
        logits = policy.child_logits(prefix, table.children).view_as(left) / temperature
        steps = logits.masked_fill(~left & going[:, None], -math.inf).log_softmax(dim=1)
        taken = torch.where(going, node - table.first, 0)
        parts.append(steps.gather(1, taken[:, None]).squeeze(1) * going)
        free.append(going & (left.sum(dim=1) > 1))
    entropy = -(firsts.exp() * firsts.clamp(min=torch.finfo(firsts.dtype).min)).sum(dim=1).mean()
    counted = torch.stack(free, dim=1).flatten()
    logprobs = torch.stack(parts, dim=1).flatten().where(counted, 0.0)
    item = torch.arange(len(items), device=items.device).repeat_interleave(len(free), output_size=len(logprobs))
    return SlateLogprobs(FreeTokens(logprobs, item, counted), entropy)
