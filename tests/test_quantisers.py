"""The other quantisers: balanced k-means against an exact assignment, the RQ-VAE by hand and on planted clusters."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sagerec.actions.semantic_ids import balanced
from sagerec.actions.semantic_ids.balanced import ROUNDING, balanced_assignment, balanced_kmeans
from sagerec.actions.semantic_ids.quantisers import (
    codebooks_of,
    collision_rate,
    mean_square,
    nearest_codes,
    perplexity,
    residual_kmeans,
)
from sagerec.actions.semantic_ids.rq_vae import (
    DECAY,
    MovingCodebooks,
    RqVae,
    _revive_dead,
    encode,
    load_rq_vae,
    quantise,
    rq_vae,
    vae_loss,
)

SMALL: dict[str, Any] = {"width": 32, "latent": 4, "commitment": 0.25}


def planted(per_pair: int = 6) -> np.ndarray:
    """Four far centres, each with the same four near offsets: 16 places in 8 dimensions, `per_pair` items at each."""
    rng = np.random.default_rng(0)
    far, near = 6 * np.eye(8)[:4], np.eye(8)[4:]
    centres = (far[:, None] + near[None]).reshape(16, 8)
    return (np.repeat(centres, per_pair, axis=0) + rng.normal(0, 0.01, (16 * per_pair, 8))).astype(np.float32)


# --- balanced k-means -----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), n=st.integers(1, 60), size=st.integers(1, 12), left=st.sampled_from([8, 256]))
@settings(max_examples=30, deadline=None)
def test_sizes_differ_by_at_most_one_and_centroids_are_means(seed: int, n: int, size: int, left: int) -> None:
    """Whatever the points (some stand twice, one may be far off): every cluster has floor(n / C) or one more."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 3)).astype(np.float32)[rng.integers(0, n, n)]
    points[0] *= 10.0 ** rng.integers(0, 5)
    size = min(size, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balanced, "LEFT_OVER", left)
        centroids, cluster = balanced_kmeans(points, size, seed)
    counts = np.bincount(cluster, minlength=size)
    assert set(counts) <= {n // size, -(-n // size)}
    assert cluster.dtype == np.int32
    assert centroids.dtype == np.float32
    assert centroids.shape == (size, 3)
    means = np.stack([points[cluster == c].mean(axis=0, dtype=np.float64) for c in range(size)])
    assert centroids == pytest.approx(means, rel=1e-4, abs=1e-4 * float(abs(points).max()))


@given(seed=st.integers(0, 1000), n=st.integers(2, 40), size=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_the_auction_is_within_its_step_of_the_best_assignment(seed: int, n: int, size: int) -> None:
    """The slow twin: the Hungarian method over every place. n items may each lose one step; placed exactly, none."""
    size = min(size, n)
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n, 2)).astype(np.float32))
    centroids = torch.from_numpy(rng.normal(size=(size, 2)).astype(np.float32))
    distances = ((x[:, None] - centroids[None]) ** 2).sum(-1).double()
    with pytest.MonkeyPatch.context() as patch:
        exact, places = balanced_assignment(x, centroids)
        patch.setattr(balanced, "LEFT_OVER", 0)
        patch.setattr(balanced, "BID_STEP", 0.1)
        auctioned, same = balanced_assignment(x, centroids)
    assert torch.equal(places, same)
    assert torch.equal(torch.bincount(auctioned, minlength=size), places)
    every = distances[:, torch.arange(size).repeat_interleave(places)].numpy()
    best = every[linear_sum_assignment(every)].sum()
    rows = torch.arange(n)
    assert float(distances[rows, exact].sum()) == pytest.approx(best, abs=1e-4)
    spread = ((x - x.mean(0)) ** 2).sum(1)
    step = float(0.1 * spread.mean() + ROUNDING * (spread.max() + (x**2).sum(1).max()))
    assert float(distances[rows, auctioned].sum()) <= best + n * step + 1e-4


def test_an_assignment_by_hand() -> None:
    """Points 0, 1, 2, 3, 10 on a line, centroids 0 and 10: four are nearest to the first, which has three places.

    Cheapest to move: 3 (7^2 - 3^2 = 40; 2 would cost 60, and so on), so {0, 1, 2} and {3, 10}.
    """
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    cluster, places = balanced_assignment(x, torch.tensor([[0.0], [10.0]]))
    assert cluster.tolist() == [0, 0, 0, 1, 1]
    assert places.tolist() == [3, 2]


def test_points_that_are_all_alike_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balanced, "LEFT_OVER", 3)
    _, cluster = balanced_kmeans(np.ones((50, 4), dtype=np.float32), 7, 0)
    assert sorted(np.bincount(cluster).tolist()) == [7, 7, 7, 7, 7, 7, 8]


def test_balanced_levels_use_every_code_alike() -> None:
    """96 items, two levels of 16: six items a code at each, so perplexity 16; the planted far centres stay apart."""
    found = residual_kmeans(planted(), levels=2, codebook_size=16, seed=1, cluster=balanced_kmeans)
    assert found.perplexities == pytest.approx([16, 16])
    assert found.errors[1] < found.errors[0] < 1
    four = residual_kmeans(planted(), levels=1, codebook_size=4, seed=0, cluster=balanced_kmeans)
    pairs = set(zip((np.arange(96) // 24).tolist(), four.codes[:, 0].tolist(), strict=True))
    assert len(pairs) == 4


def test_balanced_is_reproducible_and_leaves_its_input_alone() -> None:
    points = np.random.default_rng(2).normal(size=(300, 6)).astype(np.float32)
    before = points.copy()
    one, same, other = (balanced_kmeans(points, 16, seed) for seed in (0, 0, 1))
    assert (one[1] == same[1]).all()
    assert (one[0] == same[0]).all()
    assert (one[1] != other[1]).any()
    assert (points == before).all()


# --- codes from given codebooks, codebooks from given codes ----------------------------------------------------------


def test_nearest_codes_by_hand() -> None:
    """Level 1 has centroids 0, 4, 10, of which 4 is not in use: 5 takes 10 (left -5) or, with all in use, 4 (left 1).

    Level 2 has -4, 0, 1: -5 takes -4 and leaves -1; 1 takes 1 and leaves 0.
    """
    codebooks = np.array([[[0], [4], [10]], [[-4], [0], [1]]], dtype=np.float32)
    vector = np.array([[5.1]], dtype=np.float32)
    codes, left = nearest_codes(vector, codebooks, [np.array([0, 2]), np.arange(3)])
    assert codes.tolist() == [[2, 0]]
    assert left == pytest.approx(np.array([[-0.9]]), abs=1e-6)
    codes, left = nearest_codes(vector, codebooks, [np.arange(3), np.arange(3)])
    assert codes.tolist() == [[1, 2]]
    assert left == pytest.approx(np.array([[0.1]]), abs=1e-6)


def test_nearest_codes_of_the_items_are_their_own() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    found = residual_kmeans(vectors, levels=3, codebook_size=8, seed=0)
    codes, left = nearest_codes(vectors, found.codebooks, [np.unique(column) for column in found.codes.T])
    assert (codes == found.codes).all()
    assert mean_square(left) / mean_square(vectors) == pytest.approx(found.errors[-1], rel=1e-4)


def test_codebooks_of_given_codes_by_hand() -> None:
    """Vectors 1, 3, 10 with codes (0, 0), (0, 2), (2, 0): level 1 has means 2, none, 10; residuals -1, 1, 0.

    Level 2: code 0 has -1 and 0, so -0.5; code 2 has 1. Errors: (1 + 1 + 0) / 110, then (0.25 + 0 + 0.25) / 110.
    """
    vectors = np.array([[1], [3], [10]], dtype=np.float32)
    found = codebooks_of(vectors, np.array([[0, 0], [0, 2], [2, 0]], dtype=np.int32))
    assert found.codebooks[:, :, 0].tolist() == [[2, 0, 10], [-0.5, 0, 1]]
    assert found.errors == pytest.approx([2 / 110, 0.5 / 110])
    assert found.perplexities == pytest.approx([perplexity(np.array([0, 0, 2]))] * 2)


def test_codebooks_of_a_quantisation_leave_no_more_over_than_its_own() -> None:
    vectors = np.random.default_rng(1).normal(size=(100, 4)).astype(np.float32)
    found = residual_kmeans(vectors, levels=1, codebook_size=8, seed=0)
    assert codebooks_of(vectors, found.codes).errors[0] <= found.errors[0] + 1e-6


# --- RQ-VAE ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_quantise_equals_the_slow_twin(seed: int) -> None:
    """The twin: item by item and level by level, the centroid of least distance, and what is left for the next."""
    generator = torch.Generator().manual_seed(seed)
    z, codebooks = torch.randn(9, 3, generator=generator), torch.randn(3, 5, 3, generator=generator)
    found = quantise(z, codebooks)
    for i, residual in enumerate(z):
        for level, centroids in enumerate(codebooks):
            assert torch.allclose(found.residuals[level, i], residual)
            code = int(((residual - centroids) ** 2).sum(1).argmin())
            assert int(found.codes[i, level]) == code
            assert torch.equal(found.chosen[level, i], centroids[code])
            residual = residual - centroids[code]


def test_the_loss_by_hand() -> None:
    """Two items: |x - x'|^2 is 1 and 4, so 2.5; residuals 3 and 1 at codes 1 and 1, then 2 and 0 at 0 and 0.

    Commitment: (2^2 + 2^2) for the first, 0 for the second, so 4 on average; at weight 0.5 the loss is 4.5.
    """
    x, decoded = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [0.0]])
    quantised = quantise(torch.tensor([[3.0], [1.0]]), torch.tensor([[[1.0], [-9.0]], [[0.0], [-9.0]]]))
    assert quantised.residuals[:, :, 0].tolist() == [[3, 1], [2, 0]]
    assert vae_loss(x, decoded, quantised, commitment=0.5).item() == pytest.approx(4.5)


def test_moving_codebooks_by_hand() -> None:
    """Code 0 stands at 0 for one item; two items at 10 choose it, code 1 none.

    Then count = d + 2 (1 - d) and e = 20 (1 - d) / count, d = DECAY. Code 1 stays at 7 whatever its count.
    """
    moving = MovingCodebooks(torch.tensor([[[0.0], [7.0]]]), torch.tensor([[1.0, 3.0]]))
    moving.update(quantise(torch.tensor([[10.0], [10.0]]), torch.tensor([[[0.0], [100.0]]])))
    count = DECAY + 2 * (1 - DECAY)
    assert moving.codebooks[0, :, 0].tolist() == pytest.approx([20 * (1 - DECAY) / count, 7])
    assert moving.counts[0].tolist() == pytest.approx([count, 3 * DECAY])
    moving.revive(0, torch.tensor([1]), torch.tensor([[-2.0]]), 0.5)
    assert moving.codebooks[0, 1, 0] == -2
    moving.update(quantise(torch.tensor([[-2.0]]), moving.codebooks))
    assert moving.codebooks[0, 1, 0] == pytest.approx(-2)


def test_the_gradient_passes_the_codes() -> None:
    """Without commitment the encoder still learns, for the decoder's gradient reaches z as if nothing were rounded."""
    torch.manual_seed(0)
    model, x = RqVae(4, 8, 2), torch.randn(5, 4)
    z = model.encoder(x)
    z.retain_grad()
    quantised = quantise(z, torch.randn(1, 3, 2))
    through = z + (quantised.chosen.sum(0) - z).detach()
    through.retain_grad()
    vae_loss(x, model.decoder(through), quantised, commitment=0.0).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert through.grad is not None
    assert torch.equal(z.grad, through.grad)
    assert bool((z.grad != 0).any())


def test_planted_clusters_are_found() -> None:
    """Four far centres, four codes: each its own. Sixty short epochs leave much of the decoder's error, not most.

    The codebooks begin at items drawn at random and may end in a poor optimum, so this is the better of two seeds.
    """
    tries = [rq_vae(planted(), levels=1, codebook_size=4, epochs=60, seed=seed, **SMALL) for seed in (1, 2)]
    found = min(tries, key=lambda quantised: quantised.errors[0])
    assert len(set(zip((np.arange(96) // 24).tolist(), found.codes[:, 0].tolist(), strict=True))) == 4
    assert found.perplexities == pytest.approx([4])
    assert found.errors[0] < 0.4
    assert collision_rate(found.codes) == 1


def test_the_stated_errors_are_those_of_the_saved_network() -> None:
    x = planted(3)
    found = rq_vae(x, levels=2, codebook_size=8, epochs=10, seed=0, **SMALL)
    assert found.codes.shape == (48, 2)
    assert found.codebooks.shape == (2, 8, 4)
    model = load_rq_vae(found.network)
    z = encode(model, torch.from_numpy(x))
    codes, _ = nearest_codes(z.numpy(), found.codebooks, [np.arange(8)] * 2)
    assert (codes == found.codes).all()
    for level in range(2):
        sums = sum(torch.from_numpy(found.codebooks[m][codes[:, m]]) for m in range(level + 1))
        with torch.no_grad():
            left = x - model.decoder(sums).numpy()
        assert found.errors[level] == pytest.approx(mean_square(left) / mean_square(x), rel=1e-4)


def test_rq_vae_is_reproducible_and_draws_nothing_from_others() -> None:
    x = planted(3)
    before, state = copy.deepcopy(x), torch.get_rng_state()
    one, same, other = (rq_vae(x, levels=2, codebook_size=8, epochs=5, seed=seed, **SMALL) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert (one.codes == same.codes).all()
    assert all((one.network[name] == same.network[name]).all() for name in one.network)
    assert any((one.network[name] != other.network[name]).any() for name in one.network)
    assert (x == before).all()


def test_dead_codes_are_revived() -> None:
    """Code 1 of each level is far off and unused. At level 1 it moves to one of the z; then level 2's to a residual.

    z is 1, 2 or 4 and code 0 stands at 0: at level 1 the residuals are these, at level 2 what the moved code leaves.
    """
    z = torch.tensor([[1.0], [2.0], [4.0]])
    moving = MovingCodebooks(torch.tensor([[[0.0], [99.0]], [[0.0], [99.0]]]), torch.ones(2, 2))
    _revive_dead(moving, torch.tensor([[True, False], [True, False]]), z, 1.0)
    assert moving.codebooks[:, 0].tolist() == [[0], [0]]
    assert moving.codebooks[0, 1].item() in (1, 2, 4)
    assert moving.codebooks[1, 1].item() in quantise(z, moving.codebooks).residuals[1].flatten().tolist()
    assert set(quantise(z, moving.codebooks[:1]).codes.flatten().tolist()) == {0, 1}


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_items_than_codes(n: int) -> None:
    found = rq_vae(planted()[:n], levels=2, codebook_size=16, epochs=1, seed=0, **SMALL)
    assert found.codebooks.shape == (2, n, 4)
    assert found.codes.shape == (n, 2)
