"""Training batches: windows of the sequences, grouped by length so that little is padded.

Shapes: W windows, B windows of a batch, T items of the longest.
"""

from dataclasses import dataclass

import numpy as np
import torch

from sagerec.catalogue.splits import Sequences
from sagerec.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Windows:
    """Runs of consecutive items of one user; every item but the first of a sequence is a target once."""

    items: np.ndarray
    """(E',) int32 items of all sequences."""
    begins: np.ndarray
    """(W,) int64 first input of each window."""
    lengths: np.ndarray
    """(W,) int64 number of inputs, which is the number of targets."""

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
        return inputs, targets, counted


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


def shuffled_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of windows in batches of like length, in random order and with random company among equals."""
    order = np.argsort(lengths + rng.random(len(lengths)), kind="stable")
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
