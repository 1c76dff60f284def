"""What the tests of `test_torchrun` run: in their own process, and on the ranks of torchrun.

torchrun … tests/ranks.py FOLDER        all of `on_ranks`, for copies of a run that stand in FOLDER
torchrun … tests/ranks.py FOLDER tasks  three tasks of a study, one of which fails
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sagerec.errors import SettingsError
from sagerec.policies.registry import PolicySettings
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import align, train
from sagerec.study.workers import do_tasks, over_ranks
from sagerec.training import alignment, loop, parallel, sharding
from sagerec.training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from tests.conftest import SMALL_TRAIN
from tests.test_alignment import QUICK
from tests.tiny_qwen import VOCABULARY, make_model

NO_DROPOUT = PolicySettings(width=32, max_items=20, dropout=0.0)
TRAIN = replace(SMALL_TRAIN, epochs=3, batch_size=31, precision="float32", learning_rate=0.5)
ALIGN = replace(
    QUICK,
    reward=("click=1", "like=1", "hit=2"),
    beam_slates=4,
    epochs=1,
    batch_users=31,
    round_users=62,
    learning_rate=0.2,
    replay_weight=1.0,
)


LM_TRAIN = replace(TRAIN, epochs=2, learning_rate=0.1, validation_users=8)
LM_ALIGN = replace(
    ALIGN,
    learning_rate=0.05,
    k=2,
    beam_slates=1,
    batch_users=8,
    round_users=16,
    max_contexts=27,
    passes=1,
    kl_weight=0.1,
    validations=0,
)


def plain_steps(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=learning_rate)


class StoppedError(Exception):
    """A stage that was ended after its first checkpoint."""


def language_settings(folder: Path) -> PolicySettings:
    """A tiny Qwen3 that reads in pieces, of which the ranks have unlike numbers, and drops what is old."""
    model = str(folder.parent / "model")
    return PolicySettings(kind="causal-lm", model=model, max_items=20, max_tokens=24, micro_tokens=256)


STAGES: dict[str, Callable[[Run], object]] = {
    "train": lambda run: train(run, NO_DROPOUT, TRAIN),
    "align": lambda run: align(run, ALIGN),
    "lm-train": lambda run: train(run, language_settings(run.folder), LM_TRAIN),
    "lm-align": lambda run: align(run, LM_ALIGN),
}
"""Of the LazyDecoder, which every rank holds whole, and of a language model in shards."""


def run_stage(stage: str, folder: Path, *, stop: bool = False) -> None:
    """A stage of a run, by plain gradient steps; `stop` ends it after its first checkpoint."""

    def save_and_stop(work: Path, step: int, model: nn.Module, *given: Any, **named: Any) -> None:
        assert sharding.is_sharded(model.parameters()) == (stage.startswith("lm") and parallel.n_ranks() > 1)
        save_checkpoint(work, step, model, *given, **named)
        parallel.share_from_first(None)  # no rank ends before the checkpoint is there
        raise StoppedError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.functional, "relu", nn.functional.gelu)  # one has a kink, where rounding becomes a step
        for module in (loop, alignment):
            patched.setattr(module, "make_optimizer", plain_steps)
            if stop:
                patched.setattr(module, "save_checkpoint", save_and_stop)
        run = open_run(folder)
        try:
            STAGES[stage](run)
        except StoppedError:
            assert stop


def run_shards(out: Path, source: Path) -> None:
    """Three steps of AdamW on next tokens, each rank its rows; scores in unlike numbers of steps; state in and out."""
    out.mkdir(exist_ok=True)
    model = make_model().double()  # so that AdamW does not magnify rounding
    sharding.shard(model, model.model.layers)
    optimizer = loop.make_optimizer(model, 0.01, 0.1)
    rows = torch.randint(2, VOCABULARY, (9, 7), generator=torch.Generator().manual_seed(0))
    own = rows[parallel.own_share(len(rows))]
    norms = []
    for _ in range(3):
        logits = model(input_ids=own).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, own[:, 1:].flatten(), reduction="sum") / rows[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        parallel.add_gradients_up(model)
        norms.append(parallel.clip_gradients(model, 1.0))
        optimizer.step()
    with sharding.gathered(model), torch.no_grad():
        for _ in range(1 + parallel.rank()):  # one rank computes more often than the other
            scores = model(input_ids=rows).logits[:, -1]
    whole = sharding.whole_state(model) | {"norms": torch.stack(norms), "scores": scores.contiguous()}
    save_checkpoint(out, 3, model, optimizer, progress={"step": 3}, best=sharding.snapshot(model))
    parallel.share_from_first(None)
    read: dict[str, torch.Tensor] = {}
    if (checkpoint := newest_checkpoint(source)) is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        best = load_checkpoint(checkpoint, model, optimizer)
        read = sharding.whole_state(model)
        assert all(torch.equal(sharding.whole(best[name]), value) for name, value in read.items())
        moments = [sharding.whole(state["exp_avg"]) for state in optimizer.state.values()]
        assert all(float(state["step"]) == 3 for state in optimizer.state.values())
        assert all(bool(moment.abs().max() > 0) for moment in moments)
        read |= {"norms": whole["norms"], "scores": whole["scores"]}
    if parallel.rank() == 0:
        save_file(whole, out / "whole.safetensors")
        if read:
            save_file(read, out / "read.safetensors")
    parallel.share_from_first(None)


def mark(folder: Path, number: int, threads: int, device: str) -> str:
    """A task of a study: leaves a file that says which rank did it, and is one process as far as it can see."""
    if number == 1:
        raise SettingsError("task 1 cannot be done")
    assert parallel.n_ranks() == parallel.launched() == 1
    (folder / f"{number}-by-{os.environ['RANK']}").touch()
    return str(number)


def on_ranks(folder: Path) -> None:
    """Each stage whole, and the second half of one that one process began; a first half; a model in shards."""
    for stage in STAGES:
        run_stage(stage, folder / f"{stage}-two")
        run_stage(stage, folder / f"{stage}-one-then-two")
        run_stage(stage, folder / f"{stage}-two-then-one", stop=True)
    run_shards(folder / "shards-two", folder / "shards-one")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    target = Path(sys.argv[1])
    if sys.argv[2:] == ["tasks"]:
        over_ranks(lambda: do_tasks([(partial(mark, target, i), "cpu") for i in range(3)], 1), 1)
    else:
        parallel.join_ranks(torch.device("cpu"))
        on_ranks(target)
