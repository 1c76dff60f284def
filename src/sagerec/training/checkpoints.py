"""Checkpoints of a training: weights, optimiser, random state and counters, so that a killed run resumes exactly.

Each is a new folder `checkpoint-<step>` that is renamed into place whole; older ones go only afterwards, so that at any
moment the newest complete one can be read.
"""

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sagerec.artifacts import Manifest, read_manifest, write_artifact
from sagerec.errors import ArtifactError
from sagerec.files import read_json, remove, write_json
from sagerec.training import parallel, sharding

logger = logging.getLogger(__name__)
_TENSORS, _PROGRESS, KIND = "state.safetensors", "progress.json", "checkpoint"


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    progress: dict[str, Any],
    best: dict[str, Tensor],
) -> None:
    """Write `folder/checkpoint-<step>` and remove the older ones; every rank calls it.

    `progress` holds JSON values, `best` the weights of the best validation so far (may be empty). What every rank holds
    whole is written by the first, what is held in shards by all.
    """
    shards = sharding.is_sharded(model.parameters())
    if not shards and parallel.rank():
        return
    tensors = {f"model.{name}": value for name, value in sharding.state_of(model).items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    target = folder / f"checkpoint-{step:09d}"
    with write_artifact(target, KIND) if parallel.rank() == 0 else nullcontext(target) as fresh:
        if shards:
            sharding.write_shards(parallel.share_from_first(fresh), tensors)
        else:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, fresh / _TENSORS)
        if parallel.rank() == 0:
            write_json(fresh / _PROGRESS, progress)
    if parallel.rank():
        return
    for old in folder.glob("checkpoint-*"):
        if old != target:
            remove(old)


def find_checkpoint(folder: Path, depends: list[Any], what: str) -> Path | None:
    """The checkpoint from which every rank goes on, None for none.

    One of what depends on other things than `depends` is removed, and the log says so of `what`. The number of ranks
    may be another than that which wrote it. Raises: SettingsError where the ranks depend on other things.
    """
    parallel.check_same(depends, what)
    found = newest_checkpoint(folder) if parallel.rank() == 0 else None
    if found is not None and read_progress(found)["fingerprint"] != depends:
        logger.info("the unfinished %s in %s was of other inputs or settings; starting anew", what, folder)
        shutil.rmtree(folder)
        found = None
    return parallel.share_from_first(found)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step that is as it was written, None where there is none."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), reverse=True):
        try:
            read_manifest(checkpoint, KIND)
        except ArtifactError as error:
            logger.warning("%s; going on without it", error)
        else:
            return checkpoint
    return None


def working_folder(folder: Path) -> Path:
    """Where a stage works until its artefact at `folder` is there."""
    return folder.with_name(folder.name + ".training")


def fingerprint(settings: dict[str, Any], made_from: dict[str, str]) -> list[Any]:
    """What a training depends on, as JSON: a checkpoint with another one is not resumed."""
    values: list[Any] = json.loads(json.dumps([settings, made_from]))
    return values


def discard_finished(folder: Path, manifest: Manifest) -> None:
    """Remove what the training of the artefact at `folder` left where it was killed at the very end.

    What another training left there stays, for it may be resumed.
    """
    work = working_folder(folder)
    checkpoint = newest_checkpoint(work) if work.is_dir() else None
    if checkpoint is None or read_progress(checkpoint)["fingerprint"][:2] == fingerprint(
        manifest.settings, manifest.made_from
    ):
        shutil.rmtree(work, ignore_errors=True)


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint."""
    values: dict[str, Any] = read_json(checkpoint / _PROGRESS)
    return values


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Restore model, optimiser and random state; returns the weights of the best validation so far."""
    plain = checkpoint / _TENSORS
    whole = plain.is_file() and not sharding.is_sharded(model.parameters())
    tensors = load_file(plain) if whole else sharding.read_shards(checkpoint, sharding.state_of(model))
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}, "random": {}}
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = value
    sharding.restore(model, groups["model"])
    parameters = dict(model.named_parameters())
    for name, value in groups["optimizer"].items():
        key, _, owner = name.partition(".")
        parameter = parameters[owner]
        optimizer.state[parameter][key] = value.to(parameter.device)  # fused AdamW's step counter too
    torch.set_rng_state(groups["random"]["cpu"])
    if "cuda" in groups["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(groups["random"]["cuda"])
    return groups["best"]
