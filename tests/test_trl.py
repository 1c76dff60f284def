"""SageTrainer: the loss and gradient of our own stage, r that departs from 1, and the settings that it refuses."""

import importlib
import importlib.util
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sagerec import OBJECTIVES, compute_advantages
from sagerec.decoding.slates import slate_logprobs
from sagerec.errors import MissingExtraError, RewardError, SettingsError
from sagerec.integrations.catalogue_rewards import CatalogueRewards
from sagerec.integrations.legal_tokens import LegalTokens
from sagerec.objectives.rewards import Facts, Membership, RewardInputs, compute_rewards, slate_coldness, slate_diversity
from sagerec.training import rounds
from sagerec.training.layout import lay_out
from sagerec.training.settings import AlignSettings
from tests.tiny_qwen import END, SEQUENCES, SPACE, TinyPolicy, make_model, make_tokenizer

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (1.16)")
B, G = 4, 4
"""Prompts of a generation, completions of each."""
FACTS = Facts(
    cold=torch.tensor([False, True, False, False, True, False, False, True]),
    novelty=torch.linspace(0, 1, 8),
    clusters=Membership(torch.tensor([[0], [0], [1], [1], [2], [2], [2], [3]]), torch.ones(8, 1), 4),
)
ITEMS = CatalogueRewards(LegalTokens(SPACE, END).read, FACTS, G)
GIVEN: dict[str, Any] = {"diversity": ITEMS.diversity, "coldness": ITEMS.coldness, "legal": LegalTokens(SPACE, END)}
OF_SAGE = {"sage", "sage_clip"}


@pytest.fixture
def make_trainer(tmp_path: Path) -> Any:
    """A SageTrainer around the tiny Qwen3 on the CPU; settings of GRPOConfig and of the trainer by name."""

    def make(objective: Any = "sage", *, config: dict[str, Any] | None = None, **given: Any) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig

        from sagerec.integrations.trl import SageTrainer

        settings: dict[str, Any] = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": B * G // 2,
            "steps_per_generation": 2,
            "num_generations": G,
            "max_completion_length": 4,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 0.01,
            "save_strategy": "no",
        }
        targets = np.arange(2 * B) % len(SEQUENCES)
        prompts = [" ".join(f"w{token}" for token in SEQUENCES[(i + 3) % 8]) for i in range(2 * B)]
        return SageTrainer(
            model=given.pop("model", None) or make_model(),
            processing_class=make_tokenizer(),
            reward_funcs=[ITEMS.reward("hit"), ITEMS.reward("novelty")],
            args=GRPOConfig(**(settings | (config or {}))),
            train_dataset=Dataset.from_dict({"prompt": prompts, "target": targets}),
            objective=objective,
            **(GIVEN | given),
        )

    return make


def alone(objective: str) -> dict[str, Any]:
    """What a row that reads neither diversity nor coldness is not given."""
    return {} if objective in OF_SAGE else {"diversity": None, "coldness": None}


@needs_trl
def test_two_steps_move_the_ratio_from_one(make_trainer: Any) -> None:
    """The first of a generation's two steps has r = 1; by the second the policy has moved. Completions are legal."""
    trainer = make_trainer()
    trainer.train()
    first, second = [line for line in trainer.state.log_history if "loss" in line]
    assert (first["ratio_q05"], first["ratio_q95"]) == pytest.approx((1, 1), abs=1e-5)
    assert second["ratio_q05"] < 0.99 < 1.01 < second["ratio_q95"]
    assert max(first["coefficient_positive"], second["coefficient_positive"]) > 1, "the boost"
    written = [[int(word[1:]) for word in text.split()] for text in trainer._logs["completion"]]
    assert len(written) == B * G
    assert all(tokens in SEQUENCES for tokens in written)


def inputs_of(trainer: Any) -> dict[str, Any]:
    """A generation, and a policy that has moved since."""
    trainer.model.train()
    rows = [dict(trainer.train_dataset[i]) for i in range(B) for _ in range(G)]
    torch.manual_seed(3)
    inputs: dict[str, Any] = trainer._generate_and_score_completions(rows)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainer.current_gradient_accumulation_steps = 1
    return inputs


def loss_and_gradient(model: Any, loss: Tensor) -> tuple[float, list[Tensor]]:
    return float(loss.detach()), list(torch.autograd.grad(loss, list(model.parameters())))


@needs_trl
@pytest.mark.parametrize("objective", ["sage", "sage_clip", "gbpo", "gspo", "grpo", "dapo", "cispo", "dr_grpo"])
def test_the_loss_is_that_of_our_own_stage(objective: str, make_trainer: Any) -> None:
    """The stage's `losses` on the same model, slates and rewards: loss and gradient within 1e-5 of the largest.

    The aggregation "constant" divides by the longest completion in TRL, end token and forced ones too: 4 here, and 3
    free tokens at most in our stage.
    """
    trainer = make_trainer(objective, config={"steps_per_generation": 1, "num_iterations": 2}, **alone(objective))
    trainer.args.steps_per_generation = 1
    inputs = inputs_of(trainer)
    slates = torch.tensor([ITEMS.read(ids.tolist()) for ids in inputs["completion_ids"]]).view(B, G, 1)
    targets = torch.arange(B)
    policy = TinyPolicy(trainer.model)
    history, lengths = (targets[:, None] + 3) % 8, torch.ones(B, dtype=torch.int64)
    read = RewardInputs(targets, slates, targets, torch.zeros(B, G), FACTS)
    row = OBJECTIVES[objective]
    layout = lay_out(slate_logprobs(policy, history, lengths, slates).tokens, (B, G, 1), per_item=False)
    old = inputs["old_per_token_logps"][
        GIVEN["legal"].follow(inputs["completion_ids"], inputs["completion_mask"].bool()).free
    ]
    batch = rounds.Minibatch(
        rounds.CaseBatch(B, np.arange(B), history, lengths, None, targets),
        rounds.Rollouts(
            slates,
            layout,
            layout.fill(old),
            None,
            torch.empty(0),
            slate_diversity(slates, FACTS.clusters),
            slate_coldness(slates, FACTS.cold),
        ),
        compute_advantages(row, compute_rewards(["hit", "novelty"], read), tokens=layout.mask.sum(2)),
    )
    settings = AlignSettings(objective=objective, policy_weight=1.0, replay_weight=0.0, slates=G).resolved()
    nothing: Any = None
    stage = rounds.Stage(settings, policy, policy, nothing, nothing, False, {}, FACTS, nothing, Path(), longest=4)
    found = loss_and_gradient(trainer.model, trainer.compute_loss(trainer.model, inputs))
    expected = loss_and_gradient(policy, rounds.losses(stage, batch, 0)[0])
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    scale = max(float(g.abs().max()) for g in expected[1])
    assert scale > 1e-3
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(scale, 1))


@needs_trl
@pytest.mark.parametrize("objective", ["sage", "dapo", "dr_grpo"])
def test_micro_batches_add_up_to_the_large_batch(objective: str, make_trainer: Any) -> None:
    """Two halves of a generation, each accumulated, give the gradient of the whole, whatever their tokens."""
    trainer = make_trainer(objective, **alone(objective))
    inputs = inputs_of(trainer)
    whole = loss_and_gradient(trainer.model, _scaled(trainer, inputs, 1, 1))
    halves = [
        {k: v[i * 8 : i * 8 + 8] if v.ndim else v for k, v in inputs.items() if isinstance(v, Tensor)} for i in range(2)
    ]
    parts = [loss_and_gradient(trainer.model, _scaled(trainer, half, 2, 2)) for half in halves]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole[0], abs=1e-5)
    for one, other, expected in zip(parts[0][1], parts[1][1], whole[1], strict=True):
        torch.testing.assert_close(one + other, expected, rtol=1e-4, atol=1e-5)


def _scaled(trainer: Any, inputs: dict[str, Any], accumulated: int, slices: int) -> Tensor:
    trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation = accumulated, slices
    loss: Tensor = trainer.compute_loss(trainer.model, inputs)
    return loss


@needs_trl
def test_stored_log_probabilities_are_those_of_the_masked_sampler(make_trainer: Any) -> None:
    """Old log-probabilities under the weights that wrote: exp of their sum is the item's share among all eight."""
    trainer = make_trainer()
    rows = [dict(trainer.train_dataset[0]) for _ in range(G)]
    inputs = trainer._generate_and_score_completions(rows)
    slates = torch.arange(8).view(1, 8, 1)
    scored = slate_logprobs(TinyPolicy(trainer.model), torch.tensor([[3]]), torch.tensor([1]), slates).tokens
    shares = torch.zeros(8).index_add(0, scored.item, scored.logprobs.detach())
    assert float(shares.exp().sum()) == pytest.approx(1, abs=1e-5)
    for ids, logprobs in zip(inputs["completion_ids"].tolist(), inputs["old_per_token_logps"], strict=True):
        assert float(logprobs.sum()) == pytest.approx(float(shares[ITEMS.read(ids)[0]]), abs=1e-5)


@needs_trl
def test_advantages_of_trl_are_the_rows(make_trainer: Any) -> None:
    """Both ways of the decoupled advantage, on one generation; the other aggregation is refused by name."""
    made = []
    for advantages in ("row", "trl"):
        config = {"multi_objective_aggregation": "normalize_then_sum"} if advantages == "trl" else {}
        made.append(inputs_of(make_trainer(config=config, advantages=advantages))["advantages"])
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(SettingsError, match="expected multi_objective_aggregation='normalize_then_sum', got 'sum_then"):
        make_trainer(advantages="trl")


@needs_trl
def test_the_on_policy_trap_is_explained(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """By TRL's defaults no old log-probabilities are kept, and the warning says what to set; ours is silent."""
    with caplog.at_level(logging.WARNING, "sagerec"):
        make_trainer()
        make_trainer(config={"steps_per_generation": 1, "num_iterations": 2})
        make_trainer("reinforce", config={"steps_per_generation": 1}, **alone("reinforce"))
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING, "sagerec"):
        trainer = make_trainer(config={"steps_per_generation": 2, "gradient_accumulation_steps": 2})
    assert caplog.messages == [
        "the ratio of sage will be 1 throughout: each completion serves one optimiser step "
        "(gradient_accumulation_steps 2, steps_per_generation 2, num_iterations 1), so no bound on the ratio can act. "
        "Set steps_per_generation to 4 or more (a multiple of 2), or num_iterations to 2"
    ]
    assert "old_per_token_logps" not in inputs_of(trainer)


@needs_trl
@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({"loss_type": "grpo"}, {}, "loss_type is 'grpo'; the row 'sage' says it"),
        ({"epsilon_high": 0.28}, {}, "epsilon_high is 0.28; the row 'sage' says it"),
        ({"importance_sampling_level": "sequence"}, {}, "importance_sampling_level is 'sequence'; the row"),
        ({"top_entropy_quantile": 0.5}, {}, "top_entropy_quantile is 0.5; SageTrainer has no such term"),
        ({"scale_rewards": "none"}, {}, "scale_rewards is 'none'; the row's advantages do not read it"),
        ({"max_completion_length": 3}, {}, "max_completion_length is 3; expected at least 4, or a completion is cut"),
        ({}, {"diversity": None}, "sage needs diversity: give a function like a reward function"),
        ({}, {"objective": "gbpo"}, "diversity is given, and gbpo does not read it; leave it out"),
        ({}, {"objective": "sft"} | alone("sft"), "sft has no policy loss; use TRL's SFTTrainer"),
        ({}, {"objective": "reinforce", "advantages": "trl"} | alone("x"), "TRL makes no raw advantages"),
        ({"use_transformers_continuous_batching": True}, {}, "use_transformers_continuous_batching is True"),
    ],
)
def test_what_cannot_hold_is_refused_by_name(
    config: dict[str, Any], given: dict[str, Any], message: str, make_trainer: Any
) -> None:
    with pytest.raises(SettingsError, match=message):
        make_trainer(config=config, **given)


@needs_trl
def test_vllm_is_held_to_the_same_mask_or_refused() -> None:
    """VLLM is not here: its settings are looked at alone."""
    from trl import GRPOConfig

    from sagerec.integrations.trl import check_config

    common: dict[str, Any] = {"bf16": False, "use_cpu": True, "use_vllm": True, "max_completion_length": 8}
    common["vllm_importance_sampling_mode"] = "sequence_truncate"
    row, legal = OBJECTIVES["sage"], GIVEN["legal"]
    with pytest.raises(SettingsError, match="use_vllm is True with `legal`, and vLLM is not held to it"):
        check_config(GRPOConfig(**common), row, advantages="row", legal=legal)
    structured = {"generation_kwargs": {"structured_outputs": {"choice": ["w2 w10"]}}}
    check_config(GRPOConfig(**common, **structured), row, advantages="row", legal=legal)
    with pytest.raises(SettingsError, match="expected a sequence mode"):
        check_config(
            GRPOConfig(**(common | {"vllm_importance_sampling_mode": "token_truncate"})),
            row,
            advantages="row",
            legal=None,
        )


@needs_trl
def test_vllms_weight_of_a_completion_scales_what_it_adds(make_trainer: Any) -> None:
    """The loss is linear in |A|: weights of 2 on every completion give twice the loss."""
    trainer = make_trainer()
    inputs = inputs_of(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    weighted = trainer.compute_loss(trainer.model, inputs | {"importance_sampling_ratio": torch.full((B * G, 1), 2.0)})
    torch.testing.assert_close(weighted, 2 * loss)


@needs_trl
def test_a_divergence_to_the_reference_is_added(make_trainer: Any, tmp_path: Path) -> None:
    """Beta times the k3 estimate over counted tokens; TRL reads the reference from where the model was."""
    make_model().save_pretrained(tmp_path / "model")
    trainer = make_trainer(config={"beta": 0.5}, model=str(tmp_path / "model"))
    inputs = inputs_of(trainer)
    new = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        inputs["completion_ids"].shape[1],
    )[0]
    difference = inputs["ref_per_token_logps"] - new
    counted = trainer._counted(inputs)
    trainer.args.steps_per_generation = 1
    with_kl = trainer.compute_loss(trainer.model, inputs)
    trainer.beta = 0.0
    without = trainer.compute_loss(trainer.model, inputs)
    expected = ((difference.exp() - difference - 1) * counted).sum() / counted.sum()
    assert float(expected.detach()) > 1e-4
    torch.testing.assert_close(with_kl - without, 0.5 * expected, rtol=1e-4, atol=1e-6)


@needs_trl
def test_a_reward_of_none_is_named(make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.reward_funcs[1] = lambda completions, **_: [None] * len(completions)
    with pytest.raises(RewardError, match="the reward function 'novelty' gave None or NaN; expected a number"):
        inputs_of(trainer)


@needs_trl
def test_a_reward_that_is_infinite_is_named(make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.reward_funcs[0] = lambda completions, **_: [float("inf")] * len(completions)
    with pytest.raises(RewardError, match="the reward function 'hit' gave an infinite number; expected a number"):
        inputs_of(trainer)


@needs_trl
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([None] * B * G, "diversity gave nan for 16 completions; expected a number in .0, 1. for each"),
        ([1.5] * B * G, "diversity gave 1.5 for 16 completions"),
        ([0.5], "diversity gave 1 values for 16 completions"),
    ],
)
def test_a_diversity_that_is_no_share_is_named(given: list[Any], message: str, make_trainer: Any) -> None:
    with pytest.raises(RewardError, match=message):
        inputs_of(make_trainer(diversity=lambda **_: given))


@needs_trl
@pytest.mark.parametrize(
    ("end", "model", "message"),
    [
        (23, {}, "completions end at the tokens .1. .of tokenizer and model., and those of `legal` at 23; expected"),
        (40, {}, "the model has 24 tokens, and `legal` writes ids up to 40; expected a model whose embeddings"),
        (END, {"eos_token_id": [END, 10]}, "the end tokens .10. of tokenizer or model stand within"),
    ],
)
def test_an_odd_vocabulary_is_refused(end: int, model: dict[str, Any], message: str, make_trainer: Any) -> None:
    with pytest.raises(SettingsError, match=message):
        make_trainer(legal=LegalTokens(SPACE, end), model=make_model(**model))


def test_our_rewards_as_reward_functions_give_what_our_stage_gives() -> None:
    """Hit, cold*hit, diversity of groups: by columns and token ids, against `compute_rewards` of the items."""
    items = torch.tensor([[0, 1, 1, 7], [2, 4, 4, 4]])
    ids = [[*SEQUENCES[i], END] for i in items.flatten().tolist()]
    columns: dict[str, Any] = {"completion_ids": ids, "target": [1] * 4 + [4] * 4, "prompts": ["a"] * 4 + ["b"] * 4}
    read = RewardInputs(torch.arange(2), items[..., None], torch.tensor([1, 4]), torch.zeros(2, 4), FACTS)
    for name in ("hit", "cold*hit", "diversity", "novelty"):
        expected = compute_rewards([name], read).flatten().tolist()
        assert ITEMS.reward(name)(**columns) == pytest.approx(expected)
    assert ITEMS.reward("hit")(**columns) == [0, 1, 1, 0, 0, 1, 1, 1]
    assert ITEMS.coldness(**columns) == [0, 1, 1, 1, 0, 1, 1, 1]
    half = float(-(torch.tensor([0.75, 0.25]) * torch.tensor([0.75, 0.25]).log()).sum() / np.log(4))
    assert ITEMS.diversity(**columns) == pytest.approx([half] * 8), "clusters 0 0 0 3, and 1 2 2 2"


def test_rewards_that_trl_cannot_give_are_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"the reward 'click\*hit' needs the answers click"):
        ITEMS.reward("click*hit")
    columns: dict[str, Any] = {"completion_ids": [[2, 10, END]] * 4, "target": [0] * 4, "prompts": ["a"] * 4}
    with pytest.raises(SettingsError, match="'ranking' of single items needs their log-probabilities"):
        ITEMS.reward("ranking")(**columns)
    with pytest.raises(SettingsError, match="3 completions are not groups of 4 of one prompt each"):
        ITEMS.coldness(completion_ids=[[2, 10, END]] * 3)
    with pytest.raises(SettingsError, match="4 completions are not groups of 4 of one prompt each"):
        ITEMS.coldness(**(columns | {"prompts": ["a", "a", "b", "b"]}))


def test_a_row_of_ones_own_needs_only_what_it_reads() -> None:
    row = replace(OBJECTIVES["sage"], entropy_penalty=0.0, boost_scope="all")
    assert not row.needs_diversity
    assert not row.needs_coldness


def test_without_trl_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "sagerec.integrations.trl", raising=False)
    with pytest.raises(MissingExtraError, match=r"TRL is not installed; install it with: pip install 'sagerec\[trl\]'"):
        importlib.import_module("sagerec.integrations.trl")
