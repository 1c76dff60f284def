"""Logits of a language model: of the legal tokens alone, or of its whole vocabulary, some rows at a time.

A table of all tokens after all prefixes never stands in memory.

Shapes: R outputs, M tokens asked for, V vocabulary, D width.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sagerec.actions.groups import group_log_softmax
from sagerec.actions.space import Paths
from sagerec.actions.trie import ROOT

if TYPE_CHECKING:
    from sagerec.policies.causal_lm import CausalLM
    from sagerec.policies.language import LanguageModel

DENSE = 16
"""Below this many products for each logit wanted, a matrix product is faster than a gather."""
LARGEST = 2**24
"""Numbers of a gather that are held at a time."""
MOST = 2**22
"""Logits over the vocabulary that are held at a time."""


def root_logits(policy: "CausalLM", hidden: Tensor) -> Tensor:
    """(R, n) float32 logits of the root's n tokens after outputs (R, D)."""
    weight, bias = policy.language.head()
    some = None if bias is None else bias[policy.root_tokens].float()
    return policy.language.cap(F.linear(hidden.float(), weight[policy.root_tokens].float(), some).float())


def token_logits(language: "LanguageModel", hidden: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """(M,) float32 logits of vocabulary ids (M,) after outputs (R, D) of rows (M,)."""
    weight, bias = language.head()
    distinct, place = torch.unique(token, return_inverse=True)
    if len(hidden) * len(distinct) <= DENSE * len(token):
        found = F.linear(hidden.float(), weight[distinct].float())[row, place].float()
    else:
        size = max(1, LARGEST // hidden.shape[1])
        parts = zip(torch.split(row, size), torch.split(token, size), strict=True)
        found = torch.cat([(hidden[r].float() * F.embedding(t, weight).float()).sum(dim=1) for r, t in parts])
    return language.cap(found if bias is None else found + bias[token])


def choices_loss(policy: "CausalLM", hidden: Tensor, paths: Paths) -> Tensor:
    """Sum of -log P of the tokens of paths (F,) after outputs (F, D), each among the legal ones."""
    trie = policy.space.trie
    begins = (paths.depth == 0).nonzero()[:, 0]
    logits = root_logits(policy, hidden[begins])
    loss = F.cross_entropy(logits, paths.node[begins] - trie.first_child[ROOT], reduction="sum")
    deeper = ((paths.depth > 0) & policy.space.has_choice(paths.parent)).nonzero()[:, 0]
    if not len(deeper):
        return loss
    children = trie.children(paths.parent[deeper])
    token = children.token + policy.base[paths.depth[deeper]][children.parent]
    logits = token_logits(policy.language, hidden[deeper], children.parent, token)
    steps = group_log_softmax(logits, children.parent, len(deeper))
    return loss - steps[children.node == paths.node[deeper][children.parent]].sum()


def vocabulary_logits(
    language: "LanguageModel", hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> Tensor:
    """(R, V) float32 logits at a temperature of every token after outputs (R, D), by an output layer (V, D), (V,)."""
    logits = language.cap(F.linear(hidden, weight, bias).float())
    return logits if temperature == 1 else logits / temperature


def vocabulary_logprobs(language: "LanguageModel", hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """(R, V) log-probabilities of every token after outputs (R, D)."""
    return vocabulary_logits(language, hidden, *language.head(), temperature).log_softmax(dim=1)


def rows_at_a_time(language: "LanguageModel") -> int:
    """Outputs whose logits over the vocabulary are held at a time."""
    return max(1, MOST // len(language.head()[0]))


def token_logprobs(language: "LanguageModel", hidden: Tensor, token: Tensor, temperature: float = 1.0) -> Tensor:
    """(M,) log-probabilities of tokens (M,) among all after outputs (M, D), with gradient, in which they are computed
    again.
    """
    weight, bias = language.head()
    if torch.is_autocast_enabled(hidden.device.type):  # rounded once, not for every part: weights without gradient are
        weight = weight.to(torch.get_autocast_dtype(hidden.device.type))

    def part(hidden: Tensor, token: Tensor) -> Tensor:
        logits = vocabulary_logits(language, hidden, weight, bias, temperature)
        return -F.cross_entropy(logits, token, reduction="none")

    size = rows_at_a_time(language)
    parts = list(zip(torch.split(hidden, size), torch.split(token, size), strict=True))
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(part, *own, use_reentrant=False) for own in parts])
    return torch.cat([part(*own) for own in parts])
