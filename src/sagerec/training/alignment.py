"""The alignment stage: a supervised policy becomes one that several rewards have shaped. Reads as SAGE's algorithm box.

    for each round over the reserved events:
        slates, old log-probabilities  <- G slates a context, by the policy as it is
        rewards                        <- what each slate earns
        advantages                     <- per reward and group, then over the whole round
        for each minibatch, several times over: one step of AdamW on
            policy_weight x policy loss + sft_weight x next-item loss + replay_weight x that of whole sequences
            + kl_weight x KL(policy || start) - entropy_weight x entropy
    every few rounds: validate, keep the best by the stated criterion

Departures from the paper: rollouts serve several updates (old log-probabilities are stored), for at a ratio of 1 no
bound acts; dropout is off in rollouts and policy loss, so that the ratio is that of two policies and not of two masks.
The control `sft` runs the same rounds and minibatches with next-item losses alone.

A killed run resumes to the same weights, bit for bit on a CPU: what is drawn in a round hangs on seed and round alone.

Shapes: B users, G slates of each, K places, M rewards; units are slates, or items with credit "item".
"""

import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagerec.actions.clusters import entropy_clusters
from sagerec.artifacts import write_artifact
from sagerec.catalogue.audit import write_events_used
from sagerec.catalogue.dataset import Dataset
from sagerec.catalogue.simulated_store import SimulatedStore
from sagerec.catalogue.splits import Cases, Split, learnt_counts
from sagerec.config import require
from sagerec.decoding.cases import read_histories
from sagerec.errors import SettingsError
from sagerec.evaluation import metrics
from sagerec.evaluation.per_case import Yardstick, validation_means
from sagerec.objectives.rewards import parse_rewards
from sagerec.policies.protocol import AnyPolicy
from sagerec.policies.registry import write_weights
from sagerec.progress import progress_bar
from sagerec.training import parallel, sharding
from sagerec.training.batches import policy_windows, shuffled_batches
from sagerec.training.checkpoints import (
    find_checkpoint,
    fingerprint,
    load_checkpoint,
    read_progress,
    save_checkpoint,
    working_folder,
)
from sagerec.training.feedback import gather_facts, gather_feedback, to_device
from sagerec.training.layout import most_choices
from sagerec.training.loop import make_optimizer, stage_device
from sagerec.training.rounds import Stage, roll_round, update
from sagerec.training.settings import (
    AS_USUAL,
    STORE_METRICS,
    AlignSettings,
    ComputeSettings,
    parse_criterion,
    rollout_of,
)
from sagerec.training.soundness import check_kept
from sagerec.training.tracking import keep_records, open_trackers
from sagerec.training.validation import VALIDATION_K, validation_lists

logger = logging.getLogger(__name__)
GLANCE = 8
"""Reserved events that are looked at after each round, to see that the policy is not lost."""


def validate(
    policy: AnyPolicy,
    cases: Cases,
    data: Dataset,
    cold: np.ndarray,
    clusters: dict[str, Any],
    *,
    exclude_history: bool,
    store: SimulatedStore | None,
) -> dict[str, float]:
    """Recall, NDCG, Cold-Recall, Entropy (bits; both `clusters`) and coverage at 10 of `validation_lists`.

    In the simulated store, its users' expected answers to the ten too.
    """
    lists = validation_lists(policy, cases, exclude_history=exclude_history)
    yardstick = Yardstick(cold=cold, clusters=clusters, store=store)
    names = ("recall", "ndcg", "cold_recall", *clusters, *(() if store is None else STORE_METRICS))
    listed = policy.space.listed_as(cases.targets)
    found = validation_means(lists, cases, names, yardstick, k=VALIDATION_K, listed=listed)
    return found | {"valid_coverage@10": metrics.coverage_at(lists, data.n_items, VALIDATION_K)}


def criterion_value(found: dict[str, float], start: dict[str, float], weights: dict[str, float]) -> float:
    """sum_m weight_m x metric_m / metric_m at the start (x metric_m itself where that was 0)."""
    names = {name: f"valid_{name}@10" for name in weights}
    return sum(weight * found[names[m]] / (start[names[m]] or 1.0) for m, weight in weights.items())


def align_policy(
    folder: Path,
    start: AnyPolicy,
    reference: AnyPolicy | None,
    data: Dataset,
    split: Split,
    settings: AlignSettings,
    *,
    store: SimulatedStore | None = None,
    policy_settings: dict[str, Any],
    made_from: dict[str, str],
    compute: ComputeSettings = AS_USUAL,
) -> AnyPolicy:
    """Run the stage on the events of the part `align` and write its artefact to `folder`.

    `start` is trained, `reference` a second copy of it that stays, None where
    nothing reads it. Work in progress stands in `folder` + `.training`.

    Raises: SettingsError where no event is reserved; RewardError for a reward that this data cannot give;
    TrainingError where loss, gradient or weights are not finite, or what would be kept is lost.
    """
    work = working_folder(folder)
    compute.check(settings.row)
    resolved = {"policy": policy_settings, "align": settings.what(), **compute.what()}
    depends = fingerprint(resolved, made_from)
    cases = split.cases(data, "align")
    if len(cases) == 0:
        raise SettingsError(
            "the split reserves no event for alignment; make the run with --split.reserve event (or users)"
        )
    if settings.max_contexts:
        cases = cases.sample(settings.max_contexts, np.random.default_rng(settings.seed))
    for name in parse_criterion(settings.criterion).keys() & set(STORE_METRICS):
        if store is None:
            raise SettingsError(
                f"the criterion {name!r} asks a simulated store, and this dataset is none; choose others"
            )
    free = rollout_of(settings, start).writing == "free"
    device = stage_device(settings.device)
    weights = parse_rewards(settings.reward) if settings.reward else {}  # the control has none
    if "validity" in weights and not free:
        logger.warning("the reward validity is 1 for every slate, and teaches nothing: this policy writes items alone")
    facts = gather_facts(data, split, start.space, clusters=settings.clusters, cold_max_count=settings.cold_max_count)
    train, known = split.sequences(data, "train"), split.sequences(data, "train", "align")
    kept = sharding.whole_copy(start)
    stage = Stage(
        settings=settings,
        policy=sharding.shard_policy(start.move(device)),
        reference=None if reference is None else sharding.shard_policy(reference.move(device).eval()),
        cases=cases,
        feedback=gather_feedback(data, split, cases, store, list(weights), facts),
        facts=to_device(facts, device),
        exclude_history=train.excludes_history(settings.history),
        optimizer=make_optimizer(start, settings.learning_rate, settings.weight_decay),
        work=work,
        rewards=weights,
        longest=start.space.longest if free else settings.k * most_choices(start.space),
        replay=policy_windows(start, known) if settings.replay_weight else None,
        compute=compute,
    )
    validation = split.cases(data, "valid").sample(settings.validation_users, np.random.default_rng(settings.seed))
    cold = learnt_counts(data, split) <= settings.cold_max_count
    clusters = entropy_clusters(data, start.space)

    def measure() -> dict[str, float]:
        return validate(
            stage.policy, validation, data, cold, clusters, exclude_history=stage.exclude_history, store=store
        )

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        summary = run_rounds(stage, measure if len(validation) and settings.validations else None, depends)
    check_kept(stage.policy, sample_loss(stage, settings.batch_users), f"update {summary['updates']}")
    sharding.assemble(stage.policy, kept)
    if parallel.rank() == 0:
        opened, closed = (np.bincount(rows, minlength=data.n_events + 1) for rows in (cases.starts, cases.rows + 1))
        seen = np.flatnonzero((opened - closed).cumsum() > 0)  # from the start of each history to its target
        seen = seen if stage.replay is None else np.union1d(seen, known.rows)
        with write_artifact(
            folder, "policy", made_from=made_from, settings=resolved, seed=settings.seed, sizes=summary
        ) as fresh:
            write_weights(fresh, kept)
            write_events_used(fresh, seen)
            keep_records(work, fresh)
        shutil.rmtree(work)
    parallel.share_from_first(None)  # no rank goes on before the artefact is there
    return stage.policy


@torch.no_grad()
def sample_loss(stage: Stage, n: int) -> float:
    """Next-item loss of the first n reserved events, in nats an item."""
    policy, cases = stage.policy, stage.cases
    some = np.arange(min(len(cases), n))
    history, length = read_histories(policy, cases, some)
    items, lengths = (torch.from_numpy(x).to(policy.device) for x in (history, length))
    targets = torch.from_numpy(policy.space.listed_as(cases.targets[some])).to(policy.device).long()
    last = torch.arange(items.shape[1], device=policy.device) == lengths[:, None] - 1
    with sharding.gathered(policy):
        return float(policy.next_item_loss(items, targets[:, None].expand_as(items), last))


def run_rounds(stage: Stage, measure: Any, depends: list[Any]) -> dict[str, Any]:
    """The rounds of the algorithm box, from the newest checkpoint on; leaves the kept weights in the policy.

    A checkpoint of what depends on other things than `depends` is not resumed.
    """
    settings, policy, work = stage.settings, stage.policy, stage.work
    lengths = np.minimum(stage.cases.rows - stage.cases.starts, policy.max_items)
    per_round = max(1, settings.round_users // settings.batch_users)
    n_batches = math.ceil(len(stage.cases) / settings.batch_users)
    smallest = len(stage.cases) - (n_batches - 1) * settings.batch_users
    require(
        smallest >= parallel.n_ranks(),
        f"the last minibatch has {smallest} contexts for {parallel.n_ranks()} processes; choose another batch_users",
    )
    rounds_per_epoch = math.ceil(n_batches / per_round)
    n_rounds = rounds_per_epoch * settings.epochs
    total_steps = n_batches * settings.passes * settings.epochs
    due = {round(n_rounds * (i + 1) / settings.validations) for i in range(settings.validations)} if measure else set()
    progress: dict[str, Any] = {"fingerprint": depends, "round": 0, "step": 0, "best": None, "seconds": 0.0}
    best: dict[str, Tensor] = {}
    if (checkpoint := find_checkpoint(work, depends, "alignment")) is not None:
        best, progress = load_checkpoint(checkpoint, policy, stage.optimizer), read_progress(checkpoint)
        logger.info("resuming after round %d of %d", progress["round"], n_rounds)
    trackers = open_trackers(work, track=settings.track, resume_step=progress["step"] if progress["round"] else -1)
    weights = parse_criterion(settings.criterion)
    if measure and "start" not in progress:
        progress["start"] = measure()
        progress |= {"best": criterion_value(progress["start"], progress["start"], weights), "best_round": 0}
        best = sharding.snapshot(policy)
        trackers.log(0, progress["start"] | {"round": 0, "criterion": progress["best"]})
        logger.info("start: %s", describe(progress["start"]))
    with progress_bar("aligning", n_rounds, completed=progress["round"]) as bar:
        while progress["round"] < n_rounds:
            started = time.perf_counter()
            number = progress["round"]
            epoch, place = divmod(number, rounds_per_epoch)
            batches = shuffled_batches(lengths, settings.batch_users, np.random.default_rng([settings.seed, epoch]))
            minibatches, logged = roll_round(stage, batches[place * per_round : (place + 1) * per_round], number)
            figures = []
            for pass_ in range(settings.passes):
                for i in np.random.default_rng([settings.seed, number, pass_]).permutation(len(minibatches)):
                    figures.append(update(stage, minibatches[i], progress["step"], total_steps))
                    progress["step"] += 1
            progress["round"] = number + 1
            logged |= {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}
            check_kept(policy, sample_loss(stage, GLANCE), f"update {progress['step']}")
            seconds = time.perf_counter() - started
            progress["seconds"] += seconds
            if number + 1 in due:
                found = measure()
                logged |= found | {"criterion": criterion_value(found, progress["start"], weights)}
                if logged["criterion"] > progress["best"]:
                    progress |= {"best": logged["criterion"], "best_round": number + 1}
                    best = sharding.snapshot(policy)
                logger.info("round %d of %d: %s", number + 1, n_rounds, describe(found))
            trackers.log(progress["step"], logged | {"round": number + 1, "seconds": seconds})
            bar.update(number + 1, f"loss {logged['loss']:.4f}")
            if (number + 1) % settings.checkpoint_every == 0 or number + 1 == n_rounds:
                save_checkpoint(work, progress["step"], policy, stage.optimizer, progress=progress, best=best)
    trackers.close()
    if best:
        sharding.restore(policy, best)
    policy.eval()
    return {
        "rounds": progress["round"],
        "updates": progress["step"],
        "kept_round": progress.get("best_round", progress["round"]) if best else progress["round"],
        "criterion": progress["best"],
        "start": progress.get("start"),
        "seconds": progress["seconds"],
        "contexts": len(stage.cases),
    }


def describe(found: dict[str, float]) -> str:
    """Validation metrics in a line."""
    return ", ".join(f"{name.removeprefix('valid_')} {value:.4f}" for name, value in found.items())
