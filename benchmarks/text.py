"""Native text: lists against Hugging Face's constrained beam search, the loss against naive copies, the trie of titles.

One run, one machine, one model of the Qwen3 layout with random weights (`sagerec lm new` makes such), synthetic titles
of a brand, a few words and a number, 20 items a history. Contenders take turns in processes of their own; the fastest
round of each counts. On one thread seconds are those of the processor, so that other jobs do not count.

- *lists*: the 10 best titles of 20 beams, in one pass (`widen` off). Ours, `exact_lists`; the peer,
  `generate(num_beams=20, num_return_sequences=10, prefix_allowed_tokens_fn=...)` on the same weights and prompts, with
  a dictionary from the tokens written so far to the allowed ones. The peer does not renormalise over them, so that its
  lists are of another distribution; what is compared is time.
- *loss*: log-probabilities and gradient of G = 16 slates of K = 10 titles after each history, float32. Ours reads
  history and slates once for all of them, with logits over the legal tokens where there is a choice; the peer reads
  each slate as a text of its own with its copy of the history, with logits over the vocabulary at every place. Memory
  is what a process comes to hold beyond the model.
- *trie*: building, memory, and a step at depth 3, from 10^4 to 10^6 titles, and of Amazon Industrial's titles where
  `SAGEREC_DATA` has them.

    python benchmarks/text.py --out text.json      (needs the extra: pip install "sagerec[lm]")
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import tyro
from rich.console import Console
from torch import Tensor
from trie import GB, describe_run, machine_line, peak_bytes, reset_peak, resident_bytes, show_limits, table, timed

from sagerec.actions.titles import Titles, end_token, index_titles, load_tokenizer, write_titles
from sagerec.actions.trie import PADDING, build_trie
from sagerec.config import require
from sagerec.decoding.beam import exact_lists
from sagerec.decoding.slates import slate_logprobs
from sagerec.errors import MissingExtraError
from sagerec.files import write_json
from sagerec.policies.causal_lm import CausalLM, CausalLMSettings
from sagerec.policies.language import make_language
from sagerec.policies.small_lm import SmallLMSettings, new_language_model

TRIE_COLUMNS = {
    "tokens_per_title": ".1f",
    "build_seconds": ".3f",
    "rise_gb": ".2f",
    "arrays_mb": ".1f",
    "nodes": ",",
    "step_microseconds": ".0f",
    "children_per_state": ".1f",
}
LISTS_TARGET, LOSS_TARGET, MEMORY_TARGET = 10.0, 3.0, 1 / 3


@dataclass(frozen=True)
class TextSettings:
    """What is measured."""

    items: int = 4_000
    """Titles of the catalogue that lists and loss are of."""
    parameters: str = "5M"
    """Weights of the model."""
    vocabulary: int = 4096
    """Tokens of its tokenizer, at most."""
    history: int = 20
    """Items of each history."""
    k: int = 10
    """Items of each list, and of each slate."""
    beams: int = 20
    """Beams."""
    users: int = 64
    """Histories that ours lists in a round."""
    peer_users: int = 8
    """Histories that the peer lists in a round, one batch."""
    slates: int = 16
    """Slates of each history in the loss."""
    loss_users: int = 1
    """Histories in the loss."""
    catalogues: tuple[int, ...] = (10**4, 10**5, 10**6)
    """Titles of the tries."""
    states: int = 1024
    """States of a step."""
    rounds: int = 3
    """Rounds, of which the fastest counts."""
    threads: int = field(default_factory=torch.get_num_threads)
    """Threads of torch."""
    seed: int = 0
    """Seed of titles, histories and weights."""
    quick: bool = False
    """Only see that it runs: tiny, no target; replaces all settings of size."""
    out: Path | None = None
    """Write the results as JSON to this file too."""

    def __post_init__(self) -> None:
        require(1 <= self.k <= self.beams, f"k is {self.k} and beams {self.beams}; expected 1 <= k <= beams")
        require(self.history + self.k <= self.items, f"items is {self.items}; expected at least history + k")


QUICK: dict[str, Any] = {
    "items": 60,
    "parameters": "60K",
    "vocabulary": 400,
    "history": 4,
    "k": 3,
    "beams": 4,
    "users": 4,
    "peer_users": 2,
    "slates": 3,
    "loss_users": 1,
    "catalogues": (500,),
    "states": 16,
    "rounds": 1,
}


def main() -> int:
    """Measure, print, write; 1 where a target is missed."""
    settings = tyro.cli(TextSettings, description=__doc__)
    if settings.quick:
        settings = replace(settings, **QUICK)
    torch.set_num_threads(settings.threads)
    record = describe_run("text", settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            sizes = new_language_model(
                folder / "lm",
                draw_titles(settings.items, settings.seed),
                SmallLMSettings(settings.parameters, settings.vocabulary, seed=settings.seed),
            )
        except MissingExtraError as error:
            print(error, file=sys.stderr)
            return 1
        lists = {n: alone(m, folder / "lm", settings) for n, m in (("ours", our_lists), ("generate", peer_lists))}
        loss = {n: alone(m, folder / "lm", settings) for n, m in (("ours", our_loss), ("naive copies", naive_loss))}
        tries = [alone(measure_trie, folder / "lm", settings, size) for size in settings.catalogues]
    industrial = Path(os.environ.get("SAGEREC_DATA", "../shared/data")) / "amazon-industrial" / "items.parquet"
    if industrial.is_file() and not settings.quick:
        tries.insert(0, alone(measure_trie, industrial, settings, 0))
    faster = lists["ours"]["users_per_second"] / lists["generate"]["users_per_second"]
    cheaper = loss["naive copies"]["seconds"] / loss["ours"]["seconds"]
    smaller = loss["ours"]["peak_bytes"] / loss["naive copies"]["peak_bytes"]
    wanted = [
        ("lists: users a second over generate's", faster, "at least", LISTS_TARGET),
        ("loss: times faster than naive copies", cheaper, "at least", LOSS_TARGET),
        ("loss: share of the memory of naive copies", smaller, "at most", MEMORY_TARGET),
    ]
    limits = [
        {"name": n, "measured": m, "bound": b, "limit": x, "ok": m >= x if b == "at least" else m <= x}
        for n, m, b, x in wanted
        if not settings.quick
    ]
    record |= {
        "results": {"model": sizes, "lists": lists, "loss": loss, "trie": tries},
        "limits": limits,
        "ok": all(limit["ok"] for limit in limits) if limits else None,
    }
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 0 if record["ok"] is not False else 1


def alone(measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What `measure` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *given).result()


def draw_titles(n: int, seed: int) -> list[str]:
    """Titles of a brand and one to six words, some far more frequent than others, and a number: no two are the same."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(3, 9, 3000)]
    brand = (600 * rng.random(n) ** 2).astype(int)
    length = rng.integers(1, 7, n)
    place = (2400 * rng.random((n, 6)) ** 2).astype(int) + 600
    return [" ".join([words[brand[i]], *(words[p] for p in place[i, : length[i]]), str(i)]) for i in range(n)]


def write_space(titles: list[str], model: Path) -> Titles:
    """Titles as actions, without content."""
    tokenizer = load_tokenizer(str(model))
    tokens, written, _ = write_titles(titles, tokenizer, max_tokens=32, instead=titles)
    end, n = end_token(tokenizer), len(titles)
    padded = np.full((n, max(map(len, tokens)) + 1), PADDING, dtype=np.int32)
    for row, own in zip(padded, tokens, strict=True):
        row[: len(own) + 1] = [*own, end]
    inside = padded != PADDING
    arrays = {
        "tokens": padded[inside],
        "lengths": inside.sum(axis=1),
        "end": np.array([end]),
        "vectors": np.zeros((n, 1), dtype=np.float32),
        "points": np.zeros((1, 1), dtype=np.float32),
        "groups": np.zeros(n, dtype=np.int64),
    }
    return index_titles(arrays, written, build_trie(padded), model=str(model), tokenizer=model)


def make_policy(model: Path, settings: TextSettings) -> CausalLM:
    """The policy over the catalogue's titles."""
    torch.set_num_threads(settings.threads)
    space = write_space(draw_titles(settings.items, settings.seed), model)
    made = CausalLMSettings(max_items=settings.history, max_tokens=2048, micro_tokens=2**20)
    return CausalLM(made, space, make_language("", space, instruction="", dtype="float32")).eval()


def draw_histories(users: int, settings: TextSettings) -> tuple[Tensor, Tensor]:
    """Histories (B, T) and their lengths."""
    rng = np.random.default_rng(settings.seed)
    items = torch.from_numpy(np.stack([rng.permutation(settings.items)[: settings.history] for _ in range(users)]))
    return items, torch.full((users,), settings.history)


def fastest(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of some rounds, after one that warms up: of the processor on one thread, else passed."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    found = []
    for _ in range(rounds):
        start = clock()
        call()
        found.append(clock() - start)
    return min(found)


def our_lists(model: Path, settings: TextSettings) -> dict[str, Any]:
    """Users a second of `exact_lists`, one pass."""
    policy, (items, lengths) = make_policy(model, settings), draw_histories(settings.users, settings)
    run = partial(exact_lists, policy, items, lengths, k=settings.k, beams=settings.beams, widen=False)
    seconds = fastest(run, settings.rounds)
    return {"users": settings.users, "seconds": seconds, "users_per_second": settings.users / seconds}


def peer_lists(model: Path, settings: TextSettings) -> dict[str, Any]:
    """Users a second of `generate` with a dictionary of what is allowed."""
    from transformers import GenerationConfig

    policy, (items, lengths) = make_policy(model, settings), draw_histories(settings.peer_users, settings)
    space: Any = policy.space
    allowed: dict[tuple[int, ...], list[int]] = {}
    for item in range(space.n_items):
        tokens = space.sequence(item)
        for place, token in enumerate(tokens):
            allowed.setdefault(tuple(tokens[:place]), []).append(token)
    allowed = {prefix: sorted(set(tokens)) for prefix, tokens in allowed.items()}
    texts = []
    for history, length in zip(items, lengths, strict=True):
        texts.append([*policy.prefix.tolist(), *(t for i in history[:length].tolist() for t in space.sequence(i))])
    width = max(map(len, texts))
    ids = torch.tensor([[space.end] * (width - len(text)) + text for text in texts])
    there = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    config = GenerationConfig(
        num_beams=settings.beams,
        num_return_sequences=settings.k,
        do_sample=False,
        max_new_tokens=space.longest,
        length_penalty=0.0,
        pad_token_id=space.end,
        eos_token_id=space.end,
    )

    def legal(_: int, written: Tensor) -> list[int]:
        return allowed.get(tuple(written[width:].tolist()), [space.end])

    generate: Any = policy.language.plain().generate
    run = partial(
        generate, input_ids=ids, attention_mask=there, generation_config=config, prefix_allowed_tokens_fn=legal
    )
    seconds = fastest(run, settings.rounds)
    return {"users": settings.peer_users, "seconds": seconds, "users_per_second": settings.peer_users / seconds}


def draw_slates(settings: TextSettings) -> Tensor:
    """Slates (B, G, K) of distinct items."""
    rng = np.random.default_rng(settings.seed + 1)
    size = settings.loss_users * settings.slates
    drawn = np.stack([rng.permutation(settings.items)[: settings.k] for _ in range(size)])
    return torch.from_numpy(drawn).view(settings.loss_users, settings.slates, settings.k)


def measured(step: Callable[[], Any], settings: TextSettings) -> dict[str, Any]:
    """Seconds of a step, and the memory that it takes beyond what is held before it."""
    before = resident_bytes()
    reset_peak()
    seconds = fastest(step, settings.rounds)
    return {"seconds": seconds, "peak_bytes": max(peak_bytes() - before, 1)}


def our_loss(model: Path, settings: TextSettings) -> dict[str, Any]:
    """One shared read, and its gradient."""
    policy, (items, lengths) = make_policy(model, settings), draw_histories(settings.loss_users, settings)
    slates = draw_slates(settings)

    def step() -> None:
        policy.zero_grad()
        total: Any = slate_logprobs(policy, items, lengths, slates).tokens.logprobs.sum()
        total.backward()

    return measured(step, settings)


def naive_loss(model: Path, settings: TextSettings) -> dict[str, Any]:
    """A text for each slate, and logits over the vocabulary at every place; a user's G slates are one batch."""
    policy, (items, _) = make_policy(model, settings), draw_histories(settings.loss_users, settings)
    plain, space = policy.language.plain(), policy.space
    batches = []
    for history, slates in zip(items.tolist(), draw_slates(settings).tolist(), strict=True):
        start = [*policy.prefix.tolist(), *(t for i in history for t in space.sequence(i))]
        texts = [[*start, *(t for i in slate for t in space.sequence(i))] for slate in slates]
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        there = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        batches.append((ids, there, len(start)))

    def step() -> None:
        policy.zero_grad()
        for ids, there, begin in batches:
            logprobs = plain(input_ids=ids, attention_mask=there).logits[:, begin - 1 : -1].float().log_softmax(dim=2)
            own = logprobs.gather(2, ids[:, begin:, None]).squeeze(2)
            (own * there[:, begin:]).sum().backward()

    return measured(step, settings)


def measure_trie(source: Path, settings: TextSettings, size: int) -> dict[str, Any]:
    """Building, memory and a step of the trie of so many titles, or of those in a Parquet file."""
    torch.set_num_threads(settings.threads)
    if size:
        model, titles = source, draw_titles(size, settings.seed)
        tokenizer = load_tokenizer(str(model))
        tokens, _, _ = write_titles(titles, tokenizer, max_tokens=32, instead=titles)
    else:
        titles = [" ".join((t or "").split()) for t in pl.read_parquet(source)["title"].to_list()]
        with tempfile.TemporaryDirectory() as name:
            new_language_model(Path(name) / "lm", titles, SmallLMSettings("1M", settings.vocabulary))
            tokenizer = load_tokenizer(str(Path(name) / "lm"))
            tokens, _, _ = write_titles(titles, tokenizer, max_tokens=256, instead=[str(i) for i in range(len(titles))])
    end = end_token(tokenizer)
    padded = np.full((len(tokens), max(map(len, tokens)) + 1), PADDING, dtype=np.int32)
    for row, own in zip(padded, tokens, strict=True):
        row[: len(own) + 1] = [*own, end]
    before = resident_bytes()
    reset_peak()
    trie, seconds = timed(lambda: build_trie(padded))
    rise = peak_bytes() - before
    rng = np.random.default_rng(settings.seed)
    chosen = torch.from_numpy(padded[rng.integers(0, len(padded), settings.states)][:, :3].astype(np.int64))
    states = trie.walk(chosen)[:, -1]
    states = states[~trie.is_leaf(states)]
    step = fastest(lambda: trie.children(states), 20)
    return {
        "titles": len(tokens),
        "tokens_per_title": float((padded != PADDING).sum(axis=1).mean()),
        "build_seconds": seconds,
        "rise_gb": rise / GB,
        "arrays_mb": trie.n_bytes / 1e6,
        "nodes": trie.n_nodes,
        "step_microseconds": 1e6 * step,
        "children_per_state": len(trie.children(states).node) / len(states),
    }


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    console, results = Console(width=120), record["results"]
    console.print(machine_line(record), highlight=False)
    lists = table(f"Lists, {results['model']['parameters']:,} weights", ["contender", "users", "s", "users/s"])
    for name, row in results["lists"].items():
        lists.add_row(name, str(row["users"]), f"{row['seconds']:.2f}", f"{row['users_per_second']:.1f}")
    loss = table("Loss and gradient", ["contender", "s", "memory MB"])
    for name, row in results["loss"].items():
        loss.add_row(name, f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}")
    head = ["titles", "tokens", "build s", "rise GB", "arrays MB", "nodes", "step us", "children/state"]
    tries = table("Tries of titles", head)
    for row in results["trie"]:
        figures = (
            f"{row[n]:{f}}" for n, f in (("tokens_per_title", ".1f"), ("build_seconds", ".3f"), ("rise_gb", ".2f"))
        )
        more = (f"{row[n]:{f}}" for n, f in (("arrays_mb", ".1f"), ("nodes", ","), ("step_microseconds", ".0f")))
        tries.add_row(f"{row['titles']:,}", *figures, *more, f"{row['children_per_state']:.1f}")
    for shown in (lists, loss, tries):
        console.print(shown)
    show_limits(console, record)


if __name__ == "__main__":
    sys.exit(main())
