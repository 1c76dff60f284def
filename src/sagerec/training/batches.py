"""Training batches: windows of the sequences, grouped by length so that little is padded.

Shapes: W windows, B windows of a batch, T items of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sagerec.catalogue.profiles import after_words
from sagerec.catalogue.splits import Sequences
from sagerec.errors import TrainingError
from sagerec.policies.protocol import AnyPolicy


@dataclass(frozen=True, slots=True)
class Windows:
    """Runs of consecutive items of one user; every item but the first of a sequence is a target once."""

    items: np.ndarray
    """(E',) int32 items of all sequences."""
    begins: np.ndarray
    """(W,) int64 first input of each window."""
    lengths: np.ndarray
    """(W,) int64 number of inputs, which is the number of targets."""
    words: Sequence[Sequence[int]] = ()
    """Of each window what stands before its items, of whom they are (`catalogue.profiles`); () where nothing does."""

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def n_targets(self) -> int:
        return int(self.lengths.sum())

    def batch(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs (B, T) and targets (B, T) int64, padded with 0, and which places count (B, T) bool."""
        length = self.lengths[index]
        places = np.arange(int(length.max()))
        counted = places < length[:, None]
        at = np.where(counted, self.begins[index][:, None] + places, 0)
        inputs = np.where(counted, self.items[at], 0).astype(np.int64)
        targets = np.where(counted, self.items[np.where(counted, at + 1, 0)], 0).astype(np.int64)
        if not self.words:
            return inputs, targets, counted
        words = [self.words[window] for window in index]
        blank = [[0] * len(own) for own in words]
        given, _ = after_words(words, inputs, length)
        return given, after_words(blank, targets, length)[0], after_words(blank, counted, length)[0]


ROUNDED = 8
"""On a GPU lengths are multiples of this, so that few shapes occur: each has its own plans, and its own graph."""


def on_device(device: torch.device, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Arrays as tensors on a device; a GPU takes them from pinned memory while the host goes on."""
    tensors = tuple(torch.from_numpy(x) for x in arrays)
    if device.type != "cuda":
        return tuple(x.to(device) for x in tensors)
    return tuple(x.pin_memory().to(device, non_blocking=True) for x in tensors)


def device_batch(windows: Windows, index: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
    """`Windows.batch` on a device, on a GPU with T rounded up."""
    arrays: tuple[np.ndarray, ...] = windows.batch(index)
    if device.type != "cpu":
        missing = -arrays[0].shape[1] % ROUNDED
        arrays = tuple(np.pad(x, ((0, 0), (0, missing))) for x in arrays)
    return on_device(device, *arrays)


def make_windows(sequences: Sequences, max_items: int) -> Windows:
    """Cut sequences into windows of at most `max_items` inputs, full ones at the end of a sequence.

    Raises: TrainingError where no sequence has two items.
    """
    counts = np.diff(sequences.offsets) - 1
    pieces = -(-counts // max_items)
    if pieces.sum() == 0:
        raise TrainingError(
            f"none of the {len(sequences)} training sequences has two items, so there is no next item to learn"
        )
    sequence = np.repeat(np.arange(len(counts)), pieces)
    rank = np.arange(len(sequence)) - np.repeat(pieces.cumsum() - pieces, pieces)
    end = sequences.offsets[sequence] + counts[sequence] - max_items * rank
    begin = np.maximum(sequences.offsets[sequence], end - max_items)
    return Windows(items=sequences.items, begins=begin.astype(np.int64), lengths=(end - begin).astype(np.int64))


def policy_windows(policy: AnyPolicy, sequences: Sequences) -> Windows:
    """The windows that a policy learns sequences from, each after who the user is where it reads that.

    Raises: TrainingError where no sequence has two items.
    """
    windows = make_windows(sequences, policy.max_items)
    if sequences.profiles is None or not policy.reads_profiles:
        return windows
    words = policy.profile_words(sequences.profiles.gather(sequences.users).to_list())
    sequence = sequences.offsets.searchsorted(windows.begins, side="right") - 1
    return replace(windows, words=[words[own] for own in sequence])


def shuffled_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of windows in batches of like length, in random order and with random company among equals."""
    order = np.argsort(lengths + rng.random(len(lengths)), kind="stable")
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
