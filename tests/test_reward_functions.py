"""Plain Python reward functions in a run of ours."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sagerec.errors import RewardError, SettingsError
from sagerec.objectives.rewards import REWARDS, parse_rewards
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import align
from sagerec.training.reward_functions import use_functions
from sagerec.training.reward_modules import check_origin
from tests.test_alignment import QUICK, base_run, metrics_of

__all__ = ["base_run"]
CALLS: list[dict[str, Any]] = []


def is_target(items: list[list[str]], targets: list[str], **given: Any) -> list[float | None]:
    """The built-in hit in plain Python; a miss says nothing."""
    CALLS.append({"items": items, "targets": targets} | given)
    return [1.0 if target in slate else None for slate, target in zip(items, targets, strict=True)]


def of_no_use(completions: list[str], **_: Any) -> list[float]:
    return [0.0]


@pytest.fixture
def run(base_run: Path, tmp_path: Path) -> Run:
    shutil.copytree(base_run, tmp_path / "run")
    return open_run(tmp_path / "run")


def test_a_function_earns_what_the_built_in_reward_earns(run: Run) -> None:
    """A hit and its plain twin, logged side by side, are equal in every round; titles and ids are those of the data."""
    CALLS.clear()
    own = use_functions([is_target], run.data, weights=[2.0])
    (name,) = parse_rewards(own)
    assert parse_rewards(own)[name] == 2.0
    assert name.startswith("is_target@")
    settings = replace(QUICK, reward=("hit=1", *own), epochs=1, validations=0)
    rounds = [line for line in metrics_of(run, align(run, settings)) if "reward/hit" in line]
    assert [line["reward/hit"] for line in rounds] == [line[f"reward/{name}"] for line in rounds]
    assert max(line["reward/hit"] for line in rounds) > 0
    call = CALLS[0]
    index = run.data.item_ids.index(call["items"][0])
    assert call["completions"][0] == "\n".join(run.data.titles(index))
    assert call["prompts"][0] == "\n".join(run.data.titles(run.data.item_ids.index(call["prompt_items"][0])))
    user = run.data.event_users[run.split.cases(run.data, "align").rows]
    assert len(call["prompt_items"]) == len(call["items"]) == len(call["targets"])
    assert len(user) > 0


def test_wrong_functions_are_named(run: Run) -> None:
    own = use_functions([of_no_use], run.data)
    with pytest.raises(RewardError, match=r"reward 'of_no_use@.*' failed \(ValueError: 1 rewards for 256 slates\)"):
        align(run, replace(QUICK, reward=own, epochs=1, validations=0))
    with pytest.raises(RewardError, match=r"is no reward function .*; expected one written in a file"):
        use_functions([max], run.data)
    with pytest.raises(SettingsError, match="2 weights for 1 functions; expected one each"):
        use_functions([is_target], run.data, weights=[1.0, 2.0])
    with pytest.raises(RewardError, match="is registered in this process alone"):
        check_origin(list(parse_rewards(own)), [])


def test_an_edited_function_is_another_reward(run: Run) -> None:
    """Its name hangs on the source, so that a killed run does not go on with another reward of the same name."""
    (first,) = use_functions([is_target], run.data)

    def is_target_(items: list[list[str]], **_: Any) -> list[float]:
        return [0.0 for _ in items]

    is_target_.__name__ = "is_target"
    (second,) = use_functions([is_target_], run.data)
    assert first != second
    assert {name for name in REWARDS if name.startswith("is_target@")} >= {
        first.partition("=")[0],
        second.partition("=")[0],
    }
