"""SAGE and its rivals in TRL (extra `trl`): a `GRPOTrainer` whose loss is a row of our table of objectives.

    GRPOTrainer(model=…, reward_funcs=…, args=…, train_dataset=…)
    SageTrainer(model=…, reward_funcs=…, args=…, train_dataset=…, objective="sage", diversity=…, coldness=…)

Rollouts, rewards, accumulation, ranks and logging stay TRL's. The loss is `sagerec.policy_loss`, in `compute_loss`;
around it three of TRL's methods are wrapped: `_calculate_rewards`, where diversity and coldness are asked of the same
completions; `_generate_and_score_completions`, which hands them and the row's advantages on with the completions; and,
where `legal` is given, `_get_per_token_logps_and_entropies`, so that old, new and reference log-probabilities are
normalised over what the sampler was held to. Written for TRL 1.16.

Departures from our own stage: without `legal`, every token of a completion counts; what a user had is not barred; the
spread of a row with `bound_unit` "spread" is that of a micro-batch.

Shapes: n completions of a rank, G of each prompt, M rewards, T tokens of the longest.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal

import torch
from torch import Tensor

from sagerec.config import require
from sagerec.errors import MissingExtraError, RewardError, SettingsError
from sagerec.integrations.legal_tokens import LegalTokens
from sagerec.objectives.loss import compute_advantages, policy_loss, ratio_spread
from sagerec.objectives.table import Objective, find_objective
from sagerec.training.rounds import bound_figures, k3

try:
    from transformers import LogitsProcessor, LogitsProcessorList
    from trl import GRPOTrainer
except ImportError as error:
    raise MissingExtraError("TRL is not installed; install it with: pip install 'sagerec[trl]'") from error

logger = logging.getLogger(__name__)
RewardFunction = Callable[..., Sequence[float | None]]
"""A reward function as TRL calls it: with prompts, completions, completion_ids and the dataset's columns by name."""
OF_THE_ROW = (
    *("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "use_bias_correction_kl"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
    "vespo_lambda_neg",
)
"""Settings of GRPOConfig in whose place the row of the table stands."""
OF_ADVANTAGES = ("multi_objective_aggregation", "scale_rewards")
"""Settings of GRPOConfig that only TRL's own advantages read."""
NOT_READ = ("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "off_policy_mask_threshold")
"""Settings of GRPOConfig for terms that this loss does not have."""
TRL_ADVANTAGES: Mapping[str, tuple[str, str]] = {
    "decoupled": ("normalize_then_sum", ""),
    "normalised": ("sum_then_normalize", "group"),
    "mean": ("sum_then_normalize", "none"),
}
"""Advantage of a row -> the aggregation and scale of GRPOConfig that make the same; scale "" for any."""


class SageTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPO's trainer with another loss.

    Args beside those of `GRPOTrainer`:
        objective: a name of `OBJECTIVES`, or a row of one's own.
        diversity: called like a reward function, gives H in [0, 1] of each completion, for an entropy penalty.
        coldness: called like a reward function, gives the share of cold items in [0, 1], for a boost of scope "cold".
        advantages: "row" computes the row's from all rewards of the step; "trl" takes TRL's, which must be the same.
        legal: what a completion may hold; the sampler is held to it, and log-probabilities are normalised over it.

    Raises: SettingsError for a setting that the loss does not read or cannot hold, by name.
    """

    def __init__(
        self,
        *args: Any,
        objective: str | Objective = "sage",
        diversity: RewardFunction | None = None,
        coldness: RewardFunction | None = None,
        advantages: Literal["row", "trl"] = "row",
        legal: LegalTokens | None = None,
        **given: Any,
    ) -> None:
        self.row, self.legal, self._advantages = find_objective(objective), legal, advantages
        self._facts = {"diversity": diversity, "coldness": coldness}
        self._asked: dict[str, Tensor] = {}
        config = given.get("args", args[2] if len(args) > 2 else None)
        _check_row(self.row, self._facts)
        if config is not None:
            check_config(config, self.row, advantages=advantages, legal=legal)
        super().__init__(*args, **given)
        check_config(self.args, self.row, advantages=advantages, legal=legal)
        require(not self.aux_loss_enabled, "router_aux_loss_coef is set; SageTrainer has no such term: set it to 0")
        if legal is not None:
            _check_vocabulary(self.model, self.eos_token_ids, legal)
            if not self.use_vllm:
                _hold(self.model, legal)
        if (reason := explain_on_policy(self.args, self.row)) is not None:
            logger.warning("%s", reason)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's rewards (N, M) of all ranks; diversity and coldness of the same completions are kept beside."""
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
        asked = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list} | columns
        self._asked = {"rewards": rewards}
        for name, function in self._facts.items():
            if function is not None:
                self._asked[name] = _shares(name, function(**asked), len(completions)).to(rewards.device)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's completions with what the loss needs beside: rows of tensors stay together when TRL shuffles them."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        asked, n = self._asked, len(output["advantages"])
        output |= {name: value for name, value in asked.items() if name != "rewards"}
        counts = self._counted(output).sum(dim=1)
        gathered = self.accelerator.gather(counts)
        output["counted_tokens"] = gathered.sum()
        if self._advantages == "row":
            group = self.num_generations if self.model.training else self.num_generations_eval
            rewards = asked["rewards"]
            if not bool(rewards.isfinite().all()):
                name = self.reward_func_names[int((~rewards.isfinite()).any(dim=0).nonzero()[0])]
                got = "None or NaN" if bool(rewards.isnan().any()) else "an infinite number"
                raise RewardError(
                    f"the reward function {name!r} gave {got}; expected a number for every completion: give 0, "
                    "or use advantages='trl', which leaves None and NaN out"
                )
            found = compute_advantages(
                self.row,
                rewards.view(-1, group, rewards.shape[1]),
                weights=self.reward_weights.to(rewards),
                tokens=gathered.view(-1, group),
            )
            begin = self.accelerator.process_index * n
            output["advantages"] = found.flatten()[begin : begin + n]
        return output

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's log-probabilities; with `legal`, those over the legal tokens alone."""
        if self.legal is None:
            found: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **rest
            )
            return found
        parts, size = [], batch_size or len(input_ids)
        for ids, seen in zip(torch.split(input_ids, size), torch.split(attention_mask, size), strict=True):
            with self.accelerator.autocast():
                output = model(input_ids=ids, attention_mask=seen, logits_to_keep=logits_to_keep + 1, use_cache=False)
            logits = output.logits[:, -logits_to_keep - 1 : -1] / self.temperature
            parts.append(self.legal.score(logits, ids[:, -logits_to_keep:], seen[:, -logits_to_keep:].bool()))
        return torch.cat([p.logprobs for p in parts]), torch.cat([p.entropy for p in parts]), None

    def _counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """(n, T) bool: the tokens that enter means: of the model, not of a tool, and not forced."""
        mask: Tensor = inputs["completion_mask"].bool()
        counted = mask if self.legal is None else self.legal.follow(inputs["completion_ids"], mask).free & mask
        return counted & inputs["tool_mask"].bool() if "tool_mask" in inputs else counted

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The rank's part of the row's loss over an accumulation step, as TRL scales it (ranks are averaged)."""
        require(not return_outputs, "return_outputs is True; expected False: GRPO's trainers return the loss alone")
        require("pixel_values" not in inputs, "the dataset holds images; SageTrainer trains on text alone")
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        n, length = inputs["completion_ids"].shape
        new, entropy, _ = self._get_per_token_logps_and_entropies(model, ids, seen, length, compute_entropy=True)
        assert entropy is not None
        mask, training = self._counted(inputs), self.model.training
        old = inputs.get("old_per_token_logps")
        old = new.detach() if old is None else old
        advantages = inputs["advantages"]
        if "importance_sampling_ratio" in inputs:  # one a completion: the loss is linear in |A|
            advantages = advantages * inputs["importance_sampling_ratio"].view(n, -1)[:, 0]
        steps = self.current_gradient_accumulation_steps if training else 1
        share = steps / self.args.steps_per_generation if training else 1.0
        tokens = inputs["counted_tokens"].float().clamp(min=1) / self.accelerator.num_processes * share
        sizes = {"slate": n * steps, "token": tokens, "constant": n * steps * self.max_completion_length}
        facts = {name: inputs[name][None] for name in self._facts if name in inputs}
        spread = None
        if self.row.needs_spread:
            squares = ratio_spread(self.row, logprobs=new[None], old_logprobs=old[None], mask=mask[None]).square()
            spread = self.accelerator.reduce(squares, reduction="mean").sqrt()
        found = policy_loss(
            self.row,
            logprobs=new[None],
            old_logprobs=old[None],
            mask=mask[None],
            advantages=advantages[None],
            denominator=sizes[self.row.aggregation],
            spread=spread,
            **facts,
        )
        loss = found.loss
        figures = bound_figures(found, mask[None]) | {"entropy": (entropy * mask).sum() / mask.sum().clamp(min=1)}
        if self.beta:
            divergence = k3(new, inputs["ref_per_token_logps"], mask, tokens)
            loss, figures["kl"] = loss + self.beta * divergence, divergence.detach()
        for name, value in figures.items():
            gathered = self.accelerator.gather(value.detach().float().reshape(1))
            self._metrics["train" if training else "eval"][name].append(gathered.nanmean().item())
        return loss


def _shares(name: str, given: Sequence[float | None], n: int) -> Tensor:
    """(n,) what `diversity` or `coldness` gave. Raises: RewardError where that is not a share for each completion."""
    values = [math.nan if value is None else float(value) for value in given]
    if len(values) != n or not all(0 <= value <= 1 for value in values):
        got = f"{len(values)} values" if len(values) != n else str(next(v for v in values if not 0 <= v <= 1))
        raise RewardError(f"{name} gave {got} for {n} completions; expected a number in [0, 1] for each")
    return torch.tensor(values, dtype=torch.float32)


def _check_vocabulary(model: Any, ends: Sequence[int], legal: LegalTokens) -> None:
    """Raise SettingsError where the model lacks tokens that are legal, or TRL ends completions (`ends`) elsewhere."""
    known = model.config.get_text_config().vocab_size
    require(
        known >= legal.vocabulary,
        f"the model has {known} tokens, and `legal` writes ids up to {legal.vocabulary - 1}; expected a model whose "
        "embeddings were resized for the Semantic IDs' tokens",
    )
    require(
        legal.end in ends,
        f"completions end at the tokens {list(ends)} (of tokenizer and model), and those of `legal` at {legal.end}; "
        "expected that token among them",
    )
    inside = sorted({*legal.space.trie.token[1:].tolist()} & {*ends})
    require(not inside, f"the end tokens {inside} of tokenizer or model stand within items; expected others")


def _check_row(row: Objective, facts: Mapping[str, Any]) -> None:
    """Raise SettingsError for a row without a policy loss, or that asks for what is not given."""
    require(not row.trains_on_targets, f"{row.name} has no policy loss; use TRL's SFTTrainer for this control")
    for name, needed, setting in (
        ("diversity", row.needs_diversity, "entropy_penalty to 0"),
        ("coldness", row.needs_coldness, "boost to 0, or boost_scope to 'all'"),
    ):
        require(
            not needed or facts[name] is not None,
            f"{row.name} needs {name}: give a function like a reward function, which returns it in [0, 1] for each "
            f"completion, or set {setting} in the row",
        )
        require(needed or facts[name] is None, f"{name} is given, and {row.name} does not read it; leave it out")


def check_config(config: Any, row: Objective, *, advantages: str, legal: LegalTokens | None) -> None:
    """Raise SettingsError for a setting of a GRPOConfig that SageTrainer does not read or cannot hold, by name."""
    defaults = {f.name: f.default if f.default is not MISSING else None for f in fields(config)}
    of_row = f"the row {row.name!r} says it: leave it out, or change the row with dataclasses.replace"
    unread = dict.fromkeys(OF_THE_ROW, of_row) | dict.fromkeys(NOT_READ, "SageTrainer has no such term: leave it out")
    require(advantages in ("row", "trl"), f"advantages is {advantages!r}; expected 'row' or 'trl'")
    if advantages == "row":
        unread |= dict.fromkeys(OF_ADVANTAGES, "the row's advantages do not read it: leave it out, or advantages='trl'")
    for name, reason in unread.items():
        value = getattr(config, name, defaults.get(name))
        if name in defaults and value not in (defaults[name], _derived(config, name)):
            raise SettingsError(f"{name} is {value!r}; {reason}")
    if advantages == "trl":
        known = TRL_ADVANTAGES.get(row.advantage)
        require(
            known is not None, f"TRL makes no {row.advantage} advantages, which {row.name} has; use advantages='row'"
        )
        assert known is not None
        made = (config.multi_objective_aggregation, config.scale_rewards if known[1] else "")
        scale = f" and scale_rewards={known[1]!r}" if known[1] else ""
        require(
            made == known,
            f"TRL is to make the {row.advantage} advantages of {row.name}: expected multi_objective_aggregation="
            f"{known[0]!r}{scale}, got {config.multi_objective_aggregation!r} and {config.scale_rewards!r}",
        )
    corrects = config.use_vllm and config.vllm_importance_sampling_correction
    require(
        not (corrects and config.vllm_importance_sampling_mode.startswith("token")),
        f"vllm_importance_sampling_mode is {config.vllm_importance_sampling_mode!r}; expected a sequence mode "
        "(sequence_truncate, sequence_mask): one weight a completion, as its advantage is",
    )
    if legal is None:
        return
    require(
        config.max_completion_length >= legal.longest,
        f"max_completion_length is {config.max_completion_length}; expected at least {legal.longest}, or a completion "
        "is cut within an item",
    )
    require(
        not getattr(config, "use_transformers_continuous_batching", False),
        "use_transformers_continuous_batching is True, which takes no logits processor; expected False with `legal`",
    )
    structured = (config.generation_kwargs or {}).get("structured_outputs") or config.vllm_structured_outputs_regex
    require(
        not config.use_vllm or bool(structured),
        "use_vllm is True with `legal`, and vLLM is not held to it; expected "
        "generation_kwargs={'structured_outputs': {'choice': [...]}} with the same catalogue "
        "(sagerec.integrations.rollouts writes it)",
    )


def _derived(config: Any, name: str) -> Any:
    """What TRL itself fills in for a setting that was left out."""
    return config.epsilon if name == "epsilon_high" else None


def explain_on_policy(config: Any, row: Objective) -> str | None:
    """Why the ratio is 1 throughout under these settings, and what to set; None where it departs from 1.

    TRL stores old log-probabilities only where an optimiser step comes between writing a completion and training on
    it; else it sets r = 1, and a bound on r never acts.
    """
    steps, every = config.gradient_accumulation_steps, config.steps_per_generation * config.num_iterations
    stored = config.use_vllm and config.vllm_importance_sampling_correction
    if row.bound == "none" or row.ratio == "unit" or steps % every or stored:
        return None
    return (
        f"the ratio of {row.name} will be 1 throughout: each completion serves one optimiser step "
        f"(gradient_accumulation_steps {steps}, steps_per_generation {config.steps_per_generation}, num_iterations "
        f"{config.num_iterations}), so no bound on the ratio can act. Set steps_per_generation to {2 * steps} or more "
        f"(a multiple of {steps}), or num_iterations to 2"
    )


class _LegalProcessor(LogitsProcessor):  # type: ignore[misc]
    """Takes every token that is not legal after what was written out of the distribution."""

    def __init__(self, legal: LegalTokens, prompt_length: int) -> None:
        self._legal, self._prompt_length = legal, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        written = input_ids[:, self._prompt_length :]
        mask = self._legal.next(written, torch.ones_like(written, dtype=torch.bool))
        wide = torch.zeros_like(scores, dtype=torch.bool)
        wide[:, : mask.shape[1]] = mask
        return scores.masked_fill(~wide, -torch.inf)


def _hold(model: Any, legal: LegalTokens) -> None:
    """Hold `model.generate` to what is legal; TRL has no setting for a logits processor."""
    generate = model.generate

    def held(*args: Any, input_ids: Tensor, logits_processor: Any = None, **given: Any) -> Any:
        processors = LogitsProcessorList([*(logits_processor or []), _LegalProcessor(legal, input_ids.shape[1])])
        return generate(*args, input_ids=input_ids, logits_processor=processors, **given)

    model.generate = held
