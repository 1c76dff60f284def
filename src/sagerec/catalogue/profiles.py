"""Who a user is, in words that stand in a history before its items.

A word is a number below those of items and below -1, which is no item: FIRST_WORD - v is the entry v of the policy's
vocabulary. So a history says of itself whose it is, and goes whichever way histories go. Only policies that read
profiles are given any.

Shapes: B users, T items, W words of the longest profile.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

FIRST_WORD = -2
"""The number of a vocabulary's first entry."""


def as_words(tokens: Sequence[int]) -> list[int]:
    """Entries of a vocabulary as words."""
    return [FIRST_WORD - token for token in tokens]


def is_word(history: Tensor) -> Tensor:
    """Bool of the shape of `history`: a word stands there."""
    return history <= FIRST_WORD


def token_of(words: Tensor) -> Tensor:
    """Entries of the vocabulary that words stand for."""
    return FIRST_WORD - words


def after_words(
    words: Sequence[Sequence[int]], items: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Histories (B, W + T) and lengths (B,) of items (B, T), padded with 0 on the right, each after its words."""
    sizes = np.array([len(own) for own in words], dtype=np.int64)
    if not sizes.any():
        return items, lengths
    places = np.arange(int((sizes + lengths).max()))
    shifted = places - sizes[:, None]
    inside = (shifted >= 0) & (shifted < lengths[:, None])
    found = np.where(
        inside, np.take_along_axis(items, shifted.clip(0, items.shape[1] - 1), axis=1), items.dtype.type(0)
    )
    for row, own in zip(found, words, strict=True):
        row[: len(own)] = own
    return found, lengths + sizes


def first_item(history: Tensor) -> Tensor:
    """(B,) places at which the items of histories (B, T) begin."""
    return is_word(history).sum(dim=1)
