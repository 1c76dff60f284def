"""Item scores: a second expert in the policy's one distribution over the trie.

SASRec (Kang and McAuley 2018) with the full softmax scores whole items, s_i = x . v_i, from a small encoder over item
vectors of its own: an embedding of each item, and a linear map of its content. A prior of what occurred together is
added (`cooccurrence`): s_i = x . v_i + p_i. The policy's code logits c know what items share; the scores know each item
for itself. Each child v of a trie node gets the logit

    c_v + log sum_{i under v} exp(s_i),

normalised over the node's legal children as ever. So it stays one proper distribution: with c = 0 the sums telescope to
softmax(s), with s = 0 it is the codes' alone, and with both it is, token by token, the product of the two experts
(Hinton 2002). What is barred stays in the sums, which only says how much a prefix is worth; the tokens that lead to
nothing else are left out by whoever decodes.

An item that shares its sequence is scored through the item that stands for them all. Only the root sums over the
catalogue, at a cost of N x D a state; deeper nodes sum over the items under them.

Shapes: B sequences, T history items, R states, M children, N leaves (distinct sequences), D width of the scores.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sagerec.actions.groups import group_logsumexp
from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import ROOT, Children, Trie
from sagerec.policies.cooccurrence import CoOccurrence, Prior
from sagerec.policies.layers import FastDropout, Layer

LARGEST_TABLE, LARGEST_TABLE_GPU = 2**20, 2**26
"""Scores that are held at a time: as many as fit the cache of a CPU, or as keep a GPU busy."""
FLOOR = 1e-30
"""Least share of the highest score's weight that a sum over items is taken for."""


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


class Scorer(NamedTuple):
    """The item scores of R states, not computed yet."""

    states: Tensor
    """(R, D) encoder states."""
    vectors: Tensor
    """(N, D) item vectors in the order of the leaves, with what dropout left of them."""
    prior: Prior | None
    """Of the R states, where there is one."""

    def of_rows(self, rows: Tensor) -> "Scorer":
        """Those of some rows."""
        return Scorer(self.states[rows], self.vectors, None if self.prior is None else self.prior.of_rows(rows))

    def split(self, size: int) -> "list[Scorer]":
        """Those of `size` rows at a time."""
        return [
            self.of_rows(rows) for rows in torch.split(torch.arange(len(self.states), device=self.states.device), size)
        ]


class RootSums(torch.autograd.Function):
    """Log-sum-exp of the scores under each of the root's children, some states at a time.

    The scores are as many as catalogue times states. Chunks that fit a cache, and backward computing them again, cost
    a CPU half of what it takes to write them down and read them back.
    """

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, states: Tensor, sizes: Tensor, scalars: Tensor | None, prior: Prior | None
    ) -> Tensor:
        """(R, n) of vectors (N, D) and states (R, D), children of sizes (n,); `scalars` are those of the prior."""
        child = torch.repeat_interleave(sizes)
        found = torch.empty(len(states), len(sizes), device=states.device)
        ctx.dtypes, ctx.prior = (vectors.dtype, states.dtype), prior
        if torch.is_autocast_enabled(states.device.type):
            dtype = torch.get_autocast_dtype(states.device.type)
            vectors, states = vectors.to(dtype), states.to(dtype)
        for rows in chunks(len(states), len(vectors), states.device):
            scores = _scores(vectors, states, prior, rows)
            top = scores.amax(dim=0)
            sums = scores.new_zeros(len(sizes), scores.shape[1]).index_add_(0, child, scores.sub_(top).exp_())
            found[rows] = (sums.clamp_(min=FLOOR).log_() + top).T
        ctx.save_for_backward(vectors, states, child, found)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With w_i = exp(s_i - LSE_v) for the items under v, d LSE_v / d s_i = w_i."""
        vectors, states, child, found = ctx.saved_tensors
        prior: Prior | None = ctx.prior
        of_vectors, of_states = torch.zeros(vectors.shape, device=vectors.device), torch.empty_like(states)
        of_scalars = None if prior is None else torch.zeros_like(prior.scalars)
        for rows in chunks(len(states), len(vectors), states.device):
            scores = _scores(vectors, states, prior, rows)
            of_scores = scores.sub_(found[rows].T[child]).exp_().mul_(grad[rows].T[child])
            if prior is not None:
                assert of_scalars is not None
                with torch.enable_grad():
                    scalars = prior.scalars.detach().requires_grad_()
                    places, values = prior._replace(scalars=scalars).table(rows)
                of_scalars += torch.autograd.grad(values, scalars, of_scores.gather(0, places))[0]
            low = of_scores.to(states.dtype)
            of_states[rows] = low.T @ vectors
            of_vectors += low @ states[rows]
        return of_vectors.to(ctx.dtypes[0]), of_states.to(ctx.dtypes[1]), None, of_scalars, None


def _scores(vectors: Tensor, states: Tensor, prior: Prior | None, rows: slice) -> Tensor:
    """(N, r) float32 scores after some states: items first, for a child's are consecutive rows."""
    scores = F.linear(vectors, states[rows]).float()
    return scores if prior is None else prior.add_to(scores, rows)


def chunks(n_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Runs of rows that hold about LARGEST_TABLE scores of `width` a row."""
    size = max(1, (LARGEST_TABLE if device.type == "cpu" else LARGEST_TABLE_GPU) // width)
    return (slice(begin, min(begin + size, n_rows)) for begin in range(0, n_rows, size))


class ItemScores(nn.Module):
    """The expert: item embeddings, causal layers over them, and the log-sum-exp of scores under trie nodes."""

    content: Tensor
    leaves: Tensor
    first: Tensor
    root_sizes: Tensor

    def __init__(
        self,
        space: ActionSpace,
        *,
        width: int,
        heads: int,
        layers: int,
        dropout: float,
        content: bool = False,
        cooccurrence: bool = False,
    ) -> None:
        """`content` and `cooccurrence` need the space's vectors and neighbours."""
        super().__init__()
        self.width = width
        self.items = nn.Embedding(space.n_items, width)
        nn.init.normal_(self.items.weight, std=0.02)
        self.content_map: nn.Linear | None = None
        if content:
            assert space.vectors is not None
            self.register_buffer("content", torch.from_numpy(space.vectors), persistent=False)
            self.content_map = nn.Linear(space.vectors.shape[1], width)
        self.layers = nn.ModuleList(
            Layer(width=width, heads=heads, expansion=2, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = FastDropout(dropout)
        leaves, first = leaf_order(space.trie)
        self.register_buffer("leaves", leaves, persistent=False)
        self.register_buffer("first", first, persistent=False)
        children = space.trie.children(torch.full((1,), ROOT, device=space.device)).node
        self.register_buffer("root_sizes", space.trie.size[children].long(), persistent=False)
        self.cooccurrence: CoOccurrence | None = None
        if cooccurrence:
            assert space.neighbours is not None
            self.cooccurrence = CoOccurrence(space.neighbours, leaves)

    def vectors(self, items: Tensor) -> Tensor:
        """Vectors v (…, D) of items (…): an embedding of each one's own, and a linear map of its content."""
        own: Tensor = self.items(items)
        return own if self.content_map is None else own + self.content_map(self.content[items])

    def embed(self, items: Tensor) -> Tensor:
        """Embeddings (…, D) of items (…) as the encoder reads them."""
        embedded: Tensor = self.dropout(self.vectors(items))
        return embedded

    def prior(self, items: Tensor, visible: Tensor, own: Tensor | None = None) -> Prior | None:
        """The co-occurrence prior of states, see `CoOccurrence`; None without one."""
        return None if self.cooccurrence is None else self.cooccurrence(items, visible, own)

    def begin(self, states: Tensor, prior: Prior | None = None) -> Scorer:
        """The scores of encoder states (R, D); dropout is drawn once for all that is scored by them."""
        share = 1.0 if self.training else 0.5
        if prior is not None:
            moved = torch.stack([prior.scalars[0] + math.log(share), prior.scalars[1], prior.scalars[2]])
            prior = prior._replace(scalars=moved)
        return Scorer(states * share, self.dropout(self.vectors(self.leaves)), prior)

    def at_root(self, scorer: Scorer) -> Tensor:
        """(R, n) float32 log-sum-exp of the scores under each of the root's n children."""
        prior = scorer.prior
        sums: Tensor = RootSums.apply(  # type: ignore[no-untyped-call]
            scorer.vectors, scorer.states, self.root_sizes, None if prior is None else prior.scalars, prior
        )
        return sums

    def under(self, scorer: Scorer, children: Children, trie: Trie) -> Tensor:
        """(M,) float32 log-sum-exp of the scores under each of the children of R states."""
        size = trie.size[children.node].long()
        child = torch.repeat_interleave(size)
        begin = self.first[children.node] - size.cumsum(0) + size
        place = torch.arange(len(child), device=child.device) + begin[child]
        states = F.embedding(children.parent[child], scorer.states)
        scores = (states.float() * F.embedding(place, scorer.vectors).float()).sum(dim=1)
        if scorer.prior is not None:
            scores = scores + scorer.prior.at(children.parent[child], place)
        return group_logsumexp(scores, child, len(size))
