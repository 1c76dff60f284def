"""Rewards by hand, their products, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sagerec import RewardInputs, register_reward
from sagerec.errors import RewardError
from sagerec.objectives.rewards import (
    REWARDS,
    Facts,
    Membership,
    compute_rewards,
    parse_rewards,
    shaped_watch_time,
    slate_coldness,
    slate_diversity,
)

# Six items in three clusters: 0, 1 -> A; 2, 3 -> B; 4 -> C; 5 half A, half C. Items 3 and 5 are cold.
CLUSTERS = Membership(
    torch.tensor([[0, -1], [0, -1], [1, -1], [1, -1], [2, -1], [0, 2]]),
    torch.tensor([[1.0, 0], [1.0, 0], [1.0, 0], [1.0, 0], [1.0, 0], [0.5, 0.5]]),
    3,
)
ANGLES = torch.tensor([0.0, 60.0, 90.0, 180.0, 45.0, 0.0]) * math.pi / 180
FACTS = Facts(
    cold=torch.tensor([False, False, False, True, False, True]),
    novelty=torch.tensor([0.1, 0.2, 0.3, 0.9, 0.5, 1.0]),
    clusters=CLUSTERS,
    vectors=torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1),
    categories=CLUSTERS,
)


def inputs(slates: list[list[list[int]]], targets: list[int], **feedback: Tensor) -> RewardInputs:
    table = torch.tensor(slates)
    ranks = -torch.arange(table.shape[1], dtype=torch.float32).expand(table.shape[:2])
    return RewardInputs(torch.arange(len(targets)), table, torch.tensor(targets), ranks, FACTS, feedback)


def value(expression: str, x: RewardInputs, *, per_item: bool = False) -> list[float]:
    found: list[float] = compute_rewards([expression], x, per_item=per_item)[..., 0].flatten().tolist()
    return found


def test_hit_and_rank_by_hand() -> None:
    """The target 2 stands first in slate 0, third in slate 1, and is absent from slate 2; 1 / log2(3 + 1) = 1/2."""
    x = inputs([[[2, 0, 1], [0, 1, 2], [0, 1, 3]]], [2])
    assert value("hit", x) == [1, 1, 0]
    assert value("rank", x) == pytest.approx([1, 0.5, 0])
    assert value("hit", x, per_item=True) == [1, 0, 0, 0, 0, 1, 0, 0, 0]


def test_ranking_penalises_confident_misses_by_hand() -> None:
    """K = 1 and three slates in falling probability, the second a hit: costs 1, 1/log2 3, 1/2 over their sum."""
    x = inputs([[[0], [2], [1]]], [2])
    total = 1 + 1 / math.log2(3) + 0.5
    assert value("ranking", x) == pytest.approx([-1 / total, 0, -0.5 / total])
    assert value("ranking", inputs([[[0], [3], [1]]], [2])) == [0, 0, 0]  # no hit to rank below
    in_slate = inputs([[[0, 2, 1]]], [2])
    assert value("ranking", in_slate) == pytest.approx([-(1 + 0.5) / total])


def test_similarity_and_category_by_hand() -> None:
    """To target 0 at angle 0: cosines of 60, 90 and 180 degrees are .5, 0 and -1, which counts 0."""
    assert value("similarity", inputs([[[1], [2], [3], [0]]], [0])) == pytest.approx([0.5, 0, 0, 1], abs=1e-6)
    assert value("similarity", inputs([[[1, 0]]], [0])) == pytest.approx([0.75], abs=1e-6)
    # Item 5 is half A: overlap .5 with target 0, .5 with target 4, 1 with itself.
    assert value("category", inputs([[[5], [1], [2]]], [0])) == [0.5, 1, 0]
    assert value("category", inputs([[[5], [4], [1]]], [5])) == [1, 0.5, 0.5]


def test_cold_and_novelty_and_their_products_by_hand() -> None:
    x = inputs([[[3, 0], [0, 1]], [[3, 5], [2, 3]]], [3, 0])
    assert value("cold", x) == [0.5, 0, 1, 0.5]
    assert value("cold*hit", x) == [1, 0, 0, 0]
    assert value("novelty", x) == pytest.approx([0.5, 0.15, 0.95, 0.6])
    assert value("novelty*hit", x) == pytest.approx([0.9, 0, 0, 0])
    assert slate_coldness(x.slates, FACTS.cold).flatten().tolist() == [0.5, 0, 1, 0.5]


def test_diversity_by_hand() -> None:
    """Clusters A, A, B, C of four items: shares 1/2, 1/4, 1/4, H = 1.5 bits of log2 4 = 2. Four of A: 0.

    Item 5 with itself once: shares 1/2 A, 1/2 C, and log K is of the number of items, 2: H = 1.
    """
    slates = torch.tensor([[[0, 1, 2, 4], [0, 1, 0, 1]]])
    assert slate_diversity(slates, CLUSTERS).tolist() == [pytest.approx([0.75, 0.0])]
    assert slate_diversity(torch.tensor([[[5, 5]]]), CLUSTERS).item() == pytest.approx(1.0)
    # K = 1: the group of four takes the slate's place, and what an item adds is 1 - its cluster's share.
    group = inputs([[[0], [1], [2], [4]]], [0])
    assert slate_diversity(group.slates, CLUSTERS).tolist() == [pytest.approx([0.75] * 4)]
    assert value("diversity", group) == pytest.approx([0.5, 0.5, 0.75, 0.75])
    assert slate_diversity(torch.tensor([[[0]]]), CLUSTERS).tolist() == [[0.0]]


@given(seed=st.integers(0, 1000), k=st.integers(1, 6), g=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_rewards_lie_in_their_ranges(seed: int, k: int, g: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slates = torch.rand(3, g, 6, generator=generator).argsort(dim=2)[:, :, :k]
    answers = {n: torch.rand(3, g, k, generator=generator) for n in ("click", "like", "dislike", "follow", "watch")}
    x = inputs(slates.tolist(), [0, 3, 5], **answers, collaborative=answers["click"])
    found = compute_rewards(list(REWARDS), x)
    assert found.shape == (3, g, len(REWARDS))
    low = torch.tensor([-1.0 if name == "ranking" else 0.0 for name in REWARDS])
    assert bool((found >= low - 1e-6).all())
    assert bool((found <= 1 + 1e-6).all())
    assert bool((slate_diversity(slates, CLUSTERS) <= 1).all())


def test_feedback_is_the_users_answer() -> None:
    x = inputs([[[0, 1], [2, 3]]], [0], click=torch.tensor([[[0.2, 0.4], [0.0, 1.0]]]))
    assert value("click", x) == pytest.approx([0.3, 0.5])
    assert value("click", x, per_item=True) == pytest.approx([0.2, 0.4, 0, 1])


def test_watch_time_is_ranked_within_user_and_length() -> None:
    """User 0 has four films of 64-127 s, watched 10, 20, 30, 40 s: percentiles 1/4 … 1, so only the last is above .75.

    The film of 1,000 s is alone in its bucket: percentile 1. User 1's only film too, but it was disliked.
    """
    watched = torch.tensor([10.0, 40.0, 20.0, 30.0, 5.0, 99.0])
    length = torch.tensor([64.0, 127.0, 100.0, 90.0, 1000.0, 100.0])
    users = torch.tensor([0, 0, 0, 0, 0, 1])
    disliked = torch.tensor([False] * 5 + [True])
    assert shaped_watch_time(watched, length, users, disliked).tolist() == [0, 1, 0, 0, 1, -1]
    assert shaped_watch_time(watched, length, users).tolist() == [0, 1, 0, 0, 1, 1]


def test_own_rewards_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagerec.objectives.rewards.REWARDS", dict(REWARDS))
    register_reward("even", lambda x: (x.slates % 2 == 0).float())
    x = inputs([[[0, 1], [2, 4]]], [0])
    assert value("even", x) == [0.5, 1]
    assert value("even*hit", x) == [1, 0]
    with pytest.raises(RewardError, match="reward 'even' exists"):
        register_reward("even", lambda x: x.slates.float())
    with pytest.raises(RewardError, match="reward name 'a b'"):
        register_reward("a b", lambda x: x.slates.float())
    register_reward("broken", lambda x: torch.ones(3))
    with pytest.raises(RewardError, match=r"reward 'broken' gave shape \(3,\), finite: True; expected finite values"):
        value("broken", x)


def test_expressions_are_parsed_and_wrong_ones_refused() -> None:
    assert parse_rewards(("hit=1", "cold*hit=0.5", "dislike=-1")) == {"hit": 1.0, "cold*hit": 0.5, "dislike": -1.0}
    for text, message in {
        "hit": "reward 'hit'; expected NAME=WEIGHT",
        "hit=x": "reward 'hit=x'; expected NAME=WEIGHT",
        "hits=1": "unknown reward 'hits'; expected some of hit, rank",
        "hit*nope=1": "unknown reward 'nope'",
    }.items():
        with pytest.raises(RewardError) as error:
            parse_rewards((text,))
        assert message in str(error.value)
    with pytest.raises(RewardError, match="stands twice"):
        parse_rewards(("hit=1", "hit=2"))
    with pytest.raises(RewardError, match="no reward is given"):
        parse_rewards(())
