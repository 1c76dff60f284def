"""One legal-token mask for a causal language model: what it may write, and what its loss normalises over.

A completion is a slate: K items of a catalogue, each its token sequence, no item twice, then the end token. A sampler
that is held to it draws from the model's distribution renormalised over the legal tokens; a loss over the whole
vocabulary would be that of another policy. Where one token alone is legal its log-probability is 0, and it counts in no
mean.

Shapes: n completions, T tokens of the longest, V vocabulary, K items, S completions that go on, M legal continuations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sagerec.actions.groups import group_log_softmax
from sagerec.actions.legal import NO_ITEM, bar
from sagerec.actions.space import ActionSpace, make_space
from sagerec.actions.trie import PADDING, ROOT
from sagerec.config import require
from sagerec.errors import TrieError


class Legal(NamedTuple):
    """The legal tokens at each place of completions."""

    place: Tensor
    """(M,) int64 place i x T + t, ascending."""
    token: Tensor
    """(M,) int64 token that may stand there."""
    free: Tensor
    """(n, T) bool: more than one may."""


class Scored(NamedTuple):
    """What a model says of completions under the mask, 0 where a token is forced or none stands."""

    logprobs: Tensor
    """(n, T) nats, with gradient to the logits."""
    entropy: Tensor
    """(n, T) nats, of the legal tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class LegalTokens:
    """What a causal language model may write."""

    space: ActionSpace
    """The catalogue, its tokens being ids of the model's vocabulary."""
    end: int
    """The id of the end token."""
    k: int = 1
    """Items a completion."""

    def __post_init__(self) -> None:
        require(
            1 <= self.k <= self.space.n_sequences, f"k is {self.k}; expected 1 to {self.space.n_sequences}, the items"
        )
        require(
            self.end >= 0 and not bool((self.space.trie.token[1:] == self.end).any()),
            f"end is {self.end}, which stands within items; expected the id of a token that ends completions alone",
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest completion, its end token too."""
        return self.space.longest * self.k + 1

    @property
    def vocabulary(self) -> int:
        """Ids that a model must have at least: the highest one that may be written, and 1."""
        return max(self.space.trie.vocabulary, self.end + 1)

    def next(self, completions: Tensor, counted: Tensor) -> Tensor:
        """(n, V') bool: the tokens that may follow completions (n, T) of which `counted` (n, T) stand, V' a bound of V.

        After the end token, it alone. Raises: TrieError for a completion that is none.
        """
        going = _Going(self, len(completions), completions.device)
        for tokens, here in zip(completions.unbind(1), counted.unbind(1), strict=True):
            going.write(tokens, here & ~going.ended)
        rows, tokens = going.legal()
        mask = torch.zeros(len(completions), self.vocabulary, dtype=torch.bool, device=completions.device)
        mask[rows, tokens] = True
        mask[going.ended, self.end] = True
        return mask

    def follow(self, completions: Tensor, counted: Tensor) -> Legal:
        """The legal tokens at each counted place of completions (n, T). Raises: TrieError where another stands."""
        n, length = completions.shape
        going = _Going(self, n, completions.device)
        places, found = [], []
        for t in range(length):
            here = counted[:, t] & ~going.ended
            rows, tokens = going.legal(here)
            places.append(rows * length + t)
            found.append(tokens)
            going.write(completions[:, t], here)
        place, order = torch.cat(places).sort(stable=True)
        choices = torch.bincount(place, minlength=n * length).view(n, length)
        return Legal(place, torch.cat(found)[order], choices > 1)

    def score(self, logits: Tensor, completions: Tensor, counted: Tensor) -> Scored:
        """Log-probabilities of completions (n, T) under logits (n, T, V), normalised over what is legal."""
        legal = self.follow(completions, counted)
        shape = completions.shape
        choices = torch.bincount(legal.place, minlength=shape.numel())
        position = ((choices > 0).cumsum(0) - 1)[legal.place]  # of each among the places that have a legal token
        n_places = int((choices > 0).sum())
        steps = group_log_softmax(logits.flatten(0, 1)[legal.place, legal.token].float(), position, n_places)
        taken = legal.token == completions.flatten()[legal.place]
        empty = steps.new_zeros(shape.numel())
        logprobs = empty.index_put((legal.place[taken],), steps[taken])
        entropy = empty.index_add(0, legal.place, -(steps.exp() * steps))
        return Scored(logprobs.view(shape) * legal.free, entropy.view(shape) * legal.free)

    def read(self, completion: Sequence[int]) -> list[int]:
        """The K items of a completion's token ids, -1 where what stands there is no item, or no more follows."""
        trie, items, state = self.space.trie, list[int](), torch.full((1,), ROOT, device=self.space.device)
        for token in completion:
            if len(items) == self.k or token == self.end:
                break
            try:
                state = trie.advance(state, torch.tensor([token], device=state.device))
            except TrieError:
                break
            if bool(trie.is_leaf(state)):
                items.append(int(trie.item[state]))
                state = torch.full_like(state, ROOT)
        return items + [NO_ITEM] * (self.k - len(items))


class _Going:
    """n completions as they are written, all at the same place."""

    def __init__(self, legal: LegalTokens, n: int, device: torch.device) -> None:
        self._of, self._space = legal, legal.space.to(device)
        self._state = torch.full((n,), ROOT, device=device)
        self._items = torch.full((n, legal.k), NO_ITEM, device=device)
        self._barred = bar(self._space, self._items)
        self._written = torch.zeros(n, dtype=torch.int64, device=device)
        self.ended = torch.zeros(n, dtype=torch.bool, device=device)
        """(n,) bool: the end token stands."""

    def legal(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Row and token (M,) each of every legal continuation of the rows (n,) bool, all that have not ended."""
        rows = ~self.ended if rows is None else rows
        full = self._written == self._of.k
        inside, last = (rows & ~full).nonzero()[:, 0], (rows & full).nonzero()[:, 0]
        children = self._space.trie.children(self._state[inside])
        if self._of.k > 1:
            children = children.select(self._barred.leaves_free(inside, self._state[inside], children))
        row = torch.cat([inside[children.parent], last])
        return row, torch.cat([children.token, torch.full_like(last, self._of.end)])

    def write(self, tokens: Tensor, rows: Tensor) -> None:
        """Write tokens (n,) to the rows (n,) bool. Raises: TrieError for one that may not stand there."""
        full, trie = self._written == self._of.k, self._space.trie
        last, inside = rows & full, (rows & ~full).nonzero()[:, 0]
        if bool((tokens[last] != self._of.end).any()):
            got = int(tokens[last][tokens[last] != self._of.end][0])
            raise TrieError(
                f"token {got} stands where a completion of {self._of.k} items ends; expected the end token "
                f"{self._of.end}: sample under the same mask"
            )
        self.ended = self.ended | last
        states = trie.advance(self._state[inside], tokens[inside])
        leaf = trie.is_leaf(states)
        done, items = inside[leaf], trie.item[states[leaf]].long()
        repeated = (self._items[done] == items[:, None]).any(dim=1)
        if bool(repeated.any()):
            raise TrieError(f"item {int(items[repeated][0])} stands twice in a completion; sample under the same mask")
        self._state[inside] = torch.where(leaf, ROOT, states)
        self._items[done, self._written[done]] = items
        self._written[done] += 1
        if self._of.k > 1 and len(done):
            self._barred = bar(self._space, self._items)


def in_vocabulary(space: ActionSpace, first_ids: Sequence[int]) -> ActionSpace:
    """The same items, token t at depth d being the id first_ids[d] + t of a model's vocabulary (T5's way, TIGER's).

    Raises: SettingsError where depths are missing, or two depths would share an id.
    """
    codes = space.padded().cpu().numpy()
    require(
        len(first_ids) == codes.shape[1],
        f"first_ids has {len(first_ids)} entries; expected {codes.shape[1]}, one for each place of a sequence",
    )
    sizes = codes.max(axis=0) + 1
    for a, b in np.argwhere(~np.eye(len(sizes), dtype=bool)):
        clear = first_ids[a] + sizes[a] <= first_ids[b] or first_ids[b] + sizes[b] <= first_ids[a]
        require(clear, f"first_ids {list(first_ids)} overlap at places {a} and {b} of {sizes.tolist()} codes")
    ids = np.where(codes == PADDING, PADDING, codes + np.asarray(first_ids))
    listed = None if space.is_unique else np.unique(space.listed_as(np.arange(space.n_items)))
    return make_space(ids, listed=listed, vectors=space.vectors)
