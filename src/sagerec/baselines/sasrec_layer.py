"""The layer of SASRec as the PyTorch port of its authors' code has it, which is not the usual one.

It attends from its normalised input to its plain one, and adds what it reads to what it normalised. The empty places
before the first item are attended to like items, so that they take weight from those of a short history; the authors'
own code masks them.

Shapes: B users, T history items, D width.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sagerec.policies.layers import FastDropout


class SasRecLayer(nn.Module):
    """Causal self-attention and feed-forward: h = n(x) + attend(n(x), x), then n'(h) + feed_forward(n'(h))."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, width)
        self.feed_forward_out = nn.Linear(width, width)
        self.dropout = FastDropout(dropout)
        for bias in (self.query_key_value.bias, self.attention_output.bias):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """The layer's output for x (B, T, D); `padding` (B,) counts the empty places before the first item."""
        normed = self.norm_attention(x)
        h = normed + self.attention_output(self._attend(normed, x, padding))
        z = self.norm_feed_forward(h)
        inner = self.dropout(F.relu(self.feed_forward_in(z)))
        output: Tensor = z + self.dropout(self.feed_forward_out(inner))
        return output

    def _attend(self, normed: Tensor, x: Tensor, padding: Tensor) -> Tensor:
        """What each position (B, T, D) reads of itself, those before, and the empty places before all of them.

        An empty place is 0, so that its key and value are the biases: one more column of scores, plus the logarithm of
        how many there are, stands for all of them, and the values' bias, which every column has, is added to the sum.
        """
        batch, length, width = x.shape
        weight, bias = self.query_key_value.weight, self.query_key_value.bias

        def heads(y: Tensor) -> Tensor:
            return y.view(-1, y.shape[-2], self.heads, width // self.heads).transpose(1, 2)

        query = heads(F.linear(normed, weight[:width], bias[:width])) / math.sqrt(width // self.heads)
        key = heads(F.linear(x, weight[width : 2 * width], bias[width : 2 * width]))
        value = heads(F.linear(x, weight[2 * width :]))
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (query @ key.transpose(2, 3)).masked_fill(later, -torch.inf)
        empty = query @ heads(bias[None, width : 2 * width]).transpose(2, 3) + padding.log()[:, None, None, None]
        weights = torch.cat([scores, empty], dim=-1).softmax(dim=-1)[..., :-1]
        attended: Tensor = (self.dropout(weights) @ value).transpose(1, 2).reshape(batch, length, width)
        return attended + bias[2 * width :]
