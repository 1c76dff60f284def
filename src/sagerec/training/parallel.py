"""Data-parallel helpers: what the ranks of a `torchrun` share. Without one, every call is the identity.

A stage that divides by global counts and adds its gradients up gives the same update on any number of ranks. Gradients
of weights that every rank holds whole are added up here, those of weights in shards by FSDP2 (`sharding`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sagerec.errors import SettingsError

T = TypeVar("T")
LOST = (
    "another process of this job has ended, so that this one cannot go on; the same command, with as many processes or "
    "fewer, goes on from the newest checkpoint (what ended stands in torchrun's report)"
)
"""What is said where the ranks lose one of them."""
_alone = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """The process works for itself, as one that nobody launched beside others: a task of a study that ranks share."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def join_ranks(device: torch.device) -> None:
    """Join the process group that `torchrun` announces, once: gloo on the CPU, nccl on GPUs."""
    if "RANK" in os.environ and not dist.is_initialized() and not _alone.get():
        if device.type == "cuda":
            torch.cuda.set_device(device)  # object broadcasts go through the current device
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def rank_device(name: str) -> str:
    """The device setting of this rank: `auto` or `cuda` on a machine with GPUs is the one of the local rank."""
    if name in ("auto", "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def rank() -> int:
    """Number of the process: in its group, before there is one as torchrun says, 0 without it."""
    if _alone.get():
        return 0
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def n_ranks() -> int:
    """Processes in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() and not _alone.get() else 1


def launched() -> int:
    """Processes that torchrun started, whether they have met or not; 1 without it."""
    return 1 if _alone.get() else int(os.environ.get("WORLD_SIZE", "1"))


def own_share(n: int) -> slice:
    """Which of n rows belong to this rank: every n_ranks-th."""
    return slice(rank(), n, n_ranks())


def gather_rows(own: Tensor, n: int) -> Tensor:
    """All n rows, in their order, from each rank's `own_share` of them."""
    if n_ranks() == 1:
        return own
    longest = -(-n // n_ranks())
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(n_ranks())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:n]


def add_up(values: Tensor) -> Tensor:
    """Sum of `values` over the ranks."""
    if n_ranks() > 1:
        dist.all_reduce(values)
    return values


def share_of(own: Tensor) -> Tensor:
    """What a rank's count () is of that of all ranks, 1 without others: the weight of its mean in theirs."""
    return own / add_up(own.clone()).clamp(min=1) if n_ranks() > 1 else torch.ones_like(own)


def add_gradients_up(model: nn.Module) -> None:
    """Replace every gradient by its sum over the ranks, in one message; those of weights in shards are sums already."""
    if n_ranks() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if not parameters:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale the gradients, summed over the ranks, to a norm of at most `most`; returns the norm before, ()."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), most)
    whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole


def share_from_first(value: T) -> T:
    """The first rank's value, on every rank (JSON-like values, small tensors)."""
    if n_ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check_same(value: object, what: str) -> None:
    """Raise SettingsError where a rank has another value (JSON-like) than the first."""
    if (first := share_from_first(value)) != value:
        raise SettingsError(
            f"process {rank()} has another {what} than the first: got {value}, expected {first}; start every process "
            "with the same command on the same files"
        )
