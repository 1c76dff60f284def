"""Rewards of one's own in alignments, a study's processes and ranks; settings that an objective does not read."""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sagerec import register_reward
from sagerec.artifacts import hash_file
from sagerec.cli import main
from sagerec.errors import RewardError, SettingsError, TrainingError
from sagerec.files import read_json
from sagerec.objectives.rewards import REWARDS
from sagerec.objectives.table import OBJECTIVES
from sagerec.run.folder import Run
from sagerec.run.stages import align, train
from sagerec.study import CompareSettings, StudySettings, run_study
from sagerec.training.reward_modules import load_reward_module
from sagerec.training.settings import AlignSettings
from tests.conftest import ENVIRONMENT, SMALL_POLICY, SMALL_TRAIN
from tests.test_alignment import QUICK, base_run, metrics_of, run
from tests.test_study import SMALL_STUDY

__all__ = ["base_run", "run"]
SOURCE = """
import sagerec

sagerec.register_reward("even", lambda x: (x.slates % 2 == 0).float())
"""

SMALL_FLAGS = ["--slates", "8", "--batch-users", "32", "--epochs", "1", "--validations", "0", "--device", "cpu"]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the package `mine`, whose module `rewards` registers one; all forgotten afterwards."""
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    known, loaded = dict(REWARDS), set(sys.modules)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rewards.py").write_text(SOURCE)
    load_reward_module.cache_clear()
    yield tmp_path
    REWARDS.clear()
    REWARDS.update(known)
    for name in set(sys.modules) - loaded:
        if name.startswith(("mine", "sagerec_rewards_of_")):
            del sys.modules[name]
    load_reward_module.cache_clear()


def forget() -> None:
    """As in a process of its own: no module is imported, no reward of one's own known."""
    load_reward_module.cache_clear()
    REWARDS.pop("even", None)
    for name in [name for name in sys.modules if name.startswith(("mine", "sagerec_rewards_of_"))]:
        del sys.modules[name]


@pytest.mark.parametrize("module", ["mine.rewards", "mine/rewards.py"])
def test_a_module_is_imported_and_a_changed_one_makes_the_alignment_anew(
    module: str, modules: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    given: dict[str, Any] = {"reward": ("even=1",), "reward_module": (module,), "epochs": 1, "validations": 0}
    path = modules / "mine" / "rewards.py"
    name = align(run, replace(QUICK, **given))
    assert "reward/even" in metrics_of(run, name)[-1]
    saved = run.manifest(name).settings["align"]
    assert saved["reward_module"] == {module: hash_file(path)}
    forget()
    align(run, replace(QUICK, **given))
    assert "policy-sage: there and fits" in caplog.text
    forget()
    path.write_text(SOURCE.replace("% 2", "% 3"))
    align(run, replace(QUICK, **given))
    assert "making it again, for its setting align" in caplog.text
    assert run.manifest(name).settings["align"]["reward_module"] == {module: hash_file(path)}


def test_the_command_line_finds_a_module_of_the_working_directory(modules: Path, run: Run) -> None:
    flags = [*SMALL_FLAGS, "--round-users", "64", "--name", "own"]
    command = [sys.executable, "-P", "-m", "sagerec.cli", "align", str(run.folder), *flags]
    own = ["--reward", "even=1", "--reward-module", "mine.rewards"]
    done = subprocess.run([*command, *own], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "reward/even" in metrics_of(run, "policy-own")[-1]


def test_the_processes_of_a_study_know_the_rewards_of_a_module(
    modules: Path, store_folder: Path, tmp_path: Path
) -> None:
    """Two spawned processes; the record names the module's source, and the control, which reads no reward, has none."""
    study = StudySettings(objectives=("sage",), baselines=(), seeds=1, trials=0, processes=2)
    shared = replace(QUICK, epochs=1, validations=1, reward=("even=1",), reward_module=("mine.rewards",), slates=6)
    settings = replace(SMALL_STUDY, study=study, align=shared)
    record = run_study(store_folder, tmp_path / "study", settings)
    sources = {"mine.rewards": hash_file(modules / "mine" / "rewards.py")}
    assert record["settings"]["align"]["reward_module"] == sources
    saved = {
        name: read_json(tmp_path / "study" / "run" / f"policy-{name}-s0" / "manifest.json")["settings"]["align"]
        for name in ("sage", "sft")
    }
    assert saved["sage"]["reward_module"] == sources
    assert saved["sage"]["reward"] == ["even=1"]
    assert saved["sft"]["reward_module"] == {}
    assert saved["sft"]["reward"] == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_study_of_a_reward_that_no_module_registers_is_refused_before_anything_trains(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagerec.objectives.rewards.REWARDS", dict(REWARDS))
    register_reward("mine_alone", lambda x: torch.ones(x.slates.shape))
    monkeypatch.setattr("sagerec.training.reward_modules.REWARDS", sys.modules["sagerec.objectives.rewards"].REWARDS)
    for expression in ("mine_alone=1", "hit*mine_alone=1"):
        with pytest.raises(RewardError, match=r"'mine_alone' is registered in this process alone.*--reward-module"):
            CompareSettings(StudySettings(processes=processes), align=replace(QUICK, reward=(expression,)))
    register_reward("hit", lambda x: torch.ones(x.slates.shape), replace=True)  # among the default rewards
    with pytest.raises(RewardError, match=r"'hit' is registered in this process alone"):
        CompareSettings()


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("mine.nothing", None, r"'mine.nothing' cannot be imported \(ModuleNotFoundError: No module named"),
        ("", None, r"'' cannot be imported \(ValueError: Empty module name\)"),
        (".mine", None, r"'.mine' cannot be imported \(TypeError"),
        ("absent.py", None, r"'absent.py' cannot be imported \(FileNotFoundError"),
        ("sys", None, "'sys' has no source file"),
        ("mine.wrong", "def (", r"'mine.wrong' cannot be imported \(SyntaxError"),
        ("mine.wrong", "raise ValueError('two\\nlines')", r"\(ValueError: two lines\); expected a module"),
        ("mine.wrong", "raise SystemExit(3)", r"\(SystemExit: 3\)"),
        ("mine.wrong", SOURCE.replace('"even"', '"hit"'), r"\(RewardError: reward 'hit' exists"),
        ("mine.wrong", SOURCE + "\n1 / 0", r"\(ZeroDivisionError: division by zero\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    module: str, source: str | None, message: str, modules: Path
) -> None:
    """And leaves no reward behind, so that the mended module can be imported."""
    if source is not None:
        (modules / "mine" / "wrong.py").write_text(source)
    with pytest.raises(RewardError, match=f"the reward module .*{message}") as error:
        AlignSettings(reward_module=(module,))
    assert "\n" not in str(error.value)
    assert "even" not in REWARDS


NUMBERS: dict[str, Any] = {
    **{"boost": 3.5, "boost_form": "bound", "boost_scope": "all", "entropy_penalty": 1.5, "clip_low": 0.11},
    **{"clip_high": 0.12, "cap": 3.0, "k": 4, "slates": 5, "beam_slates": 2, "temperature": 0.7, "top_p": 0.9},
    **{
        "credit": "item",
        "clusters": "category",
        "cold_max_count": 3,
        "history": "keep",
        "epochs": 3,
        "max_contexts": 9,
    },
    **{"round_users": 99, "batch_users": 33, "passes": 2, "learning_rate": 1e-3, "weight_decay": 0.2, "seed": 3},
    **{"warmup_share": 0.1, "clip_norm": 2.0, "policy_weight": 0.5, "sft_weight": 0.4, "replay_weight": 0.3},
    **{"kl_weight": 0.2, "entropy_weight": 0.1, "validations": 3, "validation_users": 77, "criterion": ("recall=1",)},
    **{"reward": ("hit=2",), "reward_module": ("mine.rewards",), "start": "supervised"},
}
BESIDE: dict[str, dict[str, Any]] = {"top_p": {"beam_slates": 2}, "credit": {"k": 3}}
"""What a setting needs beside it."""


def attempt(**settings: Any) -> tuple[AlignSettings | None, str]:
    """The settings, or why there are none."""
    try:
        return AlignSettings(**settings), ""
    except SettingsError as error:
        return None, str(error)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_setting_is_read_or_refused(objective: str, modules: Path) -> None:
    """Another value changes what the alignment is recorded to be, or is refused by name.

    A bound's own settings are those of the table in docs/alignment.md; the control reads nothing of rollouts.
    """
    row, plain = OBJECTIVES[objective], AlignSettings(objective=objective)
    assert {field.name for field in fields(AlignSettings)} - NUMBERS.keys() == {
        *("objective", "device", "track", "checkpoint_every")
    }
    refused = set()
    for name, value in NUMBERS.items():
        beside = BESIDE.get(name, {})
        changed, said = attempt(objective=objective, **{name: value}, **beside)
        if changed is None:
            flags = [f"--{n.replace('_', '-')}" for n in (name, *beside)]
            assert said in [f"{flag} is not read by objective {objective}; leave it out" for flag in flags]
            refused.add(name)
        else:
            assert changed.what() != plain.what(), name
    by_bound = {
        "none": set(),
        "clip": {"clip_low", "clip_high"},
        "up-clip": {"clip_low"},
        "early-clip": {"clip_low", "clip_high"},
        "cap": {"cap"},
        "gradient": {"boost", "boost_form", "boost_scope", "entropy_penalty"},
        "adaptive-clip": {"boost", "boost_scope", "entropy_penalty", "clip_low", "clip_high"},
    }
    of_rows = set.union(*by_bound.values())
    if row.trains_on_targets:
        rollouts = {
            "reward",
            "reward_module",
            "k",
            "slates",
            "beam_slates",
            "temperature",
            "top_p",
            "credit",
            "clusters",
        }
        assert refused == of_rows | rollouts | {"policy_weight", "sft_weight", "kl_weight", "entropy_weight"}
    else:
        unboosted = {"boost_form", "boost_scope"} if row.boost == 0 else set()
        assert refused == of_rows - (by_bound[row.bound] - unboosted)


def test_what_all_alignments_of_a_study_share_is_narrowed_to_each() -> None:
    """Refused for the control alone, left out where all share it; what a study sets itself cannot be shared."""
    shared = AlignSettings(reward=("hit=1",), k=3, slates=5, credit="item", sft_weight=0.2, learning_rate=1e-4)
    for objective in OBJECTIVES:
        own = shared.for_objective(objective)
        assert (own.objective, own.learning_rate) == (objective, 1e-4)
        assert (own.k == 3) == (objective != "sft")
    assert shared.for_objective("sft").resolved().reward == ()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"objective": "gbpo"}, "objective is set for all alignments, and a study has its own; .*--objectives"),
        ({"seed": 3}, "seed is set for all alignments, and a study has its own; .*--seeds"),
    ]
    for given, message in refused:
        with pytest.raises(SettingsError, match=message):
            CompareSettings(align=AlignSettings(**given))


def changed(name: str, value: Any) -> AlignSettings:
    """The defaults but for one."""
    return AlignSettings(**{name: value})


WHOLE = (
    *("k", "slates", "beam_slates", "cold_max_count", "epochs", "max_contexts", "round_users", "batch_users"),
    *("passes", "validations", "validation_users", "checkpoint_every", "seed"),
)
REAL = (
    *("temperature", "top_p", "learning_rate", "weight_decay", "warmup_share", "clip_norm", "policy_weight"),
    *("sft_weight", "replay_weight", "kl_weight", "entropy_weight", "boost", "entropy_penalty"),
)


@pytest.mark.parametrize("name", [*WHOLE, *REAL])
@pytest.mark.parametrize("value", [-1, 10**30, -1e300, 1e300, math.nan, math.inf, -math.inf, "3", True])
def test_a_number_out_of_range_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} is .*; expected "):
        changed(name, value)


@pytest.mark.parametrize("name", ["k", "slates", "epochs", "round_users", "batch_users", "passes", "validation_users"])
def test_counts_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is 0; expected at least 1$"):
        changed(name, 0)
    with pytest.raises(SettingsError, match=f"^{name} is 2.5; expected a whole number"):
        changed(name, 2.5)


@pytest.mark.parametrize("part", ["recall=nan", "recall=inf", "recall=1e99", "recall", "=1", "speed=1", "recall=x"])
def test_a_criterion_that_is_none_is_refused(part: str) -> None:
    with pytest.raises(SettingsError, match=f"criterion '{part}'; expected METRIC=WEIGHT"):
        AlignSettings(criterion=(part,))
    with pytest.raises(SettingsError, match="criterion 'recall' stands twice"):
        AlignSettings(criterion=("recall=1", "recall=2"))


@pytest.mark.parametrize("objective", ["sage", "sft"])
@pytest.mark.parametrize("change", [{}, {"max_contexts": 32}, {"round_users": 32}])
def test_a_learning_rate_that_ruins_the_policy_leaves_none(objective: str, change: dict[str, Any], run: Run) -> None:
    """Without a validation: after one update, before the next round, and at an update of the same round."""
    own = QUICK.for_objective(objective)
    settings = replace(own, learning_rate=1e6, validations=0, warmup_share=0.0, epochs=1, **change)
    with pytest.raises(TrainingError, match=r"update [01].*[Ll]ower (the learning rate \()?--learning-rate") as error:
        align(run, settings)
    assert "\n" not in str(error.value)
    assert not (run.folder / f"policy-{objective}").exists()


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_learning_rate_that_ruins_the_supervised_policy_leaves_none(epochs: int, run: Run) -> None:
    before = run.manifest("policy").content_hash
    settings = replace(SMALL_TRAIN, learning_rate=1e6, validate_every=0, epochs=epochs, batch_size=10_000)
    with pytest.raises(TrainingError, match=r"step 1.*ower the learning rate"):
        train(run, SMALL_POLICY, settings)
    assert run.manifest("policy").content_hash == before
    with pytest.raises(TrainingError, match=r"step 1.*ower the learning rate"):  # the checkpoint is as lost
        train(run, SMALL_POLICY, settings)


def test_a_ruined_alignment_is_one_line_on_the_command_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", str(run.folder), *SMALL_FLAGS, "--learning-rate", "1e6"]) == 1
    assert "--learning-rate" in capsys.readouterr().err
