"""Itemic tokens in text: what a generation names, what an answer asks for, and the key of an item.

The rules are those of the published evaluator, oddities included, for a figure is only comparable where they are: one
generation names one item, its first; text before the first begin tag hides the item behind it; an answer's item needs
its end tag and a generation's does not.
"""

import re
from collections.abc import Iterable, Sequence

BEGIN, END, THOUGHT_END = "<|sid_begin|>", "<|sid_end|>", "</think>"
LEVEL_SIZE = 8192
"""Codes a level."""
NO_KEY = -1
MOST_KEY = 2**63 - 1
_PLAIN = re.compile(
    r"(<\|sid_begin\|>)?(<s_a_([0-9]{1,6})><s_b_([0-9]{1,6})><s_c_([0-9]{1,6})>)(?(1)(?:<\|sid_end\|>)?)"
)
"""A generation of one item and nothing else."""
_CODES = re.compile(r"<s_a_(\d+)><s_b_(\d+)><s_c_(\d+)>")


def after_thought(generation: str) -> str:
    """The text behind the last `</think>`, or all of it, without space around."""
    return generation.strip().rpartition(THOUGHT_END)[2].strip()


def named_item(generation: str) -> str:
    """What a generation names: the first text between the tags that is not empty; without a begin tag, all of it."""
    text = after_thought(generation)
    if BEGIN in text:
        for part in text.split(BEGIN):
            if body := part.partition(END)[0].strip():
                return body
    return text


def asked_items(answer: str) -> list[str]:
    """The items of an answer, each once, in order: the texts between begin and end tags."""
    parts = (part.partition(END) for part in answer.split(BEGIN))
    return list(dict.fromkeys(body for text, end, _ in parts if end and (body := text.strip())))


def asked_ids(ids: Iterable[object]) -> list[object]:
    """The ids of an answer, each once, in order, without zeros."""
    return [value for value in dict.fromkeys(ids) if value != 0]


def make_key(a: int, b: int, c: int) -> int:
    """The number under which `sid2pid.json` has an item: a · 8192² + b · 8192 + c."""
    return (a * LEVEL_SIZE + b) * LEVEL_SIZE + c


def keys_in(text: str) -> list[int]:
    """The keys of all items that a text holds, in order; NO_KEY for codes beyond any item's."""
    keys = (make_key(int(a), int(b), int(c)) for a, b, c in _CODES.findall(text))
    return [key if key <= MOST_KEY else NO_KEY for key in keys]


def key_of(generation: str) -> int:
    """The key of the first item after a generation's thought; NO_KEY where there is none."""
    found = _CODES.search(after_thought(generation))
    if found is None:
        return NO_KEY
    key = make_key(*map(int, found.groups()))
    return key if key <= MOST_KEY else NO_KEY


def read_generation(generation: str) -> tuple[str, int]:
    """`named_item` and `key_of`, at once where the generation is one item and nothing else, as most are."""
    plain = _PLAIN.fullmatch(generation)
    if plain is None:
        return named_item(generation), key_of(generation)
    _, body, a, b, c = plain.groups()
    return body, (int(a) * LEVEL_SIZE + int(b)) * LEVEL_SIZE + int(c)


def itemic_text(codes: Sequence[int]) -> str:
    """`<|sid_begin|><s_a_340><s_b_6566><s_c_5603><|sid_end|>` of three codes."""
    a, b, c = codes
    return f"{BEGIN}<s_a_{a}><s_b_{b}><s_c_{c}>{END}"


def codes_of(key: int) -> tuple[int, int, int]:
    """The three codes of a key."""
    return key // LEVEL_SIZE**2, key // LEVEL_SIZE % LEVEL_SIZE, key % LEVEL_SIZE
