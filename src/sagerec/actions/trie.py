"""The trie: every legal token sequence of the catalogue in flat, immutable arrays.

One trie serves training, rollouts, evaluation and serving. Nodes are numbered by depth and, within a depth, in the
order of their sequences, so the children of a node are consecutive and sorted by token: `first_child[v]` …
`first_child[v + 1] - 1`. A state is a node number; the root is 0. Building is a radix sort of the columns, without a
Python loop over items; a step costs the children it lists, whatever the size of the catalogue.

An unknown prefix or a state without children is a TrieError, never an unconstrained step. No sequence may begin
another (text ends with an end token), so items stand at leaves alone and the policy's probabilities sum to 1.

Shapes: N sequences, L longest sequence, V vocabulary, M children listed, B states.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sagerec.errors import ArtifactError, TrieError

ROOT = 0
PADDING = -1
_ARRAYS = ("first_child", "token", "item", "size")
_SIZES = "sizes"


@dataclass(frozen=True, slots=True)
class Children:
    """The legal continuations of a batch of states, listed one after another."""

    parent: Tensor
    """(M,) int64 position, in the batch of states, of each child's parent; ascending."""
    node: Tensor
    """(M,) int64 state that the child is."""
    token: Tensor
    """(M,) int64 token that leads to it; ascending within a parent."""

    def select(self, keep: Tensor) -> "Children":
        """The children for which `keep` (M,) is true."""
        return Children(self.parent[keep], self.node[keep], self.token[keep])

    def of_rows(self, rows: Tensor) -> "Children":
        """The same children where the states asked for are `rows` (B,) of a larger batch."""
        return Children(rows[self.parent], self.node, self.token)


@dataclass(frozen=True, slots=True)
class Trie:
    """A prefix index over token sequences of any lengths."""

    first_child: Tensor
    """(nodes + 1,) int32 bounds of each node's children."""
    token: Tensor
    """(nodes,) int16 or int32 token on the edge into a node; -1 for the root."""
    item: Tensor
    """(nodes,) int32 index of the sequence that ends at a leaf; -1 elsewhere."""
    size: Tensor
    """(nodes,) int32 number of sequences at or under a node."""
    max_children: int
    """The largest number of children of any node."""
    vocabulary: int
    """One more than the largest token."""

    @property
    def n_nodes(self) -> int:
        return len(self.token)

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(t.numel() * t.element_size() for t in (getattr(self, name) for name in _ARRAYS))

    def to(self, device: torch.device | str) -> "Trie":
        """The same trie on another device."""
        arrays = {name: getattr(self, name).to(device) for name in _ARRAYS}
        return Trie(**arrays, max_children=self.max_children, vocabulary=self.vocabulary)

    def children(self, states: Tensor) -> Children:
        """List the legal continuations of `states` (B,) int64.

        Raises: TrieError for a state that is no node, or that has no child (a dead end).
        """
        begin = self.first_child[self._checked(states)].long()
        count = self.first_child[states + 1] - begin
        if bool((count == 0).any()):
            dead = int(states[count == 0][0])
            raise TrieError(
                f"state {dead} is a dead end: it holds item {int(self.item[dead])} and no token may follow. "
                "Stop at states for which is_leaf() is true"
            )
        parent = torch.repeat_interleave(count)
        node = torch.arange(len(parent), device=states.device) + (begin - count.cumsum(0) + count)[parent]
        return Children(parent=parent, node=node, token=self.token[node].long())

    def allowed(self, states: Tensor, *, vocabulary: int | None = None) -> Tensor:
        """Legal next tokens of `states` (B,) int64 as a mask (B, V) bool. Raises: TrieError as `children`."""
        children = self.children(states)
        mask = torch.zeros(len(states), vocabulary or self.vocabulary, dtype=torch.bool, device=states.device)
        mask[children.parent, children.token] = True
        return mask

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The states (B,) int64 after `tokens` (B,); a bisection over each state's children.

        Raises: TrieError where a token does not follow.
        """
        low = self.first_child[self._checked(states)].long()
        end = self.first_child[states + 1].long()
        high = end
        # The widest range decides: below the root most states have few children.
        for _ in range(int((end - low).max()).bit_length() if len(states) else 0):
            middle = (low + high) // 2
            # The last node is never a parent's first child past its end, so clamping only guards empty ranges.
            right = (low < high) & (self.token[middle.clamp(max=self.n_nodes - 1)] < tokens)
            low = torch.where(right, middle + 1, low)
            high = torch.where(right | (low >= high), high, middle)
        known = (low < end) & (self.token[low.clamp(max=self.n_nodes - 1)] == tokens)
        if not bool(known.all()):
            at = int((~known).nonzero()[0])
            raise TrieError(
                f"token {int(tokens[at])} does not follow state {int(states[at])}: no item of the catalogue begins "
                "so. Choose among children() or allowed()"
            )
        return low

    def parents(self, states: Tensor) -> Tensor:
        """The states (B,) int64 that `states` (B,), none of them the root, are children of."""
        return torch.searchsorted(self.first_child, states.to(self.first_child.dtype), right=True) - 1

    def is_leaf(self, states: Tensor) -> Tensor:
        """(B,) bool: the sequence is complete and no token may follow."""
        return self.item[states] >= 0

    def is_decided(self, states: Tensor) -> Tensor:
        """(B,) bool: one item alone is left, so that every further token has probability 1."""
        return self.size[states] == 1

    def only_item(self, states: Tensor) -> Tensor:
        """(B,) int64 item of states that are decided."""
        assert bool(self.is_decided(states).all()), "more than one item is left"
        while not bool(self.is_leaf(states).all()):
            states = torch.where(self.is_leaf(states), states, self.first_child[states].long())
        return self.item[states].long()

    def walk(self, sequences: Tensor) -> Tensor:
        """States (B, L + 1) on the way of whole sequences (B, L), root first; after a sequence's end, its last state.

        Raises: TrieError where a sequence is not in the trie.
        """
        states = [torch.full((len(sequences),), ROOT, dtype=torch.int64, device=sequences.device)]
        for tokens in sequences.unbind(1):
            going = tokens != PADDING
            state = states[-1].clone()
            state[going] = self.advance(state[going], tokens[going])
            states.append(state)
        return torch.stack(states, dim=1)

    def _checked(self, states: Tensor) -> Tensor:
        if bool(((states < 0) | (states >= self.n_nodes)).any()):
            raise TrieError(f"a state lies outside 0 … {self.n_nodes - 1}; states come from ROOT and advance()")
        return states


def build_trie(sequences: np.ndarray, items: np.ndarray | None = None) -> Trie:
    """Build a trie over `sequences` (N, L) integers >= 0, padded on the right with -1.

    `items` (N,) are the item indices at the leaves, 0 … N-1 if not given.

    Sorts column by column from the last (a radix sort for 16-bit codes), then finds the new prefixes of each depth
    by comparing neighbours: O(N L) memory and time.

    Raises: TrieError for an empty catalogue, an empty sequence, a gap in a sequence, two equal sequences, or one that
    begins another.
    """
    assert sequences.ndim == 2, sequences.shape
    n, length = sequences.shape
    if n == 0 or length == 0:
        raise TrieError("the catalogue is empty; expected at least one item with at least one token")
    if sequences.min() < PADDING or not (sequences[:, 0] >= 0).all():
        raise TrieError(f"every sequence needs a first token >= 0; padding is {PADDING} and stands at the end")
    codes = sequences.astype(np.int16 if sequences.max() < 2**15 else np.int32, copy=False)
    if ((codes[:, :-1] == PADDING) & (codes[:, 1:] != PADDING)).any():
        raise TrieError("a sequence has padding before its last token; pad on the right only")
    order = np.arange(n, dtype=np.int32)
    for column in reversed(range(length)):
        order = order[np.argsort(codes[order, column], kind="stable")]

    labels = order if items is None else items.astype(np.int32)[order]
    tokens, leaves, sizes = (
        [np.full(1, PADDING, codes.dtype)],
        [np.full(1, -1, np.int32)],
        [np.full(1, n, np.int32)],
    )
    child_counts = []
    parent = np.zeros(n, dtype=np.int32)  # rank within its depth of the node that each sorted row has reached
    n_parents = 1
    new = np.zeros(n, dtype=bool)  # the sorted row begins a new prefix
    new[0] = True
    for column in range(length):
        values = codes[order, column]
        going = values != PADDING
        if not going.any():
            break
        new[1:] |= values[1:] != values[:-1]
        begins = new & going
        rank = np.cumsum(begins, dtype=np.int32) - 1
        size = np.bincount(rank[going], minlength=rank[-1] + 1).astype(np.int32)
        ends = going & (codes[order, column + 1] == PADDING) if column + 1 < length else going
        if (size[rank[ends]] > 1).any():
            _report_overlap(codes, order, going & (rank == rank[ends][size[rank[ends]] > 1][0]))
        item = np.full(len(size), -1, dtype=np.int32)
        item[rank[ends]] = labels[ends]
        child_counts.append(np.bincount(parent[begins], minlength=n_parents).astype(np.int32))
        tokens.append(values[begins])
        leaves.append(item)
        sizes.append(size)
        parent, n_parents = rank, len(size)
    child_counts.append(np.zeros(n_parents, dtype=np.int32))
    per_node = np.concatenate(child_counts)
    first_child = np.ones(len(per_node) + 1, dtype=np.int32)
    first_child[1:] += np.cumsum(per_node, dtype=np.int32)
    return Trie(
        first_child=torch.from_numpy(first_child),
        token=torch.from_numpy(np.concatenate(tokens)),
        item=torch.from_numpy(np.concatenate(leaves)),
        size=torch.from_numpy(np.concatenate(sizes)),
        max_children=int(per_node.max()),
        vocabulary=int(codes.max()) + 1,
    )


def _report_overlap(codes: np.ndarray, order: np.ndarray, group: np.ndarray) -> None:
    """Raise the TrieError for sorted rows of which the first is equal to the second or begins it."""
    first, second = order[group][:2]
    one, two = ([int(c) for c in codes[i] if c != PADDING] for i in (first, second))
    raise TrieError(
        f"items {first} and {second} have sequences {one} and {two}, of which one is the other or begins it; give each "
        "its own, by a last code that separates them or an end token"
    )


def write_trie(folder: Path, trie: Trie) -> None:
    """Write the arrays as .npy files into `folder` (part of an artefact, which renames it into place)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _ARRAYS:
        np.save(folder / f"{name}.npy", getattr(trie, name).cpu().numpy(), allow_pickle=False)
    np.save(folder / f"{_SIZES}.npy", np.array([trie.max_children, trie.vocabulary]), allow_pickle=False)


def read_trie(folder: Path, *, memory_map: bool = True) -> Trie:
    """Read a trie; with `memory_map` the arrays stay on disk until touched and are shared between processes.

    Raises: ArtifactError where a file is missing or damaged.
    """
    arrays = {}
    for name in (*_ARRAYS, _SIZES):
        path = folder / f"{name}.npy"
        try:
            # Mode "c" (copy on write) lets torch wrap the read-only file without a warning.
            arrays[name] = np.load(path, mmap_mode="c" if memory_map else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); make the Semantic IDs again") from error
    max_children, vocabulary = arrays.pop(_SIZES).tolist()
    first_child = arrays["first_child"]
    if len({len(first_child) - 1, *(len(arrays[name]) for name in _ARRAYS[1:])}) > 1:
        raise ArtifactError(f"{folder}: the trie's arrays differ in length; make the Semantic IDs again")
    return Trie(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        max_children=max_children,
        vocabulary=vocabulary,
    )
