"""The causal encoder over a history's items that the policies of Semantic IDs share.

One position an item, not one a code. The history is read once and its keys and values are kept, so that the slates
written after it share it.

Shapes: B users, G slates of each, K places, T history items, S cached positions, D width, H heads.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sagerec.actions.dense import level_widths, wants_static
from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import PADDING
from sagerec.config import require
from sagerec.policies.layers import KeyValue
from sagerec.policies.protocol import Policy, PrefixT

CODE_ROWS = ("item_codes.weight", "prefix_codes.weight", "head", "head_bias")
"""Weights with a row a code, level after level."""


class Context(NamedTuple):
    """What the encoder knows of B users, with G slates of each written so far."""

    hidden: Tensor
    """(B, G, D) state that the next item is decoded from."""
    caches: tuple[KeyValue, ...]
    """Per encoder layer, keys and values (B, H, S, D/H): the history, then the slates' items."""
    visible: Tensor
    """(B, G, S) bool: the cached positions that belong to the history or to the slate itself."""
    positions: Tensor
    """(B,) int64 place of the next item in the sequence."""


class HistoryEncoder(Policy[Context, PrefixT]):
    """The half of a policy that reads. Calls: see `sagerec.policies.protocol.Policy`."""

    slate_mark: nn.Parameter | None
    """(D,) what is added to an item that stands in the slate and was not taken, where the policy tells them apart."""
    encoder: nn.ModuleList
    """Layers with the call of `sagerec.policies.layers.Layer`."""
    encoder_norm: nn.LayerNorm

    codes: Tensor
    """(N, L) codes of each item, -1 after the last."""
    content: Tensor
    """(N, C) content vectors, where the policy reads them."""
    level_offsets: Tensor
    """(L,) first row of each level in what has a row a code."""
    level_sizes: list[int]
    """Codes of each level."""

    def embed_by(self, space: ActionSpace, width: int, *, content: bool, item_embedding: bool) -> None:
        """Make what `item_vectors` adds up. Raises: SettingsError for content where the items have no vectors."""
        require(
            not content or space.vectors is not None,
            "the policy's setting content is on, and the items have no vectors; switch content off",
        )
        codes = space.padded()
        self.widths = level_widths(space.trie)
        self.level_sizes = [int(size) for size in codes.max(dim=0).values + 1]
        self.register_buffer("codes", codes, persistent=False)
        offsets = torch.tensor([0, *self.level_sizes]).cumsum(0)[:-1]
        self.register_buffer("level_offsets", offsets, persistent=False)
        self.item_codes = nn.Embedding(sum(self.level_sizes), width)
        nn.init.normal_(self.item_codes.weight, std=0.02)
        self.content_map: nn.Linear | None = None
        if content:
            assert space.vectors is not None
            self.register_buffer("content", torch.from_numpy(space.vectors), persistent=False)
            self.content_map = nn.Linear(space.vectors.shape[1], width)
        self.item_embedding: nn.Embedding | None = None
        if item_embedding:
            self.item_embedding = nn.Embedding(len(codes), width)
            nn.init.normal_(self.item_embedding.weight, std=0.02)

    def item_vectors(self, items: Tensor) -> Tensor:
        """(…, D) the sum of what items (…) are known by: code embeddings, content, an embedding of their own."""
        codes = self.codes[items]
        known = (codes != PADDING).unsqueeze(-1)
        x: Tensor = (self.item_codes(codes.clamp(min=0) + self.level_offsets) * known).sum(dim=-2)
        if self.content_map is not None:
            x = x + self.content_map(self.content[items])
        return x if self.item_embedding is None else x + self.item_embedding(items)

    def embed_items(self, items: Tensor) -> Tensor:
        """Embeddings (…, D) of item indices (…) as the encoder reads them."""
        raise NotImplementedError

    def embed_slate(self, items: Tensor) -> Tensor:
        """Embeddings (…, D) of items (…) of a slate."""
        x = self.embed_items(items)
        return x if self.slate_mark is None else x + self.slate_mark

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take trained weights, grown to the catalogue of today."""
        self.load_state_dict(grow_weights(weights, self))

    def layers(self) -> Iterable[nn.Module]:
        """The encoder's."""
        return self.encoder

    def encode_all(self, items: Tensor) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """Encoder states (B, T, D) after each item of sequences (B, T), and the caches of each layer."""
        return self.encode_embedded(self.embed_items(items))

    def encode_embedded(self, x: Tensor) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """The same after embeddings (B, T, D)."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        caches = []
        for layer in self.encoder:
            x, cache = layer(x, positions=positions)
            caches.append(cache)
        return self.encoder_norm(x), tuple(caches)

    def encode(self, items: Tensor, lengths: Tensor, *, slates: int = 1) -> Context:
        """Read histories; see the protocol."""
        assert wants_static(self.device) or bool((lengths >= 1).all()), "every history needs an item"
        states, caches = self.encode_all(items)
        at = torch.arange(len(items), device=items.device)
        visible = torch.arange(items.shape[1], device=items.device) < lengths[:, None]
        hidden = states[at, lengths - 1].unsqueeze(1)
        return Context(hidden.expand(-1, slates, -1), caches, visible.unsqueeze(1).expand(-1, slates, -1), lengths)

    def of_users(self, context: Context, users: Tensor) -> Context:
        """The part of some users; see the protocol."""
        caches = tuple((key[users], value[users]) for key, value in context.caches)
        return Context(context.hidden[users], caches, context.visible[users], context.positions[users])

    def append(self, context: Context, items: Tensor) -> Context:
        """Write one item to each slate; see the protocol."""
        if not self.reads_slate:
            return context
        batch, slates = items.shape
        own = torch.eye(slates, dtype=torch.bool, device=items.device).expand(batch, -1, -1)
        visible = torch.cat([context.visible, own], dim=2)
        positions = context.positions[:, None].expand(-1, slates)
        x = self.embed_slate(items)
        caches = []
        for layer, cache in zip(self.encoder, context.caches, strict=True):
            x, grown = layer(x, positions=positions, cache=cache, mask=visible.unsqueeze(1))
            caches.append(grown)
        return Context(self.encoder_norm(x), tuple(caches), visible, context.positions + 1)

    def extend(self, context: Context, slates: Tensor) -> Context:
        """Read whole slates at once; see the protocol. Their items are columns that a mask keeps to their slate."""
        batch, n_slates, places = slates.shape
        if not self.reads_slate:
            return context._replace(hidden=context.hidden[:, :1].expand(-1, 1 + n_slates * places, -1))
        order = torch.arange(n_slates * places, device=slates.device)
        own = (order[:, None] // places == order // places) & (order[:, None] >= order)
        seen = context.visible[:, :1].expand(-1, len(order), -1)
        visible = torch.cat([seen, own.expand(batch, -1, -1)], dim=2)
        positions = context.positions[:, None] + order % places
        x = self.embed_slate(slates.flatten(1))
        for layer, cache in zip(self.encoder, context.caches, strict=True):
            x, _ = layer(x, positions=positions, cache=cache, mask=visible.unsqueeze(1))
        hidden = torch.cat([context.hidden[:, :1], self.encoder_norm(x)], dim=1)
        return Context(hidden, context.caches, visible, context.positions)


def grow_weights(weights: dict[str, Tensor], policy: HistoryEncoder[Any]) -> dict[str, Tensor]:
    """Weights trained before items were added, grown to the catalogue of `policy`: new rows at the end of their arrays.

    Codes in use stay and only the last level gets more of them. A last code that no item had in training takes the
    row of the last one that some item had: both stand for the least popular of items that collide. An item's own row
    that was never trained is zeros. New items count as often taken as any: they are unknown, and not rare.
    """
    grown = dict(weights)
    more_codes = sum(policy.level_sizes) - len(weights["item_codes.weight"])
    for name in weights.keys() & set(CODE_ROWS):
        grown[name] = torch.cat([weights[name], weights[name][-1:].expand(more_codes, *weights[name].shape[1:])])
    if (name := "item_embedding.weight") in weights:
        more_items = policy.space.n_items - len(weights[name])
        grown[name] = torch.cat([weights[name], weights[name].new_zeros(more_items, weights[name].shape[1])])
    if (name := "popularity") in weights:
        more_items = policy.space.n_items - len(weights[name])
        grown[name] = torch.cat([weights[name], weights[name].max().expand(more_items)])
    return grown
