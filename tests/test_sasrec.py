"""SASRec against a plain twin, its losses by hand, what its dropout covers, and planted data."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sagerec.baselines import sasrec as sasrec_module
from sagerec.baselines.sasrec import TUNED, SasRec, SasRecSettings
from sagerec.baselines.sasrec_layer import SasRecLayer
from sagerec.baselines.tuning import evaluate_baseline
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.simulated_store import StoreSettings, write_store
from sagerec.catalogue.splits import SplitSettings
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.policies.softmax import CHUNK_POSITIONS, full_softmax_loss, sampled_softmax_loss
from sagerec.run.stages import make_actions, prepare
from sagerec.training.settings import TrainSettings
from tests.conftest import SMALL_IDS

N_ITEMS = 30
INPUTS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0], [6, 0, 0, 0, 0]])
TARGETS = torch.tensor([[1, 4, 1, 5, 29], [2, 7, 0, 0, 0], [8, 0, 0, 0, 0]])
COUNTED = torch.tensor([[True] * 5, [True, True, False, False, False], [True] + [False] * 4])


class PlainSasRec(nn.Module):
    """SASRec as a page of PyTorch: rows padded on the left with item 0 to `max_items` places, nothing masked but later
    places, `nn.MultiheadAttention`; no dropout. Takes over the weights of ours, items numbered from 1.
    """

    def __init__(self, ours: SasRec) -> None:
        super().__init__()
        self.ours, self.length = ours, ours.settings.max_items
        width = ours.settings.width
        self.attention = nn.ModuleList()
        for layer in ours.layers:
            assert isinstance(layer, SasRecLayer)
            attention = nn.MultiheadAttention(width, ours.settings.heads, batch_first=True)
            attention.load_state_dict(
                {
                    "in_proj_weight": layer.query_key_value.weight,
                    "in_proj_bias": layer.query_key_value.bias,
                    "out_proj.weight": layer.attention_output.weight,
                    "out_proj.bias": layer.attention_output.bias,
                }
            )
            self.attention.append(attention)

    def states(self, rows: list[list[int]]) -> Tensor:
        """States (B, max_items, D) of rows of items numbered from 0."""
        padded = torch.tensor([[0] * (self.length - len(row)) + [item + 1 for item in row] for row in rows])
        keep = (padded > 0)[..., None]
        table = torch.cat([torch.zeros(1, self.ours.settings.width), self.ours.items.weight])
        h = (table[padded] + self.ours.positions.weight.flip(0)) * keep
        later = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        for layer, attention in zip(self.ours.layers, self.attention, strict=True):
            assert isinstance(layer, SasRecLayer)
            q = layer.norm_attention(h)
            h = q + attention(q, h, h, attn_mask=later, need_weights=False)[0]
            z = layer.norm_feed_forward(h)
            h = (layer.feed_forward_out(F.relu(layer.feed_forward_in(z))) + z) * keep
        states: Tensor = self.ours.norm(h)
        return states


def sasrec(**settings: float) -> SasRec:
    """A small model whose weights, biases and norms are all random."""
    torch.manual_seed(0)
    model = SasRec(SasRecSettings(width=16, max_items=8, **settings), N_ITEMS)  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("shape", [{"layers": 1, "heads": 1}, {"layers": 2, "heads": 2}])
def test_states_and_loss_equal_a_plain_twin(shape: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """States of the real places, the loss, which is their mean plain cross-entropy though rows are encoded two at a
    time, and its gradient.
    """
    monkeypatch.setattr(sasrec_module, "ENCODED_ROWS", 2)
    model = sasrec(**shape)
    twin = PlainSasRec(model)
    rows = [row[: int(n)].tolist() for row, n in zip(INPUTS, COUNTED.sum(1), strict=True)]
    expected = torch.cat([twin.states([row])[0, -len(row) :] for row in rows])
    torch.testing.assert_close(model.encode(INPUTS, COUNTED.sum(1))[COUNTED], expected)
    wanted = F.cross_entropy(expected @ model.items.weight.T, TARGETS[COUNTED])
    loss = model.loss(INPUTS, TARGETS, COUNTED)
    torch.testing.assert_close(loss, wanted)
    for weight in (model.items.weight, model.positions.weight):
        (found,), (by_twin,) = (torch.autograd.grad(x, weight, retain_graph=True) for x in (loss, wanted))
        torch.testing.assert_close(found, by_twin)


def test_a_row_as_long_as_the_model_reads_has_no_empty_place() -> None:
    model = sasrec()
    row = list(range(8))
    torch.testing.assert_close(
        model.encode(torch.tensor([row]), torch.tensor([8]))[0], PlainSasRec(model).states([row])[0]
    )


@pytest.mark.parametrize("positions", [1, CHUNK_POSITIONS, 2 * CHUNK_POSITIONS + 5])
def test_the_full_softmax_equals_a_plain_cross_entropy(positions: int) -> None:
    """Value and both gradients, whole chunks and a rest; scaled by what comes from above."""
    generator = torch.Generator().manual_seed(positions)
    states = torch.randn(positions, 6, generator=generator, requires_grad=True)
    items = torch.randn(20, 6, generator=generator, requires_grad=True)
    targets = torch.randint(20, (positions,), generator=generator)
    losses = [full_softmax_loss(states, items, targets), F.cross_entropy(states @ items.T, targets)]
    torch.testing.assert_close(*losses)
    found, plain = (torch.autograd.grad(3 * loss, (states, items)) for loss in losses)
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        low = full_softmax_loss(states, items, targets)
        ours = torch.autograd.grad(low, (states, items))
        plain = torch.autograd.grad(F.cross_entropy(F.linear(states, items).float(), targets), (states, items))
    torch.testing.assert_close(low, losses[1], rtol=1e-2, atol=1e-2)
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.999


def test_the_sampled_softmax_by_hand() -> None:
    """Two positions, each with negatives of its own; the second draws its target, which is masked.

    Scores of state 1 are items 1, 2, 3, 4. First: target 0, negatives 1 and 2: -log e^1 / (e^1 + e^2 + e^3). Second:
    target 3, negatives 0 and 3: -log e^4 / (e^4 + e^1).
    """
    loss = sampled_softmax_loss(
        torch.ones(2, 1),
        torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        torch.tensor([0, 3]),
        torch.tensor([[1, 2], [0, 3]]),
    )
    first = -math.log(math.e / (math.e + math.e**2 + math.e**3))
    second = -math.log(math.e**4 / (math.e**4 + math.e))
    assert float(loss) == pytest.approx((first + second) / 2, rel=1e-5)


def test_every_position_draws_its_own_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr(
        sasrec_module, "sampled_softmax_loss", lambda states, items, targets, negatives: drawn.append(negatives)
    )
    sasrec(sampled=25).loss(INPUTS, TARGETS, COUNTED)
    (negatives,) = drawn
    assert negatives.shape == (COUNTED.sum(), 25)
    assert len({tuple(row) for row in negatives.tolist()}) == len(negatives)
    assert negatives.min() >= 0
    assert negatives.max() < N_ITEMS


def test_dropout_covers_the_items_where_they_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training about a quarter of the scored table is 0 and the rest times 4/3; in evaluation it is whole."""
    scored: list[Tensor] = []
    monkeypatch.setattr(sasrec_module, "full_softmax_loss", lambda states, items, targets: scored.append(items))
    model = sasrec(dropout=0.25)
    model.loss(INPUTS, TARGETS, COUNTED)
    assert torch.equal(scored[0], model.items.weight)
    model.train().loss(INPUTS, TARGETS, COUNTED)
    kept = scored[1] != 0
    assert 0.65 < float(kept.float().mean()) < 0.85
    torch.testing.assert_close(scored[1][kept], (model.items.weight * 4 / 3)[kept])


def test_the_defaults_are_adam_at_a_constant_rate_and_one_layer_of_64() -> None:
    assert SasRecSettings() == SasRecSettings(width=64, layers=1, heads=1, dropout=0.2, max_items=50, sampled=0)
    assert (TUNED.learning_rate, TUNED.weight_decay, TUNED.warmup_share, TUNED.final_rate_share) == (1e-3, 0, 0, 1)


@pytest.mark.parametrize("sampled", [0, 64])
def test_planted_successors_are_learnt_to_recall_one(tmp_path: Path, sampled: int) -> None:
    """Where the next item is a function of the last, recall@1 reaches 1 on test."""
    write_store(tmp_path / "store", simulate(StoreSettings(users=300, items=200, dynamics="successor", seed=1)))
    run = prepare(tmp_path / "store", tmp_path / "run", SplitSettings())
    make_actions(run, SMALL_IDS)
    training = TrainSettings(
        epochs=20, batch_size=16, learning_rate=1e-2, weight_decay=0, validate_every=20, device="cpu"
    )
    report = evaluate_baseline(
        run,
        "sasrec",
        EvaluateSettings(k=(1, 5), history="keep", bootstrap_samples=100),
        model=SasRecSettings(width=32, dropout=0.0, sampled=sampled),
        training=training,
    )
    assert report["metrics"]["recall@1"]["value"] == 1.0
