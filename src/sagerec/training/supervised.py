"""The supervised stage: next-item prediction on every position of the training sequences.

Validation targets choose the epoch and are never trained on; the rows of the log that were are saved for the audit.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sagerec.actions.semantic_ids.build import SemanticIds
from sagerec.artifacts import read_manifest, write_artifact
from sagerec.catalogue.audit import write_events_used
from sagerec.catalogue.splits import Cases, Sequences
from sagerec.config import from_json, to_json
from sagerec.decoding.cases import list_cases
from sagerec.errors import ArtifactError
from sagerec.evaluation.per_case import validation_means
from sagerec.policies.lazy_decoder import LazyDecoder, LazyDecoderSettings, grow_weights
from sagerec.training.batches import make_windows
from sagerec.training.loop import choose_device, fit, validation_sample
from sagerec.training.settings import TrainSettings
from sagerec.training.tracking import keep_records

WEIGHTS = "model.safetensors"
VALIDATION_K, VALIDATION_BEAMS = 10, 20


def next_item_loss(policy: LazyDecoder, inputs: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean over counted places of -log P(target | items before), in nats an item: inputs, targets, counted (B, T)."""
    states, _ = policy.encode_all(inputs)
    return -policy.target_logprobs(states[counted], targets[counted]).sum(dim=1).mean()


def make_policy(ids: SemanticIds, settings: LazyDecoderSettings) -> LazyDecoder:
    """A fresh policy over the Semantic IDs, its weights drawn from torch's global generator."""
    return LazyDecoder(
        settings,
        torch.from_numpy(ids.codes).long(),
        ids.trie,
        torch.from_numpy(ids.vectors) if settings.content else None,
    )


def train_policy(
    folder: Path,
    ids: SemanticIds,
    train: Sequences,
    validation: Cases | None,
    policy_settings: LazyDecoderSettings,
    settings: TrainSettings,
    *,
    made_from: dict[str, str],
) -> LazyDecoder:
    """Run the stage and write its artefact to `folder`; work in progress stands in `folder` + `.training`.

    `train` must hold training events only (audited). `validation` None, or `validate_every` 0, keeps the last weights.

    Raises: TrainingError for a non-finite loss (the batch is saved) or nothing to train on.
    """
    work = folder.with_name(folder.name + ".training")
    resolved = {"policy": to_json(policy_settings), "train": to_json(settings)}
    with torch.random.fork_rng(devices=[0] if torch.cuda.is_available() else []):
        torch.manual_seed(settings.seed)
        policy = make_policy(ids, policy_settings).move(choose_device(settings.device))
        cases = validation_sample(validation, settings)
        exclude = not train.has_repeats()
        summary = fit(
            policy,
            work,
            make_windows(train, policy_settings.max_items),
            settings,
            loss=lambda inputs, targets, counted: next_item_loss(policy, inputs, targets, counted),
            validate=None if cases is None else lambda: validate(policy, cases, exclude_history=exclude),
            fingerprint=[resolved, made_from],
            layers=[*policy.encoder, *policy.decoder],
        )
    sizes = {"parameters": sum(p.numel() for p in policy.parameters()), "sequences": len(train)} | summary
    with write_artifact(
        folder, "policy", made_from=made_from, settings=resolved, seed=settings.seed, sizes=sizes
    ) as fresh:
        save_file({k: v.contiguous().cpu() for k, v in policy.state_dict().items()}, fresh / WEIGHTS)
        write_events_used(fresh, train.rows)
        keep_records(work, fresh)
    shutil.rmtree(work)
    return policy


def validate(policy: LazyDecoder, cases: Cases, *, exclude_history: bool) -> dict[str, float]:
    """Recall@10 and NDCG@10 of beam lists (20 beams, not widened: for choosing an epoch, not for reporting)."""
    lists, _ = list_cases(
        policy, cases, k=VALIDATION_K, beams=VALIDATION_BEAMS, widen=False, exclude_history=exclude_history
    )
    listed = policy.listed_as(cases.targets)
    return validation_means(lists, cases, ("recall", "ndcg"), k=VALIDATION_K, listed=listed)


def read_policy(folder: Path, ids: SemanticIds, *, device: str = "auto") -> LazyDecoder:
    """Read a trained policy, in evaluation mode; where items were added to the IDs since, its weights are grown.

    Raises: ArtifactError where the weights are missing or were trained on other Semantic IDs.
    """
    manifest = read_manifest(folder, "policy")
    if manifest.made_from.get("semantic_ids") not in (ids.content_hash, *ids.grown_from):
        raise ArtifactError(f"{folder} was trained on other Semantic IDs than those given; train it again")
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
        policy = make_policy(ids, from_json(LazyDecoderSettings, manifest.settings["policy"]))
    try:
        policy.load_state_dict(grow_weights(load_file(folder / WEIGHTS), policy))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read ({error}); train the policy again") from error
    return policy.move(choose_device(device)).eval()
