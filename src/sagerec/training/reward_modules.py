"""Modules of one's own rewards, imported wherever an alignment runs: here, in a study's processes, in every rank.

A module calls `sagerec.register_reward` when it is imported. What was registered elsewhere is known to one process
alone, and its source to nobody.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from sagerec.artifacts import hash_file
from sagerec.errors import RewardError
from sagerec.objectives.rewards import BUILT_IN, REWARDS


@cache
def load_reward_module(name: str) -> str:
    """Import a module once, by its dotted name or as the path of a .py file; returns the SHA-256 of its source file.

    The working directory is searched after all that Python searches. A module that fails leaves no reward behind.

    Raises: RewardError where it cannot be imported, or has no source file.
    """
    before = dict(REWARDS)
    try:
        module = _import_file(Path(name)) if name.endswith(".py") else _import_name(name)
    except (Exception, SystemExit) as error:
        REWARDS.clear()
        REWARDS.update(before)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise RewardError(
            f"the reward module {name!r} cannot be imported ({said}); expected a module that can be imported from "
            f"{Path.cwd()}, such as my.rewards, or the path of a .py file"
        ) from error
    source = getattr(module, "__file__", None)
    if source is None or not Path(source).is_file():
        raise RewardError(f"the reward module {name!r} has no source file; expected a .py file, or a package of them")
    return hash_file(Path(source))


def _import_name(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    importlib.invalidate_caches()  # the file may be newer than the process
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """The module of a file, under a name that no other module has."""
    name = f"sagerec_rewards_of_{path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python source")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def check_origin(expressions: Sequence[str], modules: Sequence[str]) -> None:
    """Raise RewardError for a reward of one's own that another process would not know."""
    for name in dict.fromkeys(name for expression in expressions for name in expression.split("*")):
        reward = REWARDS[name]
        here_alone = not modules or getattr(reward.function, "__module__", None) == "__main__"
        if reward is not BUILT_IN.get(name) and here_alone:
            raise RewardError(
                f"the reward {name!r} is registered in this process alone, and the processes of a study would not know "
                "it; register it in a module of its own and name that with --align.reward-module (of align: "
                "--reward-module), reward_module=(...) in Python"
            )
