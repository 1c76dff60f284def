"""From `GRPOTrainer` to SAGE: a small Qwen3 that writes Semantic IDs, aligned in TRL on the simulated store.

    pip install ".[trl]"                 (in a clone; PyTorch first, where another build is wanted)
    python examples/trl_sage.py          (about 2 minutes on 2 cores)

A store is simulated and its items get Semantic IDs; each code becomes a word of the vocabulary. The model learns next
items from the log, then SageTrainer rolls it out on one reserved event a user: the store's users answer with a click or
not, a reward function of our own, beside two of the library's. Sampler and loss share one legal-token mask, so that
every completion is an item. Printed: clicks a completion at first and at last, and Recall@10 on test before and after.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig

from sagerec.actions.registry import ActionSettings
from sagerec.catalogue.simulate import simulate
from sagerec.catalogue.simulated_store import StoreSettings, write_store
from sagerec.catalogue.splits import Cases, SplitSettings
from sagerec.integrations.catalogue_rewards import CatalogueRewards
from sagerec.integrations.legal_tokens import LegalTokens, in_vocabulary
from sagerec.integrations.trl import SageTrainer
from sagerec.run import stages
from sagerec.training.feedback import gather_facts

END, READ = 1, 10
"""Id of the end token, history items in a prompt."""


@dataclass(frozen=True)
class Args:
    """What is run."""

    out: Path = Path("runs/trl")
    """Folder for the store, the run and TRL's output."""
    users: int = 400
    """Users of the store."""
    items: int = 200
    """Items of the store."""
    supervised_epochs: int = 15
    """Passes over the training sequences."""
    steps: int = 60
    """Optimiser steps of SAGE."""
    objective: str = "sage"
    """A row of the table of objectives that reads diversity and coldness."""


def main(args: Args) -> None:
    """Simulate, learn, align, measure."""
    write_store(args.out / "store", simulate(StoreSettings(users=args.users, items=args.items)))
    run = stages.prepare(args.out / "store", args.out / "run", SplitSettings(reserve="event"))
    space = stages.make_actions(run, ActionSettings(levels=2, codebook_size=16))
    sizes = space.padded().amax(dim=0) + 1
    first_ids = (2 + sizes.cumsum(0) - sizes).tolist()
    space = in_vocabulary(space, first_ids)
    tokenizer, model = make_tokenizer(2 + int(sizes.sum())), make_model(2 + int(sizes.sum()))
    legal = LegalTokens(space, END)

    words = [" ".join(f"c{token}" for token in space.sequence(item)) for item in range(space.n_items)]
    train = run.split.sequences(run.data, "train")
    users = [train.items[a:b].tolist() for a, b in zip(train.offsets[:-1], train.offsets[1:], strict=True)]
    learn(model, [[token for item in user for token in space.sequence(item)] for user in users], args.supervised_epochs)

    def prompts(cases: Cases) -> list[str]:
        history, lengths = cases.histories(np.arange(len(cases)), READ)
        return [" ".join(words[i] for i in row[:n]) for row, n in zip(history, lengths, strict=True)]

    test = run.split.cases(run.data, "test")
    ids = tokenizer(prompts(test), padding=True, return_tensors="pt")
    before = recall_at_10(model, ids, torch.from_numpy(test.targets).long(), legal)

    reserved = run.split.cases(run.data, "align")
    facts = gather_facts(run.data, run.split, space, clusters="coarse", cold_max_count=5)
    catalogue, store = CatalogueRewards(legal.read, facts, group=16), run.store()
    assert store is not None

    def click(completion_ids: list[list[int]], user: list[int], last: list[int], **_: Any) -> list[float]:
        """Share of such users that would click on the item."""
        items = np.array([legal.read(ids) for ids in completion_ids])
        answers: list[float] = store.expected(np.array(user), items, last_items=np.array(last)).click[:, 0].tolist()
        return answers

    trainer = SageTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[click, catalogue.reward("hit"), catalogue.reward("novelty*similarity")],
        args=GRPOConfig(
            output_dir=str(args.out / "trl"),
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=128,
            steps_per_generation=2,  # two updates a rollout: the second has a ratio that is not 1
            num_generations=16,
            max_completion_length=legal.longest,
            reward_weights=[1.0, 1.0, 0.1],
            learning_rate=5e-4,
            max_steps=args.steps,
            logging_steps=max(1, args.steps // 10),
        ),
        train_dataset=Dataset.from_dict(
            {
                "prompt": prompts(reserved),
                "target": reserved.targets,
                "user": reserved.users,
                "last": reserved.event_items[reserved.rows - 1],
            }
        ),
        # all that turns a GRPOTrainer into SAGE:
        objective=args.objective,
        diversity=catalogue.diversity,
        coldness=catalogue.coldness,
        legal=legal,
    )
    trainer.train()
    after = recall_at_10(model, ids, torch.from_numpy(test.targets).long(), legal)
    clicks = [line["rewards/click/mean"] for line in trainer.state.log_history if "rewards/click/mean" in line]
    print(f"clicks a completion: {clicks[0]:.3f} in the first steps, {clicks[-1]:.3f} in the last")
    print(f"Recall@10 on {len(test)} test events: {before:.4f} supervised, {after:.4f} after {args.objective}")


def make_tokenizer(vocabulary: int) -> Any:
    """One word a code."""
    names = {"<pad>": 0, "<end>": END} | {f"c{i}": i for i in range(2, vocabulary)}
    plain = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", padding_side="left")


def make_model(vocabulary: int) -> Any:
    """Two layers of width 64, its weights from seed 0."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    tokens = {"vocab_size": vocabulary, "eos_token_id": END, "pad_token_id": 0}
    return Qwen3ForCausalLM(Qwen3Config(**tokens, **shape, **heads))


def learn(model: Any, sequences: list[list[int]], epochs: int) -> None:
    """Next-token training on users' codes, the latest 120 of each; plain AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    sequences = [sequence[-120:] for sequence in sequences]
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(sequences))
        for begin in range(0, len(order), 32):
            rows = [torch.tensor(sequences[i]) for i in order[begin : begin + 32]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            loss = model(input_ids=ids, attention_mask=(ids > 0).long(), labels=ids.masked_fill(ids == 0, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def recall_at_10(model: Any, prompts: Any, targets: Tensor, legal: LegalTokens) -> float:
    """Share of prompts whose target is among the ten most probable items, all items scored under the legal mask."""
    model.eval()
    space, hits = legal.space, 0
    rows = space.padded()
    rows = torch.cat([rows, torch.full_like(rows[:, :1], -1)], dim=1)
    counted = torch.arange(rows.shape[1]) <= (rows >= 0).sum(dim=1, keepdim=True)
    rows = rows.scatter(1, (rows >= 0).sum(dim=1, keepdim=True), END).clamp(min=0)
    for ids, seen, target in zip(prompts["input_ids"], prompts["attention_mask"], targets, strict=True):
        prompt = ids[seen.bool()].expand(len(rows), -1)
        logits = model(input_ids=torch.cat([prompt, rows], dim=1), logits_to_keep=rows.shape[1] + 1).logits[:, :-1]
        scores = legal.score(logits, rows, counted).logprobs.sum(dim=1)
        hits += int(target in scores.topk(10).indices)
    return hits / len(targets)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
