"""Static shapes: what a GPU runs and a compiler traces equals the ragged code; no operation in it hangs on values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sagerec.actions.dense import spend
from sagerec.catalogue.splits import Cases
from sagerec.decoding.beam import BLOCK, BeamLists, beam_lists, best_of, exact_lists, highest
from sagerec.decoding.captured import capture_lists
from sagerec.decoding.rollouts import RolloutSettings, roll_out
from sagerec.decoding.slates import slate_logprobs
from sagerec.decoding.static_beam import beam_step, begin_beam, static_lists
from sagerec.errors import SettingsError, TrainingError
from sagerec.objectives.loss import deferred_policy_loss, policy_loss
from sagerec.objectives.rewards import Facts, Membership
from sagerec.policies import history_encoder, protocol
from sagerec.policies.softmax import full_softmax_loss
from sagerec.training.feedback import Feedback
from sagerec.training.loop import make_optimizer
from sagerec.training.rounds import Stage, roll_round, slate_loss, update
from sagerec.training.settings import AlignSettings, ComputeSettings
from tests import test_filters, test_item_scores
from tests.test_objectives import batch
from tests.test_policy import N, histories, small_policy

KINDS: dict[str, Callable[..., Any]] = {"lazy-decoder": small_policy, "item-scores": test_item_scores.small_policy}
kinds = pytest.mark.parametrize("kind", KINDS)
ends = pytest.mark.parametrize("ends", [False, True])


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in one graph; a part of it that hangs on values, or reads the device, is an error."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager", dynamic=False)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Static shapes on the CPU, switched on and off."""

    def switch(on: bool) -> None:
        for module in (protocol, history_encoder):
            monkeypatch.setattr(module, "wants_static", lambda _: on or torch.compiler.is_compiling())

    return switch


def assert_same_lists(found: BeamLists, expected: BeamLists) -> None:
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.items, expected.items)


@pytest.mark.parametrize(
    "name",
    [
        "reinforce",
        "dr_grpo",
        "cispo",
        "ecpo",
        "up_grpo",
        "gbpo_raw",
        "sage",
        "sage_coupled",
        "sage_token",
        "sage_paper",
    ],
)
def test_a_policy_loss_is_one_graph(name: str) -> None:
    """Value, gradient and soundness, from rewards; what stands at places that are not counted is never read."""
    x: dict[str, Any] = batch(3)
    x["logprobs"] = x["logprobs"].masked_fill(~x["mask"], torch.nan)
    gradients, values = [], []
    for call in (policy_loss, traced(policy_loss)):
        logprobs = x["logprobs"].clone().requires_grad_()
        found = call(name, **(x | {"logprobs": logprobs}))
        assert bool(found.sound)
        values.append(found.loss.detach())
        gradients.append(torch.autograd.grad(found.loss, logprobs)[0])
    torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"logprobs": 0.5},
        {"old_logprobs": torch.nan},
        {"coldness": 1.5},
        {"diversity": -0.1},
        {"rewards": torch.inf},
        {"denominator": torch.tensor(0.0)},
        {"denominator": -1.0},
    ],
)
def test_without_the_check_a_loss_says_that_it_is_not_sound(change: dict[str, Any]) -> None:
    x: dict[str, Any] = batch(0)
    assert bool(deferred_policy_loss("sage", **x).sound)
    for name, value in change.items():
        if name == "denominator":
            x[name] = value
        else:
            x[name][(0, 1, 0)[: x[name].ndim]] = value
    assert not bool(deferred_policy_loss("sage", **x).sound)


def test_half_precision_is_not_sound_where_the_gradient_overflows() -> None:
    x = {"logprobs": torch.zeros(1, 2, 1), "old_logprobs": torch.full((1, 2, 1), -30.0)}
    x |= {"mask": torch.ones(1, 2, 1, dtype=torch.bool), "advantages": torch.full((1, 2), -3.0)}
    halved = {k: v if v.dtype == torch.bool else v.half() for k, v in x.items()}
    assert bool(deferred_policy_loss("gbpo", **x).sound)
    assert not bool(deferred_policy_loss("gbpo", **halved).sound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softmax_over_counted_positions_is_that_of_them_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states, items = torch.randn(300, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets, counted = torch.randint(0, 50, (300,)), torch.rand(300) < 0.4
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for loss in (
            full_softmax_loss(states[counted], items, targets[counted]),
            full_softmax_loss(states, items, targets, counted),
            traced(full_softmax_loss)(states, items, targets, counted),
        ):
            found.append((loss, *torch.autograd.grad(loss, (states, items))))
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-3}
    for other in found[1:]:
        for one, twin in zip(found[0], other, strict=True):
            torch.testing.assert_close(twin, one, **close)


@kinds
@ends
def test_a_supervised_step_is_one_graph(kind: str, ends: bool) -> None:
    policy = KINDS[kind](variable_length=ends).train()
    for module in policy.modules():
        if hasattr(module, "threshold"):
            module.threshold = 0  # two draws of dropout would differ
    items, lengths = histories(1)
    targets = torch.randint(0, N, items.shape)
    counted = torch.arange(items.shape[1]) < lengths[:, None]
    found = []
    for call in (policy.next_item_loss, traced(policy.next_item_loss)):
        policy.zero_grad()
        loss = call(items, targets, counted)
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)


@kinds
def test_rows_without_a_place_that_counts_add_nothing(kind: str) -> None:
    """Many such rows beside others, as a replay may draw them, and none that counts: 0 with a gradient of 0."""
    policy = KINDS[kind]().eval()
    items, lengths = histories(1)
    counted = torch.arange(items.shape[1]) < lengths[:, None]
    many, empty = torch.cat([items, *[items] * 20]), torch.zeros_like(torch.cat([counted] * 20))
    for call in (policy.next_item_loss, traced(policy.next_item_loss)):
        alone, beside = call(items, items, counted), call(many, many, torch.cat([counted, empty]))
        torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)
        nothing = call(items, items, torch.zeros_like(counted))
        assert float(nothing.detach()) == 0
        grads = torch.autograd.grad(nothing, list(policy.parameters()), allow_unused=True)
        assert all(grad is None or not bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("beams", [2, 3, 5, 8, 13])
def test_static_lists_are_proven_where_ragged_ones_are(beams: int) -> None:
    """One pass of few beams: the same lists, and the same of them proven; some are, and some are not."""
    proven = []
    for seed in range(6):
        torch.manual_seed(seed)
        policy = small_policy().eval()
        with torch.no_grad():
            policy.head.mul_(1 + 4 * seed)
        items, lengths = histories(seed)
        context = policy.encode(items, lengths)
        ragged = beam_lists(policy, context, len(items), k=2, beams=beams)
        found, logprobs, exact = static_lists(
            policy, context, len(items), k=2, beams=beams, excluded=None, filters=None
        )
        assert torch.equal(exact, ragged.exact)
        torch.testing.assert_close(logprobs, ragged.logprobs, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[exact], ragged.items[exact])
        proven += exact.tolist()
    assert any(proven)
    assert beams > 8 or not all(proven)


def test_static_lists_are_widened_no_further_than_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the beams until each list is proven, and the lists of the ragged search: a table has a place for each."""
    policy = small_policy().eval()
    items, lengths = histories(1)
    ragged = exact_lists(policy, items, lengths, k=3, beams=3)
    asked: list[int] = []

    def counted(*given: Any, beams: int, **named: Any) -> Any:
        asked.append(beams)
        return static_lists(*given, beams=beams, **named)

    monkeypatch.setattr("sagerec.decoding.beam.static_lists", counted)
    monkeypatch.setattr(type(policy), "has_static_shapes", True)
    found = exact_lists(policy, items, lengths, k=3, beams=3)
    assert torch.equal(found.items, ragged.items)
    assert bool(found.exact.all())
    assert len(asked) > 1
    assert asked == [3 * 2**number for number in range(len(asked))]


@kinds
def test_dropout_is_traced_too(kind: str) -> None:
    policy = KINDS[kind]().train()
    items, lengths = histories(1)
    counted = torch.arange(items.shape[1]) < lengths[:, None]
    loss = traced(policy.next_item_loss)(items, items, counted)
    assert bool(loss.isfinite())


@ends
@pytest.mark.parametrize("barred", [0, 7])
def test_a_level_of_the_beam_is_one_graph(ends: bool, barred: int) -> None:
    """Level by level through the compiler: the lists of the ragged beam."""
    policy = small_policy(variable_length=ends)
    items, lengths = histories(2)
    excluded = torch.stack([torch.randperm(N)[:barred] for _ in range(len(items))])
    with torch.no_grad():
        context = policy.encode(items, lengths)
        expected = beam_lists(policy, context, len(items), k=5, beams=9, excluded=excluded)
        spent = spend(policy.space, excluded) if barred else None
        beam, prefix = begin_beam(len(items), 5, policy.device), policy.begin(context)
        for depth in range(len(policy.widths)):
            step = traced(lambda p, b, d=depth: beam_step(policy, p, b, d, beams=9, spent=spent))
            beam, rows, tokens = step(prefix, beam)
            if depth + 1 < len(policy.widths):
                prefix = traced(policy.step)(prefix, rows, tokens)
    assert_same_lists(BeamLists(beam.items, beam.logprobs, beam.pruned), expected)


@ends
def test_lists_of_item_scores_are_one_graph(ends: bool) -> None:
    policy = test_item_scores.small_policy(variable_length=ends)
    items, lengths = histories(2)
    excluded = torch.tensor([[3, -1]]).expand(len(items), -1)

    def lists(items: Tensor, lengths: Tensor, excluded: Tensor) -> BeamLists:
        table = policy.score_items(policy.encode(items, lengths))
        return best_of(table, 7, excluded, None, policy)

    with torch.no_grad():
        assert_same_lists(traced(lists)(items, lengths, excluded), lists(items, lengths, excluded))


@pytest.mark.parametrize("kind", ["lazy-decoder", "item-scores"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_static_lists_with_filters_equal_the_ragged_ones(kind: str, shared: bool, seed: int) -> None:
    """Also where items share a sequence, and excluded ones stand twice."""
    policy = test_filters.draw_policy(kind, seed, shared=shared)
    items, lengths = test_filters.histories(seed)
    filters = test_filters.draw_filters(policy.space, seed, [0.5, 0.9])
    excluded = torch.randint(-1, test_filters.N, (len(items), 8), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = exact_lists(policy, items, lengths, k=4, beams=test_filters.N, excluded=excluded, filters=filters)
        given: dict[str, Any] = {"k": 4, "beams": test_filters.N, "excluded": excluded, "filters": filters}
        found = BeamLists(*static_lists(policy, policy.encode(items, lengths), len(items), **given))
    assert bool(found.exact.all())
    assert_same_lists(found, expected)


@kinds
@ends
@pytest.mark.parametrize("k", [1, 3])
def test_static_logprobs_of_slates_equal_the_ragged_ones(
    kind: str, ends: bool, k: int, as_on_a_gpu: Callable[[bool], None]
) -> None:
    """Token by token, with its gradient and the entropy; items of the history are barred."""
    policy = KINDS[kind](variable_length=ends)
    items, lengths = histories(3)
    generator = torch.Generator().manual_seed(0)
    slates = torch.stack(
        [torch.stack([10 + torch.randperm(N - 10, generator=generator)[:k] for _ in range(4)]) for _ in items]
    )
    excluded = torch.arange(10).expand(len(items), -1)
    found = []
    for on in (False, True):
        as_on_a_gpu(on)
        scored = slate_logprobs(policy, items, lengths, slates, temperature=0.7, excluded=excluded)
        gradient = torch.autograd.grad(scored.tokens.logprobs.square().sum(), policy.item_codes.weight)[0]
        found.append((scored, gradient))
    (ragged, slope), (table, twin) = found
    assert table.tokens.counted is not None
    kept = table.tokens.counted
    assert torch.equal(table.tokens.item[kept], ragged.tokens.item)
    torch.testing.assert_close(table.tokens.logprobs[kept], ragged.tokens.logprobs, rtol=1e-4, atol=1e-4)
    assert not bool(table.tokens.logprobs[~kept].any())
    torch.testing.assert_close(table.entropy, ragged.entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twin, slope, rtol=1e-3, atol=1e-3)


@kinds
@pytest.mark.parametrize("beam_slates", [0, 2, 4])
def test_static_rollouts_store_what_the_loss_recomputes(
    kind: str, beam_slates: int, as_on_a_gpu: Callable[[bool], None]
) -> None:
    policy = KINDS[kind]()
    items, lengths = histories(3)
    settings = RolloutSettings(k=1, slates=4, beam_slates=beam_slates)
    uniforms = torch.rand(len(items), 4 - beam_slates, 1, dtype=torch.float64)
    found = []
    for on in (False, True):
        as_on_a_gpu(on)
        found.append(roll_out(policy, items, lengths, settings, uniforms=uniforms))
    assert torch.equal(found[0].items, found[1].items)
    torch.testing.assert_close(found[1].scores(), found[0].scores(), rtol=1e-4, atol=1e-4)


def codes_of(policy: Any) -> Any:
    """The weights that most of the gradient goes to."""
    return policy.item_codes.weight


def move(policy: Any) -> None:
    """Move the weights a little, so that ratios leave 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def stage(kind: str, folder: Path, *, micro_users: int = 0, **change: Any) -> Stage:
    """An alignment of a small policy on made-up events, rewarded for hits."""
    policy, reference = (KINDS[kind]() for _ in range(2))
    events = np.random.default_rng(0).integers(0, N, (8, 6)).astype(np.int32)
    starts = np.arange(8, dtype=np.int64) * 6
    settings = AlignSettings(
        reward=("hit=1", "cold=1"), slates=4, batch_users=4, round_users=8, kl_weight=0.1, device="cpu", **change
    ).resolved()
    cluster = torch.arange(N)[:, None] % 5
    cases = Cases(np.arange(8, dtype=np.int32), events[:, -1], starts + 5, starts, events.ravel())
    return Stage(
        settings=settings,
        policy=policy,
        reference=reference,
        optimizer=make_optimizer(policy, 0.01, 0.0),
        cases=cases,
        exclude_history=True,
        rewards={"hit": 1.0, "cold": 1.0},
        facts=Facts(
            cold=torch.arange(N) % 4 == 0,
            novelty=torch.zeros(N),
            clusters=Membership(cluster, torch.ones_like(cluster, dtype=torch.float32), 5),
        ),
        feedback=Feedback(cases),
        work=folder,
        longest=3 * settings.k,
        compute=ComputeSettings(micro_users),
    )


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("lazy-decoder", {}),
        ("lazy-decoder", {"k": 2, "credit": "item"}),
        ("item-scores", {"objective": "grpo"}),
        ("item-scores", {"objective": "sage_paper"}),
        ("item-scores", {"k": 2, "entropy_weight": 0.1}),
    ],
)
def test_the_loss_of_an_alignment_is_one_graph(
    kind: str, change: dict[str, Any], tmp_path: Path, as_on_a_gpu: Callable[[bool], None]
) -> None:
    """Where the ratio has left 1: loss, figures and gradient of the ragged stage, and of the graph."""
    found = []
    for on in (False, True):
        as_on_a_gpu(on)
        made = stage(kind, tmp_path, **change)
        minibatches, _ = roll_round(made, [np.arange(4), np.arange(4, 8)], 0)
        move(made.policy)
        row = made.settings.row
        call = traced(lambda batch, made=made, row=row: slate_loss(made, batch, row, check=False)) if on else None
        if call is None:
            loss, logged = slate_loss(made, minibatches[1], row, check=True)
        else:
            loss, logged = call(minibatches[1])
        gradient = torch.autograd.grad(loss, codes_of(made.policy))[0]
        found.append((loss.detach(), {name: value.double() for name, value in logged.items()}, gradient))
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("kind", "static"), [("lazy-decoder", True), ("item-scores", False), ("item-scores", True)])
@pytest.mark.parametrize("change", [{"objective": "dapo"}, {"k": 2, "credit": "item", "entropy_weight": 0.1}])
def test_an_update_in_pieces_is_that_of_the_whole(
    kind: str, static: bool, change: dict[str, Any], tmp_path: Path, as_on_a_gpu: Callable[[bool], None]
) -> None:
    """Gradients of one and three contexts add up, where the ratio has left 1."""
    as_on_a_gpu(static)
    figures, gradients = [], []
    for size in (0, 1, 3):
        made = stage(kind, tmp_path, micro_users=size, sft_weight=0.0, clip_norm=1e6, **change)
        minibatches, _ = roll_round(made, [np.arange(4), np.arange(4, 8)], 0)
        move(made.policy)
        figures.append(update(made, minibatches[1], 1, 10))
        gradients.append(codes_of(made.policy).grad.clone())
    assert abs(figures[0]["loss"]) > 0.01
    for name in ("loss", "policy_loss", "gradient_norm", "entropy_nats"):
        for found in figures[1:]:
            assert found[name] == pytest.approx(figures[0][name], rel=1e-3, abs=1e-5)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-4)


@kinds
def test_a_round_rolled_together_is_that_of_its_minibatches(
    kind: str, tmp_path: Path, as_on_a_gpu: Callable[[bool], None]
) -> None:
    """On a GPU all contexts of a round are rolled out at once: the same slates, rewards and advantages."""
    found = []
    for on in (False, True):
        as_on_a_gpu(on)
        minibatches, logged = roll_round(stage(kind, tmp_path), [np.arange(5), np.arange(5, 8)], 0)
        found.append((minibatches, logged))
    (apart, figures), (together, same) = found
    for one, other in zip(apart, together, strict=True):
        assert one.contexts.index.tolist() == other.contexts.index.tolist()
        assert one.rollouts is not None
        assert other.rollouts is not None
        assert torch.equal(one.rollouts.slates, other.rollouts.slates)
        torch.testing.assert_close(one.advantages, other.advantages, rtol=1e-4, atol=1e-4)
    assert figures == pytest.approx(same, rel=1e-3, abs=1e-5)


def test_an_update_that_is_not_sound_saves_its_batch_and_says_why(tmp_path: Path) -> None:
    made = stage("item-scores", tmp_path)
    minibatches, _ = roll_round(made, [np.arange(4)], 0)
    assert minibatches[0].rollouts is not None
    minibatches[0].rollouts.coldness[0, 1] = 5.0
    before = codes_of(made.policy).detach().clone()
    with pytest.raises(
        TrainingError, match=r"update 3: .*coldness\[0, 1\] is 5.0.*the batch is saved in .*bad-batch-3"
    ):
        update(made, minibatches[0], 3, 10)
    assert torch.equal(codes_of(made.policy), before)
    assert (tmp_path / "bad-batch-3-rank0.safetensors").is_file()


def capture(policy: Any) -> Callable[[Tensor, Tensor, Tensor], BeamLists]:
    return capture_lists(policy, n_users=1, longest=12, excluded=4, k=5)


def test_a_capture_needs_a_gpu() -> None:
    with pytest.raises(SettingsError, match=r"a LazyDecoder on cpu cannot be captured; expected .* on a GPU"):
        capture(small_policy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@kinds
def test_captured_lists_are_those_of_a_pass(kind: str) -> None:
    policy = KINDS[kind]().move("cuda")
    items, lengths = (x.cuda() for x in histories(2, batch=3))
    replay = capture(policy)
    for row in range(3):
        barred = items[row : row + 1, :2]
        given = (items[row : row + 1], lengths[row : row + 1])
        expected = beam_lists(policy, policy.encode(*given), 1, k=5, beams=50, excluded=barred)
        assert_same_lists(replay(*given, barred), expected)


@kinds
def test_static_shapes_read_nothing_from_the_device(kind: str, as_on_a_gpu: Callable[[bool], None]) -> None:
    """Lists, log-probabilities and the next-item loss without one operation whose result or shape the host must know:
    what keeps a GPU waiting, and a graph from being captured. The policy is frozen, as for serving.
    """
    as_on_a_gpu(True)
    policy = KINDS[kind]()
    items, lengths = histories(3)
    excluded, slates = items[:, :2].contiguous(), torch.arange(20, 30).view(5, 2, 1)
    counted = torch.arange(items.shape[1]) < lengths[:, None]
    asked: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        policy.next_item_loss(items, items, counted)
        slate_logprobs(policy, items, lengths, slates, excluded=excluded)
        policy.freeze()
        with torch.no_grad():
            beam_lists(policy, policy.encode(items, lengths), len(items), k=5, beams=9, excluded=excluded)
    assert len(asked) > 100
    waits = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique_dim",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
    }
    assert not waits & set(asked)


@pytest.mark.parametrize("seed", range(3))
def test_the_highest_by_blocks_are_the_highest(seed: int) -> None:
    """Also with many equal values and with rows that are nearly empty."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 50, (6, 20 * BLOCK), generator=generator).float()
    values[0, 7:] = -torch.inf
    best, place = highest(values, 9)
    assert torch.equal(best, values.topk(9, dim=1).values)
    assert torch.equal(values.gather(1, place), best)
    assert all(len(set(row.tolist())) == 9 for row in place)
