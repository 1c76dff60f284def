"""sagerec: preference alignment of generative recommenders."""

from sagerec.objectives.loss import PolicyLoss, compute_advantages, policy_loss
from sagerec.objectives.rewards import RewardInputs, register_reward
from sagerec.objectives.table import OBJECTIVES, Objective
from sagerec.recommend import Recommender, load

__version__ = "0.1.0"
__all__ = [
    "OBJECTIVES",
    "Objective",
    "PolicyLoss",
    "Recommender",
    "RewardInputs",
    "__version__",
    "compute_advantages",
    "load",
    "policy_loss",
    "register_reward",
]
