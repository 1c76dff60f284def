"""What a policy is: a distribution over the sequences of an action space, given the items before.

Contexts are encoded once, then many continuations of each are extended token by token. Lists, rollouts, training,
alignment, evaluation and serving speak to a policy through this page and nothing else; `registry` makes and reads them.

Shapes: B users, G slates of each user, K places, T history items, R prefixes (rows), M legal continuations.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from sagerec.actions.dense import wants_static
from sagerec.actions.filters import NO_ITEM
from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import Children
from sagerec.errors import SettingsError

ContextT = TypeVar("ContextT")
PrefixT = TypeVar("PrefixT")


class Policy(nn.Module, Generic[ContextT, PrefixT]):
    """A policy; its weights are those of an `nn.Module`."""

    space: ActionSpace
    """What it may write, on the policy's device."""
    max_items: int
    """History items that it reads, the latest ones."""
    widths: tuple[int, ...] = ()
    """For each depth of the trie the children of the state that has most (`actions.dense.level_widths`), where the
    policy takes padded listings of them too; () where it takes ragged ones alone."""

    @property
    def has_static_shapes(self) -> bool:
        """Whether lists and log-probabilities are computed in static shapes: on a GPU, and where they are compiled."""
        return bool(self.widths) and wants_static(self.device)

    reads_slate = True
    """Whether what it writes next hangs on the items of the slate, other than that they are not written again."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def move(self, device: torch.device | str) -> Self:
        """Move weights and action space to a device."""
        self.space = self.space.to(device)
        return self.to(device)

    @property
    def most_users(self) -> int:
        """Users whose lists are written at a time, at most: few enough for the memory, or a processor's caches."""
        return 64 if self.device.type == "cpu" else 512

    def layers(self) -> Iterable[nn.Module]:
        """Modules that `torch.compile` may compile each for itself."""
        return ()

    def blocks(self) -> Iterable[nn.Module]:
        """Modules that several ranks hold in shards, and that run in `forward` alone; without any all hold all."""
        return ()

    def count(self, events: Tensor) -> None:
        """Take how many training events (N,) float32 each item has, before training; most policies need not know."""

    def describe(self, titles: Sequence[str]) -> None:
        """Take the titles (N,) of the items, before training; most policies need not know."""

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take trained weights; where items were added to the space since, they are grown. Raises: RuntimeError."""
        self.load_state_dict(weights)

    def freeze(self) -> None:
        """Compute once what hangs on the weights alone, for serving: they will not change any more."""

    @property
    def reads_profiles(self) -> bool:
        """Whether it reads who its users are."""
        return False

    def profile_words(self, profiles: Sequence[str]) -> list[list[int]]:
        """What it reads of profiles (n,): words, which stand in a history before its items, each a number of at most
        FIRST_WORD (`catalogue.profiles`). Nothing of an empty one, and of all where it reads none.
        """
        return [[] for _ in profiles]

    @property
    def writes_freely(self) -> bool:
        """Whether it can write without the trie."""
        return False

    def encode(self, items: Tensor, lengths: Tensor, *, slates: int = 1) -> ContextT:
        """Read histories (B, T) of item indices, padded on the right, with lengths (B,), once for G = `slates`.

        Those of a policy that reads profiles may begin with `profile_words`, here and wherever it is given histories.
        """
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

    def without(self, prefix: PrefixT, items: Tensor) -> PrefixT:
        """Empty prefixes of slates in which items (R, X) stand already, -1 = none.

        No item is written twice, whatever this gives: a policy whose codes add up the items under them leaves these out
        here, any other has nothing to do.
        """
        return prefix

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

    def read_slates(
        self, items: Tensor, lengths: Tensor, slates: Tensor, reach: Tensor, *, context: ContextT | None = None
    ) -> tuple[PrefixT, list[PrefixT]]:
        """All that the loss asks of given slates (B, G, K), with gradient: the empty prefixes of the states of
        `extend`, `without` the items before, and the prefixes of `follow` of the first `reach` (B G K,) tokens of each
        item, after `states_before`.

        `context` is what `encode` says of the histories, where it is known. A policy that reads all of it in one pass
        overrides this. They can only be asked for logits.
        """
        context = self.encode(items, lengths) if context is None else context
        if slates.shape[2] > 1:
            context = self.extend(context, slates[:, :, :-1])
        prefix, paths = self.begin(context), self.space.paths(slates.flatten())
        if slates.shape[2] > 1:
            prefix = self.without(prefix, items_before(slates).flatten(0, 1))
        tokens = self.space.trie.token[paths.node[paths.depth < reach[paths.owner]]].long()
        return prefix, self.follow(prefix, states_before(slates).flatten(), tokens, reach)

    def score_items(self, context: ContextT) -> "ItemTable | None":
        """Scores of all sequences after every state, where the policy has them at once: lists are then their best, and
        no beam is needed. None where it writes token by token.
        """
        return None

    def of_users(self, context: ContextT, users: Tensor) -> ContextT | None:
        """The part of some users (B',) of a context, so that they need not be encoded again; None where none is cut."""
        return None

    def root_logits(self, prefix: PrefixT) -> Tensor:
        """(R, n) float32 logits of the root's n children after empty prefixes."""
        raise NotImplementedError

    def child_logits(self, prefix: PrefixT, children: Children) -> Tensor:
        """(M,) float32 logits of legal continuations of the prefix rows; the caller normalises over the legal ones."""
        raise NotImplementedError

    def write_freely(self, items: Tensor, lengths: Tensor, *, k: int, beams: int, nearest: bool = False) -> Tensor:
        """(B, K) what beam search writes after histories (B, T) without the trie, best first: items, -1 for a text that
        is none; the same may stand twice. With `nearest` every text is taken for the item that is most like it.

        Raises: SettingsError where the policy writes nothing else than items.
        """
        raise SettingsError("this policy writes nothing else than items; expected lists beam or slate")

    def write_texts(self, items: Tensor, lengths: Tensor, *, k: int, beams: int) -> list[list[tuple[int, str]]]:
        """The same as texts: at most K of each history, best first, each with the item that it is, -1 for none.

        Raises: SettingsError where the policy writes nothing else than items.
        """
        raise SettingsError("this policy writes nothing else than items; expected lists beam or slate")

    def sample_texts(
        self, items: Tensor, lengths: Tensor, uniforms: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Texts (B, G, L) drawn without the trie after histories (B, T), a token at each of `uniforms` (B, G, L)
        float64, -1 after the last; and the items (B, G) that they are, -1 for none.

        Raises: SettingsError where the policy writes nothing else than items.
        """
        raise SettingsError("this policy writes nothing else than items; expected rewards without validity")

    def text_logprobs(
        self, items: Tensor, lengths: Tensor, texts: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (F,) of all tokens of such texts, text after text, and the mean entropy () of the first."""
        raise NotImplementedError

    def next_item_loss(self, items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """Mean over counted places of -log P(target | items up to it) in nats an item, with gradient; of P as it is
        trained, before what a policy adds to it on purpose (a popularity tilt). 0 where none is counted.

        Args: items, targets (B, T) item indices; counted (B, T) bool. Each token is normalised over the legal ones.
        """
        raise NotImplementedError

    def n_targets(self, items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """() float32 places that `next_item_loss` of these takes the mean over."""
        return counted.sum().float()


def states_before(slates: Tensor) -> Tensor:
    """(B, G, K) the state of `extend` after which each item of slates (B, G, K) is written."""
    batch, n_slates, k = slates.shape
    user = torch.arange(batch, device=slates.device)[:, None, None] * (1 + n_slates * (k - 1))
    later = 1 + torch.arange(n_slates * (k - 1), device=slates.device).view(1, n_slates, k - 1)
    return torch.cat([user.expand(-1, n_slates, 1), user + later], dim=2)


class ItemTable(NamedTuple):
    """Every sequence scored at once."""

    scores: Tensor
    """(R, n) float32 of R states, whose softmax is the policy's distribution."""
    items: Tensor
    """(n,) int64 the item that stands for each sequence."""
    columns: Tensor
    """(N,) int64 the sequence of each item."""


def items_before(slates: Tensor) -> Tensor:
    """(B, 1 + G (K - 1), K - 1) the items of slates (B, G, K) that stand before each state of `extend`, -1 = none."""
    k = slates.shape[2]
    stands = torch.ones(k - 1, k - 1, dtype=torch.bool, device=slates.device).tril()
    before = slates[:, :, None, :-1].masked_fill(~stands, NO_ITEM).flatten(1, 2)
    return torch.cat([before.new_full((len(slates), 1, k - 1), NO_ITEM), before], dim=1)


AnyPolicy: TypeAlias = Policy[Any, Any]
