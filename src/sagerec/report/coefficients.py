"""The curves c(r): how far each objective lets the gradient of a slate go, as `policy_loss` itself computes it.

A slate of one counted token with old probability q and ratio r has new probability p = r q; its coefficient is read
off `policy_loss`, so a curve shows the code that trains and no formula of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sagerec.errors import SettingsError
from sagerec.objectives.loss import policy_loss
from sagerec.objectives.table import OBJECTIVES, Objective, find_objective

OLD_PROBABILITY = 0.2
"""q of every curve: about the geometric mean of a code's probability in a rolled-out slate."""
SPREAD = 0.03
"""Spread of the ratio for every curve that bounds in its units: about that of a round of several passes."""
RATIOS = np.linspace(0.0, 2.0, 402)[1:]
SHOWN = ("sage", "gbpo", "gspo", "grpo", "gdpo")
"""Objectives that are drawn where a run has none of its own."""
OWN_SETTINGS = ("boost", "boost_form", "boost_scope", "entropy_penalty", "clip_low", "clip_high", "cap")


def coefficients(
    row: str | Objective,
    *,
    advantage: float,
    diversity: float = 1.0,
    coldness: float = 0.0,
    ratios: np.ndarray = RATIOS,
    old_probability: float = OLD_PROBABILITY,
) -> np.ndarray:
    """C (R,) at the ratios (R,) of slates with one counted token, all of one advantage, diversity and coldness."""
    shape = (1, len(ratios))
    old = torch.full((*shape, 1), float(np.log(old_probability)), dtype=torch.float64)
    new = old + torch.from_numpy(np.log(ratios)).view(*shape, 1)
    found = policy_loss(
        row,
        logprobs=new,
        old_logprobs=old,
        mask=torch.ones_like(old, dtype=torch.bool),
        advantages=torch.full(shape, advantage, dtype=torch.float64),
        diversity=torch.full(shape, diversity, dtype=torch.float64),
        coldness=torch.full(shape, coldness, dtype=torch.float64),
        spread=SPREAD,
    )
    values: np.ndarray = found.coefficient.flatten().numpy()
    return values


def aligned_objective(settings: dict[str, Any]) -> Objective | None:
    """The row of saved alignment settings; None for a control, or one that this version does not know."""
    try:
        row = find_objective(str(settings.get("objective")))
        row = replace(row, **{k: settings[k] for k in OWN_SETTINGS if settings.get(k) is not None})
    except (SettingsError, TypeError):
        return None
    return None if row.trains_on_targets else row


def choose_objectives(of_run: Sequence[tuple[str, Objective]], most: int = 6) -> list[Objective]:
    """The run's own rows under the names that are given, and those of SHOWN that it lacks; one row a curve."""
    names = {row.name for _, row in of_run}
    own = [replace(row, name=name) for name, row in of_run]
    found: dict[bytes, Objective] = {}
    for row in (*own, *(OBJECTIVES[name] for name in SHOWN if name not in names)):
        curves = [coefficients(row, advantage=a, diversity=0.5, coldness=1.0) for a in (1.0, -1.0)]
        key = np.round(np.concatenate(curves), 6).tobytes()
        if key in found:
            joined = found[key]
            if row.name not in joined.name.split(", "):
                found[key] = replace(joined, name=f"{joined.name}, {row.name}")
        else:
            found[key] = row
    return list(found.values())[:most]
