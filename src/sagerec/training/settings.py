"""Settings of the alignment stage."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from tyro.conf import UseAppendAction

from sagerec.actions.clusters import ClusterKind
from sagerec.config import above, added, at_least, between, check_fields, require, to_json
from sagerec.decoding.rollouts import RolloutSettings
from sagerec.objectives.rewards import MOST_WEIGHT, parse_rewards
from sagerec.objectives.table import Objective, find_objective
from sagerec.policies.protocol import AnyPolicy
from sagerec.training.reward_modules import load_reward_module
from sagerec.training.tracking import TrackerName, check_trackers

DEFAULT_REWARDS = ("hit=3", "cold*hit=6", "novelty*similarity=0.1", "diversity=0.1")
"""Rewards and weights that won on validation (docs/log.md)."""
CRITERION = ("recall=2", "cold_recall=0.25", "coarse_entropy=0.5")
"""What a validated policy is worth: losing 1 % of Recall costs what 4 % of Entropy or 8 % of Cold-Recall gain."""

OF_A_ROW = ("boost", "boost_form", "boost_scope", "entropy_penalty", "clip_low", "clip_high", "cap")
"""Settings of alignment that stand in place of those of the objective's row."""
LOSS_WEIGHTS = ("policy_weight", "sft_weight", "kl_weight", "entropy_weight")
OF_ROLLOUTS = (
    *("reward", "reward_module", "k", "slates", "beam_slates", "temperature", "top_p", "credit", "clusters"),
    *LOSS_WEIGHTS,
)
"""Settings that only an objective with rollouts reads: the control has none, and one loss of weight 1."""
MOST_COUNT, MOST_VALIDATIONS = 2**31 - 1, 10_000


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How the policy is trained."""

    epochs: int = 20
    """Passes over the training sequences, at most."""
    batch_size: int = 128
    """Sequences a step."""
    learning_rate: float = 2e-3
    """Highest learning rate of AdamW."""
    weight_decay: float = 0.1
    """Weight decay of the matrices."""
    warmup_share: float = 0.05
    """Share of the steps in which the learning rate rises from 0; a cosine follows."""
    final_rate_share: float = 0.02
    """Share of the highest learning rate at which the cosine ends; 1 keeps the rate constant."""
    like_lengths: bool = False
    """Batches are of sequences of like length, which pads least; else of any."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    list_weight: float = added(0.0)
    """Weight of a loss on target lists (`training.target_lists`), in nats an item, beside the one on the next item: for
    policies that read the slate."""
    list_variety: float = added(0.5)
    """Nats that the teacher's list takes off an item for each one of its coarse cluster before it."""
    validate_every: int = 2
    """Epochs between validations; 0 never validates and keeps the last weights."""
    validation_users: int = 30_000
    """Validation cases drawn for early stopping, at most."""
    patience: int = 5
    """Validations without a better Recall@10 after which training stops."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix products; auto is bfloat16 where the hardware computes it natively."""
    compile: bool = False
    """Compile the layers with torch.compile."""
    track: tuple[TrackerName, ...] = ()
    """Where metrics go beside metrics.jsonl: tensorboard, mlflow, wandb (extras of these names)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of the weights, the order of the batches and dropout."""

    def __post_init__(self) -> None:
        check_trackers(self.track)
        check_fields(
            self,
            epochs=at_least(1, 100_000),
            batch_size=at_least(1),
            learning_rate=above(0),
            weight_decay=at_least(0, 1000),
            warmup_share=between(0, 1, below=True),
            final_rate_share=between(0, 1),
            clip_norm=above(0),
            list_weight=at_least(0, 1000),
            list_variety=at_least(0, 1000),
            validate_every=at_least(0),
            validation_users=at_least(1),
            patience=at_least(1),
        )


@dataclass(frozen=True, slots=True)
class AlignSettings:
    """How a policy is aligned."""

    objective: str = "sage"
    """A row of the table of objectives; `sft` is the control."""
    start: Literal["all-at-once", "supervised"] = "all-at-once"
    """The policy that is aligned: RUN/policy-all-at-once, trained on training and reserved events together and made
    where it is missing, or RUN/policy, which has not seen the events that it is rolled out on."""
    reward: UseAppendAction[tuple[str, ...]] = ()
    """NAME=WEIGHT or NAME*NAME=WEIGHT, once for each reward; without any, those of DEFAULT_REWARDS."""
    reward_module: UseAppendAction[tuple[str, ...]] = ()
    """Module that registers rewards of one's own (my.rewards, or a .py file), once for each: imported in every process,
    and saved with the SHA-256 of its source."""
    boost: float | None = None
    """In place of the objective's own; so are the next six."""
    boost_form: Literal["scaled", "bound"] | None = None
    """See `boost`."""
    boost_scope: Literal["cold", "all"] | None = None
    """See `boost`."""
    entropy_penalty: float | None = None
    """See `boost`."""
    clip_low: float | None = None
    """See `boost`."""
    clip_high: float | None = None
    """See `boost`."""
    cap: float | None = None
    """See `boost`."""
    k: int = 1
    """Items a slate."""
    slates: int = 32
    """Slates a context, G."""
    beam_slates: int | None = None
    """Slates of the G that come from beam search, the others are sampled: with one item a slate all by default, else
    the beam list (1)."""
    temperature: float = 1.0
    """Of sampling, and of the log-probabilities in the loss."""
    top_p: float = 1.0
    """Sample only among the most probable codes that together hold this share."""
    credit: Literal["slate", "item"] = "slate"
    """What a reward is credited to: the slate, or the item that earned it (its own codes alone)."""
    clusters: ClusterKind = "coarse"
    """Clusters by which diversity is measured; over hundreds of small ones every slate looks diverse."""
    cold_max_count: int = 5
    """Items with at most this many training interactions are cold."""
    history: Literal["auto", "keep", "exclude"] = "auto"
    """Whether items of the history may be recommended; auto excludes them where no training user had one twice."""
    epochs: int = 1
    """Passes over the reserved events."""
    max_contexts: int = 0
    """Reserved events that are rolled out, drawn by the seed; 0 takes all. The replay has all of them."""
    round_users: int = 512
    """Contexts that are rolled out at a time, for round_users / batch_users x passes updates, the staleness."""
    batch_users: int = 128
    """Contexts of an update."""
    passes: int = 1
    """Times that each round's rollouts are gone through."""
    learning_rate: float = 4e-4
    """Highest learning rate of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of the matrices."""
    warmup_share: float = 0.05
    """Share of the updates in which the learning rate rises from 0; a cosine to a fiftieth follows."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    policy_weight: float = 8.0
    """Weight of the policy loss."""
    sft_weight: float = 0.0
    """Weight of the next-item loss on the reserved events, the anchor."""
    replay_weight: float = 2.0
    """Weight of the next-item loss on whole sequences of training and reserved events, as many of them beside each
    update as users: the policy keeps the catalogue that it knew, and learns the reserved events in their place."""
    kl_weight: float = 0.0
    """Weight of the KL divergence to the policy that alignment started from (k3 estimator)."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus (first code, nats)."""
    validations: int = 2
    """Validations on the way, the last at the end; 0 keeps the last weights."""
    validation_users: int = 10_000
    """Validation cases, at most."""
    criterion: UseAppendAction[tuple[str, ...]] = ()
    """METRIC=WEIGHT, once for each; without any, those of CRITERION. The policy kept is that with the highest sum of
    weight x (metric / metric at the start) over recall, ndcg, cold_recall, entropy, coarse_entropy, coverage, at 10; on
    the simulated store also over clicks, likes, dislikes, watch_seconds."""
    checkpoint_every: int = 5
    """Rounds between checkpoints."""
    track: tuple[TrackerName, ...] = ()
    """Where metrics go beside metrics.jsonl: tensorboard, mlflow, wandb (extras of these names)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of the order of events, of samples and of dropout."""

    def __post_init__(self) -> None:
        counts = ("epochs", "round_users", "batch_users", "passes", "checkpoint_every", "validation_users")
        check_fields(
            self,
            **dict.fromkeys(counts, at_least(1, MOST_COUNT)),
            **dict.fromkeys(("max_contexts", "cold_max_count"), at_least(0, MOST_COUNT)),
            **dict.fromkeys(("learning_rate", "clip_norm"), above(0, MOST_WEIGHT)),
            **dict.fromkeys(("weight_decay", "replay_weight", *LOSS_WEIGHTS), at_least(0, MOST_WEIGHT)),
            validations=at_least(0, MOST_VALIDATIONS),
            warmup_share=between(0, 1, below=True),
        )
        check_trackers(self.track)
        for module in self.reward_module:
            load_reward_module(module)  # before the rewards are looked up
        if self.reward:
            parse_rewards(self.reward)
        if self.criterion:
            parse_criterion(self.criterion)
        row, rollout = self.row, self.rollout  # raise SettingsError for what they cannot take
        for name in sorted(unread_by(row)):
            require(
                getattr(self, name) == _DEFAULTS[name],
                f"--{name.replace('_', '-')} is not read by objective {self.objective}; leave it out",
            )
        require(
            self.top_p == 1 or rollout.n_beams < self.slates,
            "top_p is set, and all slates come from beam search; set beam_slates below slates to sample some",
        )
        require(
            self.slates >= 2 or not row.compares,
            f"slates is {self.slates}, and {self.objective} compares the slates of a context; expected at least 2",
        )
        require(
            not (self.credit == "item" and self.k == 1),
            "credit 'item' with one item a slate; expected k above 1, or credit 'slate'",
        )

    def resolved(self) -> "AlignSettings":
        """The settings with default rewards (which the control does not read) and criterion filled in."""
        reward = () if self.row.trains_on_targets else self.reward or DEFAULT_REWARDS
        return replace(self, reward=reward, criterion=self.criterion or CRITERION)

    def for_objective(self, objective: str) -> "AlignSettings":
        """The same for another objective, without what it does not read."""
        return replace(self, objective=objective, **{n: _DEFAULTS[n] for n in unread_by(find_objective(objective))})

    def what(self) -> dict[str, Any]:
        """The resolved settings that decide the result, as JSON: all but where it runs and what is recorded.

        A reward module stands with the SHA-256 of its source, so that a changed one is another setting.
        """
        values = to_json(self.resolved()) | {"reward_module": self.reward_sources}
        return {name: value for name, value in values.items() if name not in ("device", "track", "checkpoint_every")}

    @property
    def reward_sources(self) -> dict[str, str]:
        """Reward module -> SHA-256 of its source file."""
        return {name: load_reward_module(name) for name in self.reward_module}

    @property
    def row(self) -> Objective:
        """The objective with the settings that are given here."""
        given = {name: value for name in OF_A_ROW if (value := getattr(self, name)) is not None}
        return replace(find_objective(self.objective), **given)

    @property
    def rollout(self) -> RolloutSettings:
        """How slates are written."""
        return RolloutSettings(self.k, self.slates, self.beam_slates, self.temperature, self.top_p)


def rollout_of(settings: AlignSettings, policy: AnyPolicy) -> RolloutSettings:
    """How a policy writes slates: freely where it can and `validity` is a reward, which else is the same for all."""
    names = {name for reward in settings.reward for name in reward.partition("=")[0].split("*")}
    free = "validity" in names and policy.writes_freely
    return replace(settings.rollout, writing="free") if free else settings.rollout


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(AlignSettings)}


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """How an alignment is computed: no more than rounding hangs on it."""

    micro_users: int = 0
    """Contexts of an update that pass the policy at a time, whose gradients add up to the update's: memory for so many.
    0 takes all together."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of the matrix products; auto is bfloat16 where the hardware computes it natively."""

    def __post_init__(self) -> None:
        check_fields(self, micro_users=at_least(0, MOST_COUNT))

    def check(self, row: Objective) -> None:
        """Raises: SettingsError where the objective cannot be computed so."""
        require(
            not (self.micro_users and row.needs_spread),
            f"micro_users is {self.micro_users}, and {row.name} needs the spread of an update's ratios; expected 0",
        )

    def what(self) -> dict[str, Any]:
        """What an artefact records, as JSON: nothing of the defaults."""
        return {} if self == AS_USUAL else {"compute": to_json(self)}


AS_USUAL = ComputeSettings()
"""All contexts of an update at once, in float32."""


def unread_by(row: Objective) -> set[str]:
    """The settings of alignment that a row of the table does not read."""
    return set(OF_A_ROW) - row.reads | (set(OF_ROLLOUTS) if row.trains_on_targets else set())


STORE_METRICS = ("clicks", "likes", "dislikes", "watch_seconds")
CRITERION_METRICS = ("recall", "ndcg", "cold_recall", "entropy", "coarse_entropy", "coverage", *STORE_METRICS)


def parse_criterion(parts: tuple[str, ...]) -> dict[str, float]:
    """`("recall=1", "entropy=0.25")` as metric -> weight. Raises: SettingsError."""
    weights: dict[str, float] = {}
    for text in parts:
        name, _, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        require(
            name in CRITERION_METRICS and abs(weight) <= MOST_WEIGHT,
            f"criterion {text!r}; expected METRIC=WEIGHT with one of {', '.join(CRITERION_METRICS)} and a weight of "
            f"at most {MOST_WEIGHT:g} in size",
        )
        require(name not in weights, f"criterion {name!r} stands twice; give it one weight")
        weights[name] = weight
    require(bool(weights), "the criterion is empty; expected at least one METRIC=WEIGHT, such as recall=1")
    return weights
