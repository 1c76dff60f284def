"""Bounds: what an objective maximises of a ratio and an advantage, and how far its gradient may go.

The third of an objective's four parts. A unit is a token or a slate. Each bound returns, for every unit, the surrogate
s (its contribution to what is maximised) and the coefficient c in closed form, defined by

    ds / d log p = c A,

so that a unit's gradient is c A grad log p. The tests differentiate the published surrogates and compare.

Shapes: every argument is (...), one value a unit, or broadcasts against that. r = p / q is the ratio of the new to the
old probability, above 0 and finite, A the advantage; all are detached.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Bounded(NamedTuple):
    """One value a unit, each of the units' shape."""

    surrogate: Tensor
    """s, to be maximised."""
    coefficient: Tensor
    """c = (ds / d log p) / A."""
    at_bound: Tensor
    """bool: the bound acts, so that c is not what the ratio alone would give."""


def unbounded(logp: Tensor, advantage: Tensor) -> Bounded:
    """S = A log p, c = 1: REINFORCE, which knows no old policy."""
    return Bounded(logp * advantage, torch.ones_like(logp), torch.zeros_like(logp, dtype=torch.bool))


def clip(
    ratio: Tensor, advantage: Tensor, *, low: float | Tensor, high: float | Tensor, dual: float | None = None
) -> Bounded:
    """PPO's bound: the gradient of what has gone far enough is cut to zero.

    s = min(r A, clip(r, 1 - low, 1 + high) A);  c = r, and 0 where r > 1 + high, A > 0 or r < 1 - low, A < 0.

    PPO (arXiv 1707.06347); clip-higher with high > low (DAPO, arXiv 2503.14476). `dual` bounds negatives as well:
    s >= dual A, so c = 0 where r > dual, A < 0 (Ye et al., arXiv 1912.09729).
    """
    free = ratio * advantage
    limited = ratio.clamp(min=1 - low).clamp_(max=1 + high).mul_(advantage)
    surrogate = torch.minimum(free, limited, out=limited)
    if dual is not None:
        surrogate = torch.maximum(surrogate, torch.where(advantage < 0, dual * advantage, -torch.inf))
    cut = torch.ne(surrogate, free, out=torch.empty_like(free))  # 1 or 0, as in `_above`
    return Bounded(surrogate, torch.addcmul(ratio, ratio, cut, value=-1), cut.to(torch.bool))


def up_clip(ratio: Tensor, advantage: Tensor, *, low: float, dual: float | None) -> Bounded:
    """A > 0: s = p / sg(p) A, c = 1 whatever r;  else `clip` with `dual`.

    UP-GRPO (arXiv 2607.06987): successes keep their gradient however far they went, failures are bounded on both sides.
    """
    return clip(torch.where(advantage > 0, 1.0, ratio), advantage, low=low, high=0.0, dual=dual)


def cap(ratio: Tensor, logp: Tensor, advantage: Tensor, *, most: float) -> Bounded:
    """S = sg(min(r, most)) A log p, c = min(r, most): no gradient is cut. CISPO (arXiv 2506.13585), as in TRL."""
    coefficient = ratio.clamp(max=most)
    return Bounded(coefficient * advantage * logp, coefficient, _above(ratio, coefficient))


def early_clip(ratio: Tensor, advantage: Tensor, *, low: float, high: float, margin: float) -> Bounded:
    """`clip` on r' = p / max(q, sg(p) / (1 + high + margin)) where A < 0: c is at most 1 + high + margin there.

    ECPO (OneRec, arXiv 2506.13695).
    """
    limit = torch.where(advantage < 0, advantage.new_tensor(1 + high + margin), torch.inf)
    inner = clip(torch.minimum(ratio, limit), advantage, low=low, high=high)
    return inner._replace(at_bound=inner.at_bound | _above(ratio, limit))


def gradient_bound(
    ratio: Tensor,
    logp: Tensor,
    advantage: Tensor,
    *,
    boost: float | Tensor = 0.0,
    penalty: float | Tensor = 0.0,
    boost_form: Literal["scaled", "bound"] = "scaled",
) -> Bounded:
    """S = p / sg(d) A, c = p / d: no unit's gradient is cut, and d bounds it.

    A >= 0:  d = max(q, sg p) / (1 + b),    c = (1 + b) min(r, 1)          "scaled" (a reading of the abstract)
             d = max(q, sg p / (1 + b)),    c = min(r, 1 + b)              "bound"
    A <  0:  d = max(q, 1 - sg p) / kappa,  c = kappa min(r, p / (1 - p)),  kappa = 1 + penalty

    With boost b = 0 and penalty 0, GBPO (OneRec-V2, arXiv 2508.20900); else SAGE (arXiv 2601.21452). 1 - p is taken
    from the logarithm, p / (1 - p) = 1 / (exp(-log p) - 1), so that p near 1 loses no digits, and p = 1 leaves
    min(r, infinity) = r.
    """
    negative = advantage < 0
    odds = logp.abs().expm1_().reciprocal_()
    scaled = boost_form == "scaled"
    limit = torch.where(negative, odds, 1.0 if scaled else 1.0 + boost)
    extra = torch.where(negative, torch.as_tensor(penalty).to(logp), boost if scaled else 0.0)
    bounded = torch.minimum(ratio, limit)
    coefficient = torch.addcmul(bounded, bounded, extra)
    return Bounded(coefficient * advantage, coefficient, ratio > limit)


def _above(ratio: Tensor, limit: Tensor) -> Tensor:
    """Whether r > limit, token by token: several times as fast as the comparison that makes booleans at once."""
    return torch.gt(ratio, limit, out=torch.empty_like(ratio)).to(torch.bool)
