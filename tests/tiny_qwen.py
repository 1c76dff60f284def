"""A tiny Qwen3 over a small catalogue, for the tests of engines: its tokenizer, and itself as a policy of ours.

Eight items of two tokens or three; ids 0 and 1 are padding and end, 2 to 6 first tokens, 10 to 13 second ones, 20 to 22
third ones. Item 7 is alone under its first token, so that its second is forced.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sagerec.actions.space import ActionSpace, make_space
from sagerec.actions.trie import Children
from sagerec.policies.protocol import Policy

END, VOCABULARY = 1, 24
SEQUENCES = [[2, 10], [2, 11], [3, 10], [3, 12], [4, 13, 20], [4, 13, 21], [4, 12], [5, 11]]
SPACE = make_space(np.array([s + [-1] * (3 - len(s)) for s in SEQUENCES]))


def make_model(seed: int = 0, **changed: Any) -> Any:
    """Two layers of width 32, weights wide enough that logits differ."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    tokens = {"vocab_size": VOCABULARY, "eos_token_id": END, "pad_token_id": 0, "tie_word_embeddings": True}
    return Qwen3ForCausalLM(Qwen3Config(**(tokens | shape | heads | changed)))


def make_tokenizer() -> Any:
    """Words `w2` … `w23`, one a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": END} | {f"w{i}": i for i in range(2, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", padding_side="left")


class Prefix(NamedTuple):
    """Rows of token ids (R, T), padded on the left, and which stand (R, T)."""

    ids: Tensor
    seen: Tensor


class TinyPolicy(Policy[Prefix, Prefix]):
    """The model as a policy over single items, without a cache: each prefix is read from its beginning."""

    def __init__(self, model: Any, space: ActionSpace = SPACE) -> None:
        super().__init__()
        self.model, self.space, self.max_items = model, space, 10

    def encode(self, items: Tensor, lengths: Tensor, *, slates: int = 1) -> Prefix:
        rows = [
            [token for item in row[:n].tolist() for token in self.space.sequence(item)]
            for row, n in zip(items, lengths, strict=True)
        ]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return Prefix(ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]))

    def begin(self, context: Prefix) -> Prefix:
        return context

    def step(self, prefix: Prefix, rows: Tensor, tokens: Tensor) -> Prefix:
        seen = prefix.seen[rows]
        return Prefix(
            torch.cat([prefix.ids[rows], tokens[:, None]], dim=1),
            torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1),
        )

    def follow(self, prefix: Prefix, rows: Tensor, tokens: Tensor, lengths: Tensor) -> list[Prefix]:
        begins, found, grown = lengths.cumsum(0) - lengths, [], (prefix, rows)
        alive = torch.arange(len(rows))
        for depth in range(int(lengths.max())):
            kept = lengths[alive] > depth
            alive = alive[kept]
            found.append(self.step(grown[0], grown[1][kept], tokens[begins[alive] + depth]))
            grown = (found[-1], torch.arange(len(alive)))
        return found

    def logits(self, prefix: Prefix) -> Tensor:
        """(R, V) after the last token."""
        logits: Tensor = self.model(input_ids=prefix.ids, attention_mask=prefix.seen).logits[:, -1]
        return logits

    def root_logits(self, prefix: Prefix) -> Tensor:
        return self.logits(prefix)[:, self.space.trie.children(torch.zeros(1, dtype=torch.int64)).token]

    def child_logits(self, prefix: Prefix, children: Children) -> Tensor:
        return self.logits(prefix)[children.parent, children.token]
