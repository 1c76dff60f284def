"""What an alignment works with: the stage, the contexts of a minibatch, their slates, and pieces of them.

Shapes: B contexts of a minibatch, G slates of each, K places, M rewards, F free tokens of all slates. Units are slates,
or items with credit "item": B' = B of G slates each, or B K of G items each; T the most free tokens of a unit.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sagerec.catalogue.splits import Cases
from sagerec.objectives.rewards import Facts
from sagerec.policies.protocol import AnyPolicy
from sagerec.training.batches import Windows
from sagerec.training.feedback import Feedback
from sagerec.training.layout import Layout
from sagerec.training.settings import AS_USUAL, AlignSettings, ComputeSettings


@dataclass(frozen=True, slots=True)
class Stage:
    """What a running alignment works with."""

    settings: AlignSettings
    """How."""
    policy: AnyPolicy
    """That is aligned."""
    reference: AnyPolicy | None
    """That alignment started from; None where nothing reads it."""
    optimizer: torch.optim.Optimizer
    """Of the policy."""
    cases: Cases
    """The reserved events."""
    exclude_history: bool
    """Whether slates leave out what the user had."""
    rewards: dict[str, float]
    """Expression -> weight."""
    facts: Facts
    """What rewards know of the catalogue."""
    feedback: Feedback
    """Who answers for the users."""
    work: Path
    """Where a bad batch is saved."""
    longest: int = 1
    """Free tokens that a unit of K items can have, at most: the constant of the aggregation "constant"."""
    replay: Windows | None = None
    """Training sequences for the replay, None without one."""
    compute: ComputeSettings = AS_USUAL
    """In which pieces and how exactly."""


@dataclass(frozen=True, slots=True)
class CaseBatch:
    """The rank's share of a minibatch."""

    total: int
    """Contexts of the minibatch over all ranks."""
    index: np.ndarray
    """(B,) the cases."""
    items: Tensor
    """(B, T) histories."""
    lengths: Tensor
    """(B,) their lengths."""
    excluded: Tensor | None
    """(B, X) items that no slate may hold."""
    targets: Tensor
    """(B,) what the users took next."""

    def part(self, rows: slice) -> "CaseBatch":
        """A minibatch of its contexts `rows`, where one rank has them all."""
        out = None if self.excluded is None else self.excluded[rows]
        index, given = self.index[rows], (self.items[rows], self.lengths[rows])
        return CaseBatch(len(index), index, *given, out, self.targets[rows])


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The slates of a minibatch's contexts."""

    slates: Tensor
    """(B, G, K) items."""
    layout: Layout
    """Of their free tokens, which alone count."""
    old_logprobs: Tensor
    """(B', G, T) nats, under the policy that wrote them."""
    reference: Tensor | None
    """(B', G, T) nats, under the policy that alignment started from; None where nobody asks."""
    rewards: Tensor
    """(B', G, M) of units."""
    diversity: Tensor
    """(B', G) H of the unit's slate."""
    coldness: Tensor
    """(B', G) share of cold items in the unit."""
    texts: Tensor | None = None
    """(B, G, L) tokens of slates that were written freely, -1 after the last."""

    def part(self, rows: slice) -> "Rollouts":
        """Those of the contexts `rows`."""
        units = self.layout.mask.shape[0] // len(self.slates)
        own = slice(rows.start * units, rows.stop * units)
        reference = None if self.reference is None else self.reference[own]
        facts = (self.rewards[own], self.diversity[own], self.coldness[own])
        layout, texts = self.layout.part(own), None if self.texts is None else self.texts[rows]
        return Rollouts(self.slates[rows], layout, self.old_logprobs[own], reference, *facts, texts)


@dataclass(frozen=True, slots=True)
class Minibatch:
    """What an update learns from; without rollouts, from the targets alone."""

    contexts: CaseBatch
    rollouts: Rollouts | None = None
    advantages: Tensor | None = None
    """(B', G)."""


def pieces(batch: Minibatch, size: int) -> list[Minibatch]:
    """The minibatch in pieces of at most `size` contexts, of which each knows the whole's number; 0 for one piece."""
    n, rolled = len(batch.contexts.index), batch.rollouts
    if not 0 < size < n:
        return [batch]
    found = []
    for begin in range(0, n, size):
        rows = slice(begin, min(begin + size, n))
        contexts = replace(batch.contexts.part(rows), total=batch.contexts.total)
        if rolled is None or batch.advantages is None:
            found.append(Minibatch(contexts))
            continue
        units = len(batch.advantages) // n
        own = batch.advantages[rows.start * units : rows.stop * units]
        found.append(Minibatch(contexts, rolled.part(rows), own))
    return found
