"""Transformer layers of the LazyDecoder, and the dropout that SASRec shares with it.

Shapes: B sequences, T positions, S cached positions, D width, H heads, E width of a head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sagerec.config import Bounds, between, check_fields, require

KeyValue = tuple[Tensor, Tensor]
ROTARY_BASE = 1000.0


def check_shape(settings: Any, **bounds: Bounds) -> None:
    """Check the fields of a model's shape (width, heads, dropout, max_items; others by `bounds`).

    Raises: SettingsError.
    """
    check_fields(
        settings,
        width=between(1, 16_384),
        heads=between(1, 1024),
        dropout=between(0, 1, below=True),
        max_items=between(1, 100_000),
        **bounds,
    )
    width, heads = settings.width, settings.heads
    require(width % (2 * heads) == 0, f"width is {width}; expected a multiple of twice the {heads} heads")


class FastDropout(nn.Module):
    """Dropout whose mask costs one random byte a value: eight times fewer draws than `nn.Dropout` on a CPU.

    The rate is rounded to 1/256, and the kept values are scaled by the rate that was really used.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.threshold = round(rate * 256)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.threshold == 0:
            return x
        if torch.compiler.is_compiling():  # a compiler draws in the kernel that multiplies
            return x * ((torch.rand_like(x) >= self.threshold / 256).to(x.dtype) * (256 / (256 - self.threshold)))
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        bytes_ = words.random_(-(2**63), 2**63 - 1).view(torch.uint8)[: x.numel()].view(x.shape)
        return x * ((bytes_ >= self.threshold).to(x.dtype) * (256 / (256 - self.threshold)))


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of x (B, H, T, E) at positions (B or 1, T)."""
    half = x.shape[-1] // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Layer(nn.Module):
    """Pre-norm self-attention and feed-forward, each added to what came in."""

    def __init__(self, *, width: int, heads: int, expansion: int, dropout: float) -> None:
        super().__init__()
        inner = expansion * width
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, inner)
        self.feed_forward_out = nn.Linear(inner, width)
        self.dropout = FastDropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KeyValue | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Attend from x (B, T, D) to `cache` and x itself.

        `positions` (B or 1, T) rotates queries and keys. `mask` (B, 1, T, S + T) bool names what each position sees;
        without it, all of the cache where there is one, else itself and those before. Returns the output and the
        grown cache.
        """
        batch, length, width = x.shape
        qkv = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if positions is not None:
            query, key = rotate(query, positions), rotate(key, positions)
        if cache is not None:
            key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
        if length == 1 and mask is None:  # one position of few keys: a plain product beats a kernel that tiles them
            attended = (query @ key.transpose(2, 3) / math.sqrt(key.shape[-1])).softmax(dim=-1) @ value
        else:
            causal = cache is None and mask is None
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        merged = attended.transpose(1, 2).reshape(batch, length, width)
        x = x + self.dropout(self.attention_output(merged))
        inner = self.dropout(F.gelu(self.feed_forward_in(self.norm_feed_forward(x))))
        return x + self.dropout(self.feed_forward_out(inner)), (key, value)


class SimilarityLayer(nn.Module):
    """Self-attention from normalised to plain input, and feed-forward, each added to the normalised input.

    SASRec's layer (h = n(x) + attend(n(x), x), then n'(h) + feed_forward(n'(h))), with rotary positions, so that what
    is read can be kept, in place of an embedding of the place. Its call is that of `Layer`.
    """

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.attention_output = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, width)
        self.feed_forward_out = nn.Linear(width, width)
        self.dropout = FastDropout(dropout)

    def forward(
        self, x: Tensor, *, positions: Tensor, cache: KeyValue | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        """See `Layer`; `positions` are needed."""
        batch, length, width = x.shape
        normed = self.norm_attention(x)
        query = self.query(normed).view(batch, length, self.heads, -1).transpose(1, 2)
        key, value = self.key_value(x).view(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = rotate(query, positions) / math.sqrt(query.shape[-1]), rotate(key, positions)
        if cache is not None:
            key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
        scores = query @ key.transpose(2, 3)
        if mask is None and cache is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        attended = (self.dropout(scores.softmax(dim=-1)) @ value).transpose(1, 2).reshape(batch, length, width)
        h = self.norm_feed_forward(normed + self.attention_output(attended))
        inner = self.dropout(F.relu(self.feed_forward_in(h)))
        return h + self.dropout(self.feed_forward_out(inner)), (key, value)
