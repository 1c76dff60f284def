"""The table of objectives: each is a row, ratio x advantage x bound x aggregation, and nothing else.

    ratio        token: r_t = pi(o_t) / pi_old(o_t);  sequence: r = exp(mean_t log r_t), the geometric mean (GSPO, SAGE)
                 unit: the same with q set to sg(p), so that r = 1 whoever wrote the slates (OneRec-V2)
    advantage    raw, ternary (nearest of -1, 0, 1), mean, normalised (sum, then normalise), decoupled (normalise each,
                 then sum), decoupled-token
    bound        none, clip, up-clip, cap, early-clip, gradient, adaptive-clip
    aggregation  slate: mean over slates of the mean over their tokens;  token: mean over all tokens;  constant: sum
                 over tokens divided by slates x longest slate

`loss.policy_loss` computes any row of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from sagerec.config import above, at_least, between, check_fields
from sagerec.errors import SettingsError

MOST = 1e9
"""Largest setting of a row."""
_CLIP = ("clip_low", "clip_high")
_ADAPTIVE = ("boost", "boost_scope", "entropy_penalty")
READ_BY_BOUND: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "none": (),
        "clip": (*_CLIP, "dual_clip"),
        "up-clip": ("clip_low", "dual_clip"),
        "cap": ("cap",),
        "early-clip": (*_CLIP, "early_margin"),
        "gradient": (*_ADAPTIVE, "boost_form"),
        "adaptive-clip": (*_CLIP, *_ADAPTIVE),
    }
)
"""Bound -> the settings of a row that it reads."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A row of the table. Change a setting with `dataclasses.replace`."""

    name: str
    """What it is called in reports."""
    ratio: Literal["token", "sequence", "unit"] = "sequence"
    """Unit of the importance ratio."""
    advantage: Literal["raw", "ternary", "mean", "normalised", "decoupled", "decoupled-token"] = "decoupled"
    """How rewards become an advantage (`advantages`)."""
    bound: Literal["none", "clip", "up-clip", "cap", "early-clip", "gradient", "adaptive-clip"] = "gradient"
    """What limits the gradient (`bounds`); adaptive-clip is SAGE's boost and penalty on the bounds of a clip."""
    aggregation: Literal["slate", "token", "constant"] = "slate"
    """How units are averaged."""
    clip_low: float = 0.2
    """A clip's lower bound is 1 - clip_low."""
    clip_high: float = 0.2
    """A clip's upper bound is 1 + clip_high."""
    dual_clip: float | None = None
    """Upper bound of the ratio of negatives under `clip` and `up-clip`; None for none."""
    cap: float = 5.0
    """Upper bound of the coefficient under `cap`."""
    early_margin: float = 0.1
    """Under `early-clip`, the ratio of negatives is held below 1 + clip_high + early_margin."""
    boost: float = 0.0
    """b = boost x coldness, or boost: what successes gain under `gradient` and `adaptive-clip`."""
    boost_form: Literal["scaled", "bound"] = "scaled"
    """Under `gradient`: (1 + b) scales the coefficient, or only raises its bound."""
    boost_scope: Literal["cold", "all"] = "cold"
    """Slates that are boosted: by their share of cold items, or all alike."""
    entropy_penalty: float = 0.0
    """lambda: negatives count 1 + lambda (1 - H) times, H in [0, 1] the slate's diversity."""
    bound_unit: Literal["one", "spread"] = "one"
    """Unit of boost and penalty under `adaptive-clip`: 1, or how far the ratios of a minibatch are from 1
    (`loss.ratio_spread`)."""
    eps: float = 1e-4
    """Added to standard deviations."""
    trains_on_targets: bool = False
    """A control without a policy loss: the stage continues supervised training on the same events."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            clip_low=between(0, 1, below=True),
            clip_high=at_least(0, MOST),
            dual_clip=above(1, MOST),
            cap=above(0, MOST),
            early_margin=at_least(0, MOST),
            boost=at_least(0, MOST),
            entropy_penalty=at_least(0, MOST),
            eps=above(0, MOST),
        )

    @property
    def reads(self) -> frozenset[str]:
        """The settings of a row, from `clip_low` on, that its loss reads."""
        if self.trains_on_targets:
            return frozenset()
        normalises = self.advantage not in ("raw", "ternary", "mean")
        read = {*READ_BY_BOUND[self.bound], *(("eps",) if normalises else ())}
        if self.is_adaptive and self.boost == 0:
            read -= {"boost_form", "boost_scope"}
        return frozenset(read)

    @property
    def is_adaptive(self) -> bool:
        """Whether boost and penalty are read."""
        return self.bound in ("gradient", "adaptive-clip")

    @property
    def compares(self) -> bool:
        """Whether an advantage compares the slates of a context, so that there must be several."""
        return self.advantage not in ("raw", "ternary") and not self.trains_on_targets

    @property
    def needs_spread(self) -> bool:
        return self.bound == "adaptive-clip" and self.bound_unit == "spread"

    @property
    def needs_diversity(self) -> bool:
        return self.is_adaptive and self.entropy_penalty > 0

    @property
    def needs_coldness(self) -> bool:
        return self.is_adaptive and self.boost > 0 and self.boost_scope == "cold"


_GRPO = Objective("grpo", ratio="token", advantage="normalised", bound="clip")
_SAGE = Objective("sage", boost=4.0, entropy_penalty=4.0)
OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        row.name: row
        for row in (
            #                                      what differs from the line above its group
            Objective("sft", trains_on_targets=True),
            Objective("reinforce", ratio="token", advantage="raw", bound="none"),
            _GRPO,
            replace(_GRPO, name="dr_grpo", advantage="mean", aggregation="constant"),
            replace(_GRPO, name="dapo", clip_high=0.28, aggregation="token"),
            replace(_GRPO, name="gspo", ratio="sequence", clip_low=3e-4, clip_high=4e-4),
            replace(_GRPO, name="cispo", bound="cap", aggregation="token"),
            replace(_GRPO, name="gdpo", advantage="decoupled"),
            replace(_GRPO, name="ecpo", bound="early-clip"),
            replace(_GRPO, name="up_grpo", bound="up-clip", dual_clip=3.0),
            Objective("gbpo", advantage="normalised"),
            Objective("gbpo_decoupled"),
            Objective("gbpo_raw", ratio="unit", advantage="ternary"),
            _SAGE,
            replace(_SAGE, name="sage_clip", bound="adaptive-clip", boost=0.5, entropy_penalty=0.5),
            replace(_SAGE, name="sage_no_boost", boost=0.0),
            replace(_SAGE, name="sage_no_penalty", entropy_penalty=0.0),
            replace(_SAGE, name="sage_coupled", advantage="normalised"),
            replace(_SAGE, name="sage_token", ratio="token"),
            replace(_SAGE, name="sage_bound", boost_form="bound"),
            Objective(
                "sage_paper",
                bound="adaptive-clip",
                clip_low=3e-4,
                clip_high=4e-4,
                boost=1.0,
                boost_scope="all",
                entropy_penalty=1.0,
                bound_unit="spread",
            ),
        )
    }
)
"""Every objective by name. Sources: REINFORCE (Williams 1992), GRPO (arXiv 2402.03300), Dr.GRPO (2503.20783), DAPO
(2503.14476, without its dynamic sampling), GSPO (2507.18071), CISPO (2506.13585), GDPO (2601.05242), ECPO
(2506.13695), UP-GRPO (2607.06987), GBPO and, as OneRec-V2 runs it, gbpo_raw (2508.20900), SAGE (2601.21452). The
settings are those papers', SAGE's from validation (docs/log.md); UP-GRPO's dual clip is that of Ye et al. (1912.09729).
`sage_paper` is the clipped form in which SAGE's body is summarised, with GSPO's clip; it gives no values for boost and
penalty, and one spread of the ratio is a reading."""


def find_objective(objective: str | Objective) -> Objective:
    """A row by name, or the one given. Raises: SettingsError for an unknown name."""
    if isinstance(objective, Objective):
        return objective
    if objective not in OBJECTIVES:
        raise SettingsError(f"unknown objective {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]
