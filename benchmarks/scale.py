"""Memory, floating-point operations and bytes moved, by formula, and the formulas checked against what runs here.

docs/scale.md states the formulas; this file computes them, checks each on sizes that fit this machine, and prints the
tables of that page for catalogues of 10^7 to 10^9 items and policies of 0.1 to 8 B weights. Checked, within 2 %:

- the trie: nodes and bytes of `build_trie` over random codes;
- weights of Qwen3's published shapes, counted on models without memory (the meta device);
- operations of a forward and a training step of a small Qwen3, counted by torch's FlopCounterMode;
- bytes of a key-value cache, of AdamW's state, and of the gradients that the ranks add up, as tensors hold them.

Limits of time are not checked: they hang on the machine, and the tables state what they assume of it.

    python benchmarks/scale.py --out scale.json            (needs pip install "sagerec[trl]" for the models)
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from trie import GB, describe_run, machine_line, show_limits, table

from sagerec.actions.semantic_ids.quantisers import separate
from sagerec.actions.trie import build_trie
from sagerec.errors import MissingExtraError
from sagerec.files import write_json

TOLERANCE = 0.02
NODE_BYTES = {"first_child": 4, "token": 2, "item": 4, "size": 4}
"""Of a node of the trie; tokens of 2^15 and more take 4."""
ADAMW_BYTES = 16
"""A weight in training: itself, its gradient and two moments, float32."""
PEAK_FLOPS, SHARE, LINK_BYTES = 989e12, 0.4, 50e9
"""Assumed of a GPU: dense bfloat16 operations a second (H100), the share reached, bytes a second of each link."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A causal language model of Qwen3's kind."""

    name: str
    """What it is called."""
    width: int
    """Of the residual stream, D."""
    layers: int
    """L."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Width of a head."""
    feed_forward: int
    """Width of the gated feed-forward layer."""
    vocabulary: int
    """V."""
    tied: bool = True
    """Whether the head is the embedding."""

    @property
    def layer_weights(self) -> int:
        """Matrices of a layer: queries and output, keys and values, and three of the feed-forward layer."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.width * self.feed_forward

    @property
    def weights(self) -> int:
        """All weights, norms too."""
        norms = self.layers * (2 * self.width + 2 * self.head_dim) + self.width
        return self.layers * self.layer_weights + norms + self.vocabulary * self.width * (1 if self.tied else 2)

    def forward_flops(self, tokens: int, length: int, logits: int) -> float:
        """Of `tokens` tokens in sequences of `length`, with `logits` rows over the vocabulary.

        2 a weight and token, and 4 x heads x head_dim x length a layer and token for attention, unmasked as kernels
        that skip nothing compute it (those that skip what is masked need half).
        """
        attention = 4 * self.heads * self.head_dim * length * self.layers
        return (
            tokens * (2.0 * self.layers * self.layer_weights + attention) + 2.0 * logits * self.width * self.vocabulary
        )

    def cache_bytes(self, tokens: int, bytes_each: int = 2) -> int:
        """Keys and values of tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_each * tokens


QWEN3 = (
    Shape("0.6B", 1024, 28, 16, 8, 128, 3072, 151_936),
    Shape("1.7B", 2048, 28, 16, 8, 128, 6144, 151_936),
    Shape("4B", 2560, 36, 32, 8, 128, 9728, 151_936),
    Shape("8B", 4096, 36, 32, 8, 128, 12_288, 151_936, tied=False),
)
PUBLISHED = {"0.6B": 0.596e9, "1.7B": 1.72e9, "4B": 4.02e9, "8B": 8.19e9}
"""Weights as counted on the meta device; the names round them."""
SMALL = Shape("0.1B", 768, 12, 12, 12, 64, 2048, 24_576)


def trie_nodes(items: int, codebook: int, levels: int) -> float:
    """Expected nodes over random codes: the root, the distinct prefixes of each level, and a leaf an item.

    Of C^l prefixes of l codes, C^l (1 - (1 - C^-l)^N) are met by N items.
    """
    prefixes = (float(codebook) ** level for level in range(1, levels))
    return 1 + items + sum(n * -math.expm1(items * math.log1p(-1 / n)) for n in prefixes)


def trie_bytes(items: int, codebook: int, levels: int) -> float:
    """Of the trie's arrays."""
    return trie_nodes(items, codebook, levels) * (sum(NODE_BYTES.values()) + (2 if codebook >= 2**15 else 0))


def space_bytes(items: int, levels: int) -> int:
    """Of each item's way through the trie: a node a code, its bounds, and where it is decided."""
    return items * (4 * levels + 8 + 4)


def scores_bytes(items: int, width: int) -> int:
    """Of the policy that scores every item, in training: an embedding an item, with AdamW."""
    return ADAMW_BYTES * items * width


def all_reduce_bytes(values: int, ranks: int, bytes_each: int = 4) -> float:
    """That each rank sends to add values up over a ring."""
    return 2 * (ranks - 1) / ranks * bytes_each * values


def sharded_bytes(weights: int, ranks: int, bytes_each: int = 2) -> float:
    """That each rank sends in a step of FSDP2: weights gathered twice, gradients (float32) scattered once."""
    return (ranks - 1) / ranks * weights * (2 * bytes_each + 4)


def checks(seed: int, *, quick: bool) -> list[dict[str, Any]]:
    """Formula and count, side by side."""
    found = []

    def compare(what: str, formula: float, counted: float) -> None:
        found.append({"what": what, "formula": float(formula), "counted": float(counted)})

    for items, codebook in ((20_000, 64), *(() if quick else ((300_000, 256), (1_000_000, 1024)))):
        rng = np.random.default_rng(seed)
        codes = separate(rng.integers(0, codebook, (items, 3)), np.arange(items))
        trie = build_trie(codes)
        prefixes = len(np.unique(codes[:, :3], axis=0))
        compare(f"trie, {items:,} items: nodes", trie_nodes(items, codebook, 4), trie.n_nodes)
        compare(
            f"trie, {items:,} items: prefixes of three codes",
            trie_nodes(items, codebook, 4) - trie_nodes(items, codebook, 3),
            prefixes,
        )
        compare(f"trie, {items:,} items: bytes", trie_bytes(items, codebook, 4), trie.n_bytes)
    for shape in QWEN3[:1] if quick else QWEN3:
        with torch.device("meta"):
            model = make_model(shape)
        counted = sum(p.numel() for p in model.parameters())
        compare(f"weights of Qwen3-{shape.name}", shape.weights, counted)
        compare(f"weights of Qwen3-{shape.name} as published", PUBLISHED[shape.name], counted)
    tiny = Shape("tiny", 64, 2, 4, 2, 16, 128, 256)
    model, ids = make_model(tiny), torch.arange(96).view(3, 32) % 256
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, use_cache=True)
    compare("operations forward", tiny.forward_flops(96, 32, 96), counter.get_total_flops())
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    compare("key-value cache, bytes", tiny.cache_bytes(96, 4), cache)
    optimizer = torch.optim.AdamW(model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    compare("operations of a training step", 3 * tiny.forward_flops(96, 32, 96), counter.get_total_flops())
    optimizer.step()
    held = [
        x for p in model.parameters() for x in (p, p.grad, *optimizer.state[p].values()) if x is not None and x.ndim
    ]
    compare("weights, gradients and moments, bytes", ADAMW_BYTES * tiny.weights, sum(x.nbytes for x in held))
    return found


def make_model(shape: Shape) -> Any:
    """The model of a shape. Raises: MissingExtraError without transformers."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError as error:
        raise MissingExtraError("this needs transformers; install it with: pip install 'sagerec[trl]'") from error
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    sizes = {"hidden_size": shape.width, "num_hidden_layers": shape.layers, "intermediate_size": shape.feed_forward}
    tokens = {"vocab_size": shape.vocabulary, "tie_word_embeddings": shape.tied}
    # Eager attention: the counter knows no fused kernel of the CPU.
    return Qwen3ForCausalLM(Qwen3Config(**heads, **sizes, **tokens, attn_implementation="eager"))


def catalogue_rows() -> list[dict[str, Any]]:
    """Memory of catalogues, three codes of 8,192 and one that separates."""
    return [
        {
            "items": items,
            "trie_gb": trie_bytes(items, 8192, 4) / GB,
            "ways_gb": space_bytes(items, 4) / GB,
            "scores_gb": scores_bytes(items, 128) / GB,
        }
        for items in (10**7, 10**8, 10**9)
    ]


def policy_rows(*, tokens: int = 2**20, length: int = 512, ranks: int = 8) -> list[dict[str, Any]]:
    """A training step of `tokens` tokens, on one GPU and on `ranks`."""
    rows = []
    for shape in (SMALL, *QWEN3):
        flops = 3 * shape.forward_flops(tokens, length, 0)
        rows.append(
            {
                "policy": shape.name,
                "weights": shape.weights,
                "state_gb": ADAMW_BYTES * shape.weights / GB,
                "state_gb_of_8": ADAMW_BYTES * shape.weights / ranks / GB,
                "step_petaflop": flops / 1e15,
                "step_seconds": flops / (PEAK_FLOPS * SHARE * ranks),
                "all_reduce_gb": all_reduce_bytes(shape.weights, ranks) / GB,
                "sharded_gb": sharded_bytes(shape.weights, ranks) / GB,
                "sharded_seconds": sharded_bytes(shape.weights, ranks) / LINK_BYTES,
                "cache_mb_a_context": shape.cache_bytes(length) / 1e6,
            }
        )
    return rows


@dataclass(frozen=True)
class ScaleSettings:
    """What is checked."""

    quick: bool = False
    """The smallest sizes, and no limit checked."""
    seed: int = 0
    """Of the codes of the tries."""
    out: Path | None = None
    """Write the results as JSON to this file too."""


def main() -> int:
    """Check, print, write."""
    settings = tyro.cli(ScaleSettings, description=__doc__)
    record = describe_run("scale", settings)
    found = checks(settings.seed, quick=settings.quick)
    worst = max(abs(row["formula"] / row["counted"] - 1) for row in found)
    limit = {"name": "largest difference of a formula", "measured": worst, "bound": "at most", "limit": TOLERANCE}
    limits = [] if settings.quick else [limit | {"ok": worst <= TOLERANCE}]
    record |= {"results": found, "catalogues": catalogue_rows(), "policies": policy_rows()}
    record |= {"limits": limits, "ok": all(limit["ok"] for limit in limits) if limits else None}
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 1 if record["ok"] is False else 0


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    console.print(machine_line(record))
    rows = table("Formula and count", ["what", "formula", "counted", "apart"])
    for row in record["results"]:
        apart = row["formula"] / row["counted"] - 1
        rows.add_row(row["what"], f"{row['formula']:,.0f}", f"{row['counted']:,.0f}", f"{apart:+.2%}")
    console.print(rows)
    for name in ("catalogues", "policies"):
        rows = table(name.capitalize(), list(record[name][0]))
        for row in record[name]:
            rows.add_row(
                *(f"{v:,.3g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in row.values())
            )
        console.print(rows)
    show_limits(console, record)


if __name__ == "__main__":
    sys.exit(main())
