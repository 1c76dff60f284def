"""The loss of an objective: value and gradient in closed form, for any row of `table`.

    loss = - sum_units w s(r, A),    d loss / d log pi(o_t) = - c A w_t

c is the coefficient of `bounds`, w_t the weight that the aggregation gives to a counted token. It asks for
log-probabilities and rewards and drops into any trainer.

Where the paper's abstract leaves SAGE's formulas open, the reading is that of `bounds.gradient_bound`.

Shapes: B contexts, G slates of each, T tokens of the longest slate, M rewards.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sagerec.config import require
from sagerec.errors import NumericalError, SettingsError
from sagerec.objectives import advantages, bounds
from sagerec.objectives.table import Objective, find_objective

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are held within +- this many nats, as in verl, so that no exponential overflows."""

ROUNDING = 0.01
"""Log-probabilities may lie this many nats above 0: a log-softmax is rounded."""


SOUND, UNSOUND = torch.tensor(True), torch.tensor(False)


class PolicyLoss(NamedTuple):
    """What an objective says of a batch."""

    loss: Tensor
    """() to be minimised, with gradient to `logprobs`."""
    advantages: Tensor
    """(B, G), detached."""
    coefficient: Tensor
    """c: (B, G), or (B, G, T) for token ratios with 0 where the mask is False; detached."""
    diagnostics: dict[str, Tensor]
    """`ratio` and `at_bound` (bool), of the shape of the coefficient; detached."""
    sound: Tensor
    """() bool, on the device: nothing is out of range. True wherever `policy_loss` itself checks it."""


class _WithGradient(torch.autograd.Function):
    """`value`, whose gradient with respect to `logprobs` (B, G, T) is `slope` (B, G, 1) x `share` (B, G, T)."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, value: Tensor, slope: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(slope, share)
        ctx.dtype = logprobs.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        slope, share = ctx.saved_tensors
        return (upstream * slope * share).to(ctx.dtype), None, None, None


def compute_advantages(
    objective: str | Objective,
    rewards: Tensor,
    *,
    weights: Tensor | None = None,
    group: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """Advantages (B, G) of rewards (B, G, M) under the objective's row.

    Call it on all slates of a step, of every rank and accumulation step, and give `policy_loss` the part that it
    needs: the statistics are then those of the global batch.

    Args: weights (M,), 1 if not given; group (B, G) integer ids for ragged groups; tokens (B, G) counted tokens, for
    `decoupled-token` alone.

    Returned in the type of the rewards, at least float32; where that overflows on the way, computed in float64.

    Raises: SettingsError for a wrong shape or type; NumericalError for a reward, weight or number of tokens that is not
    finite, or an advantage that the type does not hold.
    """
    row = find_objective(objective)
    found = _advantages(row, rewards, weights, group, tokens)
    if math.isfinite(found.sum().item()):
        return found
    what = "advantages are not finite"
    given: dict[str, Tensor | None] = {"rewards": rewards, "weights": weights, "tokens": tokens}
    _refuse([_first_bad(name, values) for name, values in given.items()], what)
    found = _advantages(row, rewards.double(), weights, group, tokens).to(found.dtype)
    _refuse([_first_bad("advantages", found)], f"{what}: rewards of up to {float(rewards.abs().max()):g} overflow")
    return found


def _advantages(
    row: Objective, rewards: Tensor, weights: Tensor | None, group: Tensor | None, tokens: Tensor | None
) -> Tensor:
    """`compute_advantages` before it looks whether they are finite."""
    for name, given in (("rewards", rewards), ("weights", weights)):
        if given is not None and (not isinstance(given, Tensor) or given.is_complex()):
            got = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise SettingsError(f"{name} are {got}; expected a tensor of real numbers")
    if rewards.ndim != 3 or rewards.shape[2] == 0:
        raise SettingsError(f"rewards have shape {tuple(rewards.shape)}; expected (B, G, M): add the last dimension")
    for name, given in (("group", group), ("tokens", tokens)):
        if given is not None and given.shape != rewards.shape[:2]:
            raise SettingsError(f"{name} has shape {tuple(given.shape)}; expected {tuple(rewards.shape[:2])}")
    if group is not None and (group.is_floating_point() or group.is_complex()):
        raise SettingsError(f"group has type {group.dtype}; expected integers")
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    weights = rewards.new_ones(rewards.shape[2]) if weights is None else weights.detach().to(rewards)
    if weights.shape != rewards.shape[2:]:
        raise SettingsError(f"weights have shape {tuple(weights.shape)}; expected ({rewards.shape[2]},), one a reward")
    if row.advantage == "raw":
        return advantages.summed(rewards, weights)
    if row.advantage == "ternary":
        return advantages.ternary(rewards, weights)
    if row.advantage == "mean":
        return advantages.mean_centred(rewards, weights, group)
    if row.advantage == "normalised":
        return advantages.group_normalised(rewards, weights, group, eps=row.eps)
    if row.advantage == "decoupled":
        return advantages.decoupled(rewards, weights, group, eps=row.eps)
    require(tokens is not None, "decoupled-token needs tokens (B, G): the number of counted tokens of each slate")
    return advantages.decoupled(rewards, weights, group, eps=row.eps, tokens=tokens)


def policy_loss(
    objective: str | Objective,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    rewards: Tensor | None = None,
    weights: Tensor | None = None,
    diversity: Tensor | None = None,
    coldness: Tensor | None = None,
    group: Tensor | None = None,
    denominator: float | Tensor | None = None,
    advantages: Tensor | None = None,
    spread: float | Tensor | None = None,
) -> PolicyLoss:
    """The loss of an objective, with its gradient to `logprobs`.

    Args:
        objective: a name of `OBJECTIVES`, or a row of one's own.
        logprobs: (B, G, T) log pi(o_t) in nats under the policy that is trained.
        old_logprobs: (B, G, T) the same under the policy that wrote the slates, stored when it did.
        mask: (B, G, T) bool, True where a token counts; what stands elsewhere is never read.
        rewards: (B, G, M); normalised over groups and batch as the row says. Not needed with `advantages`.
        weights: (M,) of the rewards, 1 if not given.
        diversity: (B, G) H in [0, 1], for an entropy penalty.
        coldness: (B, G) share of cold items in [0, 1], for a boost of scope "cold".
        group: (B, G) integer ids, where a group is not a row.
        denominator: what the sum is divided by, the global number of slates (aggregation "slate"), of counted tokens
            ("token") or slates x longest slate ("constant"). Taken from this batch if not given; with the global one,
            losses of accumulation steps and ranks add up to that of the large batch.
        advantages: (B, G) from `compute_advantages` on the global batch, in place of `rewards`.
        spread: `ratio_spread` of the global batch, the unit of boost and penalty where a row's `bound_unit` says so;
            that of this batch if not given.

    A slate without a counted token adds 0. Log-ratios are held within 20 nats of 0. bfloat16 and float16 are computed
    in float32.

    Raises: SettingsError for a wrong shape or type, or a missing argument; NumericalError, with argument, place and
    value, for what is not finite or out of its range: a counted log-probability above 0 (by more than rounding), a
    diversity or coldness outside [0, 1] that the row reads, a denominator of 0 or less, a spread below 0; and where
    loss or gradient is not finite in the type in which it is returned. (A gradient that only the loss scaling of the
    caller takes out of range is infinite, as its GradScaler expects.) To see that nothing is out of range waits for a
    GPU; in `torch.compile`, whose graph nothing here breaks, it is left to the caller, as in `deferred_policy_loss`.

    """
    return _policy_loss(
        find_objective(objective),
        reads=not torch.compiler.is_compiling(),
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        rewards=rewards,
        weights=weights,
        diversity=diversity,
        coldness=coldness,
        group=group,
        denominator=denominator,
        advantages=advantages,
        spread=spread,
    )


def deferred_policy_loss(objective: str | Objective, **given: Any) -> PolicyLoss:
    """`policy_loss` of the same arguments that reads nothing from the device and refuses no value.

    The caller looks at `sound` when it reads other figures, and calls `policy_loss` to be told what is wrong.
    """
    return _policy_loss(find_objective(objective), reads=False, **given)


def _policy_loss(
    row: Objective,
    *,
    reads: bool,
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    rewards: Tensor | None = None,
    weights: Tensor | None = None,
    diversity: Tensor | None = None,
    coldness: Tensor | None = None,
    group: Tensor | None = None,
    denominator: float | Tensor | None = None,
    advantages: Tensor | None = None,
    spread: float | Tensor | None = None,
) -> PolicyLoss:
    """Both of the above; values are looked at only if it `reads`."""
    _check(row, logprobs, old_logprobs, mask, rewards, advantages, diversity, coldness, denominator, spread)
    given: dict[str, Any] = {"logprobs": logprobs, "old_logprobs": old_logprobs}
    facts: dict[str, Any] = {"mask": mask, "denominator": denominator, "spread": spread}
    facts |= {"diversity": diversity if row.needs_diversity else None}
    facts |= {"coldness": coldness if row.needs_coldness else None}
    if not reads:
        read = {name: x.where(mask, 0.0) for name, x in given.items()}
        return _evaluate(row, **read, rewards=rewards, weights=weights, group=group, gain=advantages, **facts)[0]
    found, _, _ = _evaluate(row, **given, rewards=rewards, weights=weights, group=group, gain=advantages, **facts)
    if bool(found.sound):
        return found
    for name, number, least in (("denominator", denominator, "above 0"), ("spread", spread, "of at least 0")):
        if number is not None and _fault(number, positive=name == "denominator") > 0:
            raise NumericalError(f"{name} is {float(number)}, expected a finite number {least}")
    what, gain = f"the loss of {row.name} is {found.loss.item()}", found.advantages
    if rewards is not None:
        gain = compute_advantages(row, rewards, weights=weights, group=group, tokens=mask.sum(dim=2))
    # What stands at uncounted places is never read: it may be anything, and 0 times infinity is not 0.
    read = {name: x.where(mask, 0.0) for name, x in given.items()}
    faults = [_first_bad("advantages", gain), *(_first_bad(name, x, high=ROUNDING) for name, x in read.items())]
    _refuse([*faults, *(_first_bad(name, facts[name], 0.0, 1.0) for name in ("diversity", "coldness"))], what)
    found, slope, share = _evaluate(row, **read, gain=gain, **facts)
    if not math.isfinite(found.loss.item()):
        raise NumericalError(f"{what}: the inputs are finite, and their products overflow {found.loss.dtype}")
    if not bool(found.sound):
        raise NumericalError(
            f"the gradient of {row.name} reaches {(slope * share).abs().max().item():.3g}, and {logprobs.dtype} holds "
            f"{torch.finfo(logprobs.dtype).max:.3g}; expected smaller advantages, or log-probabilities in float32"
        )
    return found


def _evaluate(
    row: Objective,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    gain: Tensor | None,
    diversity: Tensor | None,
    coldness: Tensor | None,
    denominator: float | Tensor | None,
    spread: float | Tensor | None,
    rewards: Tensor | None = None,
    weights: Tensor | None = None,
    group: Tensor | None = None,
) -> tuple[PolicyLoss, Tensor, Tensor]:
    """`policy_loss` whatever is given, and the two factors of its gradient; nothing is read from a GPU."""
    bits = mask if torch.compiler.is_compiling() else mask.view(torch.uint8)  # without a compiler bytes convert faster
    counted = bits.to(torch.promote_types(logprobs.dtype, torch.float32))
    counts = counted.sum(dim=2)
    if gain is None:
        assert rewards is not None
        tokens = counts if row.advantage == "decoupled-token" else None
        gain = _advantages(row, rewards, weights, group, tokens)
    new, old, gain = logprobs.detach().to(counted), old_logprobs.detach().to(counted), gain.detach().to(counted)
    divisor = counts.clamp(min=1)
    per_token = _token_weight(row, counts, divisor, mask.shape[2], denominator)  # (B, G), or () where all weigh alike
    if row.ratio != "token":
        logp = (new * counted).sum(dim=2) / divisor
        nats = logp - (old * counted).sum(dim=2) / divisor
    else:
        logp, nats = new, new - old
    distance = nats.sum()
    unit: float | Tensor = 1.0
    if row.needs_spread:
        unit = ratio_spread(row, logprobs=new, old_logprobs=old, mask=mask) if spread is None else spread
    if row.ratio == "unit":
        nats = torch.zeros_like(nats)
    ratio = nats.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp_()
    if row.ratio != "token":
        found = _bound(row, ratio, logp, gain, diversity, coldness, unit)
        value = _dot(found.surrogate, counts * per_token)
        slope, share = (found.coefficient * gain * per_token).unsqueeze(2), counted
    else:
        wide = [None if x is None else x.unsqueeze(2) for x in (diversity, coldness)]
        found = _bound(row, ratio, new, gain.unsqueeze(2), wide[0], wide[1], unit)
        found = found._replace(coefficient=found.coefficient.mul_(counted), at_bound=found.at_bound & mask)
        value = _dot(found.surrogate.mul_(counted).sum(dim=2), per_token.expand_as(counts))
        slope, share = (gain * per_token).unsqueeze(2), found.coefficient
    ranges: list[tuple[float | Tensor, float, float]] = [(x, -math.inf, math.inf) for x in (value, distance)]
    ranges += [(x.amax(), -math.inf, ROUNDING) for x in (new, old) if x.numel()]
    for one in (diversity, coldness):
        if one is not None and one.numel():
            ends = one.aminmax()
            ranges += [(ends.min, 0.0, math.inf), (ends.max, -math.inf, 1.0)]
    numbers = [_fault(x, positive=x is denominator) for x in (denominator, spread) if x is not None]
    sound = _are_within(ranges + [(fault, 0.0, 0.0) for fault in numbers], value)
    if logprobs.dtype != counted.dtype:
        sound = sound & (slope * share).to(logprobs.dtype).isfinite().all()
    return (
        PolicyLoss(
            loss=_WithGradient.apply(logprobs, value, slope, share),  # type: ignore[no-untyped-call]
            advantages=gain,
            coefficient=found.coefficient,
            diagnostics={"ratio": ratio, "at_bound": found.at_bound},
            sound=sound,
        ),
        slope,
        share,
    )


def ratio_spread(objective: str | Objective, *, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Root mean square of log r over slates, or over counted tokens for token ratios: how far ratios are from 1, ()."""
    nats = (logprobs.detach() - old_logprobs.detach()).masked_fill(~mask, 0.0)
    counted, n = nats, mask.sum()
    if find_objective(objective).ratio != "token":
        counted, n = nats.sum(dim=2) / mask.sum(dim=2).clamp(min=1), n.new_tensor(mask.shape[0] * mask.shape[1])
    return (counted.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).square().sum() / n.clamp(min=1)).sqrt()


def _are_within(ranges: list[tuple[float | Tensor, float, float]], like: Tensor) -> Tensor:
    """() bool: every number is finite and between the two beside it, on the device of `like`. Memory of the CPU is read
    at once, which starts no kernel.
    """
    if like.device.type == "cpu" and not torch.compiler.is_compiling():
        for x, low, high in ranges:
            if not (low <= (number := float(x)) <= high and math.isfinite(number)):
                return UNSOUND
        return SOUND
    held = [x.to(like) if isinstance(x, Tensor) else like.new_full((), x) for x, _, _ in ranges]
    excess = [torch.maximum(x - high, low - x) for x, (_, low, high) in zip(held, ranges, strict=True)]
    finite = torch.stack(held).isfinite().all()
    return finite & (torch.stack(excess).amax() <= 0)


def _fault(number: float | Tensor, *, positive: bool) -> float | Tensor:
    """1 where a number is not finite, is below 0 or, if it must be `positive`, 0; else 0."""
    if isinstance(number, Tensor):
        fine = number.isfinite() & ((number > 0) if positive else (number >= 0))
        return 1.0 - fine.reshape(()).double()
    return float(not (math.isfinite(number) and (number > 0 or (number == 0 and not positive))))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of products."""
    return torch.dot(x.flatten(), y.flatten())


def _bound(
    row: Objective,
    ratio: Tensor,
    logp: Tensor,
    gain: Tensor,
    diversity: Tensor | None,
    coldness: Tensor | None,
    unit: float | Tensor,
) -> bounds.Bounded:
    """The row's bound on units (...), with diversity and coldness in a shape that broadcasts against them.

    `unit` is that of boost and penalty under `adaptive-clip`.
    """
    if row.bound == "none":
        return bounds.unbounded(logp, gain)
    if row.bound == "clip":
        return bounds.clip(ratio, gain, low=row.clip_low, high=row.clip_high, dual=row.dual_clip)
    if row.bound == "up-clip":
        return bounds.up_clip(ratio, gain, low=row.clip_low, dual=row.dual_clip)
    if row.bound == "cap":
        return bounds.cap(ratio, logp, gain, most=row.cap)
    if row.bound == "early-clip":
        return bounds.early_clip(ratio, gain, low=row.clip_low, high=row.clip_high, margin=row.early_margin)
    boost: float | Tensor = row.boost
    if row.needs_coldness:
        assert coldness is not None
        boost = coldness.to(logp) * row.boost
    penalty: float | Tensor = 0.0
    if row.needs_diversity:
        assert diversity is not None
        # lambda - lambda H, in one step.
        penalty = torch.rsub(diversity.to(logp), row.entropy_penalty, alpha=row.entropy_penalty)
    if row.bound == "gradient":
        return bounds.gradient_bound(ratio, logp, gain, boost=boost, penalty=penalty, boost_form=row.boost_form)
    return bounds.clip(ratio, gain, low=row.clip_low + penalty * unit, high=row.clip_high + boost * unit)


def _token_weight(
    row: Objective, counts: Tensor, divisor: Tensor, longest: int, denominator: float | Tensor | None
) -> Tensor:
    """What one counted token weighs in the loss: (B, G), or () where all weigh alike; negative, for a loss falls."""
    if row.aggregation == "slate":
        return (divisor * -(counts.numel() if denominator is None else denominator)).reciprocal_()
    if denominator is None:
        denominator = counts.sum().clamp(min=1) if row.aggregation == "token" else counts.numel() * max(longest, 1)
    return -torch.as_tensor(denominator, dtype=counts.dtype, device=counts.device).reciprocal()


def _check(
    row: Objective,
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    rewards: Tensor | None,
    given: Tensor | None,
    diversity: Tensor | None,
    coldness: Tensor | None,
    denominator: float | Tensor | None,
    spread: float | Tensor | None,
) -> None:
    """Raise SettingsError for what does not fit together."""
    if row.trains_on_targets:
        raise SettingsError(f"{row.name} has no policy loss: it is the control that goes on with supervised training")
    require((rewards is None) != (given is None), "expected either rewards or advantages: give one of the two")
    for name, number in (("denominator", denominator), ("spread", spread)):
        single = isinstance(number, Tensor) and number.numel() == 1
        if not (number is None or single or (isinstance(number, (int, float)) and number is not True)):
            got = tuple(number.shape) if isinstance(number, Tensor) else repr(number)
            raise SettingsError(f"{name} is {got}; expected a number, or a tensor of one")
    for name, given_logprobs in (("logprobs", logprobs), ("old_logprobs", old_logprobs)):
        if not given_logprobs.is_floating_point():
            raise SettingsError(f"{name} have type {given_logprobs.dtype}; expected a floating-point type")
    if logprobs.ndim != 3:
        raise SettingsError(f"logprobs have shape {tuple(logprobs.shape)}; expected (B, G, T)")
    tokens, slates = logprobs.shape, logprobs.shape[:2]
    for name, tensor, shape in (
        ("old_logprobs", old_logprobs, tokens),
        ("mask", mask, tokens),
        ("advantages", given, slates),
        ("diversity", diversity, slates),
        ("coldness", coldness, slates),
    ):
        if tensor is not None and tensor.shape != shape:
            raise SettingsError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if rewards is not None and rewards.shape[:2] != slates:
        raise SettingsError(f"rewards have shape {tuple(rewards.shape)}; expected {(*slates, 'M')}")
    if mask.dtype != torch.bool:
        raise SettingsError(f"mask has type {mask.dtype}; expected torch.bool, True where a token counts")
    if row.needs_diversity and diversity is None:
        raise SettingsError(
            f"{row.name} needs diversity (B, G) in [0, 1] for its entropy penalty; give it, or set entropy_penalty to 0"
        )
    if row.needs_coldness and coldness is None:
        raise SettingsError(
            f"{row.name} needs coldness (B, G) in [0, 1] to boost; give it, or set boost to 0 or boost_scope to 'all'"
        )


def _first_bad(name: str, values: Tensor | None, low: float | None = None, high: float | None = None) -> str:
    """The first value that is not finite or out of range, in words; empty where there is none."""
    if values is None:
        return ""
    fine = values.isfinite()
    fine = fine if low is None else fine & (values >= low)
    fine = fine if high is None else fine & (values <= high)
    bad = (~fine).nonzero()
    if not len(bad):
        return ""
    at = bad[0].tolist()
    ends = " and ".join(f"{word} {end:g}" for word, end in (("at least", low), ("at most", high)) if end is not None)
    return f"{name}{at or ''} is {values[tuple(at)].item()}, expected a finite number {ends}".rstrip()


def _refuse(faults: Sequence[str], what: str) -> None:
    """Raise NumericalError with the faults that there are."""
    if found := [fault for fault in faults if fault]:
        raise NumericalError(f"{what}: {'; '.join(found)}")
