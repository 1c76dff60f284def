"""The round of alignment: what each part of the loss adds, and where free tokens stand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.decoding.slates import FreeTokens
from sagerec.objectives.loss import ratio_spread
from sagerec.objectives.table import OBJECTIVES
from sagerec.run.folder import Run
from sagerec.training import parallel, rounds
from sagerec.training.layout import lay_out
from tests.test_alignment import QUICK, base_run, run, stage_of

__all__ = ["base_run", "run"]


@given(seed=st.integers(0, 1000), per_item=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_layout_puts_each_units_tokens_in_its_row(seed: int, per_item: bool) -> None:
    """The slow twin: unit by unit, token by token; every slate and item has a number of tokens of its own, maybe 0."""
    rng = np.random.default_rng(seed)
    batch, group, k = rng.integers(1, 4, 3)
    counts = rng.integers(0, 4, batch * group * k)
    item = torch.from_numpy(np.repeat(np.arange(batch * group * k), counts))
    values = torch.arange(1.0, len(item) + 1)
    layout = lay_out(FreeTokens(values, item), (int(batch), int(group), int(k)), per_item=per_item)
    rows: dict[int, list[float]] = {}
    for value, number in zip(values.tolist(), item.tolist(), strict=True):
        b, rest = divmod(number, group * k)
        g, place = divmod(rest, k)
        unit = (b * k + place) * group + g if per_item else b * group + g
        rows.setdefault(int(unit), []).append(value)
    table, mask = layout.fill(values).flatten(0, 1), layout.mask.flatten(0, 1)
    assert layout.mask.shape[:2] == ((batch * k if per_item else batch), group)
    for unit in range(len(table)):
        assert table[unit][mask[unit]].tolist() == rows.get(unit, [])
    assert int(mask.sum()) == len(values)


def test_the_spread_of_the_ratio_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One context here and three on another rank, whose sums stand in for those of a group: the spread of all four."""
    generator = torch.Generator().manual_seed(0)
    new, old = (-4 * torch.rand(4, 5, 3, generator=generator) for _ in range(2))
    mask = torch.rand(4, 5, 3, generator=generator) < 0.7
    new[0] = -3.0  # the two ranks differ
    row = OBJECTIVES["sage_paper"]
    sums: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        sums.append(value.clone())
        return value

    def spread(part: slice) -> float:
        return float(rounds.global_spread(row, new[part], old[part], mask[part]))

    whole = spread(slice(None))
    assert whole == pytest.approx(float(ratio_spread(row, logprobs=new, old_logprobs=old, mask=mask)))
    monkeypatch.setattr(parallel, "add_up", keep)
    assert abs(spread(slice(1, 4)) - whole) > 1e-3
    monkeypatch.setattr(parallel, "add_up", lambda value: value + sums.pop(0))
    assert spread(slice(0, 1)) == pytest.approx(whole)


def losses_of(run: Run, **change: object) -> tuple[float, dict[str, float]]:
    """Loss and figures of a round's second update, where the ratio has left 1, with dropout from one seed."""
    more = replace(QUICK, reward=("click=1", "hit=2"), learning_rate=0.01, **change).resolved()  # type: ignore[arg-type]
    stage = replace(stage_of(run, more), longest=3)
    made, _ = rounds.roll_round(stage, [np.arange(40), np.arange(40, 80)], 0)
    rounds.update(stage, made[0], 0, 10)
    loss, logged = rounds.losses(stage, made[1], 1)
    return float(loss.detach()), {name: float(value.detach()) for name, value in logged.items()}


def test_the_loss_is_the_sum_of_its_parts(run: Run) -> None:
    """Total = 2 policy + .5 anchor + 3 KL - .25 entropy + .125 replay; the KL is above 0 where the policy has moved."""
    alone = {"policy_weight": 0.0, "sft_weight": 0.0}
    plain, figures = losses_of(run, policy_weight=2.0, sft_weight=0.5)
    expected = 2 * figures["policy_loss"] + 0.5 * figures["sft_loss_nats"]
    assert plain == pytest.approx(expected, rel=1e-5)
    assert figures["ratio_q05"] < 1 < figures["ratio_q95"]
    one, parts = losses_of(run, policy_weight=2.0, sft_weight=0.5, entropy_weight=0.25)
    assert one == pytest.approx(
        2 * parts["policy_loss"] + 0.5 * parts["sft_loss_nats"] - 0.25 * parts["entropy_nats"], rel=1e-4
    )
    assert parts["entropy_nats"] > 0
    divergence, parts = losses_of(run, policy_weight=2.0, sft_weight=0.5, kl_weight=3.0)
    assert divergence > 2 * parts["policy_loss"] + 0.5 * parts["sft_loss_nats"] + 1e-4
    nothing, _ = losses_of(run, **alone)
    assert nothing == 0


def test_the_anchor_is_the_loss_of_the_targets_alone(run: Run) -> None:
    """Without dropout, the figure is -log P(target | history), case by case."""
    stage = stage_of(run, QUICK.for_objective("sft").resolved())
    contexts = rounds.read_cases(stage, np.arange(6))
    policy = stage.policy.eval()
    policy.train = lambda mode=True: policy  # type: ignore[method-assign]
    _, logged = rounds.losses(stage, rounds.Minibatch(contexts), 0)
    one_by_one = []
    for case in range(6):
        length = int(contexts.lengths[case])
        items = contexts.items[case : case + 1, :length]
        counted = torch.arange(length)[None] == length - 1
        targets = contexts.targets[case].expand(1, length)
        one_by_one.append(float(policy.next_item_loss(items, targets, counted).detach()))
    assert float(logged["sft_loss_nats"]) == pytest.approx(np.mean(one_by_one), rel=1e-4)


def test_the_rate_follows_its_schedule_and_the_gradient_is_clipped(run: Run) -> None:
    """The first of 40 updates has half of the highest rate (a warm-up of 2); a tiny norm limits what AdamW is given."""
    stage = stage_of(run, replace(QUICK, clip_norm=1e-3).resolved())
    made, _ = rounds.roll_round(stage, [np.arange(40)], 0)
    figures = rounds.update(stage, made[0], 0, 40)
    assert figures["learning_rate"] == pytest.approx(QUICK.learning_rate / 2)
    assert stage.optimizer.param_groups[0]["lr"] == figures["learning_rate"]
    assert figures["gradient_norm"] > 1e-3
    norm = sum(float(p.grad.square().sum()) for p in stage.policy.parameters() if p.grad is not None) ** 0.5
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_quantiles_are_those_of_what_is_counted() -> None:
    """Of 1, 2, 4, 8 the median is 3 and the quartile 1.75; of one value all are that value."""
    values, counted = torch.tensor([9.0, 4.0, 1.0, 8.0, 2.0]), torch.tensor([False, True, True, True, True])
    found = rounds.quantiles(values, counted, (0.0, 0.25, 0.5, 1.0))
    assert [float(x) for x in found] == [1.0, 1.75, 3.0, 8.0]
    assert float(rounds.quantiles(values, values == 4, (0.3,))[0]) == 4.0
