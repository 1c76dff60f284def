"""Parity with the code of TRL 1.16 and verl 0.9: the same loss, the same gradient, the same advantages.

Each half runs where its engine is installed and is skipped, saying so, where it is not; the two want different versions
of transformers, so that each needs an environment of its own (`pip install "trl==1.16.*"`; `pip install verl==0.9.1
"tensordict<=0.10" ray hydra-core "transformers<5.11"`, which needs no GPU for what is tested here).

Nothing of an engine is copied: TRL's losses are those of `GRPOTrainer.compute_loss` on a tiny Qwen3, its advantages
those that the trainer itself makes of planted rewards, verl's those of its registries. Where a definition differs, the
test states how and tests the difference:

- a log-ratio beyond +- 20 nats is held there, as in verl; TRL lets it overflow;
- TRL's Dr.GRPO divides by its setting max_completion_length, ours by the longest slate unless `denominator` is given;
- TRL's CISPO holds the ratio from above alone, as ours; verl's from below too;
- verl's "vanilla" always has a dual clip, at 3; ours where `dual_clip` is set;
- verl's GDPO whitens with rsqrt(variance + 1e-8) where ours divides by deviation + eps;
- a group of one has advantage 0; in verl the reward itself.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sagerec import OBJECTIVES, Objective, compute_advantages, policy_loss

B, G, P, T, VOCABULARY = 3, 4, 5, 6, 24
"""Contexts, completions of each, prompt tokens, completion tokens, vocabulary."""
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (1.16)")
needs_verl = pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed (0.9.1)")


def draw_mask(generator: torch.Generator) -> Tensor:
    """(B, G, T): completions of 1 to T tokens, as an end token leaves them; at least one as long as T."""
    lengths = torch.randint(1, T + 1, (B, G, 1), generator=generator)
    lengths[0, 0] = T
    return torch.arange(T) < lengths


def draw_batch(seed: int, *, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Log-probabilities whose ratio leaves every bound, and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -4 * torch.rand(B, G, T, generator=generator, dtype=dtype) - 1e-3
    noise = torch.randn(B, G, T, generator=generator, dtype=dtype)
    return {
        "logprobs": logprobs,
        "old_logprobs": (logprobs + spread * noise).clamp(max=-1e-3),
        "mask": draw_mask(generator),
        "advantages": torch.randn(B, G, generator=generator, dtype=dtype),
    }


def our_loss(row: Objective, batch: dict[str, Tensor], **given: Any) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient (B, G, T) with respect to the log-probabilities."""
    logprobs = batch["logprobs"].detach().clone().requires_grad_()
    loss = policy_loss(row, **(batch | {"logprobs": logprobs}), **given).loss
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


# TRL

TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "epsilon": 0.2},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "gdpo": {"loss_type": "grpo", "epsilon": 0.2, "multi_objective_aggregation": "normalize_then_sum"},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon": 0.2, "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
}
"""What makes TRL's trainer each of our rows. GDPO differs from GRPO in its advantages alone."""
WEIGHTS = torch.tensor([0.3, 1.0, 0.5])
"""Weights of three rewards."""


def planted_rewards() -> Tensor:
    """(B, G, 3): a rare hit, a dense reward, and one that is constant in the first group."""
    generator = torch.Generator().manual_seed(5)
    rewards = torch.rand(B, G, 3, generator=generator)
    rewards[..., 0] = (rewards[..., 0] < 0.3).float()
    rewards[0, :, 2] = 0.5
    return rewards


def planted_reward(values: list[float]) -> Any:
    """A reward function of TRL that gives the completions of a batch these values."""

    def reward(completions: list[str], **_: Any) -> list[float]:
        assert len(completions) == len(values)
        return values

    return reward


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A GRPOTrainer around a tiny Qwen3 on the CPU with the settings of one row and the planted rewards."""
    folder: Path = tmp_path_factory.mktemp("trl")

    def make(name: str, **changed: Any) -> Any:
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
        from trl import GRPOConfig, GRPOTrainer

        words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
        plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", padding_side="left"
        )
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        tokens = {"vocab_size": VOCABULARY, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": True}
        model = Qwen3ForCausalLM(Qwen3Config(**tokens, **shape, **heads))
        settings: dict[str, Any] = TRL_SETTINGS[name] | {
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": B * G,
            "steps_per_generation": 1,
            "num_generations": G,
            "max_completion_length": T,
            "reward_weights": WEIGHTS.tolist(),
            "beta": 0.0,
        }
        columns = planted_rewards().view(B * G, 3).T.tolist()
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=[planted_reward(column) for column in columns],
            args=GRPOConfig(**(settings | changed)),
            train_dataset=Dataset.from_dict({"prompt": [f"w{2 + i} w3 w4" for i in range(B)]}),
        )
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def trl_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The batch as the trainer's `compute_loss` takes it, with made-up tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = batch["mask"].flatten(0, 1)
    prompts = torch.randint(2, VOCABULARY, (B, 1, P), generator=generator).expand(-1, G, -1).flatten(0, 1)
    completions = torch.randint(2, VOCABULARY, (B * G, T), generator=generator)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions.masked_fill(~mask, 0),
        "completion_mask": mask.long(),
        "advantages": batch["advantages"].flatten(),
        "old_per_token_logps": batch["old_logprobs"].flatten(0, 1),
        "num_items_in_batch": mask.sum(),
    }


def trl_loss(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of the trainer and its gradient (B, G, T) with respect to the log-probabilities, which are planted."""
    logprobs = batch["logprobs"].detach().clone().requires_grad_()
    entropies = torch.zeros(B * G, T)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs.flatten(0, 1), entropies, None)
    loss = trainer.compute_loss(trainer.model, trl_inputs(batch))
    del trainer._get_per_token_logps_and_entropies
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


@needs_trl
@pytest.mark.parametrize("name", TRL_SETTINGS)
def test_trl_gives_the_same_loss_and_gradient_to_the_log_probabilities(name: str, make_trainer: Any) -> None:
    """In float64, at ratios from within the bounds to far outside, and for GSPO about its narrow ones."""
    trainer = make_trainer(name)
    for seed, spread in enumerate((0.0, 1e-3, 0.3, 2.0)):
        batch = draw_batch(seed, spread=spread)
        loss, gradient = our_loss(OBJECTIVES[name], batch)
        expected_loss, expected = trl_loss(trainer, batch)
        if spread == 0.0:
            # At a ratio of exactly 1 nothing is clipped, and PyTorch's minimum shares a tie without changing the sum.
            assert bool((gradient[batch["mask"]] != 0).all())
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@needs_trl
@pytest.mark.parametrize("name", TRL_SETTINGS)
def test_trl_gives_the_same_gradient_to_the_parameters(name: str, make_trainer: Any) -> None:
    """The whole way: the trainer's forward of a Qwen3 and its loss, against the same forward and `policy_loss`."""
    trainer, batch = make_trainer(name), draw_batch(3, dtype=torch.float32)
    inputs, model = trl_inputs(batch), trainer.model
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        now = trainer._get_per_token_logps_and_entropies(model, ids, seen, T)[0]
        noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(4))
        inputs["old_per_token_logps"] = now + (1e-3 if name == "gspo" else 0.5) * noise
    expected_loss = trainer.compute_loss(model, inputs)
    expected = torch.autograd.grad(expected_loss, list(model.parameters()))

    logprobs = trainer._get_per_token_logps_and_entropies(model, ids, seen, T)[0].view(B, G, T)
    batch |= {"logprobs": logprobs, "old_logprobs": inputs["old_per_token_logps"].view(B, G, T)}
    loss = policy_loss(name, **batch).loss
    found = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


@needs_trl
@pytest.mark.parametrize("name", ["grpo", "gdpo", "dr_grpo"])
def test_trl_makes_the_same_advantages_of_planted_rewards(name: str, make_trainer: Any) -> None:
    """Summed then normalised (GRPO), normalised then summed (GDPO), centred (Dr.GRPO): eps 1e-4, n - 1 in both."""
    trainer = make_trainer(name)
    trainer.model.train()
    prompts = [{"prompt": f"w{2 + i} w3 w4"} for i in range(B) for _ in range(G)]
    made = trainer._generate_and_score_completions(prompts)["advantages"]
    found = compute_advantages(name, planted_rewards(), weights=WEIGHTS)
    torch.testing.assert_close(found, made.view(B, G), rtol=1e-5, atol=1e-5)


@needs_trl
def test_trl_divides_dr_grpo_by_its_setting_and_we_by_the_longest_slate(make_trainer: Any) -> None:
    """With max_completion_length 10 and slates of 6, TRL's loss is 6 / 10 of ours; `denominator` gives TRL's."""
    trainer, batch = make_trainer("dr_grpo", max_completion_length=10), draw_batch(7)
    expected_loss, expected = trl_loss(trainer, batch)
    loss, gradient = our_loss(OBJECTIVES["dr_grpo"], batch)
    torch.testing.assert_close(expected_loss, loss * T / 10, rtol=1e-6, atol=1e-9)
    loss, gradient = our_loss(OBJECTIVES["dr_grpo"], batch, denominator=B * G * 10)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@needs_trl
def test_log_ratios_beyond_20_nats_are_held_there_and_overflow_in_trl(make_trainer: Any) -> None:
    """A token at 100 nats with a negative advantage: TRL's loss in float32 is infinite, ours e^20 of the advantage."""
    trainer = make_trainer("grpo")
    batch = draw_batch(8, dtype=torch.float32)
    batch["mask"] = torch.ones_like(batch["mask"])
    batch["old_logprobs"][0, 0, 0] = batch["logprobs"][0, 0, 0] - 100
    batch["advantages"][0, 0] = -1.0
    assert trl_loss(trainer, batch)[0] == torch.inf
    loss, gradient = our_loss(OBJECTIVES["grpo"], batch)
    torch.testing.assert_close(gradient[0, 0, 0], torch.tensor(20.0).exp() / (B * G * T))
    assert bool(loss.isfinite())


# verl


@pytest.fixture(scope="module")
def verl() -> Any:
    """The module of verl's losses and advantages."""
    from verl.trainer.ppo import core_algos

    return core_algos


def verl_loss(verl: Any, name: str, mode: str, batch: dict[str, Tensor], **given: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient (B, G, T) of a registered loss of verl."""
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=G, use_dynamic_bsz=True, **given)
    logprobs = batch["logprobs"].detach().clone().requires_grad_()
    loss, _ = verl.get_policy_loss_fn(name)(
        old_log_prob=batch["old_logprobs"].flatten(0, 1),
        log_prob=logprobs.flatten(0, 1),
        advantages=batch["advantages"].view(B * G, 1).expand(-1, T),
        response_mask=batch["mask"].flatten(0, 1).to(logprobs.dtype),
        loss_agg_mode=mode,
        config=config,
    )
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


VANILLA = replace(OBJECTIVES["grpo"], clip_low=0.2, clip_high=0.28, dual_clip=3.0)
VERL_ROWS: dict[str, tuple[Objective, str, str, dict[str, float]]] = {
    "token-mean": (replace(VANILLA, aggregation="token"), "vanilla", "token-mean", {}),
    "slate-mean": (VANILLA, "vanilla", "seq-mean-token-mean", {}),
    "constant": (replace(VANILLA, aggregation="constant"), "vanilla", "seq-mean-token-sum-norm", {}),
    "gspo": (
        OBJECTIVES["gspo"],
        "gspo",
        "seq-mean-token-mean",
        {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
    ),
}


@needs_verl
@pytest.mark.parametrize("case", VERL_ROWS)
def test_verl_gives_the_same_loss_and_gradient(case: str, verl: Any) -> None:
    """Its dual clip is always on (at 3), so ours is too here; its slate mean adds 1e-8 to the number of tokens."""
    row, name, mode, bounds = VERL_ROWS[case]
    for seed, spread in enumerate((0.0, 1e-3, 0.3, 2.0)):
        batch = draw_batch(seed, spread=spread)
        loss, gradient = our_loss(row, batch)
        given = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28} | bounds
        expected_loss, expected = verl_loss(verl, name, mode, batch, **given)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


@needs_verl
def test_verl_holds_the_ratio_of_cispo_from_below_too(verl: Any) -> None:
    """The same where r >= 1 - clip_low; below, verl's coefficient is 1 - clip_low and ours r."""
    row, bounds = replace(OBJECTIVES["cispo"], cap=1.28), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    batch = draw_batch(2)
    held = batch["old_logprobs"].minimum(batch["logprobs"] + 0.2)  # r >= e^-.2 = .82
    loss, gradient = our_loss(row, batch | {"old_logprobs": held})
    expected_loss, expected = verl_loss(verl, "cispo", "token-mean", batch | {"old_logprobs": held}, **bounds)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)
    _, gradient = our_loss(row, batch)
    _, expected = verl_loss(verl, "cispo", "token-mean", batch, **bounds)
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp()
    low = batch["mask"] & (ratio < 0.8)
    assert bool(low.any())
    torch.testing.assert_close(gradient[low] / expected[low], ratio[low] / 0.8, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient[~low], expected[~low], rtol=1e-6, atol=1e-7)


@needs_verl
def test_verl_gdpo_is_our_decoupled_token_mode(verl: Any) -> None:
    """Both whiten over tokens; the deviations get eps = 1e-6 in both, but verl's of the batch sqrt(variance + 1e-8).

    The variance of the sum is about 1, so this differs by about 1e-6 of the value.
    """
    mask = draw_mask(torch.Generator().manual_seed(2))
    rewards = planted_rewards()
    names = ["hit", "dense", "constant"]
    tokens = mask.flatten(0, 1).long()
    index = np.repeat(np.array(["a", "b", "c"], dtype=object), G)
    made, _ = verl.compute_gdpo_outcome_advantage(
        token_level_rewards=torch.zeros(B * G, T),
        response_mask=tokens,
        index=index,
        config={"gdpo_reward_keys": names, "gdpo_reward_weights": WEIGHTS.tolist()},
        non_tensor_batch={name: rewards[..., i].flatten().numpy() for i, name in enumerate(names)},
        batch={
            "prompts": torch.zeros(B * G, P, dtype=torch.long),
            "attention_mask": torch.cat([torch.ones(B * G, P, dtype=torch.long), tokens], dim=1),
        },
    )
    row = replace(OBJECTIVES["gdpo"], advantage="decoupled-token", eps=1e-6)
    found = compute_advantages(row, rewards, weights=WEIGHTS, tokens=mask.sum(dim=2))
    torch.testing.assert_close(found.unsqueeze(2) * mask, made.view(B, G, T), rtol=1e-5, atol=1e-5)
    by_slate = compute_advantages(replace(row, advantage="decoupled"), rewards, weights=WEIGHTS)
    assert float((by_slate - found).abs().max()) > 0.01, "the two modes must differ for the test to tell them apart"


@needs_verl
def test_verl_takes_the_reward_of_a_lone_completion_for_its_advantage_and_we_0(verl: Any) -> None:
    """A group of one has no baseline: verl's GRPO divides by 1 and subtracts 0, ours subtracts the reward itself."""
    made, _ = verl.compute_grpo_outcome_advantage(
        token_level_rewards=torch.tensor([[0.7]]), response_mask=torch.ones(1, 1), index=np.array(["a"], dtype=object)
    )
    assert made.item() == pytest.approx(0.7)
    assert compute_advantages("grpo", torch.tensor([[[0.7]]])).item() == 0.0
