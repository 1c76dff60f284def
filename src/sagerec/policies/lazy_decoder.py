"""The LazyDecoder: a causal encoder over items, and a shallow decoder over the codes of the next one.

After OneRec-V2 (arXiv 2508.20900): the history costs one position an item, not one a code, and only the next item's
few codes pass through the decoder, which is what makes a CPU enough. Departures from it: the decoder reads the
encoder's last state as its first position instead of attending to all of the history; an item enters as the sum
of its code embeddings and a linear map of its content vector (the vector that was quantised), so that what the
codes round off is not lost; and the scores of a second expert over whole items stand beside the code logits
(`item_scores`), in one distribution.

Shapes: B users, G slates of each, T history items, S cached positions, P targets, R prefixes, L codes per item, C codes
of a level, D width (of an encoder state: of both experts together), H heads, N items.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sagerec.actions.groups import group_log_softmax
from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import PADDING, ROOT, Children
from sagerec.config import at_least, between, require
from sagerec.policies.cooccurrence import Prior
from sagerec.policies.item_scores import ItemScores, Scorer
from sagerec.policies.layers import FastDropout, KeyValue, Layer, check_shape, run_layers
from sagerec.policies.protocol import Policy

CODE_ROWS = ("item_codes.weight", "prefix_codes.weight", "head", "head_bias")
"""Weights with a row a code, level after level."""
SCORED_ROWS = "item_scores.items.weight"
ITEM_ROWS = {"item_embedding.weight", SCORED_ROWS}
"""Weights with a row an item; the second are scored."""
DENSE_SHARE = 16
"""Above one child in this many codes of a level, a matrix product over all codes is faster than a gather."""


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
    """Add a linear map of the item's content vector to its code embeddings, and another where items are scored."""
    item_embedding: bool = False
    """Add an embedding of the item's own to its code embeddings."""
    item_scores: bool = True
    """Add scores of whole items, from an encoder of their own, to the code logits."""
    item_width: int = 64
    """Width of the item scores' encoder."""
    item_layers: int = 1
    """Its causal layers."""
    item_heads: int = 2
    """Its attention heads."""
    item_dropout: float = 0.2
    """Dropout in it, and on the item embeddings where they are scored."""
    cooccurrence: bool = True
    """Add to the item scores what the users of the items before took too, from the counts of the space."""
    expert_weight: float = 0.5
    """In training, weight of each expert's own next-item loss beside that of both together, whose weight is 1."""

    def __post_init__(self) -> None:
        layers = at_least(1, 128)
        check_shape(
            self,
            **dict.fromkeys(("encoder_layers", "decoder_layers", "item_layers"), layers),
            expansion=at_least(1, 64),
            item_width=between(1, 16_384),
            item_heads=between(1, 1024),
            item_dropout=between(0, 1, below=True),
            expert_weight=at_least(0),
        )
        width, heads = self.item_width, self.item_heads
        require(width % (2 * heads) == 0, f"item_width is {width}; expected a multiple of twice the {heads} item_heads")


class Context(NamedTuple):
    """What the encoder knows of B users, with G slates of each written so far."""

    hidden: Tensor
    """(B, G, D) state that the next item is decoded from."""
    items: Tensor
    """(B, S) int64 items at the cached positions."""
    caches: tuple[KeyValue, ...]
    """Per layer of the encoders, keys and values (B, H, S, D/H): the history, then the slates' items."""
    visible: Tensor
    """(B, G, S) bool: the positions that each state has read, of the history or of the slate itself."""
    positions: Tensor
    """(B,) int64 place of the next item in the sequence."""


class States(NamedTuple):
    """R states that an item is decoded from."""

    hidden: Tensor
    """(R, D) encoder states."""
    prior: Prior | None
    """Co-occurrence prior of each, where the policy has one."""

    def of_rows(self, rows: Tensor) -> "States":
        """Some of them."""
        return States(self.hidden[rows], None if self.prior is None else self.prior.of_rows(rows))


class Prefix(NamedTuple):
    """R partly written items, all of the same number of codes."""

    output: Tensor
    """(R, D) decoder output at the last position."""
    caches: tuple[KeyValue, ...]
    """Per decoder layer, keys and values (R, H, level + 1, D/H)."""
    level: int
    """Codes written so far."""
    scorer: Scorer | None
    """The item scores of the R states, where the policy has some."""


class LazyDecoder(Policy[Context, Prefix]):
    """The policy. Calls: see `sagerec.policies.protocol.Policy`."""

    codes: Tensor
    content: Tensor
    level_offsets: Tensor

    def __init__(self, settings: LazyDecoderSettings, space: ActionSpace) -> None:
        super().__init__()
        require(
            not settings.content or space.vectors is not None,
            "the policy's setting content is on, and the items have no vectors; switch content off",
        )
        require(
            not (settings.item_scores and settings.cooccurrence) or space.neighbours is not None,
            "the policy's setting cooccurrence is on, and the items have no neighbours; switch cooccurrence off, or "
            "make the Semantic IDs again with neighbours above 0",
        )
        self.settings, self.space, self.max_items = settings, space, settings.max_items
        codes = space.padded()
        width = settings.width
        sizes = [int(size) for size in codes.max(dim=0).values + 1]
        self.level_sizes = sizes
        self.n_first_codes = len(space.trie.children(torch.tensor([ROOT], device=codes.device)).token)
        self.register_buffer("codes", codes, persistent=False)
        offsets = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        self.register_buffer("level_offsets", offsets, persistent=False)
        self.item_codes = nn.Embedding(sum(sizes), width)
        self.prefix_codes = nn.Embedding(sum(sizes), width)
        self.level_embedding = nn.Parameter(torch.empty(len(sizes), width))
        self.head = nn.Parameter(torch.empty(sum(sizes), width))
        self.head_bias = nn.Parameter(torch.zeros(sum(sizes)))
        for weight in (
            self.item_codes.weight,
            self.prefix_codes.weight,
            self.level_embedding,
            self.head,
        ):
            nn.init.normal_(weight, std=0.02)
        if settings.content:
            assert space.vectors is not None
            self.register_buffer("content", torch.from_numpy(space.vectors), persistent=False)
            self.content_map = nn.Linear(space.vectors.shape[1], width)
        if settings.item_embedding:
            self.item_embedding = nn.Embedding(len(codes), width)
            nn.init.normal_(self.item_embedding.weight, std=0.02)
        shape: dict[str, Any] = {name: getattr(settings, name) for name in ("width", "heads", "expansion", "dropout")}
        self.encoder = nn.ModuleList(Layer(**shape) for _ in range(settings.encoder_layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(Layer(**shape) for _ in range(settings.decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.dropout = FastDropout(settings.dropout)
        if settings.item_scores:
            self.item_scores = ItemScores(
                space,
                width=settings.item_width,
                heads=settings.item_heads,
                layers=settings.item_layers,
                dropout=settings.item_dropout,
                content=settings.content,
                cooccurrence=settings.cooccurrence,
            )

    def layers(self) -> Iterable[nn.Module]:
        """The encoders' and the decoder's."""
        return [*self.encoder, *self.decoder, *(self.item_scores.layers if self.settings.item_scores else ())]

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take trained weights, grown to the codes of today."""
        self.load_state_dict(grow_weights(weights, self))

    def embed_items(self, items: Tensor) -> Tensor:
        """Embeddings (…, D) of item indices (…)."""
        codes = self.codes[items]
        known = (codes != PADDING).unsqueeze(-1)
        x = (self.item_codes(codes.clamp(min=0) + self.level_offsets) * known).sum(dim=-2)
        if self.settings.content:
            x = x + self.content_map(self.content[items])
        if self.settings.item_embedding:
            x = x + self.item_embedding(items)
        embedded: Tensor = self.dropout(x)
        return embedded

    def encode_all(self, items: Tensor) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """Encoder states (B, T, D) after each item of sequences (B, T), and the caches of each layer."""
        return self._encode(items, torch.arange(items.shape[1], device=items.device)[None])

    def _encode(
        self, items: Tensor, positions: Tensor, caches: tuple[KeyValue, ...] = (), mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """States (B, T, D) of both experts after items (B, T) at positions (B or 1, T) that see `caches` by `mask`."""
        n = len(self.encoder)
        x, grown = run_layers(self.encoder, self.embed_items(items), positions, caches[:n], mask)
        states = self.encoder_norm(x)
        if self.settings.item_scores:
            scores = self.item_scores
            x, more = run_layers(scores.layers, scores.embed(items), positions, caches[n:], mask)
            states, grown = torch.cat([states, scores.norm(x)], dim=-1), grown + more
        return states, grown

    def encode(self, items: Tensor, lengths: Tensor, *, slates: int = 1) -> Context:
        """Read histories; see the protocol."""
        assert bool((lengths >= 1).all()), "every history needs an item"
        states, caches = self.encode_all(items)
        at = torch.arange(len(items), device=items.device)
        visible = torch.arange(items.shape[1], device=items.device) < lengths[:, None]
        hidden = states[at, lengths - 1].unsqueeze(1)
        visible = visible.unsqueeze(1).expand(-1, slates, -1)
        return Context(hidden.expand(-1, slates, -1), items, caches, visible, lengths)

    def append(self, context: Context, items: Tensor) -> Context:
        """Write one item to each slate; see the protocol."""
        batch, slates = items.shape
        own = torch.eye(slates, dtype=torch.bool, device=items.device).expand(batch, -1, -1)
        visible = torch.cat([context.visible, own], dim=2)
        positions = context.positions[:, None].expand(-1, slates)
        hidden, caches = self._encode(items, positions, context.caches, visible.unsqueeze(1))
        return Context(hidden, torch.cat([context.items, items], dim=1), caches, visible, context.positions + 1)

    def extend(self, context: Context, slates: Tensor) -> Context:
        """Read whole slates at once; see the protocol. Their items are columns that a mask keeps to their slate."""
        batch, n_slates, places = slates.shape
        order = torch.arange(n_slates * places, device=slates.device)
        own = (order[:, None] // places == order // places) & (order[:, None] >= order)
        seen = context.visible[:, :1].expand(-1, len(order), -1)
        visible = torch.cat([seen, own.expand(batch, -1, -1)], dim=2)
        positions = context.positions[:, None] + order % places
        items = slates.flatten(1)
        states, _ = self._encode(items, positions, context.caches, visible.unsqueeze(1))
        none = own.new_zeros(batch, 1, len(order))
        return Context(
            torch.cat([context.hidden[:, :1], states], dim=1),
            torch.cat([context.items, items], dim=1),
            context.caches,
            torch.cat([torch.cat([context.visible[:, :1], none], dim=2), visible], dim=1),
            context.positions,
        )

    def states(self, context: Context) -> States:
        """What the next items are decoded from: B * G rows."""
        prior = self.item_scores.prior(context.items, context.visible) if self.settings.item_scores else None
        return States(context.hidden.flatten(0, 1), prior)

    def begin(self, context: Context) -> Prefix:
        """The empty prefix of every state; see the protocol."""
        hidden, scorer = self._split(self.states(context))
        return self._decode(hidden, None, 0, scorer)

    def _split(self, states: States) -> tuple[Tensor, Scorer | None]:
        """What the decoder starts from, and the item scores, of R states."""
        if not self.settings.item_scores:
            return states.hidden, None
        width = self.settings.width
        return states.hidden[:, :width], self.item_scores.begin(states.hidden[:, width:], states.prior)

    def step(self, prefix: Prefix, rows: Tensor, tokens: Tensor) -> Prefix:
        """Longer prefixes; see the protocol."""
        x = self.prefix_codes(tokens + self.level_offsets[prefix.level])
        caches = tuple((key[rows], value[rows]) for key, value in prefix.caches)
        scorer = None if prefix.scorer is None else prefix.scorer.of_rows(rows)
        return self._decode(x, caches, prefix.level + 1, scorer)

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
        prefixes = []
        for depth in range(1, longest + 1):
            going = lengths >= depth
            scorer = None if prefix.scorer is None else prefix.scorer.of_rows(rows[going])
            prefixes.append(Prefix(outputs[begin[going] + depth - 1], (), depth, scorer))
        return prefixes

    def _decode(self, x: Tensor, caches: tuple[KeyValue, ...] | None, level: int, scorer: Scorer | None) -> Prefix:
        x = (x + self.level_embedding[level]).unsqueeze(1)
        grown = []
        for number, layer in enumerate(self.decoder):
            x, cache = layer(x, cache=None if caches is None else caches[number])
            grown.append(cache)
        return Prefix(self.decoder_norm(x.squeeze(1)), tuple(grown), level, scorer)

    def root_logits(self, prefix: Prefix) -> Tensor:
        """Logits of the root's children; see the protocol."""
        logits = self._root_code_logits(prefix.output, self._root_tokens())
        return logits if prefix.scorer is None else logits + self.item_scores.at_root(prefix.scorer)

    def child_logits(self, prefix: Prefix, children: Children) -> Tensor:
        """Logits of legal continuations; see the protocol."""
        if prefix.level == 0 and len(children.token) == len(prefix.output) * self.n_first_codes:
            return self.root_logits(prefix).flatten()
        logits = self._code_logits(prefix.output, prefix.level, children)
        if prefix.scorer is None:
            return logits
        return logits + self.item_scores.under(prefix.scorer, children, self.space.trie)

    def _code_logits(self, output: Tensor, level: int, children: Children) -> Tensor:
        """(M,) float32 logits y_parent . w_token + b_token of children of decoder outputs y (R, D).

        Where the children are few beside all codes of the level, only theirs are computed.
        """
        begin, size = int(self.level_offsets[level]), self.level_sizes[level]
        if DENSE_SHARE * len(children.token) > len(output) * size:
            weight, bias = self.head[begin : begin + size], self.head_bias[begin : begin + size]
            return F.linear(output, weight, bias)[children.parent, children.token].float() * self._share
        weight = F.embedding(children.token + begin, self.head)
        products = output[children.parent].float() * weight.float()
        return (products.sum(dim=1) + self.head_bias[children.token + begin]) * self._share

    def _root_tokens(self) -> Tensor:
        return self.space.trie.children(torch.full((1,), ROOT, device=self.device)).token

    def _root_code_logits(self, output: Tensor, tokens: Tensor) -> Tensor:
        """(R, n) float32 code logits of the root's n tokens from decoder outputs (R, D)."""
        return F.linear(output, self.head[tokens], self.head_bias[tokens]).float() * self._share

    def next_item_loss(self, items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """Mean negative log-probability of targets; see the protocol.

        In training, the weighted mean of it (weight 1) and of what each expert alone gives (`expert_weight` each), so
        that neither leaves to the other what it could have learnt.
        """
        return self._loss(items, targets, counted, own=None)

    def training_loss(self, items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """The same for sequences that the space has counted, without what each added; see the protocol."""
        own = torch.cat([items, targets], dim=1).masked_fill(~counted.repeat(1, 2), -1)
        return self._loss(items, targets, counted, own=own)

    def _loss(self, items: Tensor, targets: Tensor, counted: Tensor, *, own: Tensor | None) -> Tensor:
        """`next_item_loss`; `own` (B, X) are items whose counts leave out what their sequence added."""
        hidden, _ = self.encode_all(items)
        prior = None
        if self.settings.item_scores:
            # As many states a sequence as the most that count, those that do first.
            some = counted.sum(dim=1)
            places = counted.int().argsort(dim=1, descending=True, stable=True)[:, : int(some.max())]
            visible = torch.arange(items.shape[1], device=items.device) <= places.unsqueeze(2)
            kept = (torch.arange(places.shape[1], device=items.device) < some[:, None]).flatten()
            prior = self.item_scores.prior(items, visible & kept.view_as(places).unsqueeze(2), own)
            prior = None if prior is None else prior.of_rows(kept.nonzero()[:, 0])
        weight = self.settings.expert_weight if self.training and self.settings.item_scores else 0.0
        logprobs = self._logprobs(States(hidden[counted], prior), targets[counted], alone=weight > 0)
        together, *alone = logprobs.sum(dim=2).mean(dim=1)
        loss: Tensor = -sum(alone) / 2 if alone else -together
        return loss

    @property
    def _share(self) -> float:
        return 0.5 if self.settings.item_scores and not self.training else 1.0

    def target_logprobs(self, states: States, targets: Tensor) -> Tensor:
        """Log-probabilities (P, L) in nats of the codes of items `targets` (P,) after P states.

        Each code is normalised over the codes that may follow its prefix, which is the distribution that decoding
        uses. Where a prefix leaves one item, the rest of its codes have probability 1 and are not decoded; places
        after a code sequence's end give 0 too.
        """
        return self._logprobs(states, targets, alone=False)[0]

    def _logprobs(self, states: States, targets: Tensor, *, alone: bool) -> Tensor:
        """(1, P, L) `target_logprobs`; with `alone` (3, P, L), then those by the codes and by the item scores alone."""
        codes = self.codes[targets]
        nodes = self.space.trie.walk(codes)
        needed = (~self.space.trie.is_decided(nodes[:, :-1])).sum(dim=1)
        hidden, scorer = self._split(states)
        logprobs = torch.zeros(3 if alone else 1, *codes.shape, device=hidden.device)
        for depth in sorted(set(needed.tolist()) - {0}):
            rows = (needed == depth).nonzero()[:, 0]
            block = self._block_logprobs(
                hidden[rows],
                None if scorer is None else scorer.of_rows(rows),
                codes[rows, :depth],
                nodes[rows, : depth + 1],
                alone=alone,
            )
            logprobs = logprobs.index_copy(1, rows, F.pad(block, (0, codes.shape[1] - depth)))
        return logprobs

    def _block_logprobs(
        self, hidden: Tensor, scorer: Scorer | None, codes: Tensor, nodes: Tensor, *, alone: bool
    ) -> Tensor:
        """`_logprobs` (1 or 3, P, n) of the first n codes (P, n), whose prefixes are nodes (P, n + 1)."""
        depth, trie = codes.shape[1], self.space.trie
        x = self.dropout(self.prefix_codes(codes[:, :-1] + self.level_offsets[: depth - 1]))
        x = torch.cat([hidden.unsqueeze(1), x], dim=1) + self.level_embedding[:depth]
        for layer in self.decoder:
            x, _ = layer(x)
        x = self.decoder_norm(x)
        # All rows stand at the root first: its children are listed once, and one dense softmax serves.
        tokens = self._root_tokens()
        at = torch.searchsorted(tokens, codes[:, :1].contiguous())
        logits = self._root_code_logits(x[:, 0], tokens)
        sums = None if scorer is None else self.item_scores.at_root(scorer)
        experts = combine(logits, sums, alone=alone)
        columns = [torch.stack([one.log_softmax(dim=1).gather(1, at)[:, 0] for one in experts])]
        for level in range(1, depth):
            children = trie.children(nodes[:, level])
            taken = children.node == nodes[children.parent, level + 1]
            logits = self._code_logits(x[:, level], level, children)
            sums = None if scorer is None else self.item_scores.under(scorer, children, trie)
            experts = combine(logits, sums, alone=alone)
            columns.append(torch.stack([group_log_softmax(one, children.parent, len(nodes))[taken] for one in experts]))
        return torch.stack(columns, dim=2)


def combine(codes: Tensor, sums: Tensor | None, *, alone: bool) -> list[Tensor]:
    """Logits of both experts together, code logits + log-sum-exp of item scores; with `alone` of each by itself too."""
    if sums is None:
        return [codes]
    return [codes + sums, codes, sums] if alone else [codes + sums]


def grow_weights(weights: dict[str, Tensor], policy: LazyDecoder) -> dict[str, Tensor]:
    """Weights trained before items were added, grown to the catalogue of `policy`: new rows at the end of their arrays.

    Codes in use stay and only the last level gets more of them. A last code that no item had in training takes the
    row of the last one that some item had: both stand for the least popular of items that collide. An item of its own
    (`settings.item_embedding`) that was never trained gets zeros, and is scored as the mean of all items is.
    """
    grown = dict(weights)
    more_codes = sum(policy.level_sizes) - len(weights["head"])
    for name in CODE_ROWS:
        grown[name] = torch.cat([weights[name], weights[name][-1:].expand(more_codes, *weights[name].shape[1:])])
    for name in ITEM_ROWS & weights.keys():
        more_items = policy.space.n_items - len(weights[name])
        mean = weights[name].mean(dim=0, keepdim=True) * (name == SCORED_ROWS)
        grown[name] = torch.cat([weights[name], mean.expand(more_items, -1)])
    return grown
