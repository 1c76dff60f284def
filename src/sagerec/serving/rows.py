"""Rows of a batch to lists and slates: the one place of serving that calls the decoder.

Shapes: B rows, T history items, X items left out, K places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sagerec.actions.filters import Filter, Filters, levels, shown, used_up
from sagerec.actions.legal import NO_ITEM, items_left
from sagerec.actions.space import ActionSpace
from sagerec.decoding.beam import exact_lists
from sagerec.decoding.slates import write_slates
from sagerec.policies.protocol import AnyPolicy
from sagerec.serving.settings import BEAMS

ROW_BYTES = 64
"""Memory of a row for each continuation that a beam looks at: a handful of numbers of 8 bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What one list or slate is made for."""

    history: np.ndarray
    """(T,) int64 items, the oldest first; at least one."""
    left_out: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(X,) int64 distinct items that are not shown."""
    filter: Filter | None = None
    """What may be shown; None for everything."""
    listed: tuple[int, ...] = ()
    """Items that stand for sequences which are in the list already."""
    profile: str = ""
    """Who the user is, for a policy that reads it."""


class Found(NamedTuple):
    """What was found for a row, best first, or in the order written."""

    items: list[int]
    """Items to show."""
    scores: list[float]
    """Log-probability of each in nats."""
    listed: list[int]
    """The items that stand for their sequences."""
    logprobs: Sequence[list[float]] = ()
    """Of a slate: of the free tokens of each item."""


class _Batch(NamedTuple):
    items: Tensor
    lengths: Tensor
    left_out: Tensor
    excluded: Tensor
    filters: Filters


def _pad(rows: Sequence[np.ndarray], fill: int, device: torch.device) -> Tensor:
    """(B, longest) int64, padded on the right."""
    table = np.full((len(rows), max((len(row) for row in rows), default=0)), fill, dtype=np.int64)
    for at, row in enumerate(rows):
        table[at, : len(row)] = row
    return torch.from_numpy(table).to(device)


def _gather(policy: AnyPolicy, rows: Sequence[Row]) -> _Batch:
    space, device = policy.space, policy.device
    words = policy.profile_words([row.profile for row in rows])
    latest = [row.history[-policy.max_items :] for row in rows]
    read = [np.concatenate([np.array(own, dtype=np.int64), items]) for own, items in zip(words, latest, strict=True)]
    everything = Filter(torch.ones(1, dtype=torch.bool, device=device).expand(space.n_items), space.trie.size)
    numbers: dict[int, int] = {}
    filters: list[Filter] = []
    for row in rows:
        one = row.filter or everything
        if id(one) not in numbers:
            numbers[id(one)] = len(filters)
            filters.append(one)
    which = torch.tensor([numbers[id(row.filter or everything)] for row in rows], device=device)
    made = Filters(tuple(filters), which)
    left_out = _pad([row.left_out for row in rows], NO_ITEM, device)
    listed = _pad([np.array(row.listed, dtype=np.int64) for row in rows], NO_ITEM, device)
    excluded = torch.cat([used_up(space, left_out, made), listed], dim=1)
    lengths = torch.tensor([len(row) for row in read], device=device)
    return _Batch(_pad(read, 0, device), lengths, left_out, excluded, made)


@torch.no_grad()
def list_rows(policy: AnyPolicy, rows: Sequence[Row], k: int) -> list[Found]:
    """The k most probable next items of each row, proven exact; fewer where no more are left."""
    batch = _gather(policy, rows)
    plain = all(row.filter is None for row in rows)
    lists = exact_lists(
        policy,
        batch.items,
        batch.lengths,
        k=min(k, policy.space.n_sequences),
        beams=BEAMS,
        excluded=batch.excluded,
        filters=None if plain else batch.filters,
    )
    names = shown(policy.space, lists.items, batch.left_out, batch.filters).tolist()
    found = []
    for listed, items, scores in zip(lists.items.tolist(), names, lists.logprobs.tolist(), strict=True):
        size = sum(item != NO_ITEM for item in listed)
        found.append(Found(items[:size], scores[:size], listed[:size]))
    return found


@torch.no_grad()
def write_rows(
    policy: AnyPolicy, rows: Sequence[Row], k: int, *, temperature: float, top_p: float, seeds: Sequence[int]
) -> list[Found]:
    """A slate of k items for each row, greedy at `temperature` 0, else drawn by the row's own seed; shorter where no
    more items are left. What a row gets hangs on no other row.
    """
    batch = _gather(policy, rows)
    left = items_left(policy.space, batch.excluded, batch.filters).clamp(max=k)
    found = [Found([], [], []) for _ in rows]
    for size in sorted(set(left.tolist()) - {0}):
        at = (left == size).nonzero()[:, 0]
        uniforms = [
            torch.rand(k, generator=torch.Generator().manual_seed(seeds[row]), dtype=torch.float64)[:size]
            for row in at.tolist()
        ]
        slates = write_slates(
            policy,
            batch.items[at],
            batch.lengths[at],
            k=size,
            temperature=temperature,
            top_p=top_p,
            excluded=batch.excluded[at],
            filters=batch.filters.of_rows(at),
            uniforms=torch.stack(uniforms)[:, None].to(policy.device),
        )
        listed, scores = slates.items[:, 0], slates.scores()[:, 0].tolist()
        names = shown(policy.space, listed, batch.left_out[at], batch.filters.of_rows(at)).tolist()
        logprobs: list[list[float]] = [[] for _ in range(listed.numel())]
        for item, logprob in zip(slates.tokens.item.tolist(), slates.tokens.logprobs.tolist(), strict=True):
            logprobs[item].append(logprob)
        for place, row in enumerate(at.tolist()):
            own = logprobs[place * size : (place + 1) * size]
            found[row] = Found(names[place], scores[place], listed[place].tolist(), own)
    return found


def level_widths(space: ActionSpace) -> tuple[int, ...]:
    """Nodes of each depth of the trie."""
    return tuple(end - begin for begin, end in levels(space.trie))


def row_bytes(widths: tuple[int, ...], max_children: int, k: int) -> int:
    """Memory that a row takes in the beam of k items, at most: its continuations at the widest level of the trie."""
    return ROW_BYTES * max(min(width, max(BEAMS, k) * max_children) for width in widths)
