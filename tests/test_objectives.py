"""Objectives: golden values, the literal surrogates by autograd, identities, limits, and values derived by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sagerec import OBJECTIVES, Objective, PolicyLoss, compute_advantages, policy_loss
from sagerec.errors import NumericalError, SettingsError
from sagerec.objectives.loss import ratio_spread

GOLDEN = json.loads((Path(__file__).parent / "data" / "objectives.json").read_text(encoding="utf-8"))
SAGE = replace(OBJECTIVES["sage"], boost=2.0, entropy_penalty=1.0)
ALL = replace(SAGE, boost=0.5, boost_scope="all")
GOLDEN_ROWS = {
    "sage": SAGE,
    "sage_all": ALL,
    "sage_bound": replace(ALL, boost_form="bound"),
    "sage_no_boost": replace(SAGE, boost=0.0),
    "sage_no_penalty": replace(SAGE, entropy_penalty=0.0),
    "sage_coupled": replace(SAGE, advantage="normalised"),
    "sage_clip": replace(OBJECTIVES["sage_clip"], boost=0.5, entropy_penalty=0.5),
}
WITH_LOSS = [name for name, row in OBJECTIVES.items() if not row.trains_on_targets]
GRADIENT_BOUND = [name for name in WITH_LOSS if OBJECTIVES[name].bound == "gradient"]


def batch(seed: int, *, b: int = 3, g: int = 4, t: int = 5, m: int = 2, spread: float = 0.5) -> dict[str, Tensor]:
    """A random batch in float64 whose every slate counts at least one token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    logprobs = -4 * draw(b, g, t) - 1e-3
    mask = draw(b, g, t) < 0.8
    mask[..., 0] = True
    return {
        "logprobs": logprobs,
        "old_logprobs": (logprobs + spread * (draw(b, g, t) - 0.5)).clamp(max=-1e-6),
        "mask": mask,
        "rewards": draw(b, g, m),
        "weights": 0.2 + draw(m),
        "diversity": draw(b, g),
        "coldness": draw(b, g),
    }


def run(row: str | Objective, inputs: dict[str, Any]) -> tuple[PolicyLoss, Tensor]:
    """The loss and its gradient to the log-probabilities."""
    logprobs = inputs["logprobs"].clone().requires_grad_()
    found = policy_loss(row, **(inputs | {"logprobs": logprobs}))
    return found, torch.autograd.grad(found.loss, logprobs)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", range(len(GOLDEN["cases"])))
def test_golden_values_of_an_independent_implementation(case: int, dtype: torch.dtype, tolerance: float) -> None:
    golden = GOLDEN["cases"][case]
    inputs = {k: torch.tensor(v, dtype=torch.bool if k == "mask" else dtype) for k, v in golden["inputs"].items()}
    expected = golden["expected"]

    def agrees(found: Tensor, values: Any) -> None:
        torch.testing.assert_close(found, torch.tensor(values, dtype=dtype), rtol=tolerance, atol=tolerance)

    assert len(expected["objectives"]) == 11
    for name, values in expected["objectives"].items():
        found, gradient = run(GOLDEN_ROWS.get(name, OBJECTIVES.get(name, name)), inputs)
        agrees(found.loss.detach(), values["loss"])
        agrees(gradient, values["grad"])
        coupled = name in ("grpo", "gspo", "gbpo", "sage_coupled")
        agrees(found.advantages, expected["advantages"]["sum_then_normalize" if coupled else "decoupled"])
        if "coefficient" in values:
            agrees(found.coefficient, values["coefficient"])
        if found.diagnostics["ratio"].ndim == 2:
            agrees(found.diagnostics["ratio"], expected["sequence_ratio"])


def literal_loss(row: Objective, logprobs: Tensor, x: dict[str, Tensor], advantages: Tensor) -> Tensor:
    """The twin: each objective's published surrogate in probabilities, differentiated by autograd."""
    mask, old = x["mask"], x["old_logprobs"]
    counts = mask.sum(2)
    a = advantages
    if row.ratio != "token":
        p = ((logprobs * mask).sum(2) / counts).exp()
        q = ((old * mask).sum(2) / counts).exp()
        h, cold = x["diversity"], x["coldness"]
    else:
        p, q, a = logprobs.exp(), old.exp(), advantages.unsqueeze(2)
        h, cold = x["diversity"].unsqueeze(2), x["coldness"].unsqueeze(2)
    q = p.detach() if row.ratio == "unit" else q
    r, fixed = p / q, p.detach()
    b = row.boost * (cold if row.boost_scope == "cold" else 1.0)
    if row.bound == "none":
        s = p.log() * a
    elif row.bound == "clip":
        s = torch.minimum(r * a, r.clamp(1 - row.clip_low, 1 + row.clip_high) * a)
    elif row.bound == "up-clip":
        assert row.dual_clip is not None
        down = torch.minimum(r * a, r.clamp(1 - row.clip_low, 1 + row.clip_high) * a)
        s = torch.where(a > 0, p / fixed * a, torch.maximum(down, row.dual_clip * a))
    elif row.bound == "cap":
        s = r.detach().clamp(max=row.cap) * a * p.log()
    elif row.bound == "early-clip":
        early = torch.maximum(fixed / (1 + row.clip_high + row.early_margin), q)
        r = torch.where(a < 0, p / early, r)
        s = torch.minimum(r * a, r.clamp(1 - row.clip_low, 1 + row.clip_high) * a)
    elif row.bound == "adaptive-clip":
        unit = r.detach().log().square().mean().sqrt() if row.bound_unit == "spread" else 1.0
        low, high = 1 - row.clip_low - unit * row.entropy_penalty * (1 - h), 1 + row.clip_high + unit * b
        s = torch.minimum(r * a, torch.minimum(torch.maximum(r, low), high * torch.ones_like(r)) * a)
    else:
        scaled = row.boost_form == "scaled"
        positive = torch.maximum(q, fixed) / (1 + b) if scaled else torch.maximum(q, fixed / (1 + b))
        negative = torch.maximum(q, 1 - fixed) / (1 + row.entropy_penalty * (1 - h))
        s = p / torch.where(a >= 0, positive, negative) * a
    s = s.unsqueeze(2).expand_as(mask) if row.ratio != "token" else s
    s = s * mask
    if row.aggregation == "slate":
        return -(s.sum(2) / counts).mean()
    return -s.sum() / (counts.sum() if row.aggregation == "token" else mask.numel())


@pytest.mark.parametrize("name", WITH_LOSS)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.0, 0.3, 3.0]))
@settings(max_examples=15, deadline=None)
def test_value_gradient_and_coefficient_equal_autograd_of_the_published_surrogate(
    name: str, seed: int, spread: float
) -> None:
    inputs, row = batch(seed, spread=spread), OBJECTIVES[name]
    inputs["rewards"] = 4 * inputs["rewards"] - 2  # of both signs, where they are not centred
    found, gradient = run(row, inputs)
    logprobs = inputs["logprobs"].clone().requires_grad_()
    loss = literal_loss(row, logprobs, inputs, found.advantages)
    (expected,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(found.loss.detach(), loss.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    if row.ratio != "token":
        # c measured: the gradient with respect to the mean log-probability, over - A / n.
        some = found.advantages != 0
        measured = (expected.sum(2) * found.advantages.numel() / -found.advantages)[some]
        torch.testing.assert_close(found.coefficient[some], measured, rtol=1e-8, atol=1e-10)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_without_boost_and_penalty_sage_is_decoupled_gbpo(seed: int) -> None:
    inputs = batch(seed)
    bare = replace(OBJECTIVES["sage"], boost=0.0, entropy_penalty=0.0)
    (one, g1), (two, g2) = run(bare, inputs), run("gbpo_decoupled", inputs)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(g1, g2)
    coupled, g3 = run(replace(bare, advantage="normalised"), inputs)
    gbpo, g4 = run("gbpo", inputs)
    assert torch.equal(coupled.loss, gbpo.loss)
    assert torch.equal(g3, g4)


def test_gbpo_of_one_token_by_hand() -> None:
    """With p = .6, q = .5, A = 1: c = min(1.2, 1) = 1. With A = -1: d = max(.5, .4), c = min(1.2, 1.5) = 1.2.

    With p = .2, q = .1, A = -1: d = max(.1, .8), c = min(2, .25) = .25.
    """
    p = torch.tensor([[[0.6], [0.6], [0.2]]], dtype=torch.float64)
    q = torch.tensor([[[0.5], [0.5], [0.1]]], dtype=torch.float64)
    found = policy_loss(
        "gbpo",
        logprobs=p.log(),
        old_logprobs=q.log(),
        mask=torch.ones(1, 3, 1, dtype=torch.bool),
        advantages=torch.tensor([[1.0, -1.0, -1.0]], dtype=torch.float64),
    )
    assert found.coefficient[0].tolist() == pytest.approx([1.0, 1.2, 0.25])
    assert found.diagnostics["at_bound"][0].tolist() == [True, False, True]
    assert found.loss.item() == pytest.approx(-(1.0 - 1.2 - 0.25) / 3)


def slates(name: str, p: list[float], q: list[float], **given_: list[float]) -> PolicyLoss:
    """The loss of a group of slates of one token with these probabilities."""
    new, old = (torch.tensor([values], dtype=torch.float64).log().unsqueeze(2) for values in (p, q))
    facts: dict[str, Any] = {key: torch.tensor([values], dtype=torch.float64) for key, values in given_.items()}
    if "rewards" in facts:
        facts["rewards"] = facts["rewards"].unsqueeze(2)
    return policy_loss(name, logprobs=new, old_logprobs=old, mask=torch.ones_like(new, dtype=torch.bool), **facts)


def test_gbpo_as_onerec_v2_runs_it_by_hand() -> None:
    """Whoever wrote the slates, r = 1: a success has c = 1, a failure min(1, p / (1 - p)): .2 / .8 = .25, and 1 at .6.

    Rewards of 1, -1, -1 and .3 are advantages of 1, -1, -1 and 0, the mean left in.
    """
    found = slates("gbpo_raw", [0.6, 0.6, 0.2, 0.5], [0.1, 0.9, 0.4, 0.5], rewards=[1.0, -1.0, -1.0, 0.3])
    assert found.advantages[0].tolist() == [1.0, -1.0, -1.0, 0.0]
    assert found.coefficient[0].tolist() == pytest.approx([1.0, 1.0, 0.25, 1.0])
    assert found.diagnostics["ratio"][0].tolist() == [1.0] * 4
    assert found.diagnostics["at_bound"][0].tolist() == [False, False, True, False]
    assert found.loss.item() == pytest.approx(-(1.0 - 1.0 - 0.25) / 4)
    several = compute_advantages("gbpo_raw", torch.tensor([[[1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]]))
    assert several.tolist() == [[1.0, 1.0, -1.0]]


def test_up_grpo_by_hand() -> None:
    """A = 1 has c = 1 at r = .25 and 4; A = -1 has c = 0 below .8 and above 3 (the dual clip), and r = 2 between."""
    p, q = [0.1, 0.4, 0.1, 0.4, 0.4], [0.4, 0.1, 0.2, 0.2, 0.1]
    found = slates("up_grpo", p, q, advantages=[1.0, 1.0, -1.0, -1.0, -1.0])
    assert found.coefficient.flatten().tolist() == pytest.approx([1.0, 1.0, 0.0, 2.0, 0.0])
    assert found.diagnostics["at_bound"].flatten().tolist() == [False, False, True, False, True]
    assert found.loss.item() == pytest.approx(-(1 + 1 - 0.8 - 2 - 3) / 5)


def test_the_clipped_form_in_units_of_the_spread_by_hand() -> None:
    """Log-ratios of .04, .01, -.04, -.01: a spread of sqrt((.0016 + .0001) / 2) = .029155.

    Successes are cut above 1 + 4e-4 + .029155: e^.04 is, e^.01 is not. Failures are cut below
    1 - 3e-4 - .029155 (1 - H): e^-.04 at H = 1 is, e^-.01 at H = 0 is not, and would be at H = 1. Twice the spread,
    given, spares all but e^-.04.
    """
    q = [0.5] * 4
    p = [x * math.exp(nats) for x, nats in zip(q, (0.04, 0.01, -0.04, -0.01), strict=True)]
    facts = {"advantages": [1.0, 1.0, -1.0, -1.0], "diversity": [0.0, 0.0, 1.0, 0.0]}
    found = slates("sage_paper", p, q, **facts)
    assert found.coefficient[0].tolist() == pytest.approx([0.0, math.exp(0.01), 0.0, math.exp(-0.01)])
    even = slates("sage_paper", p, q, **(facts | {"diversity": [0.0, 0.0, 1.0, 1.0]}))
    assert even.diagnostics["at_bound"][0].tolist() == [True, False, True, True]
    new, old = (torch.tensor([values]).log().unsqueeze(2) for values in (p, q))
    mask = torch.ones_like(new, dtype=torch.bool)
    spread = ratio_spread("sage_paper", logprobs=new, old_logprobs=old, mask=mask)
    assert float(spread) == pytest.approx(0.029155, abs=1e-6)
    wide = policy_loss(
        "sage_paper",
        logprobs=new,
        old_logprobs=old,
        mask=mask,
        spread=2 * spread,
        **{key: torch.tensor([values]) for key, values in facts.items()},
    )
    assert wide.diagnostics["at_bound"][0].tolist() == [False, False, True, False]
    with pytest.raises(NumericalError, match=r"spread is -1.0, expected a finite number of at least 0"):
        policy_loss("sage_paper", **batch(0), spread=-1.0)


@pytest.mark.parametrize("name", GRADIENT_BOUND)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 1.0, 6.0]))
@settings(max_examples=15, deadline=None)
def test_no_gradient_is_cut_and_none_passes_its_bound(name: str, seed: int, spread: float) -> None:
    inputs, row = batch(seed, spread=spread), OBJECTIVES[name]
    found, _ = run(row, inputs)
    c, a = found.coefficient, found.advantages
    if c.ndim == 3:
        c, a = c[inputs["mask"]], a.unsqueeze(2).expand_as(c)[inputs["mask"]]
        cold = inputs["coldness"].unsqueeze(2).expand_as(inputs["mask"])[inputs["mask"]]
    else:
        cold = inputs["coldness"]
    assert bool((c > 0).all())
    assert bool((c[a >= 0] <= (1 + row.boost * cold)[a >= 0] * (1 + 1e-12)).all())


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_coefficient_rises_with_the_ratio_to_its_bound_and_falls_with_diversity(seed: int) -> None:
    inputs = batch(seed, g=6)
    # One log-probability for all, and ratios that rise over the group.
    inputs["logprobs"] = torch.full_like(inputs["logprobs"], -1.0)
    inputs["old_logprobs"] = -1.0 - torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)[None, :, None].expand(3, -1, 5)
    same = torch.full((3, 6), 0.5, dtype=torch.float64)
    inputs |= {"coldness": same, "diversity": same}
    given_ = {k: v for k, v in inputs.items() if k not in ("rewards", "weights")}
    up = policy_loss(SAGE, **given_, advantages=torch.ones(3, 6)).coefficient
    assert bool((up.diff(dim=1) >= 0).all())
    assert up[0, -1] == pytest.approx(1 + 2.0 * 0.5)
    assert bool((up[:, :2].diff(dim=1) > 0).all())
    rising = given_ | {"diversity": torch.linspace(0, 1, 6, dtype=torch.float64).expand(3, -1)}
    rising["old_logprobs"] = rising["logprobs"]
    down = policy_loss(SAGE, **rising, advantages=-torch.ones(3, 6)).coefficient
    assert bool((down.diff(dim=1) < 0).all())
    assert down[0, 0] / down[0, -1] == pytest.approx(2.0)


@given(seed=st.integers(0, 10_000), rho=st.floats(0.2, 5.0))
@settings(max_examples=25, deadline=None)
def test_ratio_is_the_geometric_mean_and_masked_tokens_change_nothing(seed: int, rho: float) -> None:
    inputs = batch(seed)
    inputs["logprobs"] = inputs["logprobs"] - math.log(5.0)  # so that no old log-probability is above 0
    inputs["old_logprobs"] = inputs["logprobs"] - math.log(rho)
    found, gradient = run(SAGE, inputs)
    torch.testing.assert_close(found.diagnostics["ratio"], torch.full_like(found.advantages, rho))
    assert bool((gradient[~inputs["mask"]] == 0).all())
    for junk in (7.0, -torch.inf, torch.nan):
        changed = {k: inputs[k].masked_fill(~inputs["mask"], junk) for k in ("logprobs", "old_logprobs")}
        for name in ("sage", "grpo", "cispo", "reinforce"):
            one, g1 = run(name, inputs)
            two, g2 = run(name, inputs | changed)
            assert torch.equal(one.loss, two.loss)
            assert torch.equal(g1, g2)
            assert torch.equal(one.coefficient, two.coefficient)


def test_summed_rewards_collapse_and_decoupled_ones_do_not() -> None:
    """After GDPO's example: (hit, like) of a rare hit alone, and of a common like alone, sum to the same.

    Summed, (1, 0) and (0, 1) are one. Decoupled: hits are 1, 0, 0, 0, with mean 1/4 and deviation 1/2, so a hit scores
    1.5 and a miss -.5; likes are 0, 1, 1, 0, with mean 1/2 and deviation .57735, so they score +- .866025. The rare hit
    scores 1.5 - .866 and the common like -.5 + .866, before the batch is brought to unit deviation (its mean is 0).
    """
    rewards = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    together = compute_advantages("gbpo", rewards)[0]
    apart = compute_advantages(replace(SAGE, eps=1e-12), rewards)[0]
    assert together[0] == together[1]
    raw = torch.tensor([1.5 - 0.866025, -0.5 + 0.866025, -0.5 + 0.866025, -0.5 - 0.866025], dtype=torch.float64)
    torch.testing.assert_close(apart, raw / raw.std(), rtol=1e-5, atol=1e-6)
    assert apart[0] > apart[1]


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 50), shift=st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_decoupled_advantages_are_standard_and_ignore_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    rewards, row = batch(seed)["rewards"], replace(SAGE, eps=1e-12)
    found = compute_advantages(row, rewards)
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(found.std()) == pytest.approx(1.0, rel=1e-6)
    changed = rewards.clone()
    changed[..., 0] = scale * changed[..., 0] + shift
    torch.testing.assert_close(compute_advantages(row, changed), found, rtol=1e-6, atol=1e-7)


def test_a_constant_reward_adds_nothing_to_its_group() -> None:
    rewards = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[0, :, 1] = 0.3
    found = compute_advantages(SAGE, rewards)
    without = compute_advantages(replace(SAGE, advantage="normalised"), rewards[:1, :, :1])
    ratio = (found[0] - found[0].mean()) / without[0]
    torch.testing.assert_close(ratio, ratio[:1].expand(4), rtol=1e-3, atol=1e-3)


def test_token_mode_weighs_slates_by_their_tokens() -> None:
    """Slates repeated as often as they have tokens, and standardised, give the same numbers."""
    x = batch(3)
    tokens = x["mask"].sum(2)
    row = replace(SAGE, advantage="decoupled-token", eps=1e-12)
    found = compute_advantages(row, x["rewards"], tokens=tokens)
    score = (x["rewards"] - x["rewards"].mean(1, keepdim=True)) / x["rewards"].std(1, keepdim=True)
    flat = score.sum(2).flatten()
    repeated = flat.repeat_interleave(tokens.flatten())
    torch.testing.assert_close(found.flatten(), (flat - repeated.mean()) / repeated.std(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("advantage", ["mean", "normalised", "decoupled"])
def test_ragged_groups_equal_groups_taken_one_by_one(advantage: Any) -> None:
    """Groups of 1, 3 and 4 slates in shuffled order, against each group as a row of its own."""
    rewards = batch(5, b=1, g=8)["rewards"]
    group = torch.tensor([[7, 2, 2, 9, 9, 2, 9, 9]])
    row = replace(SAGE, advantage=advantage, eps=1e-9)
    found = compute_advantages(row, rewards, group=group)[0]
    expected = torch.zeros(8, dtype=torch.float64)
    for value in (2, 7, 9):
        inside = (group[0] == value).nonzero()[:, 0]
        part = rewards[:, inside]
        centred = part - part.mean(1, keepdim=True)
        deviation = part.std(1, keepdim=True) if len(inside) > 1 else torch.zeros(1, 1, 2, dtype=torch.float64)
        if advantage == "mean":
            expected[inside] = centred.sum(2)[0]
        elif advantage == "decoupled":
            expected[inside] = (centred / (deviation + 1e-9)).sum(2)[0]
        else:
            total = part.sum(2)[0]
            spread = total.std() if len(inside) > 1 else 0.0
            expected[inside] = (total - total.mean()) / (spread + 1e-9)
    if advantage == "decoupled":
        expected = (expected - expected.mean()) / (expected.std() + 1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", WITH_LOSS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_give_finite_numbers(name: str, dtype: torch.dtype) -> None:
    """Log-probabilities of -1e4 and of 0, rewards all equal, groups of one, slates without a counted token."""
    values = torch.tensor([-1e4, 0.0, -1e-30, -3.0], dtype=dtype)
    new, old = torch.cartesian_prod(values, values).T.reshape(2, 1, 16, 1)
    logprobs = new.expand(-1, -1, 2).contiguous()
    inputs: dict[str, Tensor] = {
        "logprobs": logprobs,
        "old_logprobs": old.expand(-1, -1, 2).contiguous(),
        "mask": torch.ones(1, 16, 2, dtype=torch.bool),
        "diversity": torch.rand(1, 16),
        "coldness": torch.ones(1, 16),
    }
    row = OBJECTIVES[name]
    for sign in (1.0, -1.0):
        found, gradient = run(row, inputs | {"advantages": torch.full((1, 16), sign)})
        assert bool(found.loss.isfinite())
        assert bool(gradient.isfinite().all())
    equal = inputs | {"rewards": torch.full((1, 16, 2), 0.1, dtype=dtype)}
    assert run(row, equal)[0].advantages.abs().max() < 1e-2 or not row.compares
    single = {k: v.transpose(0, 1) for k, v in equal.items()}
    assert bool(run(row, single)[0].loss.isfinite())
    empty = equal | {"mask": torch.zeros(1, 16, 2, dtype=torch.bool)}
    found, gradient = run(row, empty)
    assert found.loss.item() == 0.0
    assert not bool(gradient.any())


@pytest.mark.parametrize("name", WITH_LOSS)
def test_accumulation_steps_and_ranks_add_up_to_the_large_batch(name: str) -> None:
    """Two parts with the global advantages, denominator and spread: losses and gradients add up to the whole's."""
    x, row = batch(11, b=4), OBJECTIVES[name]
    whole, gradient = run(row, x)
    tokens = x["mask"].sum(2)
    advantages = compute_advantages(row, x["rewards"], weights=x["weights"], tokens=tokens)
    sizes = {"slate": 16, "token": int(tokens.sum()), "constant": x["mask"].numel()}
    spread = ratio_spread(row, **{n: x[n] for n in ("logprobs", "old_logprobs", "mask")})
    shared: dict[str, Any] = {"denominator": sizes[row.aggregation], "spread": spread}
    names = ("logprobs", "old_logprobs", "mask", "diversity", "coldness")
    parts = [
        run(row, {n: x[n][rows] for n in names} | {"advantages": advantages[rows]} | shared)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    total = parts[0][0].loss + parts[1][0].loss
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), gradient, rtol=1e-12, atol=1e-12)


def test_dual_clip_holds_back_negatives_of_high_ratio() -> None:
    row = replace(OBJECTIVES["grpo"], dual_clip=3.0)
    new = torch.tensor([[[-1.0], [-1.0]]], requires_grad=True)
    found = policy_loss(
        row,
        logprobs=new,
        old_logprobs=torch.tensor([[[-1.0 - math.log(4.0)], [-1.0 - math.log(2.0)]]]),
        mask=torch.ones(1, 2, 1, dtype=torch.bool),
        advantages=torch.tensor([[-1.0, -1.0]]),
    )
    assert found.coefficient[0, :, 0].tolist() == pytest.approx([0.0, 2.0], rel=1e-5)
    assert found.loss.item() == pytest.approx((3.0 + 2.0) / 2, rel=1e-5)


def test_the_same_call_in_bfloat16_gives_a_gradient_of_that_type() -> None:
    x = batch(0)
    found, gradient = run("sage", {k: v.bfloat16() if v.is_floating_point() else v for k, v in x.items()})
    assert gradient.dtype == torch.bfloat16
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(run("sage", x)[0].loss.item(), abs=0.05)


def test_wrong_calls_say_what_is_wrong() -> None:
    x = batch(0)
    with pytest.raises(SettingsError, match="unknown objective 'ppo'; expected one of sft, reinforce, grpo"):
        policy_loss("ppo", **x)
    with pytest.raises(SettingsError, match="sft has no policy loss: it is the control"):
        policy_loss("sft", **x)
    with pytest.raises(SettingsError, match="sage needs diversity"):
        policy_loss("sage", **{k: v for k, v in x.items() if k != "diversity"})
    with pytest.raises(SettingsError, match="sage needs coldness"):
        policy_loss("sage", **{k: v for k, v in x.items() if k != "coldness"})
    with pytest.raises(SettingsError, match=r"mask has shape \(3, 4\); expected \(3, 4, 5\)"):
        policy_loss("grpo", **(x | {"mask": x["mask"][..., 0]}))
    with pytest.raises(SettingsError, match=r"mask has type torch.float64; expected torch.bool"):
        policy_loss("grpo", **(x | {"mask": x["mask"].double()}))
    with pytest.raises(SettingsError, match="either rewards or advantages"):
        policy_loss("grpo", **x, advantages=x["diversity"])
    with pytest.raises(SettingsError, match=r"weights have shape \(3,\); expected \(2,\)"):
        policy_loss("grpo", **(x | {"weights": torch.ones(3)}))
    with pytest.raises(SettingsError, match="boost is -1"):
        replace(SAGE, boost=-1)
    bad = x["logprobs"].clone()
    bad[1, 2, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"logprobs\[1, 2, 0\] is nan, expected a finite number"):
        policy_loss("sage", **(x | {"logprobs": bad}))
    reward = x["rewards"].clone()
    reward[0, 1, 1] = torch.inf
    with pytest.raises(NumericalError, match=r"rewards\[0, 1, 1\] is inf"):
        policy_loss("sage", **(x | {"rewards": reward}))


WRONG_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "coldness above 1": ({"coldness": 5.0}, r"coldness\[0, 1\] is 5.0, expected .*at least 0 and at most 1"),
    "coldness below 0": ({"coldness": -0.1}, r"coldness\[0, 1\] is -0.1"),
    "diversity above 1": ({"diversity": 5.0}, r"diversity\[0, 1\] is 5.0, expected .*at least 0 and at most 1"),
    "diversity below 0": ({"diversity": -2.0}, r"diversity\[0, 1\] is -2.0"),
    "diversity nan": ({"diversity": math.nan}, r"diversity\[0, 1\] is nan"),
    "advantage nan": ({"advantages": math.nan}, r"advantages\[0, 1\] is nan"),
    "advantage inf": ({"advantages": math.inf}, r"advantages\[0, 1\] is inf"),
    "logprob above 0": ({"logprobs": 0.5}, r"logprobs\[0, 1, 0\] is 0.5, expected .*at most 0.01"),
    "logprob inf": ({"logprobs": math.inf}, r"logprobs\[0, 1, 0\] is inf"),
    "logprob -inf": ({"logprobs": -math.inf}, r"logprobs\[0, 1, 0\] is -inf"),
    "old above 0": ({"old_logprobs": 3.0}, r"old_logprobs\[0, 1, 0\] is 3.0"),
    "old nan": ({"old_logprobs": math.nan}, r"old_logprobs\[0, 1, 0\] is nan"),
    "old -inf": ({"old_logprobs": -math.inf}, r"old_logprobs\[0, 1, 0\] is -inf"),
}


@pytest.mark.parametrize("name", WITH_LOSS)
@pytest.mark.parametrize("case", WRONG_VALUES)
def test_a_counted_value_out_of_range_is_refused_by_its_name(name: str, case: str) -> None:
    """One value is put in the place (0, 1), or (0, 1, 0), which counts; what the row does not read is left alone."""
    changed, message = WRONG_VALUES[case]
    x, row = batch(0), OBJECTIVES[name]
    given_: dict[str, Any] = {k: v for k, v in x.items() if k not in ("rewards", "weights")}
    given_["advantages"] = compute_advantages("sage", x["rewards"])
    for argument, value in changed.items():
        given_[argument] = given_[argument].clone()
        given_[argument][(0, 1, 0)[: given_[argument].ndim]] = value
        unread = {"coldness": not row.needs_coldness, "diversity": not row.needs_diversity}.get(argument, False)
        if unread:
            assert bool(run(row, given_)[1].isfinite().all())
            continue
        with pytest.raises(NumericalError, match=message):
            policy_loss(row, **given_)


@pytest.mark.parametrize("denominator", [0, -3.0, math.nan, math.inf, torch.tensor(0.0), torch.tensor(-1)])
def test_a_denominator_that_is_not_above_0_is_refused(denominator: Any) -> None:
    """A negative one would turn the gradient round."""
    for name in ("sage", "dapo", "dr_grpo"):
        with pytest.raises(NumericalError, match=r"denominator is .*, expected a finite number above 0"):
            policy_loss(name, **batch(0), denominator=denominator)


@pytest.mark.parametrize("name", WITH_LOSS)
def test_weights_and_rewards_that_are_not_finite_are_named(name: str) -> None:
    x = batch(0)
    for value in (math.nan, math.inf):
        for argument in ("weights", "rewards"):
            changed = x[argument].clone()
            changed.view(-1)[1] = value
            with pytest.raises(NumericalError, match=rf"{argument}\[.*1\] is {value}, expected a finite number"):
                policy_loss(name, **(x | {argument: changed}))
            with pytest.raises(NumericalError, match=rf"{argument}\[.*1\] is {value}, expected a finite number"):
                compute_advantages(name, **{n: x[n] for n in ("rewards", "weights")} | {argument: changed})
    with pytest.raises(SettingsError, match=r"group has type torch.float64; expected integers"):
        compute_advantages(name, x["rewards"], group=x["diversity"])


@pytest.mark.parametrize("name", [name for name in WITH_LOSS if "eps" in OBJECTIVES[name].reads])
@pytest.mark.parametrize("size", [1e15, 1e20, 1e30])
def test_large_rewards_give_the_advantages_of_small_ones(name: str, size: float) -> None:
    """Squares of 1e20 overflow float32: the deviation was infinite, every advantage 0; normalised, size is nothing."""
    row, rewards = replace(OBJECTIVES[name], eps=1e-30), batch(0)["rewards"].float()
    small, large = (compute_advantages(row, rewards * factor) for factor in (1.0, size))
    assert large.dtype == torch.float32
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-5)
    group = torch.arange(3)[:, None].expand(3, 4)
    torch.testing.assert_close(compute_advantages(row, rewards * size, group=group), small, rtol=1e-4, atol=1e-5)
    with pytest.raises(NumericalError, match=r"rewards of up to .*e\+[0-9]+ overflow: advantages\[0, 0\] is nan"):
        compute_advantages(row, rewards.double() * 1e300)


FINITE = st.one_of(
    st.floats(-50.0, 0.0), st.sampled_from([0.0, -1e-30, -1e-7, -1e-3, -88.0, -104.0, -1e4, -6e4, -1e30, -3e38])
)
SIGNED = st.one_of(st.floats(-5.0, 5.0), st.sampled_from([0.0, 1e-30, -1e-8, 6e4, -6e4, 1e20, -1e30, 3e38]))


@pytest.mark.parametrize("name", WITH_LOSS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_extreme_finite_inputs_give_a_finite_gradient_of_the_right_sign_or_an_error(
    name: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Four slates of two tokens: the gradient goes against the advantage, and is exactly 0 where nothing counts."""

    def draw(shape: tuple[int, ...], values: st.SearchStrategy[Any]) -> Tensor:
        n = math.prod(shape)
        drawn = torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64)
        top = torch.finfo(dtype).max
        return drawn.clamp(-top, top).to(dtype).view(shape)

    mask = draw((2, 2, 2), st.booleans()).bool()
    logprobs = draw((2, 2, 2), FINITE).requires_grad_()
    advantages = draw((2, 2), SIGNED)
    inputs = {
        "logprobs": logprobs,
        "old_logprobs": draw((2, 2, 2), FINITE),
        "mask": mask,
        "advantages": advantages,
        "diversity": draw((2, 2), st.floats(0, 1)),
        "coldness": draw((2, 2), st.floats(0, 1)),
    }
    try:
        found = policy_loss(name, **inputs)
    except NumericalError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "overflow" in refused or "the gradient of" in refused
        return
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    assert bool(found.loss.isfinite())
    assert gradient.dtype == dtype
    assert bool(gradient.isfinite().all())
    assert bool((gradient * advantages.sign().unsqueeze(2) <= 0).all())
    assert not bool(gradient[~mask].any())


def test_a_gradient_that_the_type_does_not_hold_is_an_error() -> None:
    """A ratio of e^20 and A = -3 over two slates: c A / n = -7e8, and float16 ends at 65,504."""
    x = {
        "logprobs": torch.zeros(1, 2, 1),
        "old_logprobs": torch.full((1, 2, 1), -30.0),
        "mask": torch.ones(1, 2, 1, dtype=torch.bool),
        "advantages": torch.full((1, 2), -3.0),
    }
    assert bool(run("gbpo", x)[1].isfinite().all())
    with pytest.raises(
        NumericalError, match=r"the gradient of gbpo reaches 7.28e\+08, and torch.float16 holds 6.55e\+04"
    ):
        run("gbpo", {k: v if v.dtype == torch.bool else v.half() for k, v in x.items()})


@pytest.mark.parametrize("setting", ["clip_low", "clip_high", "cap", "boost", "entropy_penalty", "early_margin", "eps"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf, 1e300, "1"])
def test_settings_of_a_row_out_of_range_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=rf"{setting} is .*; expected"):
        replace(SAGE, **{setting: value})


def test_integers_are_no_log_probabilities() -> None:
    x = batch(0)
    with pytest.raises(SettingsError, match=r"old_logprobs have type torch.int64; expected a floating-point type"):
        policy_loss("sage", **(x | {"old_logprobs": x["old_logprobs"].long()}))
