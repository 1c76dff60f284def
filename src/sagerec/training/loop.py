"""The training loop that the supervised stage and the trained baselines share.

Reads top to bottom: shuffled batches -> loss -> AdamW; every few epochs a validation decides whether to keep, go on or
stop. A checkpoint after every epoch holds all that the rest depends on, so a run that is killed and started again ends
with the same weights, bit for bit on a CPU. Several ranks (`parallel`) take every n-th row of each batch and make the
update that one makes, but for the masks of dropout.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sagerec.catalogue.splits import Cases
from sagerec.errors import SettingsError, TrainingError
from sagerec.progress import Bar, progress_bar
from sagerec.training import parallel, sharding
from sagerec.training.batches import Windows, shuffled_batches
from sagerec.training.checkpoints import find_checkpoint, load_checkpoint, read_progress, save_checkpoint
from sagerec.training.settings import TrainSettings
from sagerec.training.soundness import check_kept
from sagerec.training.tracking import open_trackers

logger = logging.getLogger(__name__)
CRITERION = "valid_recall@10"
"""The validation metric whose best epoch is kept."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(inputs, targets, counted), each (B, T) -> a scalar: nats an item, or the number of items that it is the mean of."""


def choose_device(name: str) -> torch.device:
    """The device that a setting names; `auto` is the GPU where there is one.

    Raises: SettingsError for one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise SettingsError(f"device is {name!r}, which is not there; expected one of {', '.join(known)}") from error
    return device


def stage_device(name: str) -> torch.device:
    """The device of this process that a setting names, under torchrun its rank's own GPU; the ranks meet here."""
    device = choose_device(parallel.rank_device(name))
    parallel.join_ranks(device)
    return device


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on the device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which forward passes of training run."""
    if precision == "bfloat16" or (precision == "auto" and has_native_bfloat16(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def learning_rate_at(step: int, total: int, highest: float, warmup_share: float, final_share: float = 0.02) -> float:
    """Linear warm-up from 0 over a share of the steps, then a cosine from 1 to `final_share`, times the highest."""
    warmup = max(1, round(warmup_share * total))
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return highest * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.98); vectors such as biases and norms do not decay, nor what a policy marks `no_decay`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2 and not getattr(p, "no_decay", False)]
    vectors = [p for p in trained if p.ndim < 2 or getattr(p, "no_decay", False)]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def validation_sample(validation: Cases | None, settings: TrainSettings) -> Cases | None:
    """At most `validation_users` cases, drawn once by the seed; None where there is nothing to validate on."""
    if validation is None or len(validation) == 0 or settings.validate_every == 0:
        return None
    return validation.sample(settings.validation_users, np.random.default_rng(settings.seed))


def fit(
    model: nn.Module,
    work: Path,
    windows: Windows,
    settings: TrainSettings,
    *,
    loss: Loss,
    n_targets: Loss = lambda inputs, targets, counted: counted.sum().float(),
    validate: Callable[[], dict[str, float]] | None,
    fingerprint: list[Any],
    layers: Iterable[nn.Module] = (),
) -> dict[str, Any]:
    """Train `model` with checkpoints and metrics in the folder `work`; the kept weights are left in it.

    `loss` is the mean over `n_targets` items. `validate` gives metrics with the key CRITERION; without it the last
    weights are kept. `fingerprint` (JSON values) says what the training depends on: a checkpoint with another one is
    not resumed. `layers` are what `settings.compile` compiles. Returns what happened, for the manifest.

    Raises: TrainingError for a non-finite loss or gradient, the batch is saved first; and where what would be kept is
    lost (`check_kept`).
    """
    steps_per_epoch = math.ceil(len(windows) / settings.batch_size)
    total = steps_per_epoch * settings.epochs
    optimizer = make_optimizer(model, settings.learning_rate, settings.weight_decay)
    progress: dict[str, Any] = {
        "fingerprint": fingerprint,
        "epoch": 0,
        "best": -1.0,
        "best_epoch": 0,
        "seconds": 0.0,
    }
    best: dict[str, Tensor] = {}
    if (checkpoint := find_checkpoint(work, fingerprint, "training")) is not None:
        best, progress = load_checkpoint(checkpoint, model, optimizer), read_progress(checkpoint)
        logger.info("resuming after epoch %d of %d", progress["epoch"], settings.epochs)
    if settings.compile:
        for layer in layers:
            layer.compile(dynamic=True)
    trackers = open_trackers(work, track=settings.track, resume_step=progress["epoch"] * steps_per_epoch or -1)
    if progress["epoch"] == 0:
        trackers.log(0, {"targets": windows.n_targets, "windows": len(windows)})
    with progress_bar("training", total, completed=progress["epoch"] * steps_per_epoch) as bar:
        while progress["epoch"] < settings.epochs and not _is_done(progress, settings):
            started = time.perf_counter()
            epoch = progress["epoch"]
            mean_loss, norm = _train_epoch(model, optimizer, windows, epoch, settings, work, loss, n_targets, bar)
            progress["epoch"] = epoch + 1
            step = (epoch + 1) * steps_per_epoch
            values = {"epoch": epoch + 1, "loss_nats": mean_loss, "gradient_norm": norm}
            due = settings.validate_every and (epoch + 1) % settings.validate_every == 0
            if validate is not None and (due or epoch + 1 == settings.epochs):
                values |= validate()
                if values[CRITERION] > progress["best"]:
                    progress |= {"best": values[CRITERION], "best_epoch": epoch + 1}
                    best = sharding.snapshot(model)
            seconds = time.perf_counter() - started
            progress["seconds"] += seconds
            trackers.log(step, values | {"seconds": seconds, "targets_per_second": windows.n_targets / seconds})
            save_checkpoint(work, step, model, optimizer, progress=progress, best=best)
            recall = f", valid Recall@10 {values[CRITERION]:.4f}" if CRITERION in values else ""
            logger.info(
                "epoch %d of %d: loss %.3f nats%s; %.1f s, at most %.1f min left",
                epoch + 1,
                settings.epochs,
                mean_loss,
                recall,
                seconds,
                progress["seconds"] / (epoch + 1) * (settings.epochs - epoch - 1) / 60,
            )
    trackers.close()
    if best:
        sharding.restore(model, best)
    model.eval()
    check_kept(model, _sample_loss(model, windows, settings, loss), f"step {progress['epoch'] * steps_per_epoch}")
    return {
        "epochs": progress["epoch"],
        "best_epoch": progress["best_epoch"] or progress["epoch"],
        "best_valid_recall@10": progress["best"] if best else None,
        "seconds": progress["seconds"],
        "targets": windows.n_targets,
    }


@torch.no_grad()
def _sample_loss(model: nn.Module, windows: Windows, settings: TrainSettings, loss: Loss) -> float:
    """The loss of the first windows, a batch of them, in nats an item, without dropout."""
    device = next(model.parameters()).device
    index = np.arange(min(len(windows), settings.batch_size))
    with sharding.gathered(model):
        return float(loss(*(torch.from_numpy(x).to(device) for x in windows.batch(index))))


def _is_done(progress: dict[str, Any], settings: TrainSettings) -> bool:
    """Whether `patience` validations have passed since the best one."""
    waited = progress["epoch"] - progress["best_epoch"]
    return bool(progress["best_epoch"]) and waited >= settings.patience * max(settings.validate_every, 1)


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: Windows,
    epoch: int,
    settings: TrainSettings,
    work: Path,
    loss: Loss,
    n_targets: Loss,
    bar: Bar,
) -> tuple[float, float]:
    """One pass; returns the mean loss in nats an item and the mean norm of the gradient."""
    rng = np.random.default_rng([settings.seed, epoch])
    lengths = windows.lengths if settings.like_lengths else np.zeros_like(windows.lengths)
    batches = shuffled_batches(lengths, settings.batch_size, rng)
    total = len(batches) * settings.epochs
    device = next(model.parameters()).device
    if rank := parallel.rank():  # the first rank draws as one process does, every other one for itself
        torch.manual_seed(settings.seed * 7_368_787 + epoch + rank * 1_000_000_007)
    model.train()
    losses, norms = torch.zeros(len(batches)), torch.zeros(len(batches))
    for number, index in enumerate(batches):
        step = epoch * len(batches) + number
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step, total, settings.learning_rate, settings.warmup_share, settings.final_rate_share
            )
        own = index[parallel.own_share(len(index))]
        there = float(len(own) > 0)
        own = own if there else index[:1]  # with a share of 0, so that all ranks compute in step
        inputs, targets, counted = (torch.from_numpy(x).to(device) for x in windows.batch(own))
        share = parallel.share_of(n_targets(inputs, targets, counted) * there)
        optimizer.zero_grad()
        with sharding.gathered(model):
            with autocast(settings.precision, device):
                value = loss(inputs, targets, counted) * share
            value.backward()  # type: ignore[no-untyped-call]
        parallel.add_gradients_up(model)
        norm = parallel.clip_gradients(model, settings.clip_norm)
        if not bool(torch.isfinite(norm)):
            path = work / f"bad-batch-{step}{f'-rank{rank}' if rank else ''}.safetensors"
            save_file({"inputs": inputs.cpu(), "targets": targets.cpu(), "counted": counted.cpu()}, path)
            raise TrainingError(
                f"loss {value.item()} with gradient norm {norm.item()} at step {step}; the batch is saved in {path}. "
                "Lower the learning rate, or use float32"
            )
        optimizer.step()
        losses[number], norms[number] = value.detach(), norm
        bar.update(step + 1, f"epoch {epoch + 1}")
    return parallel.add_up(losses.to(device)).mean().item(), norms.mean().item()
