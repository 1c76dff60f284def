"""The supervised stage: next-item prediction on every position of the training sequences.

Validation targets choose the epoch and are never trained on; the rows of the log that were are saved for the audit.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from sagerec.actions.clusters import coarse_clusters
from sagerec.actions.space import ActionSpace
from sagerec.artifacts import write_artifact
from sagerec.catalogue.audit import write_events_used
from sagerec.catalogue.splits import Cases, Sequences
from sagerec.config import require, to_json
from sagerec.evaluation.per_case import validation_means
from sagerec.policies.protocol import AnyPolicy
from sagerec.policies.registry import describe_policy, make_policy, write_weights
from sagerec.training import parallel, sharding
from sagerec.training.batches import policy_windows
from sagerec.training.checkpoints import fingerprint, working_folder
from sagerec.training.loop import Loss, fit, stage_device, validation_sample
from sagerec.training.settings import TrainSettings
from sagerec.training.target_lists import list_loss
from sagerec.training.tracking import keep_records
from sagerec.training.validation import VALIDATION_K, validation_lists

logger = logging.getLogger(__name__)


def train_policy(
    folder: Path,
    space: ActionSpace,
    train: Sequences,
    validation: Cases | None,
    policy_settings: Any,
    settings: TrainSettings,
    *,
    made_from: dict[str, str],
    titles: Sequence[str] = (),
) -> AnyPolicy:
    """Run the stage and write its artefact to `folder`; work in progress stands in `folder` + `.training`.

    `train` must hold training events only (audited). `validation` None, or `validate_every` 0, keeps the last weights.
    `titles` (N,) of the items are told to a policy that reads them.

    Raises: TrainingError for a non-finite loss (the batch is saved) or nothing to train on; SettingsError for a policy
    that reads profiles where there are none.
    """
    work = working_folder(folder)
    resolved = {"policy": describe_policy(policy_settings), "train": to_json(settings)}
    device = stage_device(settings.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        policy = make_policy(space, policy_settings).move(device)
        check_profiles(policy, train.profiles)
        counts = np.bincount(train.items, minlength=space.n_items)
        policy.count(torch.from_numpy(counts).float())
        if titles:
            policy.describe(titles)
        kept = sharding.whole_copy(policy)
        sharding.shard_policy(policy)
        cases = validation_sample(validation, settings)
        exclude = not train.has_repeats()
        summary = fit(
            policy,
            work,
            policy_windows(policy, train),
            settings,
            loss=supervised_loss(policy, settings, repeats=not exclude),
            n_targets=policy.n_targets,
            validate=None if cases is None else lambda: validate(policy, cases, exclude_history=exclude),
            fingerprint=fingerprint(resolved, made_from),
            layers=policy.layers(),
        )
    sizes = {"parameters": sum(p.numel() for p in policy.parameters()), "sequences": len(train)} | summary
    sharding.assemble(policy, kept)
    if parallel.rank() == 0:
        with write_artifact(
            folder, "policy", made_from=made_from, settings=resolved, seed=settings.seed, sizes=sizes
        ) as fresh:
            write_weights(fresh, kept)
            write_events_used(fresh, train.rows)
            keep_records(work, fresh)
        shutil.rmtree(work)
    parallel.share_from_first(None)  # no rank goes on before the artefact is there
    return policy


def check_profiles(policy: AnyPolicy, profiles: pl.Series | None) -> None:
    """Say how many users a policy that reads profiles knows. Raises: SettingsError where it is none."""
    if not policy.reads_profiles:
        return
    known = 0 if profiles is None else int((profiles != "").sum())
    require(
        known > 0,
        "the policy is to read profiles, and the dataset says of none of its users who they are; expected "
        "users.parquet with the log's user_id, and profile, or no --policy.profile-tokens",
    )
    logger.info("profiles of %s of %s users", f"{known:,}", f"{0 if profiles is None else len(profiles):,}")


def supervised_loss(policy: AnyPolicy, settings: TrainSettings, *, repeats: bool) -> Loss:
    """The next-item loss, with that on target lists where it has a weight. Raises: SettingsError."""
    if not settings.list_weight:
        return policy.next_item_loss
    require(policy.reads_slate, "list_weight is for policies that read the slate; expected --policy.reads-slate")
    cluster = torch.from_numpy(coarse_clusters(policy.space)).to(policy.device)
    variety = settings.list_variety

    def both(items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        with torch.autocast(policy.device.type, enabled=False):
            lists = list_loss(policy, items, targets, counted, cluster, variety=variety, repeats=repeats)
        return policy.next_item_loss(items, targets, counted) + settings.list_weight * lists

    return both


def validate(policy: AnyPolicy, cases: Cases, *, exclude_history: bool) -> dict[str, float]:
    """Recall@10 and NDCG@10 of `validation_lists`."""
    lists = validation_lists(policy, cases, exclude_history=exclude_history)
    listed = policy.space.listed_as(cases.targets)
    return validation_means(lists, cases, ("recall", "ndcg"), k=VALIDATION_K, listed=listed)
