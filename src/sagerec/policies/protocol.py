"""What a policy is: a distribution over the sequences of an action space, given the items before.

Contexts are encoded once, then many continuations of each are extended token by token. Lists, rollouts, training,
alignment, evaluation and serving speak to a policy through this page and nothing else; `registry` makes and reads them.

Shapes: B users, G slates of each user, K places, T history items, R prefixes (rows), M legal continuations.
"""

from collections.abc import Iterable
from typing import Any, Generic, Self, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import Children

ContextT = TypeVar("ContextT")
PrefixT = TypeVar("PrefixT")


class Policy(nn.Module, Generic[ContextT, PrefixT]):
    """A policy; its weights are those of an `nn.Module`."""

    space: ActionSpace
    """What it may write, on the policy's device."""
    max_items: int
    """History items that it reads, the latest ones."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def move(self, device: torch.device | str) -> Self:
        """Move weights and action space to a device."""
        self.space = self.space.to(device)
        return self.to(device)

    def layers(self) -> Iterable[nn.Module]:
        """Modules that `torch.compile` may compile each for itself."""
        return ()

    def count(self, events: Tensor) -> None:
        """Take how many training events (N,) float32 each item has, before training; most policies need not know."""

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take trained weights; where items were added to the space since, they are grown. Raises: RuntimeError."""
        self.load_state_dict(weights)

    def freeze(self) -> None:
        """Compute once what hangs on the weights alone, for serving: they will not change any more."""

    def encode(self, items: Tensor, lengths: Tensor, *, slates: int = 1) -> ContextT:
        """Read histories (B, T) of item indices, padded on the right, with lengths (B,), once for G = `slates`."""
        raise NotImplementedError

    def append(self, context: ContextT, items: Tensor) -> ContextT:
        """Write one item (B, G) to each slate; the history stays shared."""
        raise NotImplementedError

    def extend(self, context: ContextT, slates: Tensor) -> ContextT:
        """Read whole slates (B, G, K - 1) after histories encoded for one slate, all places at once.

        The result has 1 + G (K - 1) states a user, in this order: after the history, and after each item of slate 0,
        of slate 1, …; what `append` gives item by item. It can only be begun.
        """
        raise NotImplementedError

    def begin(self, context: ContextT) -> PrefixT:
        """The empty prefix of the next item of every state: R = B * G rows, or B * (1 + G (K - 1))."""
        raise NotImplementedError

    def step(self, prefix: PrefixT, rows: Tensor, tokens: Tensor) -> PrefixT:
        """Prefix rows (R',) taken from `prefix`, each longer by one of tokens (R',)."""
        raise NotImplementedError

    def follow(self, prefix: PrefixT, rows: Tensor, tokens: Tensor, lengths: Tensor) -> list[PrefixT]:
        """Read whole token sequences at once (teacher forcing), with gradient.

        Sequence m has `lengths[m]` >= 0 of the tokens (sum of lengths,), which stand one sequence after another, and
        begins at row `rows[m]` of empty prefixes. Element d - 1 of the result holds the prefixes of d tokens, one for
        each sequence that has as many, in their order; what `step` gives token by token. They can only be asked for
        logits.
        """
        raise NotImplementedError

    def root_logits(self, prefix: PrefixT) -> Tensor:
        """(R, n) float32 logits of the root's n children after empty prefixes."""
        raise NotImplementedError

    def child_logits(self, prefix: PrefixT, children: Children) -> Tensor:
        """(M,) float32 logits of legal continuations of the prefix rows; the caller normalises over the legal ones."""
        raise NotImplementedError

    def next_item_loss(self, items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """Mean over counted places of -log P(target | items up to it) in nats an item, with gradient; of P as it is
        trained, before what a policy adds to it on purpose (a popularity tilt).

        Args: items, targets (B, T) item indices; counted (B, T) bool. Each token is normalised over the legal ones.
        """
        raise NotImplementedError


AnyPolicy: TypeAlias = Policy[Any, Any]
