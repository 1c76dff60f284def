"""The action space: every item is a token sequence, and the trie holds the sequences that are legal.

Semantic IDs are one kind, titles another; policies, decoding, alignment and evaluation know this object alone.
Sequences are of any lengths and are held one after another: nothing is as wide as the longest.

Shapes: N items, F tokens of some items together, L tokens of the longest sequence, D width of vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sagerec.actions.trie import PADDING, ROOT, Trie, build_trie
from sagerec.errors import TrieError

SpaceT = TypeVar("SpaceT", bound="ActionSpace")


class Paths(NamedTuple):
    """The tokens of several items, item after item."""

    node: Tensor
    """(F,) int64 state after the token."""
    parent: Tensor
    """(F,) int64 state before it."""
    owner: Tensor
    """(F,) int64 position of the item among those asked for, ascending."""
    depth: Tensor
    """(F,) int64 place of the token in its sequence, from 0."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ActionSpace:
    """The items of a catalogue as token sequences."""

    trie: Trie
    """Index over the distinct sequences; where items share one, its leaf holds the item that stands for them all."""
    nodes: Tensor
    """(F,) int32 states on the way of each item's sequence, without the root, item after item."""
    offsets: Tensor
    """(N + 1,) int64 bounds of the items in `nodes`."""
    decided: Tensor
    """(N,) int32 state on each item's way from which on it is the only one left."""
    vectors: np.ndarray | None = None
    """(N, D) float32 content vectors, where the space has some."""
    content_hash: str = ""
    """Content hash of the artefact, once written."""
    grown_from: tuple[str, ...] = ()
    """Content hashes of the artefact before items were added to it: a policy trained on one of these serves still."""

    @property
    def n_items(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_sequences(self) -> int:
        """Distinct sequences: the items that a list can hold."""
        return int(self.trie.size[ROOT])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int((self.offsets[1:] - self.offsets[:-1]).max())

    @property
    def is_unique(self) -> bool:
        """Whether every item has a sequence of its own."""
        return self.n_sequences == self.n_items

    @property
    def device(self) -> torch.device:
        return self.nodes.device

    def lengths(self, items: Tensor) -> Tensor:
        """(…) int64 tokens of each of items (…)."""
        return self.offsets[items + 1] - self.offsets[items]

    def leaf(self, items: Tensor) -> Tensor:
        """(…) int64 state at which the sequence of each of items (…) ends."""
        return self.nodes[self.offsets[items + 1] - 1].long()

    def to(self: SpaceT, device: torch.device | str) -> SpaceT:
        """The same space on another device."""
        ways = {name: getattr(self, name).to(device) for name in ("nodes", "offsets", "decided")}
        return replace(self, trie=self.trie.to(device), **ways)

    def paths(self, items: Tensor) -> Paths:
        """The tokens of items (n,), one after another."""
        begin = self.offsets[items]
        length = self.lengths(items)
        owner = torch.repeat_interleave(length)
        depth = torch.arange(len(owner), device=owner.device) - (length.cumsum(0) - length)[owner]
        at = begin[owner] + depth
        node = self.nodes[at].long()
        parent = torch.where(depth == 0, ROOT, self.nodes[(at - 1).clamp(min=0)].long())
        return Paths(node, parent, owner, depth)

    def nodes_at(self, items: np.ndarray, depth: int) -> np.ndarray:
        """State (…) after token `depth` (from 0) of items (…) >= 0, -1 where a sequence ends before."""
        offsets, nodes = self.offsets.cpu().numpy(), self.nodes.cpu().numpy()
        at = offsets[items] + depth
        found: np.ndarray = np.where(at < offsets[items + 1], nodes[np.minimum(at, len(nodes) - 1)], -1)
        return found

    def has_choice(self, states: Tensor) -> Tensor:
        """(B,) bool: the trie leaves a choice after states (B,), so that the next token is free and not forced."""
        return self.trie.first_child[states + 1] - self.trie.first_child[states] > 1

    def sequence(self, item: int) -> list[int]:
        """The tokens of an item."""
        tokens: list[int] = self.trie.token[self.nodes[self.offsets[item] : self.offsets[item + 1]].long()].tolist()
        return tokens

    def item(self, tokens: Sequence[int]) -> int:
        """The item that lists show for a whole sequence. Raises: TrieError where it is none."""
        state = torch.full((1,), ROOT, device=self.device)
        for token in tokens:
            state = self.trie.advance(state, torch.tensor([token], device=self.device))
        if not bool(self.trie.is_leaf(state)):
            raise TrieError(f"the tokens {list(tokens)} begin several items; expected the whole sequence of one")
        return int(self.trie.item[state])

    def listed_as(self, items: np.ndarray) -> np.ndarray:
        """(n,) the item that stands in lists for each of items (n,): itself, unless several share its sequence."""
        index = torch.from_numpy(items.astype(np.int64)).to(self.device)
        found: np.ndarray = self.trie.item[self.leaf(index)].cpu().numpy()
        return found

    def padded(self) -> Tensor:
        """(N, L) int64 the tokens of every item, -1 after its end: for spaces whose sequences are short."""
        paths = self.paths(torch.arange(self.n_items, device=self.device))
        table = torch.full((self.n_items, int(paths.depth.max()) + 1), PADDING, device=self.device)
        return table.index_put((paths.owner, paths.depth), self.trie.token[paths.node].long())

    def first_tokens(self) -> np.ndarray:
        """(N,) int64 first token of each item, by which it is clustered where it has no categories."""
        tokens: np.ndarray = self.trie.token[self.nodes[self.offsets[:-1]].long()].cpu().numpy().astype(np.int64)
        return tokens

    def titles(self, given: list[str]) -> list[str]:
        """(N,) titles as lists show them, of those that the items have; a space that writes titles has its own."""
        return given

    def centroids(self) -> tuple[np.ndarray, np.ndarray]:
        """Points (C, D) that stand for groups of items, and the group (N,) of each item; coarse clusters join them."""
        if self.vectors is None:
            first, group = np.unique(self.first_tokens(), return_inverse=True)
            return np.eye(len(first), dtype=np.float32), group
        return self.vectors, np.arange(self.n_items)


def index_sequences(trie: Trie, tokens: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """`nodes`, `offsets` and `decided` of an ActionSpace: the ways in the trie of sequences laid one after another.

    Args: tokens (F,) >= 0; lengths (N,) above 0, which add up to F. Raises: TrieError for a sequence that is not there.
    """
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).long()
    flat, size = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(np.asarray(lengths, dtype=np.int64))
    nodes = torch.zeros(len(flat), dtype=torch.int32)
    states, going = torch.full((len(size),), ROOT), torch.arange(len(size))
    depth = 0
    while len(going):
        at = offsets[going] + depth
        states = trie.advance(states, flat[at])
        nodes[at] = states.int()
        depth += 1
        kept = size[going] > depth
        states, going = states[kept], going[kept]
    several = (trie.size[nodes.long()] > 1).long()
    before = torch.cat([several.new_zeros(1), several.cumsum(0)])
    decided = nodes[offsets[:-1] + before[offsets[1:]] - before[offsets[:-1]]]
    return {"nodes": nodes, "offsets": offsets, "decided": decided}


def make_space(
    sequences: np.ndarray, *, listed: np.ndarray | None = None, vectors: np.ndarray | None = None
) -> ActionSpace:
    """The space of items with sequences (N, L), padded on the right with -1, and maybe vectors (N, D).

    Where items share a sequence, `listed` names the one of each that stands for them all. Raises: TrieError.
    """
    trie = build_trie(sequences) if listed is None else build_trie(sequences[listed], listed)
    inside = sequences != PADDING
    return ActionSpace(trie=trie, vectors=vectors, **index_sequences(trie, sequences[inside], inside.sum(axis=1)))
