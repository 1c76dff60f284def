"""Autoregressive slates: K distinct items written one after another, sampled or greedy.

P(i_1 … i_K | u) = prod_k P(i_k | u, i_<k). The history is encoded once and shared by a user's G slates; an item that
already stands in a slate is masked in the trie, code by code, and the rest renormalised.

Shapes: B users, G slates of each, K places, R = B * G rows, L codes per item, M legal continuations.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sagerec.core.groups import group_log_softmax, pad_groups
from sagerec.core.trie import ROOT
from sagerec.errors import SettingsError
from sagerec.policies.protocol import ContextT, Policy, PrefixT
from sagerec.slates.beam import NO_ITEM, excluded_paths
from sagerec.slates.legal import has_free_item


class Slates(NamedTuple):
    """Slates and the log-probabilities of their codes under the distribution that drew them."""

    items: Tensor
    """(B, G, K) int64 items (rows of the trie)."""
    logprobs: Tensor
    """(B, G, K, L) nats, at temperature 1, of each code; 0 after an item's last code."""


@torch.no_grad()
def write_slates(
    policy: Policy[ContextT, PrefixT],
    items: Tensor,
    lengths: Tensor,
    *,
    k: int,
    slates: int = 1,
    temperature: float = 1.0,
    excluded: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Slates:
    """Write `slates` slates of `k` distinct items for each history (B, T) with lengths (B,).

    `temperature` 0 is greedy: the most probable code at each step. Sampling draws from softmax(logits / temperature)
    with `generator`. `excluded` (B, X) items, -1 = none, never appear.

    Raises: SettingsError where the catalogue minus the excluded has fewer than `k` items, or for a temperature
    below 0.
    """
    if temperature < 0:
        raise SettingsError(f"temperature is {temperature}; expected 0 (greedy) or above")
    batch, device = len(items), policy.codes.device
    barred = torch.full((batch, 0), NO_ITEM, device=device) if excluded is None else excluded
    most = int((barred >= 0).sum(dim=1).max()) if barred.numel() else 0
    n_sequences = int(policy.trie.size[ROOT])
    if k + most > n_sequences:
        raise SettingsError(
            f"k is {k} with {most} excluded items, and the catalogue has {n_sequences}; expected a smaller slate"
        )
    context = policy.encode(items, lengths, slates=slates)
    written: list[Tensor] = []
    logprobs: list[Tensor] = []
    paths = excluded_paths(policy, barred.repeat_interleave(slates, dim=0))
    for place in range(k):
        found, steps = _write_item(policy, policy.begin(context), paths, temperature, generator)
        written.append(found)
        logprobs.append(steps)
        if place + 1 < k:
            paths = torch.cat([paths, excluded_paths(policy, found[:, None])], dim=1)
            context = policy.append(context, found.view(batch, slates))
    return Slates(
        torch.stack(written, dim=1).view(batch, slates, k),
        torch.stack(logprobs, dim=1).view(batch, slates, k, -1),
    )


def _write_item(
    policy: Policy[ContextT, PrefixT],
    prefix: PrefixT,
    paths: Tensor,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """One more item for R slates that exclude the items with `paths` (R, X, L + 1): items (R,), logprobs (R, L)."""
    trie, device, n_rows = policy.trie, paths.device, len(paths)
    found = torch.full((n_rows,), NO_ITEM, device=device)
    logprobs = torch.zeros(n_rows, paths.shape[2] - 1, device=device)
    row = torch.arange(n_rows, device=device)
    states = torch.full((n_rows,), ROOT, device=device)
    for level in range(paths.shape[2] - 1):
        children = trie.children(states)
        children = children.select(has_free_item(trie, children, paths[row, :, level + 1]))
        logits = policy.child_logits(prefix, children)
        steps = group_log_softmax(logits, children.parent, len(row))
        preference = steps
        if temperature > 0:
            # Gumbel-max: the largest of logit / temperature + noise is a draw from the softmax.
            uniform = torch.rand(len(logits), generator=generator, device=device)
            preference = logits / temperature - (-uniform.clamp(min=1e-20).log()).log()
        table, position = pad_groups(preference, children.parent, len(row), -math.inf)
        child_at = torch.zeros(table.numel(), dtype=torch.int64, device=device)
        child_at[position] = torch.arange(len(logits), device=device)
        best = table.argmax(dim=1) + torch.arange(len(row), device=device) * table.shape[1]
        chosen = child_at[best]
        node = children.node[chosen]
        logprobs[row, level] = steps[chosen]
        ends = trie.is_decided(node)
        found[row[ends]] = trie.only_item(node[ends])
        row, states = row[~ends], node[~ends]
        if len(row) == 0:
            break
        kept = (~ends).nonzero()[:, 0]
        prefix = policy.step(prefix, kept, children.token[chosen][kept])
    return found, logprobs
