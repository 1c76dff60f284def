"""Transformer layers of the LazyDecoder, and the dropout that SASRec shares with it.

Shapes: B sequences, T positions, S cached positions, D width, H heads, E width of a head.
"""

from collections.abc import Iterable, Sequence
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
        causal = cache is None and mask is None
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        merged = attended.transpose(1, 2).reshape(batch, length, width)
        x = x + self.dropout(self.attention_output(merged))
        inner = self.dropout(F.gelu(self.feed_forward_in(self.norm_feed_forward(x))))
        return x + self.dropout(self.feed_forward_out(inner)), (key, value)


def run_layers(
    layers: Iterable[nn.Module],
    x: Tensor,
    positions: Tensor,
    caches: Sequence[KeyValue] = (),
    mask: Tensor | None = None,
) -> tuple[Tensor, tuple[KeyValue, ...]]:
    """Send x (B, T, D) through layers, each with its own of `caches` where there are any; returns the grown too."""
    grown = []
    for number, layer in enumerate(layers):
        x, cache = layer(x, positions=positions, cache=caches[number] if caches else None, mask=mask)
        grown.append(cache)
    return x, tuple(grown)
