"""Writing without the trie: beam search over a language model's whole vocabulary, and which item a text is.

What a peer without constrained decoding does: some of what is written is no item, or stands twice. A text is an item
where it reads as its title does (case, unicode forms and white space aside), or is its Semantic ID; or, if asked for,
the item whose tokens' mean embedding is nearest to the text's by cosine.

Alignment samples such texts token by token, and scores them again in one pass after a history that is read once.

Shapes: B users, W beams, G texts of each, L tokens of a text at most, V vocabulary, D width, N items.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sagerec.policies.packing import chains
from sagerec.policies.vocabulary import rows_at_a_time, token_logprobs, vocabulary_logprobs

if TYPE_CHECKING:
    from sagerec.policies.causal_lm import CausalLM


@torch.no_grad()
def search_freely(policy: "CausalLM", items: Tensor, lengths: Tensor, *, k: int, beams: int) -> list[list[list[int]]]:
    """At most K texts of vocabulary ids for each history (B, T) with lengths (B,), the most probable first.

    One beam search, of texts no longer than the longest item; one that has not ended by then is none.
    """
    n_users, beams = len(items), max(beams, k)
    states = policy.encode(items, lengths)
    live = torch.zeros(n_users, 1, device=items.device)  # log-probability of each beam, -inf where it has ended
    texts: list[list[list[int]]] = [[[]] for _ in range(n_users)]
    done: list[list[tuple[float, list[int]]]] = [[] for _ in range(n_users)]
    for _ in range(policy.space.longest):
        logprobs = vocabulary_logprobs(policy.language, states.hidden)
        total = (live.flatten()[:, None] + logprobs).view(n_users, -1)
        best, place = total.topk(min(beams, total.shape[1]), dim=1)
        row, token = place // logprobs.shape[1], place % logprobs.shape[1]
        rows, tokens = row.tolist(), token.tolist()
        texts = [[[*own[r], t] for r, t in zip(rows[u], tokens[u], strict=True)] for u, own in enumerate(texts)]
        enough = True
        for user, scores in enumerate(best.tolist()):
            ended = [i for i, text in enumerate(texts[user]) if policy.language.ends(text, policy.base)]
            done[user] += [(scores[i], texts[user][i]) for i in ended if scores[i] > -math.inf]
            done[user] = sorted(done[user], key=lambda found: -found[0])[:k]
            best[user, ended] = -math.inf
            # Log-probabilities only fall: no live beam can still reach the list.
            enough &= len(done[user]) == k and done[user][-1][0] >= float(best[user].max())
        if enough:
            break
        source = (row + torch.arange(n_users, device=row.device)[:, None] * live.shape[1]).flatten()
        states, live = policy.read_tokens(states, source, token.flatten()), best
    return [[text for _, text in own] for own in done]


@torch.no_grad()
def sample_freely(
    policy: "CausalLM", items: Tensor, lengths: Tensor, uniforms: Tensor, *, temperature: float
) -> Tensor:
    """Texts (B, G, L) of vocabulary ids, -1 after the last, for each history (B, T) with lengths (B,).

    Each token is the inverse of its distribution function at one of `uniforms` (B, G, L) float64 in [0, 1). A text ends
    as titles do, or has L tokens.
    """
    n_users, group, longest = uniforms.shape
    states, end = policy.encode(items, lengths, slates=group), policy.language.end
    texts = torch.full((n_users * group, longest), -1, device=items.device)
    live = torch.arange(n_users * group, device=items.device)
    size, u = rows_at_a_time(policy.language), uniforms.flatten(0, 1)
    for place in range(longest):
        parts = zip(torch.split(states.hidden, size), torch.split(u[live, place], size), strict=True)
        token = torch.cat([_draw(vocabulary_logprobs(policy.language, h, temperature), own) for h, own in parts])
        texts[live, place] = token
        rows = torch.arange(len(live), device=live.device) if end is None else (token != end).nonzero()[:, 0]
        if not len(rows) or place + 1 == longest:
            break
        states, live = policy.read_tokens(states, rows, token[rows]), live[rows]
    return texts.view(n_users, group, longest)


def _draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """(R,) tokens drawn from log-probabilities (R, V) at uniforms (R,)."""
    below = logprobs.double().exp().cumsum(dim=1)
    found = torch.searchsorted(below, uniforms[:, None] * below[:, -1:], right=True).squeeze(1)
    return found.clamp(max=logprobs.shape[1] - 1)


def score_freely(
    policy: "CausalLM", items: Tensor, lengths: Tensor, texts: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (F,) of the tokens of texts (B, G, L), text after text, and the entropy (B,) of the first."""
    states, flat = policy.encode(items, lengths), texts.flatten(0, 1)
    there = flat >= 0
    user = torch.arange(len(items), device=items.device).repeat_interleave(texts.shape[1])
    read = there.clone()
    read[:, :-1] &= there[:, 1:]  # of the last token nothing is read
    read[:, -1] = False
    before = states.hidden[user][:, None].repeat(1, texts.shape[2], 1)
    if bool(read.any()):
        hidden, _, _ = policy.read_tree(states, chains(flat[read], user, read.sum(dim=1)))
        text, place = read.nonzero(as_tuple=True)
        before = before.index_put((text, place + 1), hidden)
    first = vocabulary_logprobs(policy.language, states.hidden, temperature)
    return token_logprobs(policy.language, before[there], flat[there], temperature), -(first.exp() * first).sum(dim=1)


class Readings:
    """What the items of a policy read like."""

    def __init__(self, policy: "CausalLM") -> None:
        self.language, self.base, tokens = policy.language, policy.base, policy.item_tokens()
        self.known: dict[Any, int] = {}
        for item, text in enumerate(tokens):
            self.known.setdefault(self.language.reading(text), item)
        with torch.no_grad():
            self.means = torch.stack([self._mean(text) for text in tokens])

    def _mean(self, text: list[int]) -> Tensor:
        """(D,) mean embedding of a text, of length 1."""
        weight = self.language.embedding().weight
        return F.normalize(weight[torch.tensor(text, device=weight.device)].float().mean(dim=0), dim=0)

    def item_of(self, text: list[int], *, nearest: bool) -> int:
        """The item that a text of vocabulary ids is, -1 where it is none, as one that has not ended."""
        item = self.known.get(self.language.reading(text), -1) if self.language.ends(text, self.base) else -1
        return int((self.means @ self._mean(text)).argmax()) if item < 0 and nearest else item
