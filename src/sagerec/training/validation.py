"""Lists of the validation cases, each rank listing its share of them.

Of one rank the others would wait in a collective call for as long as it takes, which NCCL ends after ten minutes.
"""

import numpy as np
import torch

from sagerec.catalogue.splits import Cases
from sagerec.decoding.cases import list_cases
from sagerec.policies.protocol import AnyPolicy
from sagerec.training import parallel, sharding

VALIDATION_K, VALIDATION_BEAMS = 10, 20


def validation_lists(policy: AnyPolicy, cases: Cases, *, exclude_history: bool) -> np.ndarray:
    """Beam lists (n, 10) of 20 beams, not widened: for choosing weights, not for reporting; the same on every rank."""
    own = parallel.own_share(len(cases))
    with sharding.gathered(policy):
        lists, _ = list_cases(
            policy,
            cases.take(own),
            k=VALIDATION_K,
            beams=VALIDATION_BEAMS,
            widen=False,
            exclude_history=exclude_history,
        )
    found: np.ndarray = parallel.gather_rows(torch.from_numpy(lists).to(policy.device), len(cases)).cpu().numpy()
    return found
