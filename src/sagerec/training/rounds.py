"""A round of alignment: slates, rewards, advantages, and the updates that they serve.

Shapes: B contexts of a minibatch, G slates of each, K places, M rewards, F free tokens of all slates. Units are slates,
or items with credit "item": B' = B of G slates each, or B K of G items each; T the most free tokens of a unit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sagerec.catalogue.splits import Cases
from sagerec.decoding.rollouts import roll_out
from sagerec.decoding.slates import slate_logprobs
from sagerec.errors import NumericalError, TrainingError
from sagerec.objectives.loss import PolicyLoss, compute_advantages, policy_loss, ratio_spread
from sagerec.objectives.rewards import Facts, RewardInputs, compute_rewards, of_items, slate_coldness, slate_diversity
from sagerec.objectives.table import Objective
from sagerec.policies.protocol import AnyPolicy
from sagerec.training import parallel, sharding
from sagerec.training.batches import Windows, shuffled_batches
from sagerec.training.feedback import Feedback
from sagerec.training.layout import Layout, as_units, lay_out
from sagerec.training.loop import learning_rate_at
from sagerec.training.settings import AlignSettings

REPLAY = 1
"""Tells the replay's random order from that of the contexts."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a running alignment works with."""

    settings: AlignSettings
    """How."""
    policy: AnyPolicy
    """That is aligned."""
    reference: AnyPolicy
    """That alignment started from."""
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


@dataclass(frozen=True, slots=True)
class Minibatch:
    """What an update learns from; without rollouts, from the targets alone."""

    contexts: CaseBatch
    rollouts: Rollouts | None = None
    advantages: Tensor | None = None
    """(B', G)."""


def read_cases(stage: Stage, index: np.ndarray) -> CaseBatch:
    """The rank's share of the cases `index`."""
    own, policy = index[parallel.own_share(len(index))], stage.policy
    history, length = stage.cases.histories(own, policy.max_items)
    items, lengths = (torch.from_numpy(x).to(policy.device) for x in (history, length))
    excluded = None
    if stage.exclude_history:
        excluded = torch.from_numpy(stage.cases.taken(own)).to(policy.device)
    targets = torch.from_numpy(policy.space.listed_as(stage.cases.targets[own])).to(policy.device).long()
    return CaseBatch(len(index), own, items, lengths, excluded, targets)


def roll_minibatch(stage: Stage, contexts: CaseBatch, generator: torch.Generator, *, with_reference: bool) -> Rollouts:
    """Slates for the contexts and what they earn."""
    settings, policy = stage.settings, stage.policy
    rollout, per_item = settings.rollout, settings.credit == "item"
    # Every rank draws for all contexts and takes its own, so that a context's slates do not hang on the ranks.
    shape = (contexts.total, rollout.slates - rollout.n_beams, rollout.k)
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)[parallel.own_share(contexts.total)]
    history = (contexts.items, contexts.lengths)
    rolled = roll_out(policy, *history, rollout, excluded=contexts.excluded, uniforms=uniforms.to(policy.device))
    slates = rolled.items
    layout = lay_out(rolled.tokens, (len(slates), rollout.slates, rollout.k), per_item=per_item)
    reference = None
    if with_reference:
        with torch.no_grad():
            scored = slate_logprobs(
                stage.reference, *history, slates, temperature=settings.temperature, excluded=contexts.excluded
            )
            reference = layout.fill(scored.tokens.logprobs)
    inputs = RewardInputs(
        sample_ids=torch.from_numpy(stage.cases.rows[contexts.index]).to(policy.device),
        slates=slates,
        targets=contexts.targets,
        logprobs=rolled.scores().sum(dim=2),
        facts=stage.facts,
        feedback=stage.feedback.answers(
            contexts.index,
            contexts.items.cpu().numpy(),
            contexts.lengths.cpu().numpy(),
            slates=slates,
            targets=contexts.targets,
        ),
    )
    earned = compute_rewards(list(stage.rewards), inputs, per_item=per_item)
    diversity, coldness = slate_diversity(slates, stage.facts.clusters), slate_coldness(slates, stage.facts.cold)
    if per_item:
        earned = earned.transpose(1, 2).flatten(0, 1)
        diversity = as_units(diversity.unsqueeze(2).expand_as(slates), True)
        coldness = as_units(of_items(stage.facts.cold, slates).float(), True)
    old = layout.fill(rolled.tokens.logprobs)
    return Rollouts(slates, layout, old, reference, earned, diversity, coldness)


def roll_round(stage: Stage, batches: Sequence[np.ndarray], number: int) -> tuple[list[Minibatch], dict[str, float]]:
    """The minibatches of round `number`, with advantages over all of them and all ranks, and what is logged."""
    settings, policy = stage.settings, stage.policy
    contexts = [read_cases(stage, index) for index in batches]
    if settings.row.trains_on_targets:
        return [Minibatch(c) for c in contexts], {}
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    policy.eval()
    # The divergence is logged of the first minibatch, and of all where the loss holds it.
    with sharding.gathered(policy), sharding.gathered(stage.reference):
        rolled = [
            roll_minibatch(stage, c, generator, with_reference=i == 0 or settings.kl_weight > 0)
            for i, c in enumerate(contexts)
        ]
    per_item = settings.credit == "item"
    units = settings.k if per_item else 1
    gathered, tokens = [], []
    for c, r in zip(contexts, rolled, strict=True):
        gathered.append(gather_units(r.rewards, c.total, units))
        tokens.append(gather_units(r.layout.mask.sum(dim=2), c.total, units))
    rewards = torch.cat(gathered)
    weights = torch.tensor(list(stage.rewards.values()), device=policy.device, dtype=torch.float64)
    advantages = compute_advantages(settings.row, rewards, weights=weights, tokens=torch.cat(tokens))
    made = []
    for c, r, part in zip(contexts, rolled, torch.split(advantages, [len(g) for g in gathered]), strict=True):
        own = part.view(c.total, units, -1)[parallel.own_share(c.total)].flatten(0, 1)
        made.append(Minibatch(c, r, own))
    return made, rollout_figures(stage, made, rewards, advantages)


def gather_units(own: Tensor, n_contexts: int, units: int) -> Tensor:
    """Units (B' over all ranks, …) in the order of the contexts, of which each has `units`."""
    return parallel.gather_rows(own.view(-1, units, *own.shape[1:]), n_contexts).flatten(0, 1)


def rollout_figures(stage: Stage, made: list[Minibatch], rewards: Tensor, advantages: Tensor) -> dict[str, float]:
    """What is logged of a round's rollouts (this rank's, but for rewards and advantages)."""
    rolled = [m.rollouts for m in made if m.rollouts is not None]
    diversity = torch.cat([r.diversity.flatten() for r in rolled])
    levels = torch.tensor([0.1, 0.5, 0.9], device=diversity.device)
    hits = torch.cat(
        [(r.slates == m.contexts.targets[:, None, None]).flatten(1).any(1) for m, r in zip(made, rolled, strict=True)]
    )
    items = torch.cat([r.slates.flatten(1) for r in rolled]).sort(dim=1).values
    repeats = ((items[:, 1:] == items[:, :-1]) & (items[:, 1:] >= 0)).float()
    first = rolled[0]
    assert first.reference is not None
    means = rewards.flatten(0, 1).mean(dim=0).tolist()
    return {f"reward/{name}": value for name, value in zip(stage.rewards, means, strict=True)} | {
        "groups_with_hit": hits.float().mean().item(),
        "advantage_std": advantages.std().item(),
        "advantage_max": advantages.abs().max().item(),
        **dict(
            zip(
                ("diversity_q10", "diversity_q50", "diversity_q90"),
                torch.quantile(diversity, levels).tolist(),
                strict=True,
            )
        ),
        "coldness": torch.cat([r.coldness.flatten() for r in rolled]).mean().item(),
        "kl_nats": k3(first.old_logprobs, first.reference, first.layout.mask).item(),
        "invalid_rate": (items < 0).float().mean().item(),
        "duplicate_rate": repeats.sum().item() / items.numel(),
    }


def k3(new: Tensor, reference: Tensor, counted: Tensor, total: Tensor | None = None) -> Tensor:
    """Mean over counted tokens of exp(ref - new) - (ref - new) - 1 >= 0, in nats a token.

    Over samples of the new policy an estimate of KL(new || ref); over beam slates, of its most probable part. `total`
    is the number of tokens to divide by, over all ranks. Schulman, "Approximating KL divergence" (2020).
    """
    difference = (reference - new).clamp(max=20.0)
    divisor = counted.sum() if total is None else total
    return ((difference.exp() - difference - 1) * counted).sum() / divisor.clamp(min=1)


def losses(stage: Stage, batch: Minibatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The rank's part of the loss of a minibatch, and detached figures."""
    settings, policy, contexts = stage.settings, stage.policy, batch.contexts
    row = settings.row
    share = len(contexts.index) / contexts.total
    total = torch.zeros((), device=policy.device)
    logged: dict[str, Tensor] = {}
    if batch.rollouts is not None:
        assert batch.advantages is not None
        policy.eval()
        layout = batch.rollouts.layout
        scored, entropy = slate_logprobs(
            policy,
            contexts.items,
            contexts.lengths,
            batch.rollouts.slates,
            temperature=settings.temperature,
            excluded=contexts.excluded,
        )
        new, mask = layout.fill(scored.logprobs), layout.mask
        n_units = mask.new_tensor(mask.shape[0] * mask.shape[1], dtype=torch.float32)
        sizes = {"slate": n_units, "token": mask.sum().float(), "constant": n_units * stage.longest}
        found = policy_loss(
            row,
            logprobs=new,
            old_logprobs=batch.rollouts.old_logprobs,
            mask=mask,
            advantages=batch.advantages,
            diversity=batch.rollouts.diversity,
            coldness=batch.rollouts.coldness,
            denominator=parallel.add_up(sizes[row.aggregation]).clamp(min=1),
            spread=global_spread(row, new, batch.rollouts.old_logprobs, mask) if row.needs_spread else None,
        )
        total = total + settings.policy_weight * found.loss
        logged |= bound_figures(found, mask)
        logged |= {"policy_loss": found.loss.detach(), "entropy_nats": entropy.detach()}
        if settings.kl_weight:
            assert batch.rollouts.reference is not None
            n_tokens = parallel.add_up(mask.sum().float())
            total = total + settings.kl_weight * k3(new, batch.rollouts.reference, mask, n_tokens)
        if settings.entropy_weight:
            total = total - settings.entropy_weight * share * entropy
    # Dropout hangs on seed, update and rank alone, so that a resumed run draws the same masks.
    torch.manual_seed(settings.seed * 7_368_787 + step + parallel.rank() * 1_000_000_007)
    policy.train()
    if weight := 1.0 if row.trains_on_targets else settings.sft_weight:
        # One target a context, after its last item; the rank's part of the mean over all targets.
        last = torch.arange(contexts.items.shape[1], device=policy.device) == contexts.lengths[:, None] - 1
        targets = contexts.targets[:, None].expand_as(contexts.items)
        n_targets = policy.n_targets(contexts.items, targets, last)
        sft = policy.next_item_loss(contexts.items, targets, last) * parallel.share_of(n_targets)
        total = total + weight * sft
        logged["sft_loss_nats"] = sft.detach()
    if stage.replay is not None:
        replayed = replay_loss(policy, stage.replay, step, settings)
        total = total + settings.replay_weight * replayed
        logged["replay_loss_nats"] = replayed.detach()
    policy.eval()
    return total, logged


def global_spread(row: Objective, new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """`ratio_spread` of the slates of all ranks: of their mean squares, each rank's weighs as much as its slates."""
    own = mask.new_tensor(mask.shape[0] * mask.shape[1], dtype=torch.float32)
    squares = ratio_spread(row, logprobs=new, old_logprobs=old, mask=mask).square().to(own.dtype) * own
    return (parallel.add_up(squares) / parallel.add_up(own).clamp(min=1)).sqrt()


def replay_loss(policy: AnyPolicy, windows: Windows, step: int, settings: AlignSettings) -> Tensor:
    """The rank's part of the mean next-item loss over the replayed sequences of update `step`, in nats an item."""
    per_epoch = math.ceil(len(windows) / settings.batch_users)
    epoch, number = divmod(step, per_epoch)
    rng = np.random.default_rng([settings.seed, epoch, REPLAY])
    index = shuffled_batches(windows.lengths, settings.batch_users, rng)[number]
    own = index[parallel.own_share(len(index))]
    if not len(own):  # fewer sequences than ranks
        parallel.add_up(torch.zeros((), device=policy.device))
        return torch.zeros((), device=policy.device)
    inputs, targets, counted = (torch.from_numpy(x).to(policy.device) for x in windows.batch(own))
    share = parallel.share_of(policy.n_targets(inputs, targets, counted))
    return policy.next_item_loss(inputs, targets, counted) * share


def bound_figures(found: PolicyLoss, mask: Tensor) -> dict[str, Tensor]:
    """Quantiles of the ratio, shares of units at each bound, and mean coefficients of both signs.

    Units are slates, or, for token ratios, the tokens that `mask` (B, G, T) counts.
    """
    ratio, at_bound = found.diagnostics["ratio"], found.diagnostics["at_bound"]
    coefficient, advantages = found.coefficient, found.advantages
    if ratio.ndim == 3:
        advantages = advantages.unsqueeze(2).expand_as(ratio)[mask]
        ratio, at_bound, coefficient = ratio[mask], at_bound[mask], coefficient[mask]
    positive, negative = advantages > 0, advantages < 0
    sample = ratio.flatten()[:: max(1, ratio.numel() // 4096)].float()
    low, middle, high = torch.quantile(sample, sample.new_tensor([0.05, 0.5, 0.95])).unbind()
    return {
        "ratio_q05": low,
        "ratio_q50": middle,
        "ratio_q95": high,
        "share_at_upper": (at_bound & positive).float().mean(),
        "share_at_lower": (at_bound & negative).float().mean(),
        "coefficient_positive": (coefficient * positive).sum() / positive.sum().clamp(min=1),
        "coefficient_negative": (coefficient * negative).sum() / negative.sum().clamp(min=1),
    }


def update(stage: Stage, batch: Minibatch, step: int, total_steps: int) -> dict[str, float]:
    """One step of AdamW on a minibatch. Raises: TrainingError where loss or gradient is not finite, the batch saved."""
    settings, policy = stage.settings, stage.policy
    stage.optimizer.zero_grad()
    try:
        with sharding.gathered(policy):
            loss, logged = losses(stage, batch, step)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
    except NumericalError as error:
        raise TrainingError(
            f"update {step}: {error}; the batch is saved in {save_batch(stage, batch, step)}. "
            "Lower --learning-rate, or look at the rewards in metrics.jsonl"
        ) from error
    parallel.add_gradients_up(policy)
    norm = parallel.clip_gradients(policy, settings.clip_norm)
    if not math.isfinite(float(norm)) or not math.isfinite(float(loss.detach())):
        path = save_batch(stage, batch, step)
        raise TrainingError(
            f"loss {loss.item()} with gradient norm {norm.item()} at update {step}; the batch is saved in {path}. "
            "Lower --learning-rate, or look at the rewards in metrics.jsonl"
        )
    rate = learning_rate_at(step, total_steps, settings.learning_rate, settings.warmup_share)
    for group in stage.optimizer.param_groups:
        group["lr"] = rate
    stage.optimizer.step()
    return {name: value.item() for name, value in logged.items()} | {
        "loss": float(loss.detach()),
        "gradient_norm": float(norm),
        "learning_rate": rate,
    }


def save_batch(stage: Stage, batch: Minibatch, step: int) -> Path:
    """Save what an update that failed was given; returns where."""
    stage.work.mkdir(parents=True, exist_ok=True)
    path = stage.work / f"bad-batch-{step}-rank{parallel.rank()}.safetensors"
    tensors = {name: getattr(batch.contexts, name) for name in ("items", "lengths", "targets")}
    if batch.rollouts is not None and batch.advantages is not None:
        tensors |= {name: getattr(batch.rollouts, name) for name in ("slates", "old_logprobs", "rewards")}
        tensors["advantages"] = batch.advantages
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path)
    return path
