"""Rollouts: G slates of K items for each context, and their log-probabilities under the policy that wrote them.

Slates are sampled, or come from beam search: with K = 1 each of the most probable items is a slate, with K > 1 the beam
list is one. Samples differ from seed to seed, and reach items that no beam list holds. Both kinds are scored under one
distribution, that of `write_slates`, which the loss uses too.

A language model can write freely instead, without the trie: slates of one text each, sampled from its whole vocabulary,
of which some are no item.

Shapes: B users, G slates of each, K places, L tokens of a text at most, X excluded items.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sagerec.actions.legal import NO_ITEM
from sagerec.config import above, at_least, between, check_fields, require
from sagerec.decoding.beam import beam_lists
from sagerec.decoding.slates import (
    LEAST_BEAMS,
    FreeTokens,
    SlateLogprobs,
    Slates,
    join_tokens,
    slate_logprobs,
    write_slates,
)
from sagerec.errors import SettingsError
from sagerec.policies.protocol import ContextT, Policy, PrefixT

MOST = 10_000
"""Items of a slate, and slates of a context, at most."""


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How slates are written."""

    k: int = 1
    """Items a slate."""
    slates: int = 32
    """Slates a context, G."""
    beam_slates: int | None = None
    """Slates of the G that come from beam search: with one item a slate up to all (the default), else the beam list,
    0 or 1 (the default is 1)."""
    temperature: float = 1.0
    """Of sampling, of the old log-probabilities and of the loss."""
    top_p: float = 1.0
    """Sample only among the most probable codes that together hold this share."""
    writing: Literal["items", "free"] = "items"
    """items, over the legal tokens; free, by a language model over all, so that some texts are no item."""

    def __post_init__(self) -> None:
        most = self.slates if self.k == 1 else 1
        check_fields(
            self,
            k=at_least(1, MOST),
            slates=at_least(1, MOST),
            temperature=between(1e-3, 1e3),  # below, logits overflow
            top_p=above(0, 1),
        )
        require(
            self.beam_slates is None or 0 <= self.beam_slates <= most,
            f"beam_slates is {self.beam_slates}; expected 0 to {most} with k = {self.k}",
        )
        require(
            self.writing == "items" or (self.k == 1 and self.top_p == 1 and not self.beam_slates),
            "free writing samples one text a slate; expected k 1, top_p 1 and no beam_slates",
        )

    @property
    def n_beams(self) -> int:
        """`beam_slates`, with the default filled in."""
        if self.writing == "free":
            return 0
        return self.beam_slates if self.beam_slates is not None else (self.slates if self.k == 1 else 1)


@torch.no_grad()
def roll_out(
    policy: Policy[ContextT, PrefixT],
    items: Tensor,
    lengths: Tensor,
    settings: RolloutSettings,
    *,
    excluded: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> Slates:
    """Slates (B, G, K) for histories (B, T) with lengths (B,), samples first, and their log-probabilities.

    `uniforms` (B, samples, K) decide the samples; of free writing they are (B, samples, L). `excluded` (B, X) items,
    -1 = none, never appear, unless writing is free.

    Raises: SettingsError where the catalogue has too few items.
    """
    if settings.writing == "free":
        assert uniforms is not None
        texts, found = policy.sample_texts(items, lengths, uniforms, temperature=settings.temperature)
        logprobs, _ = policy.text_logprobs(items, lengths, texts, temperature=settings.temperature)
        return Slates(found[:, :, None], FreeTokens(logprobs, text_of_tokens(texts)), texts)
    n_beams, parts = settings.n_beams, []
    given: dict[str, Any] = {"temperature": settings.temperature, "excluded": excluded}
    if settings.slates > n_beams:
        parts.append(
            write_slates(
                policy,
                items,
                lengths,
                k=settings.k,
                slates=settings.slates - n_beams,
                temperature=settings.temperature,
                top_p=settings.top_p,
                excluded=excluded,
                uniforms=uniforms,
            )
        )
    if n_beams:
        count = n_beams if settings.k == 1 else settings.k
        width = max(count, LEAST_BEAMS)
        context = policy.encode(items, lengths)
        listed = beam_lists(policy, context, len(items), k=count, beams=width, excluded=excluded).items
        if bool((listed == NO_ITEM).any()):  # the one wait for a GPU of a rollout
            raise SettingsError(f"a beam of {count} items does not fit this catalogue; expected fewer slates or items")
        slates = listed.view(len(items), n_beams, settings.k)
        if policy.has_static_shapes:  # one table of all slates, samples too
            slates, parts = torch.cat([*(part.items for part in parts), slates], dim=1), []
        tokens = slate_logprobs(policy, items, lengths, slates, context=context, **given).tokens
        parts.append(Slates(slates, tokens))
    elif policy.has_static_shapes:
        slates = parts[0].items
        return Slates(slates, slate_logprobs(policy, items, lengths, slates, **given).tokens)
    return _beside(parts)


def _beside(parts: list[Slates]) -> Slates:
    """The slates of several parts, one after another for each user."""
    if len(parts) == 1:
        return parts[0]
    total, begin, tokens = sum(part.items.shape[1] for part in parts), 0, []
    for part in parts:
        slates, k = part.items.shape[1:]
        user, place = part.tokens.item // (slates * k), part.tokens.item % (slates * k)
        tokens.append(FreeTokens(part.tokens.logprobs, (user * total + begin) * k + place))
        begin += slates
    return Slates(torch.cat([part.items for part in parts], dim=1), join_tokens(tokens))


def score_slates(
    policy: Policy[ContextT, PrefixT],
    items: Tensor,
    lengths: Tensor,
    slates: Tensor,
    texts: Tensor | None,
    *,
    temperature: float,
    excluded: Tensor | None = None,
) -> SlateLogprobs:
    """Log-probabilities of the free tokens of slates that `roll_out` wrote, with gradient."""
    if texts is None:
        return slate_logprobs(policy, items, lengths, slates, temperature=temperature, excluded=excluded)
    logprobs, entropy = policy.text_logprobs(items, lengths, texts, temperature=temperature)
    return SlateLogprobs(FreeTokens(logprobs, text_of_tokens(texts)), entropy)


def text_of_tokens(texts: Tensor) -> Tensor:
    """(F,) the text that each token of texts (B, G, L) belongs to."""
    return (texts >= 0).flatten(0, 1).nonzero()[:, 0]
