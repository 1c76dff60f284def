"""A small language model of one's own, for machines without a GPU or a hub: a tokenizer of the catalogue's words, and a
Qwen3 layout with random weights, saved as a Hugging Face folder.

Shapes: V vocabulary, D width, L layers.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sagerec.artifacts import write_artifact
from sagerec.config import at_least, between, check_fields, require, to_json
from sagerec.errors import MissingExtraError
from sagerec.policies.language import quiet

KIND = "language_model"
"""Of the artefact."""
END = "<|endoftext|>"
HEAD_WIDTH, PER_LAYER = 32, 11
"""Width of an attention head; weights of a layer over the width's square (attention 3, feed-forward 8)."""
LAYER_WIDTH = 48
"""Width that each further layer goes with."""
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True, slots=True)
class SmallLMSettings:
    """How large, and what it reads."""

    parameters: str = "5M"
    """Weights, about: 800K, 5M, 0.1B."""
    vocabulary: int = 4096
    """Tokens of the tokenizer (byte-level BPE), at most."""
    positions: int = 2048
    """Tokens that the model reads, at most."""
    seed: int = 0
    """Seed of the weights."""

    def __post_init__(self) -> None:
        check_fields(self, vocabulary=between(300, 10**6), positions=at_least(64, 10**6))
        require(self.count > 0, f"parameters is {self.parameters!r}; expected 10K to 10B, such as 5M")

    @property
    def count(self) -> int:
        """`parameters` as a number. Raises: SettingsError."""
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMB]?)", self.parameters.strip().upper())
        found = round(float(match[1]) * SUFFIXES[match[2]]) if match else 0
        require(10**4 <= found <= 10**10, f"parameters is {self.parameters!r}; expected 10K to 10B, such as 5M")
        return found


def shape_of(parameters: int, vocabulary: int) -> tuple[int, int]:
    """(D, L) with V D + 11 L D^2 nearest to the number of weights, with a layer for about 48 of the width."""

    def misfit(width: int, layers: int) -> float:
        return abs(math.log((vocabulary * width + PER_LAYER * layers * width**2) / parameters))

    widths = range(HEAD_WIDTH, 2**14, HEAD_WIDTH)
    options = {(width, max(2, round(width / LAYER_WIDTH) + more)) for width in widths for more in (-1, 0, 1)}
    return min(sorted(options), key=lambda option: misfit(*option))


def train_tokenizer(texts: Sequence[str], size: int) -> Any:
    """A byte-level BPE tokenizer of at most `size` tokens: every text can be written. Raises: MissingExtraError."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingExtraError('language models need transformers: pip install "sagerec[lm]"') from error
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=END, eos_token=END, pad_token=END)


def new_language_model(out: Path, texts: Sequence[str], settings: SmallLMSettings) -> dict[str, Any]:
    """Write a model for catalogue texts to `out`; returns its sizes. Raises: MissingExtraError; SettingsError."""
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    from transformers import AutoModelForCausalLM, Qwen3Config

    width, layers = shape_of(settings.count, len(tokenizer))
    heads = width // HEAD_WIDTH
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config)
    sizes = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "width": width,
        "layers": layers,
    }
    with write_artifact(out, KIND, settings=to_json(settings), seed=settings.seed, sizes=sizes) as fresh:
        with quiet():
            model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return sizes
