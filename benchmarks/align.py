"""Completions a second of a whole step of alignment: the stage of `sagerec align` against TRL's GRPOTrainer.

A step is rollout, rewards, advantages, and one update with AdamW. One run, one machine, the same catalogue (12,101
items of 4 codes, drawn as in decode.py), the same histories of 20 items, 32 users and 16 completions of each a step,
one item a completion, the reward 1 for the item that came next, models of about 1 M random weights, float32.

- Ours: `rounds.roll_round` and `rounds.update` on a LazyDecoder, with the stage's defaults: SAGE, the history
  excluded, the next-item anchor, and the reference policy's divergence for the log, all of which the peer goes without.
  Once with sampled slates, as the peer's are, and once with beam slates, the stage's default.
- The peer: `GRPOTrainer.train` on a decoder of the Qwen3 layout with as many parameters (as in decode.py), one token a
  code, so 80 tokens of history and 2 special ones. It generates 4 tokens without a constraint, which is faster than
  with one, so that nearly none of its completions is an item. Its completions pass the model together or in smaller
  micro-batches; the fastest counts.

Every contender runs in processes of its own, so that its peak memory is its own; they take turns, and the fastest step
after the warm-up counts: what else the machine does can only slow one down. On busy cores read the processor's
seconds, which do not count waiting (with one thread they are those of the clock on an idle machine). The rise is the
peak over what the process held before the first step (interpreter, libraries and model).

The ratio is that of the two systems as they are used: the LazyDecoder reads an item in one position where the peer
reads four, and encodes a history once for its 16 completions, in rollout and in loss, where the peer does so 16 times.

    python benchmarks/align.py --out align.json      (needs the extra: pip install "sagerec[bench]")
"""

import importlib.util
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from decode import (
    ANSWER_TOKEN,
    BEGIN_TOKEN,
    PADDING_TOKEN,
    DecodeSettings,
    count,
    draw_codes,
    make_peer,
    make_policy,
    peer_version,
)
from rich.console import Console
from torch import Tensor
from trie import GB, describe_run, machine_line, peak_bytes, resident_bytes, show_limits, table

from sagerec.actions.trie import build_trie
from sagerec.catalogue.splits import Cases
from sagerec.config import require
from sagerec.errors import MissingExtraError, SagerecError
from sagerec.files import write_json
from sagerec.objectives.rewards import Facts, Membership
from sagerec.training.feedback import Feedback, to_device
from sagerec.training.loop import make_optimizer
from sagerec.training.rounds import Stage, roll_round, update
from sagerec.training.settings import AlignSettings

TARGET_RATIO = 20.0
CLUSTERS = 32


@dataclass(frozen=True)
class AlignBenchmarkSettings:
    """What is measured."""

    items: int = 12_101
    """Items of the catalogue (as many as Amazon Beauty)."""
    codebook_size: int = 256
    """Codes of each of the three random levels."""
    history: int = 20
    """Items of each history."""
    users: int = 32
    """Users of a step."""
    slates: int = 16
    """Completions of each user, one item each."""
    width: int = 128
    """Width of both models; content vectors are as wide."""
    steps: int = 30
    """Steps of ours in a process, after the warm-up."""
    peer_steps: int = 3
    """Steps of the peer in a process, after the warm-up."""
    warm_up: int = 2
    """Steps before those."""
    peer_micro_batches: tuple[int, ...] = (512, 128)
    """Completions that pass the peer's model at a time in an update."""
    rounds: int = 2
    """Times that each contender has a process."""
    device: str = "cpu"
    """Where both run: cpu, or cuda, where the seconds are those of the clock and the peak is still that of the host."""
    threads: int = field(default_factory=torch.get_num_threads)
    """Threads of torch."""
    seed: int = 0
    """Seed of codes, histories, weights and samples."""
    quick: bool = False
    """Only see that it runs: a tiny catalogue, tiny models, no target; replaces all settings of size."""
    out: Path | None = None
    """Write the results as JSON to this file too."""

    def __post_init__(self) -> None:
        require(
            min(self.steps, self.peer_steps, self.warm_up, self.rounds, self.threads) >= 1,
            "steps, peer_steps, warm_up, rounds, threads: expected 1 or more",
        )
        require(
            all((self.users * self.slates) % size == 0 for size in self.peer_micro_batches),
            f"peer_micro_batches is {self.peer_micro_batches}; expected divisors of {self.users * self.slates}",
        )

    @property
    def shape(self) -> DecodeSettings:
        """The part that decode.py makes catalogue and models of."""
        return DecodeSettings(
            items=self.items, codebook_size=self.codebook_size, history=self.history, width=self.width, seed=self.seed
        )


QUICK: dict[str, Any] = {
    "items": 300,
    "codebook_size": 16,
    "history": 5,
    "users": 4,
    "slates": 4,
    "width": 32,
    "steps": 2,
    "peer_steps": 1,
    "warm_up": 1,
    "peer_micro_batches": (8,),
    "rounds": 1,
}


def main() -> int:
    """Measure, check, print, write; 1 where the target is missed or a check fails."""
    settings = tyro.cli(AlignBenchmarkSettings, description=__doc__)
    if settings.quick:
        settings = replace(settings, **QUICK)
    torch.set_num_threads(settings.threads)
    try:
        require_trl()
    except SagerecError as error:
        print(error, file=sys.stderr)
        return 1
    record = describe_run("align", settings)
    record["versions"] |= {"transformers": peer_version(), "trl": trl_version()}
    contenders: dict[str, Any] = {
        "ours, sampled": partial(measure_ours, 0),
        "ours, beams": partial(measure_ours, settings.slates),
    }
    contenders |= {f"TRL, {n} a pass": partial(measure_peer, n) for n in settings.peer_micro_batches}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(settings.rounds):
        for name, measure in contenders.items():
            turns[name].append(in_own_process(measure, settings))
    rows = [summarise(name, found, settings) for name, found in turns.items()]
    peer = max(row["completions_per_second"] for row in rows[2:])
    for row in rows:
        row["ratio"] = row["completions_per_second"] / peer
    checks = [
        {"name": "ours: every completion is an item outside the history", "ok": all(r["valid"] == 1 for r in rows[:2])},
        {
            "name": "as many parameters, within 5 %",
            "ok": abs(rows[2]["parameters"] / rows[0]["parameters"] - 1) < 0.05,
        },
    ]
    limits = [
        {
            "name": f"{row['name']}: completions a second over TRL's",
            "measured": row["ratio"],
            "bound": "at least",
            "limit": TARGET_RATIO,
            "ok": row["ratio"] >= TARGET_RATIO,
        }
        for row in rows[:2]
        if not settings.quick
    ]
    record |= {
        "results": rows,
        "checks": checks,
        "limits": limits,
        "ok": all(entry["ok"] for entry in checks + limits),
    }
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 0 if record["ok"] else 1


def require_trl() -> None:
    """Raise MissingExtraError without trl."""
    if importlib.util.find_spec("trl") is None:
        raise MissingExtraError(
            'trl is not installed, and this benchmark\'s peer needs it; install it with: pip install "sagerec[bench]"'
        )


def trl_version() -> str:
    """Version of trl."""
    from importlib.metadata import version

    return version("trl")


def in_own_process(measure: Any, settings: AlignBenchmarkSettings) -> dict[str, Any]:
    """What `measure` returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found: dict[str, Any] = pool.submit(measure, settings).result()
    return found


def clocks() -> tuple[float, float]:
    """Seconds of the clock, and of the processor in this process."""
    return time.perf_counter(), time.process_time()


def draw_events(settings: AlignBenchmarkSettings, steps: int) -> np.ndarray:
    """Items (users of all steps, history + 1): each history, and the item that came next."""
    generator = np.random.default_rng([settings.seed, 1])
    return generator.integers(0, settings.items, (settings.users * steps, settings.history + 1)).astype(np.int32)


def measure_ours(beam_slates: int, settings: AlignBenchmarkSettings) -> dict[str, Any]:
    """Steps of the alignment stage."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    codes = draw_codes(settings.items, settings.codebook_size, np.random.default_rng(settings.seed))
    policy, reference = (make_policy(codes, settings.shape).move(settings.device) for _ in range(2))
    steps = settings.warm_up + settings.steps
    stage = make_stage(policy, reference, draw_events(settings, steps), beam_slates, settings)
    held = resident_bytes()
    ends, valid = [clocks()], []
    for step in range(steps):
        index = np.arange(settings.users) + step * settings.users
        slates = our_step(stage, index, step, steps)
        ends.append(clocks())
        history = stage.cases.event_items.reshape(-1, settings.history + 1)[index, :-1]
        written = slates.cpu().numpy()
        own = written[:, :, :, None] != history[:, None, None]
        valid.append(float(((written >= 0) & own.all(axis=3)).mean()))
    return {
        "parameters": count(policy),
        "seconds": np.diff(ends, axis=0)[settings.warm_up :].tolist(),
        "peak_gb": peak_bytes() / GB,
        "rise_gb": (peak_bytes() - held) / GB,
        "valid": float(np.mean(valid)),
    }


def make_stage(policy: Any, reference: Any, events: np.ndarray, beam_slates: int, settings: Any) -> Stage:
    """The stage on made-up events, rewarded for hits alone."""
    n_users, length = events.shape
    starts = np.arange(n_users, dtype=np.int64) * length
    cases = Cases(np.arange(n_users, dtype=np.int32), events[:, -1], starts + length - 1, starts, events.ravel())
    align = AlignSettings(
        reward=("hit=1",),
        slates=settings.slates,
        beam_slates=beam_slates,
        batch_users=settings.users,
        round_users=settings.users,
        seed=settings.seed,
        device=settings.device,
    )
    cluster = torch.arange(settings.items)[:, None] % CLUSTERS
    return Stage(
        settings=align.resolved(),
        policy=policy,
        reference=reference,
        optimizer=make_optimizer(policy, align.learning_rate, align.weight_decay),
        cases=cases,
        exclude_history=True,
        rewards={"hit": 1.0},
        facts=to_device(
            Facts(
                cold=torch.arange(settings.items) % 4 == 0,
                novelty=torch.zeros(settings.items),
                clusters=Membership(cluster, torch.ones_like(cluster, dtype=torch.float32), CLUSTERS),
            ),
            policy.device,
        ),
        feedback=Feedback(cases),
        work=Path(tempfile.gettempdir()),
    )


def our_step(stage: Stage, index: np.ndarray, step: int, steps: int) -> Tensor:
    """Rollout, rewards and update for the cases `index`; the slates (B, G, 1)."""
    (minibatch,), _ = roll_round(stage, [index], step)
    update(stage, minibatch, step, steps)
    assert minibatch.rollouts is not None
    return minibatch.rollouts.slates


def measure_peer(micro_batch: int, settings: AlignBenchmarkSettings) -> dict[str, Any]:
    """Steps of TRL's trainer."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    codes = draw_codes(settings.items, settings.codebook_size, np.random.default_rng(settings.seed))
    trie = build_trie(codes)
    peer = make_peer(codes, trie, count(make_policy(codes, settings.shape)), settings.shape)
    steps = settings.warm_up + settings.peer_steps
    events = draw_events(settings, steps)
    tokens = peer.tokens.numpy()
    items = {tuple(row) for row in tokens.tolist()}
    words = {"<pad>": PADDING_TOKEN, "<begin>": BEGIN_TOKEN, "<answer>": ANSWER_TOKEN}
    words |= {str(token): token for token in range(len(words), int(peer.model.config.vocab_size))}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<begin>", padding_side="left"
    )
    prompts = [" ".join(["<begin>", *map(str, tokens[row[:-1]].ravel()), "<answer>"]) for row in events]
    written: list[list[int]] = []

    def hit(completion_ids: list[list[int]], target: list[list[int]], **_: Any) -> list[float]:
        written.extend(completion_ids)
        return [float(ids == wanted) for ids, wanted in zip(completion_ids, target, strict=True)]

    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clocks())

    parts = settings.users * settings.slates // micro_batch
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=peer.model,
            processing_class=tokenizer,
            reward_funcs=hit,
            args=GRPOConfig(
                output_dir=scratch,
                use_cpu=settings.device == "cpu",
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=parts,
                steps_per_generation=parts,
                num_generations=settings.slates,
                max_completion_length=codes.shape[1],
                max_steps=steps,
                seed=settings.seed,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts, "target": tokens[events[:, -1]].tolist()}),
            callbacks=[Clock()],
        )
        held = resident_bytes()
        trainer.train()
    assert len(ends) == steps, "the trainer made another number of steps"
    assert len(written) == steps * settings.users * settings.slates, "the trainer wrote another number of completions"
    return {
        "parameters": count(peer.model),
        "seconds": np.diff(ends, axis=0)[settings.warm_up - 1 :].tolist(),
        "peak_gb": peak_bytes() / GB,
        "rise_gb": (peak_bytes() - held) / GB,
        "valid": float(np.mean([tuple(ids) in items for ids in written])),
    }


def summarise(name: str, turns: list[dict[str, Any]], settings: AlignBenchmarkSettings) -> dict[str, Any]:
    """The row of a contender from what its processes measured."""
    seconds, of_processor = np.concatenate([turn["seconds"] for turn in turns]).T
    completions = settings.users * settings.slates
    return {
        "name": name,
        "parameters": turns[0]["parameters"],
        "completions_per_step": completions,
        "steps": len(seconds),
        "seconds_per_step": float(seconds.min()),
        "seconds_per_step_median": float(np.median(seconds)),
        "processor_seconds_per_step": float(of_processor.min()),
        "completions_per_second": completions / float(seconds.min()),
        "peak_gb": max(turn["peak_gb"] for turn in turns),
        "rise_gb": max(turn["rise_gb"] for turn in turns),
        "valid": float(np.mean([turn["valid"] for turn in turns])),
    }


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    console = Console()
    versions, settings = record["versions"], record["settings"]
    console.print(f"{machine_line(record)}, trl {versions['trl']}, transformers {versions['transformers']}")
    rows = table(
        f"A step: {settings['users']} users, {settings['slates']} completions each, histories of {settings['history']}",
        ["contender", "s/step", "CPU s", "completions/s", "peak GB", "rise GB", "items", "ratio"],
    )
    for row in record["results"]:
        rows.add_row(
            row["name"],
            f"{row['seconds_per_step']:.3f}",
            f"{row['processor_seconds_per_step']:.3f}",
            f"{row['completions_per_second']:,.0f}",
            f"{row['peak_gb']:.2f}",
            f"{row['rise_gb']:.2f}",
            f"{row['valid']:.0%}",
            f"{row['ratio']:.1f}",
        )
    console.print(rows)
    ours, *_, peer = (f"{row['parameters']:,}" for row in record["results"])
    console.print(f"parameters: ours {ours}, TRL's model {peer}; the peak is the whole process")
    for check in record["checks"]:
        console.print(f"{'[green]ok[/]' if check['ok'] else '[red]failed[/]'}  {check['name']}")
    show_limits(console, record)


if __name__ == "__main__":
    sys.exit(main())
