"""Prompts of the benchmark for a causal language model, and its published decoding, over any `generate`.

The messages are taken as they are. Published models are of the Qwen3 family with a soft switch: the last user message
ends with /no_think or /think, and without thought the answer begins behind an empty one. Where a tokenizer has a chat
template of its own, its `apply_chat_template` takes the place of `chat_prompt`.

No constraint to existing items is set: 32 beams of 3 tokens behind `<|sid_begin|>`. With thought, a thought is sampled
first and closed, and the beams follow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sagerec.recif.items import BEGIN, THOUGHT_END

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Decoding:
    """What a generator is asked for."""

    beams: int | None
    """Width of the beam search, all of whose sequences are returned, best first; None samples one sequence."""
    new_tokens: int
    """At most so many."""
    stop: str | None = None
    """Text that ends a sequence, and is not part of it."""


BEAMS = Decoding(beams=32, new_tokens=3)
THOUGHT = Decoding(beams=None, new_tokens=1000, stop=THOUGHT_END)
Generate = Callable[[list[str], Decoding], list[list[str]]]
"""Prompts and what is asked for -> the continuations of each, without the prompt."""
Render = Callable[[Messages, bool], str]
"""Messages and whether to think -> the prompt."""


def chat_prompt(messages: Messages, think: bool) -> str:
    """The prompt up to the assistant's turn, as the published models read it."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    switch = "/think" if think else "/no_think"
    turns = (
        f"<|im_start|>{message['role']}\n{message['content']}{switch if i == last else ''}<|im_end|>\n"
        for i, message in enumerate(messages)
    )
    return "".join(turns) + "<|im_start|>assistant\n" + ("" if think else f"<think>\n\n{THOUGHT_END}\n\n")


def unconstrained(
    rows: Sequence[Messages], generate: Generate, *, think: bool = False, render: Render = chat_prompt
) -> list[list[str]]:
    """The generations of each row, best first, as `Prediction.predictions` holds them."""
    prompts = [render(messages, think) for messages in rows]
    openings = [BEGIN] * len(prompts)
    if think:
        thoughts = generate(prompts, THOUGHT)
        openings = [f"{thought}{THOUGHT_END}\n{BEGIN}" for (thought,) in thoughts]
    found = generate([prompt + opening for prompt, opening in zip(prompts, openings, strict=True)], BEAMS)
    return [[opening + text for text in texts] for opening, texts in zip(openings, found, strict=True)]
