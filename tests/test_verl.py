"""The table in verl: found by its entry point, equal to verl's own losses, called as the actor calls them.

Runs where verl is installed (`benchmarks/verl.sh` makes such an environment and runs this), and is skipped elsewhere.
"""

import importlib.util
import math
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import Tensor

from sagerec.errors import SettingsError
from sagerec.objectives.loss import policy_loss
from sagerec.objectives.table import OBJECTIVES
from tests.conftest import ROOT

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed (0.9.1)", allow_module_level=True)

from sagerec.integrations import verl as ours

N, T = 6, 5


def draw(seed: int = 0) -> dict[str, Tensor]:
    """A micro-batch as the actor hands it over: advantages of whole completions."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(N, T, generator=generator, dtype=torch.float64) - 0.01
    lengths = torch.randint(1, T + 1, (N, 1), generator=generator)
    mask = torch.arange(T) < lengths
    return {
        "old_log_prob": old,
        "log_prob": (old + 0.3 * torch.randn(N, T, generator=generator, dtype=torch.float64)).clamp(max=-1e-3),
        "advantages": torch.randn(N, 1, generator=generator, dtype=torch.float64).expand(-1, T) * mask,
        "response_mask": mask,
    }


def actor(mode: str = "seq-mean-token-mean", **settings: Any) -> Any:
    """The real ActorConfig, with our policy-loss config."""
    from verl.workers.config import ActorConfig

    loss = ours.SagePolicyLossConfig(**settings)
    return ActorConfig(
        strategy="fsdp",
        rollout_n=2,
        use_dynamic_bsz=True,
        loss_agg_mode=mode,
        policy_loss=loss,
        clip_ratio_low=3e-4,
        clip_ratio_high=4e-4,
    )


def called(name: str, batch: dict[str, Tensor], config: Any, **more: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Loss, gradient to the log-probabilities, metrics of a registered loss."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    logprobs = batch["log_prob"].clone().requires_grad_()
    given = {**batch, "log_prob": logprobs, "loss_agg_mode": config.loss_agg_mode, "config": config, **more}
    loss, metrics = get_policy_loss_fn(name)(**given)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], metrics


def test_verl_finds_the_losses_by_the_entry_point() -> None:
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    assert [point.value for point in entry_points(group="verl.plugins") if point.name == "sagerec"] == [
        "sagerec.integrations.verl"
    ]
    assert {"sage", "gbpo", "sagerec_gspo", "sagerec_cispo"} <= set(ours.NAMES) <= set(POLICY_LOSS_REGISTRY)
    assert "sft" not in ours.NAMES
    assert len(ours.NAMES) == len(OBJECTIVES) - 1


@pytest.mark.parametrize("info", [{}, {"dp_size": 2, "global_batch_size": 24, "batch_num_tokens": 90}])
def test_gspo_of_our_table_is_verls(info: dict[str, int]) -> None:
    """Loss and gradient within 1e-6, for a rank's micro-batch of a larger batch too."""
    for seed in range(3):
        config = actor(clip_low=3e-4, clip_high=4e-4)
        config.global_batch_info.update(info)
        loss, gradient, _ = called("sagerec_gspo", draw(seed), config)
        expected, slope, _ = called("gspo", draw(seed), config)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-7)
        assert bool(gradient.abs().sum() > 0)


def test_sage_is_the_rows_loss_with_an_estimated_diversity() -> None:
    batch = draw(4)
    config = actor(boost_scope="all", boost=2.0, entropy_penalty=3.0, full_diversity_nats=2.0)
    loss, gradient, metrics = called("sage", batch, config)
    mask = batch["response_mask"]
    surprise = -(batch["old_log_prob"] * mask).sum(1) / mask.sum(1)
    logprobs = batch["log_prob"].clone().requires_grad_()
    expected = policy_loss(
        replace(OBJECTIVES["sage"], boost_scope="all", boost=2.0, entropy_penalty=3.0),
        logprobs=logprobs[None],
        old_logprobs=batch["old_log_prob"][None],
        mask=mask[None],
        advantages=batch["advantages"][:, :1].T,
        diversity=(surprise / 2).clamp(0, 1)[None],
    ).loss
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logprobs)[0])
    assert 0 < float((surprise / 2).min()) < 1
    assert metrics["actor/coefficient_positive"] > 1
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_actors_own_loss_takes_it() -> None:
    """`ppo_loss`, which the workers call, on CPU tensors in verl's layout without padding; a step on its gradient
    lowers what it says.
    """
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.utils.losses import ppo_loss

    prompts = torch.nested.nested_tensor([torch.arange(1, 4)] * N, layout=torch.jagged)
    batch = draw(5)
    lengths = batch["response_mask"].sum(1).tolist()

    def nested(name: str) -> Tensor:
        rows = [row[:n].float() for row, n in zip(batch[name], lengths, strict=True)]
        return torch.nested.nested_tensor(rows, layout=torch.jagged)

    responses = [torch.ones(n, dtype=torch.long) for n in lengths]
    data = TensorDict(
        {
            "prompts": prompts,
            "responses": torch.nested.nested_tensor(responses, layout=torch.jagged),
            "response_mask": nested("response_mask"),
            "old_log_probs": nested("old_log_prob"),
            "advantages": nested("advantages"),
        },
        batch_size=[N],
    )
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=None, global_batch_size=None)
    config = actor(boost_scope="all")
    logits = torch.nn.Parameter(
        torch.cat(
            [
                torch.cat(
                    [batch["log_prob"][i, :n].new_zeros(2), batch["log_prob"][i, :n], batch["log_prob"].new_zeros(1)]
                )
                for i, n in enumerate(lengths)
            ]
        ).float()
    )
    loss, metrics = ppo_loss(config, {"log_probs": logits}, data)
    plain = called("sage", {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}, config)
    torch.testing.assert_close(loss.detach(), plain[0], rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        logits.sub_(0.01 * slope)
    assert float(ppo_loss(config, {"log_probs": logits}, data)[0].detach()) < float(loss.detach())
    assert "actor/ratio_q50" in metrics


@pytest.mark.parametrize(
    ("name", "mode", "settings", "message"),
    [
        ("sage", "seq-mean-token-mean", {}, "sage boosts cold slates, and verl does not say which are cold"),
        ("sage", "token-mean", {"boost_scope": "all"}, "loss_agg_mode is 'token-mean'; sage averages as 'seq-mean-tok"),
        ("dapo", "seq-mean-token-mean", {}, "loss_agg_mode is 'seq-mean-token-mean'; dapo averages as 'token-mean'"),
        ("gbpo", "seq-mean-token-mean", {"cap": 2.0}, "policy_loss.cap is not read by gbpo; leave it out"),
        (
            "sage",
            "seq-mean-token-mean",
            {"boost_scope": "all", "full_diversity_nats": 0.0},
            "policy_loss.full_diversity_nats is 0.0; expected a finite number above 0",
        ),
    ],
)
def test_what_cannot_hold_is_refused_by_name(name: str, mode: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        called(name, draw(), actor(mode, **settings))


def test_weights_of_whole_completions_scale_and_those_of_tokens_are_refused() -> None:
    batch, config = draw(6), actor(boost_scope="all")
    loss, gradient, _ = called("sage", batch, config)
    twice = called("sage", batch, config, rollout_is_weights=torch.full((N, T), 2.0))
    torch.testing.assert_close(twice[0], 2 * loss)
    torch.testing.assert_close(twice[1], 2 * gradient)
    with pytest.raises(SettingsError, match="rollout_is_weights differ from token to token"):
        called("sage", batch, config, rollout_is_weights=torch.rand(N, T) + 0.1)
    with pytest.raises(SettingsError, match=r"advantages differ from token to token .* expected adv_estimator: gdpo"):
        called("sage", batch | {"advantages": torch.randn(N, T)}, config)


def test_the_config_is_made_by_its_target_and_knows_no_other_key() -> None:
    """As verl reads its YAML: a key that is none raises."""
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    target = {"_target_": "sagerec.integrations.verl.SagePolicyLossConfig", "boost_scope": "all", "boost": 1.5}
    made = omega_conf_to_dataclass(OmegaConf.create(target))
    assert made == ours.SagePolicyLossConfig(boost_scope="all", boost=1.5)
    with pytest.raises(Exception, match="boots"):
        omega_conf_to_dataclass(OmegaConf.create(target | {"boots": 1}))


def test_rewards_are_components_of_the_itemic_answer() -> None:
    """Three items, the second of them true: rank 1 / log2(3); two of three first codes alike: H = .6365 / log 3."""
    text = "<s_a_1><s_b_2><s_c_3><|sid_end|><|sid_begin|><s_a_4><s_b_5><s_c_6><|sid_end|><|sid_begin|><s_a_4><s_b_0>"
    truth = "<|sid_begin|><s_a_4><s_b_5><s_c_6><|sid_end|><|sid_begin|><s_a_7><s_b_8><s_c_9><|sid_end|>"
    found = ours.compute_score("video", f"<think><s_a_7><s_b_8><s_c_9></think>\n{text}", truth)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    assert found == pytest.approx({"score": 1.0, "hit": 1.0, "rank": 1 / math.log2(3), "diversity": entropy})
    assert ours.compute_score("video", "none", truth) == {"score": 0.0, "hit": 0.0, "rank": 0.0, "diversity": 0.0}


def test_the_documented_yaml_is_a_config_of_verls() -> None:
    """examples/verl_recif.yaml over verl's own defaults: the actor's dataclass is made of it, with our policy loss."""
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    with initialize_config_dir(str(ROOT / "examples"), version_base=None):
        config = compose("verl_recif")
    made = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(made.policy_loss, ours.SagePolicyLossConfig)
    assert made.policy_loss.row("sage").boost_scope == "all"
    assert (made.loss_agg_mode, config.algorithm.adv_estimator) == ("seq-mean-token-mean", "gdpo")
    loss, gradient, _ = called("sage", draw(), made)
    assert bool(loss.isfinite())
    assert bool(gradient.abs().sum() > 0)
