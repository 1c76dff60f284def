"""Rewards by hand, their products, and what is refused."""

import math
from typing import Any

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
    Reward,
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

FEEDBACK = ("click", "like", "dislike", "follow", "forward", "longview", "watch")
"""What users may say of an item."""


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
    answers = {n: torch.rand(3, g, k, generator=generator) for n in FEEDBACK}
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


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda x: None, "gave NoneType; expected a tensor of finite real numbers of shape"),
        (lambda x: [[0.0, 0.0]], r"gave list; expected a tensor .*: wrap it in torch.as_tensor"),
        (lambda x: torch.zeros(1, 2).numpy(), r"gave ndarray; expected a tensor .*: wrap it in torch.as_tensor"),
        (lambda x: 1.0, "gave float; expected a tensor"),
        (
            lambda x: torch.ones(3),
            r"gave torch.float32 of shape \(3,\); expected .* of shape \(1, 2, 2\) or \(1, 2\) on cpu",
        ),
        (lambda x: torch.ones(()), r"gave torch.float32 of shape \(\); expected"),
        (lambda x: torch.ones(1, 2, dtype=torch.complex64), r"gave torch.complex64 of shape \(1, 2\); expected"),
        (lambda x: torch.full((1, 2), math.nan), r"gave nan for slate \[0, 0\], place 0; expected"),
        (lambda x: torch.full((1, 2, 2), -math.inf), r"gave -inf for slate \[0, 0\], place 0; expected"),
        (lambda x: torch.full((1, 2), 1e300, dtype=torch.float64), r"gave 1e\+300 for slate \[0, 0\]"),
        (lambda x: torch.ones(1, 2, device="meta"), "gave a tensor on meta; expected"),
        (lambda x: {}[x.slates], r"failed \(KeyError: tensor.*\); expected"),
        (lambda x: x.nothing, r"failed \(AttributeError: .*nothing.*\); expected"),
        (lambda x: x.feedback["like"], r"failed \(KeyError: 'like'\); expected"),
    ],
)
def test_what_is_no_reward_is_refused_by_its_name(gives: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, alone and as a factor."""
    monkeypatch.setattr("sagerec.objectives.rewards.REWARDS", dict(REWARDS))
    register_reward("own", gives)
    for expression in ("own", "hit*own"):
        with pytest.raises(RewardError, match=f"reward 'own' {message}") as error:
            value(expression, inputs([[[0, 1], [2, 4]]], [0]))
        assert "\n" not in str(error.value)


def test_whole_numbers_and_truth_values_are_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagerec.objectives.rewards.REWARDS", dict(REWARDS))
    register_reward("many", lambda x: x.slates)
    register_reward("late", lambda x: x.slates > 1)
    x = inputs([[[0, 1], [2, 4]]], [0])
    assert value("many", x) == [0.5, 3.0]
    assert value("late", x) == [0.0, 1.0]
    register_reward("huge", lambda x: torch.full(x.slates.shape, 1e30))
    with pytest.raises(RewardError, match=r"reward 'huge\*huge' overflows float32"):
        value("huge*huge", x)
    refused: list[tuple[Any, Any, Any, str]] = [
        ("a\tb", torch.ones_like, "mean", "reward name"),
        (None, torch.ones_like, "mean", "reward name None"),
        ("c", 3, "mean", "reward 'c' is a int; expected a function"),
        ("c", torch.ones_like, "max", "pool of the reward 'c' is 'max'; expected sum or mean"),
    ]
    for name, function, pool, message in refused:
        with pytest.raises(RewardError, match=message):
            register_reward(name, function, pool=pool)


def answers(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Every kind of feedback, 1 everywhere."""
    return dict.fromkeys((*FEEDBACK, "collaborative"), torch.ones(shape))


@given(seed=st.integers(0, 1000), k=st.integers(1, 5), g=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_no_item_earns_nothing_of_any_reward(seed: int, k: int, g: int) -> None:
    """-1 (and any other negative) in random places: 0 there, of every built-in reward and of one's own that says 1.

    Item 5, which -1 would be as an index, is cold, novel and of the target's category.
    """
    generator = torch.Generator().manual_seed(seed)
    slates = torch.randint(0, 6, (3, g, k), generator=generator)
    none = torch.rand(slates.shape, generator=generator) < 0.5
    slates[none] = torch.tensor([-1, -2, -7])[torch.randint(0, 3, slates.shape, generator=generator)][none]
    x = inputs(slates.tolist(), [5, 5, 0], **answers(slates.shape))
    own = {"own": Reward(lambda x: torch.ones(x.slates.shape)), "nan": Reward(lambda x: (x.slates + 0.5).log().sign())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sagerec.objectives.rewards.REWARDS", REWARDS | own)
        earned = compute_rewards([*REWARDS, *own], x, per_item=True)
        of_slates = compute_rewards([*REWARDS, *own], x)
    assert earned.shape == (*slates.shape, len(REWARDS) + 2)
    assert not bool(earned[none].any())
    assert bool((earned[..., -2][~none] == 1).all())
    assert not bool(of_slates[none.all(dim=2)].any())
    for name, reward in REWARDS.items():  # the functions themselves, too
        found = reward.function(x)
        assert not bool(found[none].any() if found.ndim == 3 else found[none.all(dim=2)].any()), name
    assert bool((slate_coldness(slates, FACTS.cold) <= (~none).float().mean(dim=2)).all())


def test_places_without_an_item_add_nothing_to_diversity() -> None:
    """[A, none] is of one cluster: H = 0. [A, B, none]: log 2 / log 3. Two places of none are no cluster, and no pair.

    With K = 1, [A], [A], [none], [B]: shares 2/3 and 1/3 of the three; A earns 1/3, B 2/3, none 0.
    """
    assert slate_diversity(torch.tensor([[[0, -1]]]), CLUSTERS).item() == 0
    third = slate_diversity(torch.tensor([[[0, 2, -1]]]), CLUSTERS).item()
    assert third == pytest.approx(math.log(2) / math.log(3))
    assert slate_diversity(torch.tensor([[[-1, -1, -1]]]), CLUSTERS).item() == 0
    assert value("diversity", inputs([[[0], [1], [-1], [2]]], [0])) == pytest.approx([1 / 3, 1 / 3, 0, 2 / 3])


@pytest.mark.parametrize("name", REWARDS)
def test_items_that_the_catalogue_does_not_have_are_refused(name: str) -> None:
    with pytest.raises(RewardError, match="the slates hold item 6; expected 0 to 5, or -1 for none"):
        value(name, inputs([[[0, 6]]], [0], **answers((1, 1, 2))))
    for target in (-1, 6):
        with pytest.raises(RewardError, match=f"the targets hold item {target}; expected 0 to 5"):
            value(name, inputs([[[0, 1]]], [target], **answers((1, 1, 2))))


def test_expressions_are_parsed_and_wrong_ones_refused() -> None:
    assert parse_rewards(("hit=1", "cold*hit=0.5", "dislike=-1")) == {"hit": 1.0, "cold*hit": 0.5, "dislike": -1.0}
    for text, message in {
        "hit": "reward 'hit'; expected NAME=WEIGHT",
        "hit=x": "reward 'hit=x'; expected NAME=WEIGHT",
        "hits=1": "unknown reward 'hits'; expected some of hit, rank",
        "hit*nope=1": "unknown reward 'nope'",
        "hit=nan": "reward 'hit=nan'; expected NAME=WEIGHT",
        "hit=inf": "reward 'hit=inf'; expected NAME=WEIGHT",
        "hit=1e400": "reward 'hit=1e400'; expected NAME=WEIGHT",
        "hit=-1e10": "with a weight of at most 1e+09 in size",
    }.items():
        with pytest.raises(RewardError) as error:
            parse_rewards((text,))
        assert message in str(error.value)
    with pytest.raises(RewardError, match="stands twice"):
        parse_rewards(("hit=1", "hit=2"))
    with pytest.raises(RewardError, match="no reward is given"):
        parse_rewards(())
