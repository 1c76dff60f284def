"""Whether a training has left a model that can recommend: finite weights, and sequences that it does not think absurd.

A validation keeps the better of two policies and cannot say that both are lost; without one nobody has looked.
"""

import math

import torch
from torch import nn

from sagerec.errors import TrainingError
from sagerec.training import sharding

MOST_NATS = 1000.0
"""Mean next-item loss above which a model is lost: a uniform one over a million items has 14 nats."""
MEND = "lower the learning rate (--learning-rate of align, --train.learning-rate of the supervised stage)"


def check_weights(model: nn.Module, when: str) -> None:
    """Raise TrainingError, which names the first of them, where weights are not finite."""
    named = list(model.named_parameters())
    finite = torch.stack([sharding.whole(value.detach().isfinite().all()) for _, value in named])
    if not bool(finite.all()):
        name = named[int(finite.logical_not().nonzero()[0])][0]
        raise TrainingError(f"the weights are not finite after {when} (the first is {name}); {MEND}")


def check_kept(model: nn.Module, nats: float, when: str) -> None:
    """Raise TrainingError where the kept weights, or their mean next-item loss on a sample (nats), are of no use."""
    check_weights(model, when)
    if not (math.isfinite(nats) and nats <= MOST_NATS):
        raise TrainingError(
            f"what was kept after {when} is lost: its next-item loss is {nats:.4g} nats, expected at most "
            f"{MOST_NATS:g}; {MEND}"
        )
