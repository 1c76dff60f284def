"""Item scores: whole items are scored by what they are known by, and each code by the items under it.

SASRec (Kang and McAuley 2018) scores items by s_i = x . v_i, x the encoder's state and v_i the vector that the encoder
reads for item i, with the softmax over the whole catalogue (Klenitskiy and Vasilev 2023). Here v_i adds up the item's
code embeddings, a linear map of its content and an embedding of its own, so that what items share is learnt once; and
the softmax is written code by code: a child v of a trie node has the logit

    log sum_{i under v} exp(s_i - tau log(1 + min(n_i, n_max))),

normalised over the node's legal children. Along an item's way the sums telescope to its share of the softmax: one
proper distribution over the trie, the same in lists, slates, rollouts and the policy loss. Items that stand in a slate
leave the sums, so that the next one is drawn from the softmax over the others. The popularity tilt tau with
the item's training events n_i (logit adjustment, Menon et al. 2021) is 0 in the next-item loss, which learns the log as
it is; it evens out how often rare items occur, of which a handful of events says little, and leaves the others as the
log has them.

An item that shares its sequence is scored through the item that stands for them all. All items are scored once a
state, at a cost of N x D, and every node sums over the scores under it; where the scores of the states are too many
for a table, the root computes them piece by piece and deeper nodes anew for the items under them.

Shapes: B users, T history items, R prefixes of U states, M children, N leaves (distinct sequences), n the root's
children, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sagerec.actions.dense import node_at
from sagerec.actions.filters import NO_ITEM, levels
from sagerec.actions.groups import group_logsumexp
from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import ROOT, Children, Trie
from sagerec.config import added, at_least, between, require
from sagerec.policies.history_encoder import Context, HistoryEncoder
from sagerec.policies.layers import FastDropout, SimilarityLayer, check_shape
from sagerec.policies.protocol import ItemTable
from sagerec.policies.softmax import full_softmax_loss

LARGEST_TABLE, LARGEST_TABLE_GPU = 2**22, 2**26
"""Numbers that are held at a time: scores, or parts of products."""
MOST_USERS, MOST_USERS_GPU = 128, 4096
"""Users whose lists are written at a time, where their scores fit a table."""
ENCODED_ROWS = 64
"""Sequences that training encodes at a time, of like length, so that little is padded."""
FLOOR = 1e-30
"""Least share of the highest score's weight that a sum over items is taken for."""
LEFT_OUT = -1e30
"""Score of an item that stands in the slate: finite, for the sum under a node that is closed is asked for too."""


@dataclass(frozen=True, slots=True)
class ItemScoresSettings:
    """Shape of the policy."""

    width: int = 128
    """Width of every layer."""
    encoder_layers: int = 1
    """Causal layers over the history's items."""
    heads: int = 2
    """Attention heads; they divide the width, and each is of even width."""
    dropout: float = 0.4
    """Dropout of item vectors, read and scored, of attention and of the feed-forward layers, rounded to 1/256."""
    max_items: int = 50
    """History items read, the latest ones."""
    content: bool = True
    """Add a linear map of the item's content vector to its vector."""
    item_embedding: bool = True
    """Add an embedding of the item's own to its vector."""
    reads_slate: bool = False
    """Read the items of a slate like a history while writing on; else they are only left out from then on, and the
    slate of most probable items is the beam list."""
    slate_mark: bool = added(False)
    """Add a vector of its own to the items of a slate that is read, which tells them from the history."""
    popularity_tilt: float = 1.0
    """How much more rare items count than the log has them: every score is less this times log(1 + the item's training
    events, at most `tilt_events`)."""
    tilt_events: int = 10
    """Training events from which on an item is not rare."""

    def __post_init__(self) -> None:
        require(self.reads_slate or not self.slate_mark, "slate_mark is on; expected reads_slate on with it")
        check_shape(self, encoder_layers=at_least(1, 128), popularity_tilt=between(0, 10), tilt_events=at_least(0))


def leaf_order(trie: Trie) -> tuple[Tensor, Tensor]:
    """Items (N,) int64 at the leaves in the order of their sequences, and each node's first place there (nodes,).

    The items under node v stand at places first[v] … first[v] + size[v] - 1.
    """
    size = trie.size.long()
    before = size.cumsum(0) - size
    first = torch.zeros_like(size)
    nodes = torch.full((1,), ROOT, device=size.device)
    leaves = []
    while len(nodes):
        ends = trie.is_leaf(nodes)
        leaves.append(nodes[ends])
        if bool(ends.all()):
            break
        inner = nodes[~ends]
        children = trie.children(inner)
        parents = inner[children.parent]
        # Siblings are consecutive: a node's place is its parent's, and then the items under the siblings before it.
        first[children.node] = first[parents] + before[children.node] - before[trie.first_child[parents].long()]
        nodes = children.node
    found = torch.cat(leaves)
    return torch.empty_like(found).scatter(0, first[found], trie.item[found].long()), first


def places_under(first: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Each of the places first (M,) … first + size (M,) - 1 of M nodes, one after another, and its node before it."""
    node = torch.repeat_interleave(size)
    return node, torch.arange(len(node), device=node.device) + (first - size.cumsum(0) + size)[node]


def left_out_at(gone: Tensor, row: Tensor, first: Tensor, size: Tensor) -> Tensor:
    """Positions in the listing of `places_under(first, size)` at which a place is one of those gone from its row.

    gone (R, X) places, -1 = none; row (M,) of gone that each node is asked for, and first (M,) in a row, ascend.
    """
    owner, column = (gone >= 0).nonzero(as_tuple=True)
    place = gone[owner, column]
    if not len(first):
        return first
    width = int((first + size).max())  # one more than any place that is listed
    key, wanted = row * width + first, owner * width + place
    node = (torch.searchsorted(key, wanted, right=True) - 1).clamp(min=0)
    inside = (row[node] == owner) & (first[node] <= place) & (place < first[node] + size[node])
    return (size.cumsum(0)[node] - size[node] + place - first[node])[inside]


def biased_scores(states: Tensor, vectors: Tensor, bias: Tensor) -> Tensor:
    """(U, N) float32 scores x . v of states (U, D) and vectors (N, D), plus bias (N,)."""
    return torch.addmm(bias, states, vectors.T).float()


class Prefix(NamedTuple):
    """R partly written items, all of the same number of codes."""

    states: Tensor
    """(U, D) distinct encoder states."""
    row: Tensor
    """(R,) int64 which of them each prefix has."""
    vectors: Tensor
    """(N, D) item vectors in the order of the leaves, with what dropout left of them."""
    bias: Tensor
    """(N,) what is added to the scores: the popularity tilt."""
    level: int
    """Codes written so far."""
    scores: Tensor | None
    """(U, N) float32 biased scores in the order of the leaves, where the table holds them."""
    gone: Tensor | None = None
    """(R, X) int64 places of the leaves that stand in the slate already, -1 = none."""

    def of(self, rows: Tensor, level: int) -> "Prefix":
        """Rows (R',), with `level` codes."""
        gone = None if self.gone is None else self.gone[rows]
        return self._replace(row=self.row[rows], level=level, gone=gone)


class ItemScores(HistoryEncoder[Prefix]):
    """The policy. Calls: see `sagerec.policies.protocol.Policy`."""

    popularity: Tensor
    leaves: Tensor
    first: Tensor
    place: Tensor
    root_sizes: Tensor
    above: Tensor
    """(L, N) int64 which node of each depth a leaf stands under, one more than the last where its sequence ended."""
    level_bounds: list[tuple[int, int]]
    """First node of each depth below the root, and the one after its last."""
    frozen: tuple[Tensor, Tensor] | None = None
    """Vectors and biases of the leaves, once the weights do not change any more."""

    def __init__(self, settings: ItemScoresSettings, space: ActionSpace) -> None:
        super().__init__()
        self.settings, self.space, self.max_items = settings, space, settings.max_items
        self.reads_slate = settings.reads_slate
        self.embed_by(space, settings.width, content=settings.content, item_embedding=settings.item_embedding)
        self.encoder = nn.ModuleList(
            SimilarityLayer(width=settings.width, heads=settings.heads, dropout=settings.dropout)
            for _ in range(settings.encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(settings.width)
        self.slate_mark = nn.Parameter(torch.zeros(settings.width)) if settings.slate_mark else None
        self.dropout = FastDropout(settings.dropout)
        self.register_buffer("popularity", torch.zeros(space.n_items))
        leaves, first = leaf_order(space.trie)
        every = torch.arange(space.n_items, device=space.device)
        children = space.trie.children(torch.full((1,), ROOT, device=space.device)).node
        self.register_buffer("leaves", leaves, persistent=False)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("place", first[space.leaf(every)], persistent=False)
        self.register_buffer("root_sizes", space.trie.size[children].long(), persistent=False)
        self.level_bounds, self.is_unique = levels(space.trie)[1:], space.is_unique
        self.register_buffer("above", self._above(), persistent=False)

    def _above(self) -> Tensor:
        """See `above`."""
        nodes = torch.stack([node_at(self.space, self.leaves, depth) for depth in range(len(self.level_bounds))])
        bounds = torch.tensor(self.level_bounds, device=self.device)
        return torch.where(nodes >= 0, nodes, bounds[:, 1:]) - bounds[:, :1]

    def count(self, events: Tensor) -> None:
        """Take how many training events (n_items,) each item has."""
        self.popularity.copy_(events)

    def embed_items(self, items: Tensor) -> Tensor:
        """Embeddings (…, D) of item indices (…) as the encoder reads them."""
        if self.frozen is not None and self.is_unique:
            return F.embedding(self.place[items], self.frozen[0])
        embedded: Tensor = self.dropout(self.item_vectors(items))
        return embedded

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep the item vectors, which are most of the work of a small batch; see the protocol."""
        assert not self.training, "dropout draws them anew each time"
        self.frozen = self._scored()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move what is kept along with the weights."""
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frozen is not None:
            self.frozen = (fn(self.frozen[0]), fn(self.frozen[1]))
        return moved

    def _scored(self) -> tuple[Tensor, Tensor]:
        """Vectors (N, D) of the leaves, with what dropout left of them, and what is added to their scores (N,)."""
        events = torch.zeros(len(self.leaves), device=self.device).index_add(0, self.place, self.popularity)
        bias = -self.settings.popularity_tilt * events.clamp(max=self.settings.tilt_events).log1p()
        return self.dropout(self.item_vectors(self.leaves)), bias

    def begin(self, context: Context) -> Prefix:
        """The empty prefix of every state; see the protocol. Dropout is drawn once for all that it is asked."""
        vectors, bias = self._scored() if self.frozen is None else self.frozen
        users, slates = context.hidden.shape[:2]
        states = context.hidden.flatten(0, 1) if self.reads_slate else context.hidden[:, 0]
        row = torch.arange(users * slates, device=self.device)
        held = len(states) * len(vectors) <= self._largest_table
        scores = biased_scores(states, vectors, bias) if held else None
        return Prefix(states, row if self.reads_slate else row // slates, vectors, bias, 0, scores)

    def without(self, prefix: Prefix, items: Tensor) -> Prefix:
        """Leave the slate's items out of the sums; see the protocol."""
        return prefix._replace(gone=self.place[items].masked_fill(items < 0, NO_ITEM))

    def step(self, prefix: Prefix, rows: Tensor, tokens: Tensor) -> Prefix:
        """Longer prefixes; see the protocol."""
        return prefix.of(rows, prefix.level + 1)

    def follow(self, prefix: Prefix, rows: Tensor, tokens: Tensor, lengths: Tensor) -> list[Prefix]:
        """Whole code sequences at once; see the protocol."""
        longest = int(lengths.max()) if len(lengths) else 0
        return [prefix.of(rows[lengths >= level], level) for level in range(1, longest + 1)]

    @property
    def _largest_table(self) -> int:
        return LARGEST_TABLE if self.device.type == "cpu" else LARGEST_TABLE_GPU

    @property
    def most_users(self) -> int:
        """As many as have a table of scores, of 16 at least."""
        most = MOST_USERS if self.device.type == "cpu" else MOST_USERS_GPU
        return min(most, max(16, self._largest_table // len(self.leaves)))

    def score_items(self, context: Context) -> ItemTable:
        """Scores of all sequences; see the protocol."""
        prefix = self.begin(context)
        scores = prefix.scores
        if scores is None:
            scores = biased_scores(prefix.states, prefix.vectors, prefix.bias)
        return ItemTable(scores, self.leaves, self.place)

    def root_logits(self, prefix: Prefix) -> Tensor:
        """Logits of the root's children; see the protocol."""
        if self.has_static_shapes:
            cells = torch.arange(len(self.root_sizes), device=self.device).expand(len(prefix.row), -1)
            return self._static_sums(prefix, cells)
        if prefix.scores is not None:
            sums = self._sums_by_child(prefix.scores)[prefix.row]
        else:
            size = max(1, self._largest_table // len(prefix.vectors))
            parts = [
                checkpoint(self._root_sums, states, prefix.vectors, prefix.bias, use_reentrant=False)
                for states in torch.split(prefix.states, size)
            ]
            sums = torch.cat(parts)[prefix.row]
        if prefix.gone is None:
            return sums
        # The few children that lost an item are summed anew: a difference would leave nothing of a small rest.
        row, column = (prefix.gone >= 0).nonzero(as_tuple=True)
        child = torch.searchsorted(self.root_sizes.cumsum(0), prefix.gone[row, column], right=True)
        cell = torch.unique(row * len(self.root_sizes) + child)
        row, child = cell // len(self.root_sizes), cell % len(self.root_sizes)
        return sums.index_put((row, child), self._sums_at(prefix, row, self.space.trie.first_child[ROOT] + child))

    def _root_sums(self, states: Tensor, vectors: Tensor, bias: Tensor) -> Tensor:
        """(U, n) float32 log-sum-exp of the scores under each of the root's children."""
        return self._sums_by_child(biased_scores(states, vectors, bias))

    def _sums_by_child(self, scores: Tensor) -> Tensor:
        """The same of scores (U, N); those under a child are consecutive columns."""
        top = scores.detach().amax(dim=1, keepdim=True)
        child = torch.repeat_interleave(self.root_sizes, output_size=len(self.leaves))
        sums = scores.new_zeros(len(scores), len(self.root_sizes)).index_add(1, child, (scores - top).exp())
        return sums.clamp(min=FLOOR).log() + top

    def _static_sums(self, prefix: Prefix, cells: Tensor) -> Tensor:
        """(R, C) float32 log-sum-exp of scores under nodes `cells` (R, C) of the next depth, counted from its first.

        In static shapes: scores are summed by all nodes of the depth, as many rows at a time as a table holds.
        """
        if prefix.scores is not None and prefix.gone is None:
            sums = self._level_sums(prefix.scores, prefix.level)
            return sums.flatten()[prefix.row[:, None] * sums.shape[1] + cells]
        size = max(1, self._largest_table // len(prefix.vectors))
        given = (prefix.states, prefix.vectors, prefix.bias, prefix.level)
        gone = prefix.row.new_full((len(prefix.row), 1), NO_ITEM) if prefix.gone is None else prefix.gone
        parts = list(zip(*(torch.split(x, size) for x in (prefix.row, gone, cells)), strict=True))
        if len(parts) == 1:
            return self._row_sums(*given, *parts[0])
        return torch.cat([checkpoint(self._row_sums, *given, *part, use_reentrant=False) for part in parts])

    def _row_sums(
        self, states: Tensor, vectors: Tensor, bias: Tensor, depth: int, row: Tensor, gone: Tensor, cells: Tensor
    ) -> Tensor:
        """(r, C) `_static_sums` of rows of states `row` (r,) without places `gone` (r, X), computed anew."""
        scores = F.pad(biased_scores(F.embedding(row, states), vectors, bias), (0, 1))
        scores = scores.scatter(1, torch.where(gone >= 0, gone, len(vectors)), LEFT_OUT)[:, :-1]
        return self._level_sums(scores, depth).gather(1, cells)

    def _level_sums(self, scores: Tensor, depth: int) -> Tensor:
        """(U, n + 1) float32 log-sum-exp of scores (U, N) under each of the n nodes of a depth; the last is of none."""
        begin, end = self.level_bounds[depth]
        node = self.above[depth].expand_as(scores)
        none = scores.new_full((len(scores), end - begin + 1), -torch.inf)
        top = none.scatter_reduce(1, node, scores.detach(), "amax")
        sums = torch.zeros_like(top).scatter_add(1, node, (scores - top.gather(1, node)).exp())
        return sums.clamp(min=FLOOR).log() + top

    def child_logits(self, prefix: Prefix, children: Children) -> Tensor:
        """Logits of legal continuations; see the protocol."""
        if prefix.level == 0 and len(children.node) == len(prefix.row) * len(self.root_sizes):
            return self.root_logits(prefix).flatten()
        if self.has_static_shapes and len(children.node) == len(prefix.row) * self.widths[prefix.level]:
            cells = (children.node - self.level_bounds[prefix.level][0]).clamp(min=0)
            return self._static_sums(prefix, cells.view(len(prefix.row), -1)).flatten()
        return self._sums_at(prefix, children.parent, children.node)

    def _sums_at(self, prefix: Prefix, row: Tensor, node: Tensor) -> Tensor:
        """(M,) float32 log-sum-exp of the scores under nodes (M,) for rows (M,) of the prefix; both ascend."""
        first, size, state = self.first[node], self.space.trie.size[node].long(), prefix.row[row]
        if prefix.scores is not None:
            child, place = places_under(first, size)
            known = prefix.scores.flatten().index_select(0, state[child] * len(prefix.vectors) + place)
            if prefix.gone is not None:
                known = known.index_fill(0, left_out_at(prefix.gone, row, first, size), LEFT_OUT)
            return group_logsumexp(known, child, len(size))
        piece = (size.cumsum(0) - 1) * prefix.vectors.shape[1] // self._largest_table
        pieces = torch.bincount(piece).tolist()
        given = (prefix.states, prefix.vectors, prefix.bias, prefix.gone)
        parts = zip(*(torch.split(x, pieces) for x in (first, size, state, row)), strict=True)
        if len(pieces) == 1:
            return self._sums_under(*given, *next(parts))
        # A piece without children is of one with more items than the table holds.
        return torch.cat(
            [checkpoint(self._sums_under, *given, *part, use_reentrant=False) for part in parts if len(part[0])]
        )

    def _sums_under(
        self,
        states: Tensor,
        vectors: Tensor,
        bias: Tensor,
        gone: Tensor | None,
        first: Tensor,
        size: Tensor,
        state: Tensor,
        row: Tensor,
    ) -> Tensor:
        """(M,) float32 log-sum-exp of the scores of items at places first (M,) … first + size (M,) - 1 after states
        `state` (M,), without those that are gone from rows `row` (M,).
        """
        child, place = places_under(first, size)
        own = F.embedding(state[child], states).float()
        scores = (own * F.embedding(place, vectors).float()).sum(dim=1) + bias[place]
        if gone is not None:
            scores = scores.index_fill(0, left_out_at(gone, row, first, size), LEFT_OUT)
        return group_logsumexp(scores, child, len(size))

    def next_item_loss(self, items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """Mean negative log-probability of targets without the tilt; see the protocol. Rows of like length are encoded
        together, for batches hold rows of any.
        """
        vectors = self.item_vectors(torch.arange(self.space.n_items, device=items.device))
        if self.has_static_shapes:
            encoded, _ = self.encode_embedded(self.dropout(F.embedding(items, vectors)))
            places, scored = self.place[targets.flatten()], self.dropout(vectors[self.leaves])
            return full_softmax_loss(encoded.flatten(0, 1), scored, places, counted.flatten())
        # A row is read as far as its last counted place.
        lengths = (counted * torch.arange(1, items.shape[1] + 1, device=items.device)).amax(dim=1)
        order = lengths.argsort(stable=True)
        order = order[lengths[order] > 0]
        if not len(order):
            return vectors.sum() * 0.0
        states, wanted = [], []
        for rows in torch.split(order, ENCODED_ROWS):
            longest = int(lengths[rows].max())
            places = counted[rows, :longest]
            encoded, _ = self.encode_embedded(self.dropout(F.embedding(items[rows, :longest], vectors)))
            states.append(encoded[places])
            wanted.append(targets[rows, :longest][places])
        scored = self.dropout(vectors[self.leaves])
        return full_softmax_loss(torch.cat(states), scored, self.place[torch.cat(wanted)])
