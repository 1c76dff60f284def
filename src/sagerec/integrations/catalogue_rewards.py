"""Our rewards as reward functions of TRL, and what SAGE asks of a completion beside: its diversity and coldness.

A completion is read as the items that it names; rewards, diversity and coldness are then those of our own stage. The
dataset has a column with the item index that the user took next.

Shapes: n completions, of each prompt G one after another, B = n / G prompts, K items of a completion, N items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sagerec.config import require
from sagerec.objectives.rewards import (
    CATEGORIES,
    VECTORS,
    Facts,
    RewardInputs,
    compute_rewards,
    needs_of,
    parse_rewards,
    slate_coldness,
    slate_diversity,
)

Read = Callable[[Sequence[int]], list[int]]
"""Token ids of a completion -> its K items, -1 for none; `LegalTokens.read` is one."""


@dataclass(frozen=True, slots=True)
class CatalogueRewards:
    """Reward functions over a catalogue, for completions that name its items."""

    read: Read
    """Token ids -> items."""
    facts: Facts
    """What is known of the items (`training.feedback.gather_facts` makes it of a run)."""
    group: int
    """G, TRL's num_generations: completions of a prompt, which stand one after another."""
    target: str = "target"
    """The dataset's column with the item that the user took next."""

    def reward(self, expression: str) -> Callable[..., list[float]]:
        """A reward of ours, such as `hit` or `cold*hit`, as a reward function; its weight is TRL's `reward_weights`.

        Raises: RewardError for an unknown name; SettingsError for one that needs what TRL does not have.
        """
        parse_rewards([f"{expression}=1"])
        absent = sorted(needs_of(expression) - {CATEGORIES, VECTORS})
        require(
            not absent,
            f"the reward {expression!r} needs the answers {', '.join(absent)}; expected one of items and targets: give "
            "a reward function of your own for these",
        )

        def reward(*, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
            slates = self._slates(completion_ids, columns)
            require(
                not (slates.shape[2] == 1 and "ranking" in expression.split("*")),
                "the reward 'ranking' of single items needs their log-probabilities, which TRL does not hand on; "
                "expected several items a completion, or another reward",
            )
            targets = torch.tensor(columns[self.target], device=slates.device)
            inputs = RewardInputs(
                sample_ids=torch.arange(len(slates), device=slates.device),
                slates=slates,
                targets=targets[:: self.group],
                logprobs=torch.full(slates.shape[:2], torch.nan, device=slates.device),
                facts=self.facts,
            )
            earned: list[float] = compute_rewards([expression], inputs).flatten().tolist()
            return earned

        reward.__name__ = expression
        return reward

    def diversity(self, *, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """H of each completion's items in [0, 1]; of single items that of the group of G."""
        slates = self._slates(completion_ids, columns)
        found: list[float] = slate_diversity(slates, self.facts.clusters).flatten().tolist()
        return found

    def coldness(self, *, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """Share of cold items of each completion."""
        found: list[float] = slate_coldness(self._slates(completion_ids, columns), self.facts.cold).flatten().tolist()
        return found

    def _slates(self, completion_ids: Sequence[Sequence[int]], columns: dict[str, Any]) -> Tensor:
        """The items (B, G, K). Raises: SettingsError where the completions are not whole groups."""
        n, prompts = len(completion_ids), columns.get("prompts")
        whole = n % self.group == 0 and (
            prompts is None or all(prompts[i] == prompts[i - i % self.group] for i in range(n))
        )
        require(
            whole,
            f"{n} completions are not groups of {self.group} of one prompt each; expected group to be num_generations, "
            "and per_device_train_batch_size x steps_per_generation a multiple of it, so that no rank has part of a "
            "group",
        )
        items = [self.read(ids) for ids in completion_ids]
        return torch.tensor(items, device=self.facts.cold.device).view(-1, self.group, len(items[0]))
