"""Lists by a captured CUDA graph: for one user, or a few, starting the kernels takes longer than their work.

Shapes: B users, T history items, X items that a user leaves out, K places.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sagerec.actions.legal import NO_ITEM
from sagerec.config import require
from sagerec.decoding.beam import BeamLists, beam_lists
from sagerec.policies.protocol import AnyPolicy

WARM_UPS = 3
"""Runs before a capture, in which libraries make what they need."""


@torch.no_grad()
def capture_lists(
    policy: AnyPolicy, *, n_users: int, longest: int, excluded: int, k: int, beams: int = 50
) -> Callable[[Tensor, Tensor, Tensor], BeamLists]:
    """A function of histories (B, T), lengths (B,) and left out items (B, X) that replays one pass of `beam_lists`.

    It takes B = `n_users`, T at most `longest` and X at most `excluded`. Its result stands in memory that the next call
    writes over. The weights must not change: freeze the policy first.

    Raises: SettingsError for a policy that is not on a GPU, or has no static shapes.
    """
    device = policy.device
    require(
        device.type == "cuda" and policy.has_static_shapes,
        f"a {type(policy).__name__} on {device} cannot be captured; expected one of static shapes on a GPU",
    )
    items = torch.zeros(n_users, longest, dtype=torch.int64, device=device)
    lengths = torch.ones(n_users, dtype=torch.int64, device=device)
    out = torch.full((n_users, excluded), NO_ITEM, device=device)

    def write() -> BeamLists:
        return beam_lists(policy, policy.encode(items, lengths), n_users, k=k, beams=beams, excluded=out)

    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            write()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists = write()

    def replay(history: Tensor, length: Tensor, barred: Tensor) -> BeamLists:
        items.zero_()[:, : history.shape[1]] = history
        lengths.copy_(length)
        out.fill_(NO_ITEM)[:, : barred.shape[1]] = barred
        graph.replay()
        return lists

    return replay
