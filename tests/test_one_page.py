"""`examples/sage_on_one_page.py` makes the updates of the alignment stage, from formulas of its own."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sagerec.run import stages
from sagerec.run.folder import Run
from tests.test_alignment import base_run, run

__all__ = ["base_run", "run"]
PAGE = Path(__file__).parents[1] / "examples" / "sage_on_one_page.py"


@pytest.fixture(scope="module")
def page() -> Any:
    """The page as a module."""
    spec = importlib.util.spec_from_file_location("sage_on_one_page", PAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"boost": 0.0, "penalty": 9.0, "anchor": 0.0},
        {"boost": 9.0, "penalty": 0.0, "slates": 5, "round_users": 128},
    ],
)
def test_the_page_makes_the_updates_of_the_stage(run: Run, page: Any, change: dict[str, Any]) -> None:
    """Weights after two passes: apart by less than .2 % of the way that they went (AdamW magnifies rounding)."""
    args = replace(page.Args(slates=8, batch_users=32, round_users=64, learning_rate=2e-3), **change)
    store, mine = run.store(), run.policy(device="cpu")
    start = {name: value.clone() for name, value in mine.state_dict().items()}
    page.align(run, store, mine, args)
    theirs = run.policy(stages.align(run, page.stage_settings(args), name="beside"), device="cpu").state_dict()
    moved, apart = (
        sum(float((one[name] - other[name]).square().sum()) for name in start) ** 0.5
        for one, other in ((start, theirs), (mine.state_dict(), theirs))
    )
    assert moved > 0.5
    assert apart < 0.002 * moved, (apart, moved)


def test_the_page_is_one_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert "sagerec.objectives" not in text.split('"""', 2)[2]
    assert "training.rounds" not in text.split('"""', 2)[2]


def test_its_loss_by_hand(page: Any) -> None:
    """Success: p .5, q .25, A 2, cold, boost 4: d = .5 / 5, so the loss is -.5 / .1 x 2 = -10 before the mean.

    Failure: p .5, q .75, A -1, H 0, penalty 4: d = .75 / 5 = .15, so +.5 / .15 = 3.3333; the mean is -3.3333.
    """
    old, logp = torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log()
    loss = page.sage(
        logp,
        old,
        torch.tensor([2.0, -1.0]),
        torch.tensor([0.3, 0.0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([True, True]),
        page.Args(),
    )
    assert float(loss) == pytest.approx((-10 + 0.5 / 0.15) / 2)
