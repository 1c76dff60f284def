"""SAGE on one page: rollouts, rewards, advantages, loss and step, top to bottom, on the simulated store.

    python examples/sage_on_one_page.py            (2 minutes on 2 cores; --beside runs `sagerec align` too)

The algorithm (arXiv 2601.21452, read as docs/alignment.md says), with one item a slate:

    for each round over the reserved events:
        slates and their old log-probabilities    the G best items of each user, by the policy as it is
        rewards                                   what the users answer: clicks, likes, dislikes
        advantages                                each reward normalised in its group, then their sum over the round
        for each minibatch of the round:
            ratio r = p / q                       geometric means over the tokens where the policy had a choice
            loss = - mean p / sg(d) A             d = max(q, sg p) / (1 + boost x coldness)          for A >= 0
                                                  d = max(q, 1 - sg p) / (1 + penalty x (1 - H))     for A < 0
            one step of AdamW on loss + anchor x next-item loss

Without `sagerec.objectives` and `sagerec.training.rounds`; a test holds its updates equal to those of `sagerec align`.
It leaves out samples, slates of several items, other objectives, replay, validation, checkpoints, ranks.
Shapes: B users of a minibatch, G slates of each, M rewards, N items, Q clusters, F free tokens.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from sagerec.actions.clusters import item_clusters
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.simulated_store import SimulatedStore, StoreSettings, expected_answers, write_store
from sagerec.catalogue.splits import Cases, SplitSettings, learnt_counts
from sagerec.decoding.cases import list_cases
from sagerec.decoding.rollouts import RolloutSettings, roll_out
from sagerec.decoding.slates import FreeTokens, slate_logprobs
from sagerec.policies.protocol import AnyPolicy
from sagerec.run import stages
from sagerec.run.folder import Run
from sagerec.training.batches import shuffled_batches
from sagerec.training.settings import AlignSettings, TrainSettings

REWARDS, EPS = {"click": 1.0, "like": 1.0, "dislike": -1.0}, 1e-4


@dataclass(frozen=True)
class Args:
    """What is run."""

    out: Path = Path("runs/one-page")
    """Folder for the store and the run."""
    users: int = 2000
    """Users of the store."""
    supervised_epochs: int = 10
    """Passes of the supervised stage."""
    slates: int = 16
    """Slates a context, G."""
    boost: float = 4.0
    """b = boost x coldness: what a cold success gains."""
    penalty: float = 4.0
    """A failure counts 1 + penalty x (1 - H) times."""
    epochs: int = 2
    """Passes over the reserved events."""
    round_users: int = 256
    """Contexts that are rolled out at a time."""
    batch_users: int = 64
    """Contexts of an update."""
    learning_rate: float = 8e-4
    """Highest learning rate of AdamW; a warm-up and a cosine to a fiftieth."""
    anchor: float = 0.7
    """Weight of the next-item loss on the reserved events."""
    seed: int = 0
    """Seed of the order of events and of dropout."""
    beside: bool = False
    """Run `sagerec align` with the same settings too, and print its figures beside."""


def align(run: Run, store: SimulatedStore, policy: AnyPolicy, args: Args) -> None:
    """SAGE. Changes the weights of `policy`."""
    cases = run.split.cases(run.data, "align")
    cold = torch.from_numpy(learnt_counts(run.data, run.split) <= 5)
    clusters = torch.from_numpy(item_clusters(run.data, policy.space, "coarse").toarray()).float()
    weights = torch.tensor(list(REWARDS.values()))
    matrices = [p for p in policy.parameters() if p.ndim >= 2]
    vectors = [p for p in policy.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    lengths = np.minimum(cases.rows - cases.starts, policy.max_items)
    per_round = max(1, args.round_users // args.batch_users)
    total, step, number = args.epochs * math.ceil(len(cases) / args.batch_users), 0, 0
    for epoch in range(args.epochs):
        batches = shuffled_batches(lengths, args.batch_users, np.random.default_rng([args.seed, epoch]))
        for begin in range(0, len(batches), per_round):
            # Rollouts and rewards of the whole round, by the policy as it is.
            policy.eval()
            rolled = [roll(store, policy, cases, index, args) for index in batches[begin : begin + per_round]]
            advantages = normalise(torch.cat([r.rewards for r in rolled]), weights)
            parts = torch.split(advantages, [len(r.rewards) for r in rolled])
            for i in np.random.default_rng([args.seed, number, 0]).permutation(len(rolled)):
                batch, advantage = rolled[i], parts[i].flatten()
                policy.eval()
                scored = slate_logprobs(policy, batch.items, batch.lengths, batch.slates, excluded=batch.excluded)
                logp, counted = geometric_mean(scored.tokens, batch.slates.numel())
                diversity = group_entropy(clusters[batch.slates[:, :, 0]]).repeat_interleave(args.slates)
                coldness = cold[batch.slates.flatten()].float()
                loss = sage(logp, batch.old, advantage, diversity, coldness, counted, args)
                torch.manual_seed(args.seed * 7_368_787 + step)  # dropout, by the update alone
                policy.train()
                last = torch.arange(batch.items.shape[1]) == batch.lengths[:, None] - 1
                anchor = policy.next_item_loss(batch.items, batch.targets[:, None].expand_as(batch.items), last)
                optimizer.zero_grad()
                (loss + args.anchor * anchor).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total, args.learning_rate)
                optimizer.step()
                step += 1
            number += 1
    policy.eval()


def sage(
    logp: Tensor, old: Tensor, advantage: Tensor, diversity: Tensor, coldness: Tensor, counted: Tensor, args: Args
) -> Tensor:
    """L = - mean p / sg(d) A over slates, every argument (slates,): no gradient is cut, and d bounds each of them."""
    p, q = logp.exp(), old.exp()
    success = torch.maximum(q, p.detach()) / (1 + args.boost * coldness)
    failure = torch.maximum(q, 1 - p.detach()) / (1 + args.penalty * (1 - diversity))
    d = torch.where(advantage >= 0, success, failure)
    return -(p / d * advantage * counted).mean()


def normalise(rewards: Tensor, weights: Tensor) -> Tensor:
    """Decoupled advantages (B, G) of rewards (B, G, M): normalise each in its group, add up, normalise over all."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    total = (weights * centred / (rewards.std(dim=1, keepdim=True) + EPS)).sum(dim=2)
    return (total - total.mean()) / (total.std() + EPS)


def geometric_mean(tokens: FreeTokens, slates: int) -> tuple[Tensor, Tensor]:
    """Mean log-probability (slates,) over each slate's free tokens, and whether it has one."""
    count = torch.bincount(tokens.item, minlength=slates)
    total = torch.zeros(slates).index_add(0, tokens.item, tokens.logprobs)
    return total / count.clamp(min=1), count > 0


def group_entropy(shares: Tensor) -> Tensor:
    """H (B,) of groups of G single items from their shares in clusters (B, G, Q): entropy / log G, at most 1."""
    mean = shares.mean(dim=1)
    return (-torch.xlogy(mean, mean).sum(dim=1) / math.log(shares.shape[1])).clamp(max=1.0)


@dataclass(frozen=True)
class Rolled:
    """A minibatch of users with their slates."""

    items: Tensor
    """(B, T) histories."""
    lengths: Tensor
    """(B,) their lengths."""
    targets: Tensor
    """(B,) what the users took next."""
    excluded: Tensor
    """(B, X) what they had before, which no slate holds."""
    slates: Tensor
    """(B, G, 1) items."""
    old: Tensor
    """(B G,) mean log-probability of each slate when it was written."""
    rewards: Tensor
    """(B, G, M)."""


def roll(store: SimulatedStore, policy: AnyPolicy, cases: Cases, index: np.ndarray, args: Args) -> Rolled:
    """The G most probable items of each user as slates of one, and what the users answer."""
    history, length = cases.histories(index, policy.max_items)
    items, lengths, excluded = (torch.from_numpy(x) for x in (history, length, cases.taken(index)))
    found = roll_out(policy, items, lengths, RolloutSettings(1, args.slates, args.slates), excluded=excluded)
    old, _ = geometric_mean(found.tokens, found.items.numel())
    last = history[np.arange(len(index)), length - 1]
    answers = store.expected(
        cases.users[index].repeat(args.slates), found.items.reshape(-1, 1).numpy(), last_items=last.repeat(args.slates)
    )
    rewards = np.stack([getattr(answers, name)[:, 0] for name in REWARDS], axis=1).astype(np.float32)
    shape = (len(index), args.slates, len(REWARDS))
    targets = torch.from_numpy(cases.targets[index]).long()
    return Rolled(items, lengths, targets, excluded, found.items, old, torch.from_numpy(rewards).view(shape))


def learning_rate(step: int, total: int, highest: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to a fiftieth."""
    warmup = max(1, round(0.05 * total))
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return highest * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def answers_on_test(run: Run, store: SimulatedStore, policy: AnyPolicy) -> dict[str, float]:
    """What the test users answer to the ten best items, per list."""
    cases = run.split.cases(run.data, "test")
    lists, _ = list_cases(policy, cases, k=10, exclude_history=True)
    return {name: float(value.mean()) for name, value in expected_answers(store, cases, lists).items()}


def stage_settings(args: Args) -> AlignSettings:
    """The settings with which `sagerec align` does the same."""
    return AlignSettings(
        reward=tuple(f"{name}={weight}" for name, weight in REWARDS.items()),
        start="supervised",
        boost=args.boost,
        entropy_penalty=args.penalty,
        slates=args.slates,
        beam_slates=args.slates,
        epochs=args.epochs,
        round_users=args.round_users,
        batch_users=args.batch_users,
        learning_rate=args.learning_rate,
        sft_weight=args.anchor,
        policy_weight=1,
        replay_weight=0,
        validations=0,
        history="exclude",
        device="cpu",
        seed=args.seed,
    )


def main(args: Args) -> None:
    """Simulate, train, align, measure."""
    if not (args.out / "store").is_dir():
        write_store(args.out / "store", simulate(StoreSettings(users=args.users)))
    run = stages.prepare(args.out / "store", args.out / "run", SplitSettings(reserve="event"))
    stages.make_actions(run, stages.RunSettings().ids)
    stages.train(run, stages.RunSettings().policy, TrainSettings(epochs=args.supervised_epochs, batch_size=32))
    store, policy = run.store(), run.policy(device="cpu")
    assert store is not None
    rows = {"supervised": answers_on_test(run, store, policy)}
    align(run, store, policy, args)
    rows["SAGE, this page"] = answers_on_test(run, store, policy)
    if args.beside:
        name = stages.align(run, stage_settings(args), name="beside")
        rows["SAGE, sagerec align"] = answers_on_test(run, store, run.policy(name, device="cpu"))
    print(f"{'expected answers per list of ten':<34}" + "".join(f"{name:>15}" for name in rows["supervised"]))
    for name, row in rows.items():
        print(f"{name:<34}" + "".join(f"{value:>15.4f}" for value in row.values()))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
