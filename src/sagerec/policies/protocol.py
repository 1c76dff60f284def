"""The policy protocol: contexts are encoded once, then many continuations of each are extended code by code.

Lists, rollouts, alignment and serving speak to a policy through these seven calls and nothing else.

Shapes: B users, G slates of each user, T history items, R prefixes (rows), M legal continuations, L codes per item.
"""

from typing import Protocol, TypeVar

from torch import Tensor

from sagerec.actions.trie import Children, Trie

ContextT = TypeVar("ContextT")
PrefixT = TypeVar("PrefixT")


class Policy(Protocol[ContextT, PrefixT]):
    """A distribution over the items of a trie, given the items before."""

    trie: Trie
    """The legal code sequences, on the policy's device."""
    codes: Tensor
    """(N, L) int64 code sequence of each item, -1 after its end."""

    def encode(self, items: Tensor, lengths: Tensor, *, slates: int = 1) -> ContextT:
        """Read histories (B, T) of item indices, padded on the right, with lengths (B,), once for G = `slates`."""
        ...

    def append(self, context: ContextT, items: Tensor) -> ContextT:
        """Write one item (B, G) to each slate; the history stays shared."""
        ...

    def extend(self, context: ContextT, slates: Tensor) -> ContextT:
        """Read whole slates (B, G, K - 1) after histories encoded for one slate, all places at once.

        The result has 1 + G (K - 1) states a user, in this order: after the history, and after each item of slate 0,
        of slate 1, …; what `append` gives item by item. It can only be begun.
        """
        ...

    def begin(self, context: ContextT) -> PrefixT:
        """The empty prefix of the next item of every state: R = B * G rows, or B * (1 + G (K - 1))."""
        ...

    def root_logits(self, prefix: PrefixT) -> Tensor:
        """(R, n) float32 logits of the root's n children after empty prefixes."""
        ...

    def step(self, prefix: PrefixT, rows: Tensor, tokens: Tensor) -> PrefixT:
        """Prefix rows (R',) taken from `prefix`, each longer by one of tokens (R',)."""
        ...

    def child_logits(self, prefix: PrefixT, children: Children) -> Tensor:
        """(M,) float32 logits of legal continuations of the prefix rows; the caller normalises over the legal ones."""
        ...
