"""Plain Python reward functions, as TRL calls them, for an alignment of ours.

    def short(completions, **_):
        return [1.0 if len(text) < 40 else 0.0 for text in completions]

    AlignSettings(reward=("hit=1", *use_functions([short], run.data)))

Each is called by name with one entry a slate: `prompts` and `completions`, the titles of the user's items so far and of
the slate's, one a line; `prompt_items` and `items`, the same as lists of item ids; `targets`, the id of what the user
took next. It returns a list of numbers, one a slate; None counts 0.
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sagerec.catalogue.dataset import Dataset
from sagerec.config import require
from sagerec.errors import RewardError
from sagerec.objectives.rewards import Function, RewardInputs, register_reward

RewardFunction = Callable[..., Sequence[float | None]]


def use_functions(
    functions: Sequence[RewardFunction], data: Dataset, weights: Sequence[float] | None = None
) -> tuple[str, ...]:
    """Register functions as rewards of this process; returns their NAME=WEIGHT for `AlignSettings.reward`.

    A name is the function's with the head of the SHA-256 of its source, so that an edited one is another reward, and a
    killed run is resumed with the same alone. Other processes (a study's, a rank's) call this too, or name a module.

    Raises: RewardError for what is no function with a source.
    """
    weights = [1.0] * len(functions) if weights is None else weights
    require(len(weights) == len(functions), f"{len(weights)} weights for {len(functions)} functions; expected one each")
    found = []
    for function, weight in zip(functions, weights, strict=True):
        try:
            source, name = inspect.getsource(function), function.__name__
        except (TypeError, OSError, AttributeError) as error:
            raise RewardError(
                f"{function!r} is no reward function ({error}); expected one written in a file"
            ) from error
        name = f"{name}@{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        register_reward(name, _of_slates(function, data), replace=True)
        found.append(f"{name}={weight}")
    return tuple(found)


def _of_slates(function: RewardFunction, data: Dataset) -> Function:
    """The function as a reward of ours."""
    ids, titles = data.item_ids.ids.to_list(), data.titles(range(data.n_items))

    def listed(items: list[int], names: list[str]) -> list[str]:
        return [names[item] for item in items if item >= 0]

    def reward(x: RewardInputs) -> Tensor:
        group = x.slates.shape[1]
        slates, targets, rows = x.slates.flatten(0, 1).tolist(), x.targets.tolist(), x.sample_ids.tolist()
        before = [data.event_items[data.user_offsets[data.event_users[row]] : row].tolist() for row in rows]
        before, targets = ([value for value in values for _ in range(group)] for values in (before, targets))
        given: dict[str, Any] = {
            "prompts": ["\n".join(listed(items, titles)) for items in before],
            "completions": ["\n".join(listed(items, titles)) for items in slates],
            "prompt_items": [listed(items, ids) for items in before],
            "items": [listed(items, ids) for items in slates],
            "targets": [ids[target] for target in targets],
        }
        earned = function(**given)
        if len(earned) != len(slates):
            raise ValueError(f"{len(earned)} rewards for {len(slates)} slates")
        values = [0.0 if value is None else float(value) for value in earned]
        return torch.tensor(values, device=x.slates.device).view(-1, group)

    return reward
