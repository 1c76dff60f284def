"""Weights too large for one process: parameters, gradients and optimiser state in shards over the ranks (FSDP2).

For modules whose forward is called as it is, such as a causal language model of Hugging Face. Each rank's loss is its
part of the loss over all ranks (divided by global counts), so gradients are added up over ranks, not averaged. State is
written by `torch.distributed.checkpoint` as safetensors, each rank its shards, and is read on any number of ranks.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sagerec.policies.protocol import AnyPolicy
from sagerec.training import parallel

ModuleT = TypeVar("ModuleT", bound=nn.Module)
PolicyT = TypeVar("PolicyT", bound=AnyPolicy)


def shard(module: ModuleT, blocks: Iterable[nn.Module] = (), *, precision: torch.dtype | None = None) -> ModuleT:
    """Shard `module` in place over the ranks, each of `blocks` (its layers) gathered alone while it computes.

    `precision` is that of the products; parameters and their sums stay as they are. Without ranks nothing is done.
    """
    if parallel.n_ranks() == 1:
        return module
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=None if precision is None else torch.float32)
    mesh = init_device_mesh(next(module.parameters()).device.type, (parallel.n_ranks(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return module


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The whole weights on every rank, so that each may compute as often as it likes: lists, rollouts and the pieces of
    a loss, which the ranks make in different numbers of steps. A backward pass in it adds each block's gradients up
    over the ranks. What is not in shards is left as it is.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    try:
        for part in parts:
            _keep(part, True)
            part.unshard()
        yield
    finally:
        for part in parts:
            _keep(part, False)
            part.reshard()


def _keep(part: FSDPModule, whole: bool) -> None:
    """Whether a module's weights stay whole after its passes."""
    part.set_reshard_after_forward(not whole, recurse=False)
    part.set_reshard_after_backward(not whole, recurse=False)


def shard_policy(policy: PolicyT) -> PolicyT:
    """Shard a policy that has blocks over the ranks, in place; another one is left as it is."""
    blocks = list(policy.blocks())
    return shard(policy, blocks) if blocks else policy


def whole_copy(policy: PolicyT) -> PolicyT:
    """What is saved of a policy that is to be sharded: on the first rank a copy on the CPU, which `assemble` fills."""
    sharded = parallel.n_ranks() > 1 and bool(list(policy.blocks()))
    return copy.deepcopy(policy).move("cpu") if sharded and parallel.rank() == 0 else policy


@torch.no_grad()
def assemble(policy: AnyPolicy, kept: AnyPolicy) -> None:
    """Copy the weights of a policy in shards to their `whole_copy`; every rank calls it."""
    if not is_sharded(policy.parameters()):
        return
    into = {} if kept is policy else state_of(kept)
    for name, value in state_of(policy).items():
        found = whole(value)
        if into:
            into[name].copy_(found)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is held in shards."""
    return any(isinstance(value, DTensor) for value in tensors)


def whole(value: Tensor) -> Tensor:
    """A tensor as every rank can read it; of one in shards, gathered from all ranks, which must all ask."""
    found: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return found


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, of tied weights the first name alone; writing to the tensors changes the module."""
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in module.named_parameters()}
    return {name: value for name, value in module.state_dict().items() if name not in tied}


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """`state_of` gathered, tensor by tensor, onto the CPU of each rank, which must all ask."""
    return {name: whole(value).cpu() for name, value in state_of(module).items()}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of `state_of` as each rank holds it."""
    return {name: value.detach().clone() for name, value in state_of(module).items()}


@torch.no_grad()
def restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a `snapshot` back. Raises: RuntimeError where it is of another module."""
    own = state_of(module)
    if own.keys() != state.keys() or any(own[name].shape != value.shape for name, value in state.items()):
        raise RuntimeError(f"the state of another module: {sorted(own.keys() ^ state.keys()) or 'other shapes'}")
    for name, value in state.items():
        own[name].copy_(value)


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Each rank writes the shards that it holds into `folder`; what all hold is written once, as the first has it."""
    same = {name: parallel.share_from_first(x) for name, x in tensors.items() if not isinstance(x, DTensor)}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    state_dict_saver.save({**tensors, **same}, storage_writer=writer, no_dist=not dist.is_initialized())


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What any number of ranks wrote into `folder`, by name.

    A tensor NAME, *.NAME or *.*.NAME of the shape of like[NAME] is laid out as that is now, every other one whole.
    """
    reader = HuggingFaceStorageReader(str(folder))
    found: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata), name
        owner = next((name.split(".", n)[-1] for n in (1, 2) if name.split(".", n)[-1] in like), name)
        kept = like.get(owner)
        if kept is not None and kept.shape == stored.size:
            found[name] = torch.empty_like(kept)
        else:
            found[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(found, storage_reader=reader, no_dist=not dist.is_initialized())
    return found
