"""Autoregressive slates: K distinct items written one after another, sampled or greedy, and their log-probabilities.

P(i_1 … i_K | u) = prod_k P(i_k | u, i_<k), each code from softmax(logits / temperature) over the legal codes. The
history is encoded once and shared by a user's G slates, in writing and in the loss; an item that already stands in a
slate is masked in the trie, code by code, and the rest renormalised.

Shapes: B users, G slates of each, K places, X excluded items, L codes per item, R prefixes, D draws from each, W
continuations of the prefix that has most.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sagerec.actions.groups import group_log_softmax, pad_groups
from sagerec.actions.legal import NO_ITEM, excluded_paths, has_free_item, used_up
from sagerec.actions.trie import ROOT
from sagerec.errors import SettingsError
from sagerec.policies.protocol import ContextT, Policy, PrefixT


class Slates(NamedTuple):
    """Slates and the log-probabilities of their codes under the distribution that drew them."""

    items: Tensor
    """(B, G, K) int64 items (rows of the trie)."""
    logprobs: Tensor
    """(B, G, K, L) nats of each code, at the temperature of the draw (1 for greedy); 0 after an item's last code."""
    free: Tensor
    """(B, G, K, L) bool: more than one code was legal there."""


class SlateLogprobs(NamedTuple):
    """Log-probabilities of given slates, with gradient."""

    logprobs: Tensor
    """(B, G, K, L) nats of each code; 0 where only one is legal, and after an item's last code."""
    free: Tensor
    """(B, G, K, L) bool: more than one code is legal there, so that the policy has a choice."""
    entropy: Tensor
    """() mean entropy in nats of the first code, over the contexts and the places of the slates."""


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
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Slates:
    """Write `slates` slates of `k` distinct items for each history (B, T) with lengths (B,).

    `temperature` 0 is greedy: the most probable code at each step. `top_p` below 1 draws only among the most probable
    codes that together hold that share; log-probabilities stay those of the whole distribution. `excluded` (B, X)
    items, -1 = none, never appear. The draws are the inverse of the distribution function at `uniforms` (B, G, K, L) in
    [0, 1), from `generator` if not given, so that a user's slates do not hang on who else is in the batch.

    Raises: SettingsError where the catalogue minus the excluded has fewer than `k` items, or for a temperature
    below 0 or a `top_p` outside (0, 1].
    """
    if temperature < 0:
        raise SettingsError(f"temperature is {temperature}; expected 0 (greedy) or above")
    if not 0 < top_p <= 1:
        raise SettingsError(f"top_p is {top_p}; expected above 0, at most 1")
    batch, device, n_codes = len(items), policy.codes.device, policy.codes.shape[1]
    barred = torch.full((batch, 0), NO_ITEM, device=device) if excluded is None else excluded
    most = int((barred >= 0).sum(dim=1).max()) if barred.numel() else 0
    n_sequences = int(policy.trie.size[ROOT])
    if k + most > n_sequences:
        raise SettingsError(
            f"k is {k} with {most} excluded items, and the catalogue has {n_sequences}; expected a smaller slate"
        )
    if uniforms is None:
        uniforms = torch.rand(batch, slates, k, n_codes, generator=generator, device=device)
    context = policy.encode(items, lengths)
    paths = excluded_paths(policy.trie, policy.codes, barred)
    written: list[Tensor] = []
    logprobs: list[Tensor] = []
    choices: list[Tensor] = []
    for place in range(k):
        # All slates of a user share the first place's distribution: one prefix, and a draw for each.
        draws = uniforms[:, :, place] if place == 0 else uniforms[:, :, place].flatten(0, 1).unsqueeze(1)
        found, steps, free = _write_item(policy, policy.begin(context), paths, draws, temperature, top_p)
        written.append(found.view(batch, slates))
        logprobs.append(steps.view(batch, slates, n_codes))
        choices.append(free.view(batch, slates, n_codes))
        if place + 1 < k:
            if place == 0:
                context = policy.encode(items, lengths, slates=slates)
                paths = paths.repeat_interleave(slates, dim=0)
            paths = torch.cat([paths, excluded_paths(policy.trie, policy.codes, found.view(-1, 1))], dim=1)
            context = policy.append(context, written[-1])
    return Slates(torch.stack(written, dim=2), torch.stack(logprobs, dim=2), torch.stack(choices, dim=2))


def _write_item(
    policy: Policy[ContextT, PrefixT],
    prefix: PrefixT,
    paths: Tensor,
    uniforms: Tensor,
    temperature: float,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """D more items from each of R empty prefixes that exclude the items with `paths` (R, X, L + 1).

    `uniforms` (R, D, L). Returns items (R, D), logprobs and free places (R, D, L).
    """
    trie, device = policy.trie, paths.device
    n_rows, draws, n_codes = uniforms.shape
    found = torch.full((n_rows * draws,), NO_ITEM, device=device)
    logprobs = torch.zeros(n_rows * draws, n_codes, device=device)
    free = torch.zeros_like(logprobs, dtype=torch.bool)
    # Row of the prefix, place in `found`: at the root D draws from each prefix, then one from each.
    source, slot = torch.arange(n_rows, device=device), torch.arange(n_rows * draws, device=device).view(n_rows, draws)
    states = torch.full((n_rows,), ROOT, device=device)
    for level in range(n_codes):
        table, first = _legal_table(policy, prefix, states, paths[source, :, level + 1], level, temperature)
        place = _draw(table, uniforms.reshape(-1, n_codes)[slot, level], temperature, top_p)
        logprobs[slot.flatten(), level] = table.gather(1, place).flatten()
        free[slot, level] = _has_choice(table)[:, None]
        node = (first[:, None] + place).flatten()
        owner = torch.arange(len(states), device=device).repeat_interleave(place.shape[1])
        slot, source = slot.flatten(), source[owner]
        ends = trie.is_decided(node)
        found[slot[ends]] = trie.only_item(node[ends])
        states, source, slot = node[~ends], source[~ends], slot[~ends].unsqueeze(1)
        if len(states) == 0:
            break
        prefix = policy.step(prefix, owner[~ends], trie.token[states].long())
    shape = (n_rows, draws, n_codes)
    return found.view(n_rows, draws), logprobs.view(shape), free.view(shape)


def _has_choice(table: Tensor) -> Tensor:
    """(R,) bool: more than one column of log-probabilities (R, W) is legal."""
    return (table > -math.inf).sum(dim=1) > 1


def _legal_table(
    policy: Policy[ContextT, PrefixT],
    prefix: PrefixT,
    states: Tensor,
    excluded: Tensor,
    level: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (R, W) of the children of states (R,), -inf where used up or absent; their first nodes (R,)."""
    trie, scale = policy.trie, temperature or 1.0
    first = trie.first_child[states].long()
    if level == 0:
        logits = policy.root_logits(prefix) / scale
    else:
        children = trie.children(states)
        logits, _ = pad_groups(policy.child_logits(prefix, children) / scale, children.parent, len(states), -math.inf)
    if excluded.shape[1]:
        logits = logits.index_put(used_up(trie, states, excluded), logits.new_tensor(-math.inf))
    return logits.log_softmax(dim=1), first


def _draw(table: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Columns (R, D) drawn from log-probabilities (R, W) at uniforms (R, D): the first whose share exceeds u."""
    if temperature == 0:
        return table.argmax(dim=1, keepdim=True).expand(-1, uniforms.shape[1])
    shares = table.double().exp()
    if top_p < 1:
        ordered, order = shares.sort(dim=1, descending=True)
        outside = ordered.cumsum(dim=1) - ordered >= top_p
        shares = shares.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), 0.0)
    below = shares.cumsum(dim=1)
    total = below[:, -1:]
    last = (below < total).sum(dim=1, keepdim=True)  # the last column with a share, should u be rounded up to 1
    return torch.minimum(torch.searchsorted(below, uniforms.double() * total, right=True), last)


def slate_logprobs(
    policy: Policy[ContextT, PrefixT],
    items: Tensor,
    lengths: Tensor,
    slates: Tensor,
    *,
    temperature: float = 1.0,
    excluded: Tensor | None = None,
    context: ContextT | None = None,
) -> SlateLogprobs:
    """Log-probabilities of the codes of given slates (B, G, K) after histories (B, T) with lengths (B,).

    The distribution is that of `write_slates`: at the same weights it gives back the log-probabilities that were
    stored. Each history is encoded once, and the first place's distribution is computed once for all G slates.
    `context` is what `policy.encode` says of the histories, where it is known already.
    """
    batch, n_slates, k = slates.shape
    trie, codes, device = policy.trie, policy.codes, slates.device
    context = policy.encode(items, lengths) if context is None else context
    barred = torch.full((batch, 0), NO_ITEM, device=device) if excluded is None else excluded
    user = torch.arange(batch, device=device)[:, None, None]
    source = user.expand(-1, n_slates, 1)  # the row of `begin` that each place is decoded from
    if k > 1:
        context = policy.extend(context, slates[:, :, :-1])
        states_per_user = 1 + n_slates * (k - 1)
        later = 1 + torch.arange(n_slates * (k - 1), device=device).view(1, n_slates, k - 1)
        source = torch.cat([source * states_per_user, user * states_per_user + later], dim=2)
        # Before place p of a slate, its first p items are used.
        used = torch.ones(k - 1, k - 1, dtype=torch.bool, device=device).tril()
        before = slates[:, :, None, :-1].masked_fill(~used, NO_ITEM).flatten(1, 2)
        before = torch.cat([before.new_full((batch, 1, k - 1), NO_ITEM), before], dim=1)
        history = barred[:, None].expand(-1, states_per_user, -1)
        barred = torch.cat([history, before], dim=2).flatten(0, 1)
    prefix = policy.begin(context)
    paths = excluded_paths(trie, codes, barred)
    source, own = source.flatten(), codes[slates.flatten()]
    nodes = trie.walk(own)
    root = torch.full((len(paths),), ROOT, device=device)
    table, first = _legal_table(policy, prefix, root, paths[:, :, 1], 0, temperature)
    columns = [table[source, nodes[:, 1] - first[0]]]
    choices = [_has_choice(table)[source]]
    live = torch.arange(len(own), device=device)
    owner = source
    for level in range(1, own.shape[1]):
        going = ~trie.is_decided(nodes[live, level])
        live, owner = live[going], owner[going]
        column, choice = torch.zeros(len(own), device=device), torch.zeros(len(own), dtype=torch.bool, device=device)
        if len(live):
            states = nodes[live, level]
            prefix = policy.step(prefix, owner, own[live, level - 1])
            children = trie.children(states)
            free = has_free_item(trie, states, children, paths[source[live], :, level + 1])
            children = children.select(free)
            logits = policy.child_logits(prefix, children) / temperature
            steps = group_log_softmax(logits, children.parent, len(live))
            column = column.index_put((live,), steps[children.node == nodes[live, level + 1][children.parent]])
            choice[live] = torch.bincount(children.parent, minlength=len(live)) > 1
            owner = torch.arange(len(live), device=device)
        columns.append(column)
        choices.append(choice)
    entropy = -(table.exp() * table.clamp(min=torch.finfo(table.dtype).min)).sum(dim=1).mean()
    free = torch.stack(choices, dim=1).view(batch, n_slates, k, -1)
    return SlateLogprobs(torch.stack(columns, dim=1).view(batch, n_slates, k, -1), free, entropy)
