"""Tiny random language models of the layouts that people have, saved to a folder as Hugging Face does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LAYOUTS = ("qwen2", "qwen3", "llama", "gpt2", "gemma")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def bpe_tokenizer(texts: Sequence[str], size: int = 300) -> Any:
    """A byte-level BPE tokenizer of the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def config_of(layout: str, vocabulary: int, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    import transformers

    shape = SMALL | {"vocab_size": vocabulary} | changes
    if layout == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2
        )
    kinds = {
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "llama": transformers.LlamaConfig,
        "gemma": transformers.GemmaConfig,
        "gemma2": transformers.Gemma2Config,
        "mistral": transformers.MistralConfig,
    }
    return kinds[layout](**shape, initializer_range=0.2)


def save_model(folder: Path, layout: str, texts: Sequence[str], *, seed: int = 0, **changes: Any) -> Path:
    """A model of a layout with random weights, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    tokenizer = bpe_tokenizer(texts)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(layout, len(tokenizer), **changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
