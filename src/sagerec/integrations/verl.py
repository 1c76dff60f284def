"""The table of objectives as policy losses of verl 0.9 (extra `verl`); importing this module registers them.

verl loads it by itself, through the entry point group `verl.plugins`, in every process of a Ray cluster. A row is
registered under its name, or as `sagerec_NAME` where verl has a loss of that name (gspo, cispo); docs/engines.md has
the YAML.

What verl hands to a policy loss is log-probabilities, advantages and a mask, and nothing else of a slate. Departures
that follow, each asked for by a setting instead of being made in silence:

- *Diversity* H is estimated from the slate's own surprise: min(1, -mean_t log pi_old(o_t) / full_diversity_nats).
- *Coldness* is not known: a boost is of scope "all".
- *Advantages* are verl's. `adv_estimator: gdpo` is the decoupled one (whitened over tokens) on the legacy trainer
  (`trainer.use_v1: false`); the V1 trainer of 0.9.1 does not fetch its inputs and stops. GRPO's on a summed reward is
  `sage_coupled`, whatever the loss is called.

Shapes: n completions of a rank's micro-batch, T tokens of the longest.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sagerec.config import require
from sagerec.errors import MissingExtraError, SettingsError
from sagerec.objectives.loss import policy_loss
from sagerec.objectives.table import OBJECTIVES, Objective
from sagerec.training.rounds import bound_figures
from sagerec.training.settings import OF_A_ROW

try:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
    from verl.workers.config.actor import PolicyLossConfig
except ImportError as error:
    raise MissingExtraError(
        "verl is not installed, or not with what it needs; install it in an environment of its own with: "
        "pip install 'sagerec[verl]'"
    ) from error

AGGREGATION = {"slate": "seq-mean-token-mean", "token": "token-mean", "constant": "seq-mean-token-sum-norm"}
"""Aggregation of a row -> the loss_agg_mode that is the same."""
ITEM = re.compile(r"(?:<\|sid_begin\|>)?((?:<s_[a-z]_\d+>)+)(?:<\|sid_end\|>)?")
"""An item in itemic tokens; the begin tag may stand in the prompt, and the end may be cut."""


@dataclass
class SagePolicyLossConfig(PolicyLossConfig):  # type: ignore[misc]
    """`actor.policy_loss`, with `_target_: sagerec.integrations.verl.SagePolicyLossConfig`."""

    loss_mode: str = "sage"
    """The row."""
    boost: float | None = None
    """In place of the row's own; so are the next six."""
    boost_form: Literal["scaled", "bound"] | None = None
    boost_scope: Literal["cold", "all"] | None = None
    entropy_penalty: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    cap: float | None = None
    full_diversity_nats: float = math.log(32)
    """Mean surprise of a slate's tokens, in nats, at which its H is 1: the logarithm of 32 equally likely tokens."""

    def row(self, name: str) -> Objective:
        """The objective with the settings that are given here. Raises: SettingsError for what cannot hold in verl."""
        given = {setting: value for setting in OF_A_ROW if (value := getattr(self, setting)) is not None}
        row = replace(OBJECTIVES[name], **given)
        for setting in given:
            require(setting in row.reads, f"policy_loss.{setting} is not read by {name}; leave it out")
        require(
            not row.needs_coldness,
            f"{name} boosts cold slates, and verl does not say which are cold; expected policy_loss.boost_scope=all, "
            "or policy_loss.boost=0",
        )
        require(
            0 < self.full_diversity_nats < math.inf,
            f"policy_loss.full_diversity_nats is {self.full_diversity_nats}; expected a finite number above 0",
        )
        return row


def row_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a row over a micro-batch as verl scales it, and figures of the ratio and its bounds.

    Every tensor (n, T). Raises: SettingsError for a setting of the actor that the row cannot hold.
    """
    settings = config.policy_loss if isinstance(config.policy_loss, SagePolicyLossConfig) else SagePolicyLossConfig()
    row, mask = settings.row(name), response_mask.bool()
    expected = AGGREGATION[row.aggregation]
    require(
        loss_agg_mode == expected, f"loss_agg_mode is {loss_agg_mode!r}; {row.name} averages as {expected!r}: set that"
    )
    batch = config.global_batch_info
    ranks, n, length = batch.get("dp_size") or 1, int(mask.any(dim=1).sum()), mask.shape[1]
    slates = batch.get("global_batch_size") or n
    horizon = batch.get("loss_scale_factor") or length
    sizes = {"slate": slates, "token": batch.get("batch_num_tokens") or mask.sum(), "constant": slates * horizon}
    gain = _of_slates(advantages, mask, "advantages", "adv_estimator: gdpo or grpo, which give one a completion")
    if rollout_is_weights is not None:  # the loss is linear in |A|
        mend = "rollout_correction.rollout_is: sequence, one weight a completion"
        gain = gain * _of_slates(rollout_is_weights, mask, "rollout_is_weights", mend)
    counts = mask.sum(dim=1).clamp(min=1)
    surprise = -(old_log_prob.detach() * mask).sum(dim=1) / counts
    found = policy_loss(
        row,
        logprobs=log_prob[None],
        old_logprobs=old_log_prob[None],
        mask=mask[None],
        advantages=gain[None],
        diversity=(surprise / settings.full_diversity_nats).clamp(0, 1)[None] if row.needs_diversity else None,
        denominator=torch.as_tensor(sizes[row.aggregation]).clamp(min=1) / ranks,
    )
    figures = {f"actor/{figure}": value.item() for figure, value in bound_figures(found, mask[None]).items()}
    drift = ((old_log_prob - log_prob.detach()) * mask).sum() / mask.sum().clamp(min=1)
    return found.loss, figures | {"actor/ppo_kl": drift.item()}


def _of_slates(values: Tensor, mask: Tensor, name: str, mend: str) -> Tensor:
    """(n,) the one value that counted tokens (n, T) share. Raises: SettingsError where they differ in a row."""
    kept = values.detach().masked_fill(~mask, 0.0)
    first = kept.gather(1, mask.int().argmax(dim=1, keepdim=True))
    if not bool(torch.isclose(kept, first * mask, rtol=1e-4, atol=1e-6).all()):
        raise SettingsError(f"{name} differ from token to token of a completion; expected {mend}")
    return first[:, 0]


def register() -> list[str]:
    """Register every row that has a policy loss; returns the names under which verl knows them."""
    names = []
    for row in OBJECTIVES.values():
        if row.trains_on_targets:
            continue
        known = POLICY_LOSS_REGISTRY.get(row.name)
        name = row.name if known is None or getattr(known, "sagerec", False) else f"sagerec_{row.name}"

        def loss(*given: Any, _row: str = row.name, **named: Any) -> tuple[Tensor, dict[str, float]]:
            return row_loss(_row, *given, **named)

        loss.sagerec = True  # type: ignore[attr-defined]
        loss.__name__ = name
        register_policy_loss(name)(loss)
        names.append(name)
    return names


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> dict[str, float]:
    """The reward function: components of a completion in itemic tokens (RecIF-Bench), of which `score` is the hit.

    hit: 1 where a predicted item is among the true ones; rank: 1 / log2(place + 1) of the first that is; diversity: the
    entropy of the predicted items' first tokens over log of their number, 0 for a single item. A thought before
    `</think>` is not read. For `reward.custom_reward_function`; the others are keys of `algorithm.gdpo_reward_keys`.
    """
    predicted, true = items_in(solution_str), set(items_in(ground_truth))
    place = next((i for i, item in enumerate(predicted) if item in true), None)
    first = [item.partition(">")[0] for item in predicted]
    shares = [first.count(code) / len(first) for code in set(first)]
    entropy = -sum(share * math.log(share) for share in shares)
    hit = float(place is not None)
    return {
        "score": hit,
        "hit": hit,
        "rank": 0.0 if place is None else 1 / math.log2(place + 2),
        "diversity": entropy / math.log(len(predicted)) if len(predicted) > 1 else 0.0,
    }


def items_in(text: str) -> Sequence[str]:
    """The items of a text after its last `</think>`, as their codes' tokens, in their order."""
    return ITEM.findall(text.rpartition("</think>")[2])


SETTINGS = tuple(field.name for field in fields(SagePolicyLossConfig))
NAMES = register()
"""The losses' names in verl."""
