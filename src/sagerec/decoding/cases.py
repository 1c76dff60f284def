"""Lists for many cases at once: batches of like length, decoded on the policy's device.

Shapes: n cases, K places, X history items.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from sagerec.actions.legal import NO_ITEM
from sagerec.catalogue.profiles import after_words
from sagerec.catalogue.splits import Cases
from sagerec.decoding.beam import exact_lists
from sagerec.decoding.slates import write_slates
from sagerec.policies.protocol import AnyPolicy

BATCH_CASES = (512, 4096)
"""Cases of a batch on a CPU and on a GPU."""


def read_histories(policy: AnyPolicy, cases: Cases, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a policy reads of the cases `index` (b,): the latest items, after who the user is where it reads that.

    Returns: histories (b, T) int64 padded with 0 on the right, and lengths (b,) int64.
    """
    history, lengths = cases.histories(index, policy.max_items)
    if cases.profiles is None or not policy.reads_profiles:
        return history, lengths
    return after_words(policy.profile_words(cases.profiles.gather(cases.users[index]).to_list()), history, lengths)


def list_cases(
    policy: AnyPolicy,
    cases: Cases,
    *,
    k: int,
    beams: int = 50,
    widen: bool = True,
    exclude_history: bool = False,
    greedy_slates: bool = False,
    free: Literal["", "exact", "nearest"] = "",
    batch_size: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The list of each case: items (n, K) int64, -1 = none, and whether it is proven exact (n,) bool.

    Beam lists by default; with `greedy_slates` the list is one greedy autoregressive slate, with `free` what is
    written without the trie, matched so. `exclude_history` leaves out what the user had, unless that is free.
    `on_batch` is told the number of cases done after each batch; `batch_size` 0 leaves its size to the device.
    """
    lists = np.full((len(cases), k), NO_ITEM, dtype=np.int64)
    exact = np.zeros(len(cases), dtype=bool)
    order = np.argsort(cases.rows - cases.starts, kind="stable")
    training = policy.training
    policy.eval()
    batch_size = min(batch_size or BATCH_CASES[policy.device.type == "cuda"], policy.most_users)
    for begin in range(0, len(cases), batch_size):
        index = order[begin : begin + batch_size]
        history, length = read_histories(policy, cases, index)
        items = torch.from_numpy(history).to(policy.device)
        lengths = torch.from_numpy(length).to(policy.device)
        excluded = None
        if exclude_history:
            excluded = torch.from_numpy(cases.taken(index)).to(policy.device)
        if free:
            found_freely = policy.write_freely(items, lengths, k=k, beams=beams, nearest=free == "nearest")
            lists[index] = found_freely.cpu().numpy()
        elif greedy_slates:
            slates = write_slates(policy, items, lengths, k=k, temperature=0.0, excluded=excluded)
            lists[index] = slates.items[:, 0].cpu().numpy()
        else:
            found = exact_lists(policy, items, lengths, k=k, beams=beams, widen=widen, excluded=excluded)
            lists[index], exact[index] = found.items.cpu().numpy(), found.exact.cpu().numpy()
        if on_batch is not None:
            on_batch(begin + len(index))
    policy.train(training)
    return lists, exact


def distinct_rows(items: torch.Tensor) -> torch.Tensor:
    """Items (B, X) sorted within each row, with repeats replaced by -1."""
    ordered = items.sort(dim=1).values
    repeats = torch.zeros_like(ordered, dtype=torch.bool)
    repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(repeats, NO_ITEM)
