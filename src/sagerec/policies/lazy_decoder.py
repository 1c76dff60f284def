"""The LazyDecoder: a causal encoder over items, and a shallow decoder over the codes of the next one.

After OneRec-V2 (arXiv 2508.20900): the history costs one position an item, not one a code, and only the next item's
few codes pass through the decoder, which is what makes a CPU enough. Departures from it: the decoder reads the
encoder's last state as its first position instead of attending to all of the history; an item enters as the sum
of its code embeddings and a linear map of its content vector (the vector that was quantised), so that what the
codes round off is not lost.

Shapes: B users, G slates of each, T history items, S cached positions, P targets, R prefixes, L codes per item, C codes
of a level, D width, H heads, N items.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sagerec.actions.dense import list_children, node_at
from sagerec.actions.groups import group_log_softmax
from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import ROOT, Children
from sagerec.config import added, at_least
from sagerec.policies.history_encoder import Context, HistoryEncoder
from sagerec.policies.layers import FastDropout, KeyValue, Layer, check_shape

DENSE_SHARE = 16
"""Above one child in this many codes of a level, a matrix product over all codes is faster than a gather."""
GPU_NUMBERS = 2**28
"""Logits that a GPU holds at a time."""


@dataclass(frozen=True, slots=True)
class LazyDecoderSettings:
    """Shape of the policy."""

    width: int = 128
    """Width of every layer."""
    encoder_layers: int = 2
    """Causal layers over the history's items."""
    decoder_layers: int = 1
    """Causal layers over the codes of one item."""
    heads: int = 4
    """Attention heads; they divide the width, and each is of even width."""
    expansion: int = 4
    """Width of the feed-forward layers over that of the others."""
    dropout: float = 0.2
    """Dropout on embeddings and on the output of every layer, rounded to 1/256."""
    max_items: int = 50
    """History items read, the latest ones."""
    content: bool = True
    """Add a linear map of the item's content vector to its code embeddings."""
    item_embedding: bool = False
    """Add an embedding of the item's own to its code embeddings."""
    slate_mark: bool = added(False)
    """Add a vector of its own to the items of the slate, which tells them from the history."""

    def __post_init__(self) -> None:
        layers = at_least(1, 128)
        check_shape(self, encoder_layers=layers, decoder_layers=layers, expansion=at_least(1, 64))


class Prefix(NamedTuple):
    """R partly written items, all of the same number of codes."""

    output: Tensor
    """(R, D) decoder output at the last position."""
    caches: tuple[KeyValue, ...]
    """Per decoder layer, keys and values (R, H, level + 1, D/H)."""
    level: int
    """Codes written so far."""


class LazyDecoder(HistoryEncoder[Prefix]):
    """The policy. Calls: see `sagerec.policies.protocol.Policy`."""

    def __init__(self, settings: LazyDecoderSettings, space: ActionSpace) -> None:
        super().__init__()
        self.settings, self.space, self.max_items = settings, space, settings.max_items
        width = settings.width
        self.embed_by(space, width, content=settings.content, item_embedding=settings.item_embedding)
        sizes = self.level_sizes
        self.level_begins = [sum(sizes[:level]) for level in range(len(sizes))]
        self.slate_mark = nn.Parameter(torch.zeros(width)) if settings.slate_mark else None
        self.n_first_codes = len(space.trie.children(torch.tensor([ROOT], device=self.codes.device)).token)
        self.prefix_codes = nn.Embedding(sum(sizes), width)
        self.level_embedding = nn.Parameter(torch.empty(len(sizes), width))
        self.head = nn.Parameter(torch.empty(sum(sizes), width))
        self.head_bias = nn.Parameter(torch.zeros(sum(sizes)))
        for weight in (self.prefix_codes.weight, self.level_embedding, self.head):
            nn.init.normal_(weight, std=0.02)
        shape: dict[str, Any] = {name: getattr(settings, name) for name in ("width", "heads", "expansion", "dropout")}
        self.encoder = nn.ModuleList(Layer(**shape) for _ in range(settings.encoder_layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(Layer(**shape) for _ in range(settings.decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.dropout = FastDropout(settings.dropout)

    @property
    def most_users(self) -> int:
        """On a GPU as many as it decodes with at most `GPU_NUMBERS` numbers at a time, were there 50 beams."""
        if self.device.type == "cpu":
            return super().most_users
        return min(4096, max(16, GPU_NUMBERS // (50 * max(*self.level_sizes, *self.widths[1:], 1))))

    def layers(self) -> Iterable[nn.Module]:
        """The encoder's and the decoder's."""
        return [*self.encoder, *self.decoder]

    def embed_items(self, items: Tensor) -> Tensor:
        """Embeddings (…, D) of item indices (…)."""
        embedded: Tensor = self.dropout(self.item_vectors(items))
        return embedded

    def begin(self, context: Context) -> Prefix:
        """The empty prefix of every state; see the protocol."""
        return self._decode(context.hidden.flatten(0, 1), None, 0)

    def step(self, prefix: Prefix, rows: Tensor, tokens: Tensor) -> Prefix:
        """Longer prefixes; see the protocol."""
        x = self.prefix_codes(tokens + self.level_offsets[prefix.level])
        caches = tuple((key[rows], value[rows]) for key, value in prefix.caches)
        return self._decode(x, caches, prefix.level + 1)

    def follow(self, prefix: Prefix, rows: Tensor, tokens: Tensor, lengths: Tensor) -> list[Prefix]:
        """Whole code sequences at once; see the protocol. Sequences of one length go through the decoder together."""
        begin = lengths.cumsum(0) - lengths
        longest = int(lengths.max()) if len(lengths) else 0
        outputs = prefix.output.new_zeros(len(tokens), prefix.output.shape[1])
        for length in range(1, longest + 1):
            same = (lengths == length).nonzero()[:, 0]
            if not len(same):
                continue
            places = torch.arange(length, device=tokens.device)
            at = begin[same, None] + places
            x = self.prefix_codes(tokens[at] + self.level_offsets[:length]) + self.level_embedding[1 : length + 1]
            # The prefix's own position is in the cache; below it the codes see one another causally.
            mask = (places[:, None] + 1 >= torch.arange(length + 1, device=tokens.device))[None, None]
            for layer, (key, value) in zip(self.decoder, prefix.caches, strict=True):
                x, _ = layer(x, cache=(key[rows[same]], value[rows[same]]), mask=mask)
            outputs = outputs.index_put((at,), self.decoder_norm(x))
        return [Prefix(outputs[begin[lengths >= d] + d - 1], (), d) for d in range(1, longest + 1)]

    def _decode(self, x: Tensor, caches: tuple[KeyValue, ...] | None, level: int) -> Prefix:
        x = (x + self.level_embedding[level]).unsqueeze(1)
        grown = []
        for number, layer in enumerate(self.decoder):
            x, cache = layer(x, cache=None if caches is None else caches[number])
            grown.append(cache)
        return Prefix(self.decoder_norm(x.squeeze(1)), tuple(grown), level)

    def root_logits(self, prefix: Prefix) -> Tensor:
        """Logits of the root's children; see the protocol."""
        return self._root_logits(prefix.output, self._root_tokens())

    def child_logits(self, prefix: Prefix, children: Children) -> Tensor:
        """Logits of legal continuations; see the protocol."""
        return self._logits(prefix.output, prefix.level, children)

    def _logits(self, output: Tensor, level: int, children: Children) -> Tensor:
        """(M,) float32 logits y_parent . w_token + b_token of children of decoder outputs y (R, D).

        Where the children are few beside all codes of the level, only theirs are computed.
        """
        begin, size = self.level_begins[level], self.level_sizes[level]
        if level == 0 and len(children.token) == len(output) * self.n_first_codes:
            return self._root_logits(output, children.token[: self.n_first_codes]).flatten()
        if DENSE_SHARE * len(children.token) > len(output) * size:
            weight, bias = self.head[begin : begin + size], self.head_bias[begin : begin + size]
            return F.linear(output, weight, bias)[children.parent, children.token].float()
        weight = F.embedding(children.token + begin, self.head)
        products = output[children.parent].float() * weight.float()
        return products.sum(dim=1) + self.head_bias[children.token + begin]

    def _root_tokens(self) -> Tensor:
        """(n,) int64 tokens of the root's children."""
        trie = self.space.trie
        return trie.token[1 : 1 + self.n_first_codes].long()  # nodes are numbered by depth

    def _root_logits(self, output: Tensor, tokens: Tensor) -> Tensor:
        """(R, n) float32 logits of the root's n tokens from decoder outputs (R, D)."""
        return F.linear(output, self.head[tokens], self.head_bias[tokens]).float()

    def next_item_loss(self, items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """Mean negative log-probability of targets; see the protocol."""
        states, _ = self.encode_all(items)
        if self.has_static_shapes:
            nats = -self._static_logprobs(states.flatten(0, 1), targets.flatten())
            return (nats * counted.flatten()).sum() / counted.sum().clamp(min=1)
        nats = -self.target_logprobs(states[counted], targets[counted]).sum(dim=1)
        # Where none is counted, or one item leaves no choice, there is a gradient too: 0.
        return (nats.mean() if len(nats) else nats.sum()) + states.sum() * 0.0

    def target_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities (P, L) in nats of the codes of items `targets` (P,) after encoder states (P, D).

        Each code is normalised over the codes that may follow its prefix, which is the distribution that decoding
        uses. Where a prefix leaves one item, the rest of its codes have probability 1 and are not decoded; places
        after a code sequence's end give 0 too.
        """
        codes = self.codes[targets]
        states = self.space.trie.walk(codes)
        needed = (~self.space.trie.is_decided(states[:, :-1])).sum(dim=1)
        logprobs = torch.zeros(codes.shape, device=hidden.device)
        for depth in sorted(set(needed.tolist())):
            rows = (needed == depth).nonzero()[:, 0]
            if depth:
                block = self._block_logprobs(hidden[rows], codes[rows, :depth], states[rows, : depth + 1])
                logprobs = logprobs.index_put((rows[:, None], torch.arange(depth, device=rows.device)), block)
        return logprobs

    def _static_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`target_logprobs` summed over the codes, (P,), in static shapes: every sequence is read to the end."""
        space, codes = self.space, self.codes[targets]
        x = self.dropout(self.prefix_codes(codes[:, :-1].clamp(min=0) + self.level_offsets[:-1]))
        x = torch.cat([hidden.unsqueeze(1), x], dim=1) + self.level_embedding[: codes.shape[1]]
        for layer in self.decoder:
            x, _ = layer(x)
        x = self.decoder_norm(x)
        first = self._root_logits(x[:, 0], self._root_tokens()).log_softmax(dim=-1)
        total = first.gather(1, (node_at(space, targets, 0) - 1)[:, None]).squeeze(1)
        for level in range(1, codes.shape[1]):
            states, wanted = node_at(space, targets, level - 1), node_at(space, targets, level)
            table = list_children(space.trie, states, self.widths[level])
            logits = self._logits(x[:, level], level, table.children).view_as(table.legal)
            going = wanted >= 0
            steps = logits.masked_fill(~table.legal & going[:, None], -torch.inf).log_softmax(dim=1)
            place = torch.where(going, wanted - table.first, 0)
            total = total + steps.gather(1, place[:, None]).squeeze(1) * going
        return total

    def _block_logprobs(self, hidden: Tensor, codes: Tensor, states: Tensor) -> Tensor:
        """Log-probabilities (P, n) of the first n codes (P, n), whose prefixes are states (P, n + 1)."""
        depth = codes.shape[1]
        x = self.dropout(self.prefix_codes(codes[:, :-1] + self.level_offsets[: depth - 1]))
        x = torch.cat([hidden.unsqueeze(1), x], dim=1) + self.level_embedding[:depth]
        for layer in self.decoder:
            x, _ = layer(x)
        x = self.decoder_norm(x)
        # All rows stand at the root first: its children are listed once, and one dense softmax serves.
        root = self.space.trie.children(states[:1, 0])
        first = self._root_logits(x[:, 0], root.token).log_softmax(dim=-1)
        columns = [first.gather(1, torch.searchsorted(root.token, codes[:, :1].contiguous())).squeeze(1)]
        for level in range(1, depth):
            children = self.space.trie.children(states[:, level])
            logits = self._logits(x[:, level], level, children)
            steps = group_log_softmax(logits, children.parent, len(states))
            columns.append(steps[children.node == states[children.parent, level + 1]])
        return torch.stack(columns, dim=1)
