"""A round of alignment: slates, rewards, advantages, and the updates that they serve.

Shapes: B contexts of a minibatch, G slates of each, K places, M rewards, F free tokens of all slates. Units are slates,
or items with credit "item": B' = B of G slates each, or B K of G items each; T the most free tokens of a unit.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sagerec.decoding.cases import read_histories
from sagerec.decoding.rollouts import roll_out, score_slates
from sagerec.errors import NumericalError, TrainingError
from sagerec.objectives.loss import (
    PolicyLoss,
    compute_advantages,
    deferred_policy_loss,
    policy_loss,
    ratio_spread,
)
from sagerec.objectives.rewards import RewardInputs, compute_rewards, of_items, slate_coldness, slate_diversity
from sagerec.objectives.table import Objective
from sagerec.policies.protocol import AnyPolicy
from sagerec.training import parallel, sharding
from sagerec.training.batches import Windows, device_batch, on_device, shuffled_batches
from sagerec.training.layout import as_units, lay_out
from sagerec.training.loop import autocast, learning_rate_at
from sagerec.training.minibatches import CaseBatch as CaseBatch
from sagerec.training.minibatches import Minibatch as Minibatch
from sagerec.training.minibatches import Rollouts as Rollouts
from sagerec.training.minibatches import Stage as Stage
from sagerec.training.minibatches import pieces
from sagerec.training.settings import AlignSettings, rollout_of

UNSOUND = "unsound"
"""Ranks on which something that a policy loss reads is out of range."""
SUMMED = (UNSOUND, "loss", "policy_loss", "sft_loss_nats", "replay_loss_nats")
"""Figures of a minibatch's pieces that add up; the others are means."""
REPLAY = 1
"""Tells the replay's random order from that of the contexts."""


def read_cases(stage: Stage, index: np.ndarray) -> CaseBatch:
    """The rank's share of the cases `index`."""
    own, policy = index[parallel.own_share(len(index))], stage.policy
    history, length = read_histories(policy, stage.cases, own)
    items, lengths, targets = on_device(policy.device, history, length, stage.cases.targets[own].astype(np.int64))
    excluded = on_device(policy.device, stage.cases.taken(own))[0] if stage.exclude_history else None
    space = policy.space
    return CaseBatch(len(index), own, items, lengths, excluded, space.trie.item[space.leaf(targets)].long())


def roll_contexts(stage: Stage, contexts: CaseBatch, generator: torch.Generator) -> Rollouts:
    """Slates for the contexts and what they earn, without the reference's word on them."""
    settings, policy = stage.settings, stage.policy
    rollout, per_item = rollout_of(settings, policy), settings.credit == "item"
    # Every rank draws for all contexts and takes its own, so that a context's slates do not hang on the ranks.
    draws = rollout.k if rollout.writing == "items" else policy.space.longest
    shape = (contexts.total, rollout.slates - rollout.n_beams, draws)
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)[parallel.own_share(contexts.total)]
    history = (contexts.items, contexts.lengths)
    rolled = roll_out(policy, *history, rollout, excluded=contexts.excluded, uniforms=uniforms.to(policy.device))
    slates = rolled.items
    layout = lay_out(rolled.tokens, (len(slates), rollout.slates, rollout.k), per_item=per_item)
    inputs = RewardInputs(
        sample_ids=torch.from_numpy(stage.cases.rows[contexts.index]).to(policy.device),
        slates=slates,
        targets=contexts.targets,
        logprobs=rolled.scores().sum(dim=2),
        facts=stage.facts,
        feedback=stage.feedback.answers(
            contexts.index,
            *stage.cases.histories(contexts.index, policy.max_items),
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
    return Rollouts(slates, layout, old, None, earned, diversity, coldness, rolled.texts)


@torch.no_grad()
def with_reference(stage: Stage, contexts: CaseBatch, rolled: Rollouts) -> Rollouts:
    """The rollouts with their log-probabilities under the policy that alignment started from."""
    assert stage.reference is not None
    given: dict[str, Any] = {"temperature": stage.settings.temperature, "excluded": contexts.excluded}
    scored = score_slates(stage.reference, contexts.items, contexts.lengths, rolled.slates, rolled.texts, **given)
    return replace(rolled, reference=rolled.layout.fill(scored.tokens.logprobs))


def roll_together(
    stage: Stage, batches: Sequence[np.ndarray], generator: torch.Generator
) -> tuple[list[CaseBatch], list[Rollouts]]:
    """The contexts of minibatches and their slates, rolled out all at once where a GPU has static shapes for it."""
    if len(batches) == 1 or not stage.policy.has_static_shapes or parallel.n_ranks() > 1:
        contexts = [read_cases(stage, index) for index in batches]
        return contexts, [roll_contexts(stage, c, generator) for c in contexts]
    whole = read_cases(stage, np.concatenate(batches))
    rolled = roll_contexts(stage, whole, generator)
    ends = np.cumsum([len(index) for index in batches]).tolist()
    rows = [slice(end - len(index), end) for index, end in zip(batches, ends, strict=True)]
    return [whole.part(own) for own in rows], [rolled.part(own) for own in rows]


def roll_round(stage: Stage, batches: Sequence[np.ndarray], number: int) -> tuple[list[Minibatch], dict[str, float]]:
    """The minibatches of round `number`, with advantages over all of them and all ranks, and what is logged."""
    settings, policy = stage.settings, stage.policy
    if settings.row.trains_on_targets:
        return [Minibatch(read_cases(stage, index)) for index in batches], {}
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    policy.eval()
    # The divergence is logged of the first minibatch, and of all where the loss holds it.
    gathered_reference = nullcontext() if stage.reference is None else sharding.gathered(stage.reference)
    with autocast(stage.compute.precision, policy.device), sharding.gathered(policy), gathered_reference:
        contexts, rolled = roll_together(stage, batches, generator)
        for i, c in enumerate(contexts if stage.reference is not None else []):
            if i == 0 or settings.kl_weight > 0:
                rolled[i] = with_reference(stage, c, rolled[i])
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
    means = rewards.flatten(0, 1).mean(dim=0)
    figures = {f"reward/{name}": value for name, value in zip(stage.rewards, means, strict=True)} | {
        "groups_with_hit": hits.float().mean(),
        "advantage_std": advantages.std(),
        "advantage_max": advantages.abs().max(),
        **dict(
            zip(
                ("diversity_q10", "diversity_q50", "diversity_q90"),
                torch.quantile(diversity, levels),
                strict=True,
            )
        ),
        "coldness": torch.cat([r.coldness.flatten() for r in rolled]).mean(),
        "invalid_rate": (items < 0).float().mean(),
        "duplicate_rate": repeats.sum() / items.numel(),
    }
    if first.reference is not None:
        figures["kl_nats"] = k3(first.old_logprobs, first.reference, first.layout.mask)
    return read_figures(figures)


def k3(new: Tensor, reference: Tensor, counted: Tensor, total: Tensor | None = None) -> Tensor:
    """Mean over counted tokens of exp(ref - new) - (ref - new) - 1 >= 0, in nats a token.

    Over samples of the new policy an estimate of KL(new || ref); over beam slates, of its most probable part. `total`
    is the number of tokens to divide by, over all ranks. Schulman, "Approximating KL divergence" (2020).
    """
    difference = (reference - new).clamp(max=20.0)
    divisor = counted.sum() if total is None else total
    return ((difference.exp() - difference - 1) * counted).sum() / divisor.clamp(min=1)


def losses(
    stage: Stage,
    batch: Minibatch,
    step: int,
    *,
    whole: Minibatch | None = None,
    number: int = 0,
    check: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rank's part of the loss of a minibatch, and detached figures, `unsound` among them: whether anything is out
    of range. With `check` that is a NumericalError.

    Of a piece of the minibatch `whole`, its `number`-th, it is that piece's part; the first has the replay.
    """
    whole = batch if whole is None else whole
    settings, policy, contexts = stage.settings, stage.policy, batch.contexts
    total = torch.zeros((), device=policy.device)
    logged: dict[str, Tensor] = {}
    if batch.rollouts is not None:
        policy.eval()
        total, logged = slate_loss(stage, batch, settings.row, whole=whole, check=check)
    # Dropout hangs on seed, update, piece and rank alone, so that a resumed run draws the same masks.
    torch.manual_seed(settings.seed * 7_368_787 + step + number * 15_485_863 + parallel.rank() * 1_000_000_007)
    policy.train()
    if weight := 1.0 if settings.row.trains_on_targets else settings.sft_weight:
        # One target a context, after its last item; the rank's part of the mean over all targets.
        given = last_targets(contexts)
        sft = policy.next_item_loss(*given)
        n_own = n_all = policy.n_targets(*given)
        if batch is not whole:
            n_all = policy.n_targets(*last_targets(whole.contexts))
            sft = sft * n_own / n_all.clamp(min=1)
        sft = sft * parallel.share_of(n_all)
        total = total + weight * sft
        logged["sft_loss_nats"] = sft.detach()
    if stage.replay is not None and number == 0:
        replayed = replay_loss(policy, stage.replay, step, settings)
        total = total + settings.replay_weight * replayed
        logged["replay_loss_nats"] = replayed.detach()
    policy.eval()
    return total, logged


def last_targets(contexts: CaseBatch) -> tuple[Tensor, Tensor, Tensor]:
    """What `next_item_loss` takes of contexts: histories, targets and the last places (B, T) each."""
    last = torch.arange(contexts.items.shape[1], device=contexts.items.device) == contexts.lengths[:, None] - 1
    return contexts.items, contexts.targets[:, None].expand_as(contexts.items), last


def slate_loss(
    stage: Stage, batch: Minibatch, row: Objective, *, whole: Minibatch | None = None, check: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of `losses` that slates have in it: policy loss, divergence and entropy, with what is logged of them.

    Without `check`, and in static shapes, nothing is read from the device and no operation hangs on values.
    """
    settings, policy, contexts, rolled = stage.settings, stage.policy, batch.contexts, batch.rollouts
    assert rolled is not None
    assert batch.advantages is not None
    layout = rolled.layout
    scored, entropy = score_slates(
        policy,
        contexts.items,
        contexts.lengths,
        rolled.slates,
        rolled.texts,
        temperature=settings.temperature,
        excluded=contexts.excluded,
    )
    new, mask = layout.fill(scored.logprobs), layout.mask
    every = mask if whole is None or whole.rollouts is None else whole.rollouts.layout.mask
    n_units = torch.full((), every.shape[0] * every.shape[1], dtype=torch.float32, device=mask.device)
    sizes = {"slate": n_units, "token": every.sum().float(), "constant": n_units * stage.longest}
    found = (policy_loss if check else deferred_policy_loss)(
        row,
        logprobs=new,
        old_logprobs=rolled.old_logprobs,
        mask=mask,
        advantages=batch.advantages,
        diversity=rolled.diversity,
        coldness=rolled.coldness,
        denominator=parallel.add_up(sizes[row.aggregation]).clamp(min=1),
        spread=global_spread(row, new, rolled.old_logprobs, mask) if row.needs_spread else None,
    )
    total = settings.policy_weight * found.loss
    logged = bound_figures(found, mask)
    logged |= {"policy_loss": found.loss.detach(), "entropy_nats": entropy.detach()}
    logged[UNSOUND] = parallel.add_up(1.0 - found.sound.float())
    if settings.kl_weight:
        assert rolled.reference is not None
        n_tokens = parallel.add_up(every.sum().float())
        total = total + settings.kl_weight * k3(new, rolled.reference, mask, n_tokens)
    if settings.entropy_weight:
        total = total - settings.entropy_weight * (len(contexts.index) / contexts.total) * entropy
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
    inputs, targets, counted = device_batch(windows, own, policy.device)
    share = parallel.share_of(policy.n_targets(inputs, targets, counted))
    return policy.next_item_loss(inputs, targets, counted) * share


def bound_figures(found: PolicyLoss, mask: Tensor) -> dict[str, Tensor]:
    """Quantiles of the ratio, shares of units at each bound, and mean coefficients of both signs.

    Units are slates, or, for token ratios, the tokens that `mask` (B, G, T) counts.
    """
    ratio, at_bound = found.diagnostics["ratio"], found.diagnostics["at_bound"]
    coefficient, advantages = found.coefficient, found.advantages
    counted = mask if ratio.ndim == 3 else torch.ones_like(at_bound)
    advantages = advantages.unsqueeze(2).expand_as(ratio) if ratio.ndim == 3 else advantages
    positive, negative, n = counted & (advantages > 0), counted & (advantages < 0), counted.sum().clamp(min=1)
    some = slice(None, None, max(1, ratio.numel() // 4096))
    low, middle, high = quantiles(ratio.flatten()[some].float(), counted.flatten()[some], (0.05, 0.5, 0.95))
    return {
        "ratio_q05": low,
        "ratio_q50": middle,
        "ratio_q95": high,
        "share_at_upper": (at_bound & positive).sum() / n,
        "share_at_lower": (at_bound & negative).sum() / n,
        "coefficient_positive": (coefficient * positive).sum() / positive.sum().clamp(min=1),
        "coefficient_negative": (coefficient * negative).sum() / negative.sum().clamp(min=1),
    }


def quantiles(values: Tensor, counted: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Quantiles () of those of values (n,) that are counted (n,), between neighbours in proportion, as `torch.quantile`
    gives them; that looks at values to check them.
    """
    ordered, last = values.masked_fill(~counted, math.inf).sort().values, (counted.sum() - 1).clamp(min=0)
    found = []
    for share in shares:
        at = last * share
        below = at.floor().long()
        ends = torch.stack([below, torch.minimum(below + 1, last)])
        low, high = ordered.gather(0, ends).unbind()
        found.append(torch.lerp(low, high, (at - below).to(low.dtype)))
    return found


def update(stage: Stage, batch: Minibatch, step: int, total_steps: int) -> dict[str, float]:
    """One step of AdamW on a minibatch. Raises: TrainingError where loss or gradient is not finite, the batch saved."""
    settings, policy = stage.settings, stage.policy
    stage.optimizer.zero_grad()
    logged: dict[str, Tensor] = {}
    with sharding.gathered(policy):
        for number, piece in enumerate(pieces(batch, stage.compute.micro_users)):
            with autocast(stage.compute.precision, policy.device):
                loss, found = losses(stage, piece, step, whole=batch, number=number)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            share = 1.0 if piece is batch else len(piece.contexts.index) / len(batch.contexts.index)
            for name, value in (found | {"loss": loss.detach()}).items():
                logged[name] = logged.get(name, 0.0) + value * (1.0 if name in SUMMED else share)
    parallel.add_gradients_up(policy)
    logged["gradient_norm"] = parallel.clip_gradients(policy, settings.clip_norm)
    figures = read_figures(logged)
    if figures.pop(UNSOUND, 0.0) or not math.isfinite(figures["gradient_norm"] + figures["loss"]):
        path = save_batch(stage, batch, step)
        try:
            with autocast(stage.compute.precision, policy.device), sharding.gathered(policy):
                for number, piece in enumerate(pieces(batch, stage.compute.micro_users)):
                    losses(stage, piece, step, whole=batch, number=number, check=True)
        except NumericalError as error:
            raise TrainingError(
                f"update {step}: {error}; the batch is saved in {path}. "
                "Lower --learning-rate, or look at the rewards in metrics.jsonl"
            ) from error
        raise TrainingError(
            f"loss {figures['loss']} with gradient norm {figures['gradient_norm']} at update {step}; the batch is "
            f"saved in {path}. Lower --learning-rate, or look at the rewards in metrics.jsonl"
        )
    rate = learning_rate_at(step, total_steps, settings.learning_rate, settings.warmup_share)
    for group in stage.optimizer.param_groups:
        group["lr"] = rate
    stage.optimizer.step()
    return figures | {"learning_rate": rate}


def read_figures(logged: dict[str, Tensor]) -> dict[str, float]:
    """Figures () off the device, all in one wait for it."""
    read = torch.stack([value.detach().double() for value in logged.values()]).tolist()
    return dict(zip(logged, read, strict=True))


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
