"""Users a second for the 10 most probable next items: `exact_lists` against Hugging Face's constrained beam search.

One run, one machine, one catalogue, the same histories: 12,101 items of 4 codes (3 x 256 levels and one that separates
equals), 20 items a history, 50 beams, float32. Both decode in the batch size that is fastest for them among a few, take
turns, and the fastest round of each counts; the checks are not timed.

The codes are random, drawn so that they share prefixes as much as those of a real catalogue: residual k-means on Amazon
Beauty leaves 40 % of the items alone under their first two codes and 86 % under three, `draw_codes` 39 % and 88 %.
Independent codes would leave 83 % alone under two, and ours stops where one item is left.

- Ours: `exact_lists` on a LazyDecoder of about 1 M random weights, once as one pass of 50 beams (`widen` off, what the
  peer does) and once until every list is proven exact. The head is scaled so that the distribution is not flat, for
  a flat one proves nothing at 50 beams; `head_deviation` sets how much, and the table says what share of the lists
  one pass proves and what probability the lists hold.
- The peer, as MiniOneRec and its kin run it: `generate(num_beams=50, num_return_sequences=10,
  prefix_allowed_tokens_fn=...)` on a decoder of the Qwen3 layout with as many parameters (same depth and width; the
  feed-forward width makes up the difference), one token a code, so 80 tokens of history and 2 special ones. Its trie
  is a dictionary from the tuple of codes written so far to the list of allowed tokens.

The ratio is that of the two systems as they are used, and not of their searches alone: the LazyDecoder reads an
item in one position where the peer reads four, and reads a history once where `generate` copies it to every beam.

Beside the race: how long encoding the histories alone takes, what proven lists cost of that by batch size, and the
median and 99th percentile of one user's list; of the same LazyDecoder, and of item scores, the default policy. With
`--device cuda` all of it runs on a GPU.

On the way: the peer's lists must be distinct items of the trie; ours too, all proven, and for a sample of users equal
in log-probability to the 10 best of a scoring of the whole catalogue.

    python benchmarks/decode.py --out decode.json      (needs the extra: pip install "sagerec[bench]")
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor, nn
from trie import GB, describe_run, machine_line, peak_bytes, prefix_dictionary, reset_peak, show_limits, table, timed

from sagerec.actions.semantic_ids.quantisers import separate
from sagerec.actions.space import make_space
from sagerec.actions.trie import Trie, build_trie
from sagerec.config import require
from sagerec.decoding.beam import BeamLists, exact_lists
from sagerec.errors import MissingExtraError, SagerecError
from sagerec.files import write_json
from sagerec.policies.item_scores import ItemScores, ItemScoresSettings
from sagerec.policies.lazy_decoder import LazyDecoder, LazyDecoderSettings
from sagerec.policies.protocol import AnyPolicy

TARGET_RATIO = 50.0
PADDING_TOKEN, BEGIN_TOKEN, ANSWER_TOKEN, FIRST_CODE_TOKEN = range(4)


@dataclass(frozen=True)
class DecodeSettings:
    """What is measured."""

    items: int = 12_101
    """Items of the catalogue (as many as Amazon Beauty)."""
    codebook_size: int = 256
    """Codes of each of the three random levels."""
    history: int = 20
    """Items of each history."""
    k: int = 10
    """Items of each list."""
    beams: int = 50
    """Beams."""
    width: int = 128
    """Width of both models; content vectors are as wide."""
    head_deviation: float = 0.125
    """Standard deviation of the LazyDecoder's head weights."""
    users: int = 512
    """Histories that ours decodes in a round."""
    peer_users: int = 64
    """Histories, the first of those, that the peer decodes in a round."""
    batch_sizes: tuple[int, ...] = (64, 128, 256, 512)
    """Batch sizes tried for ours."""
    peer_batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Batch sizes tried for the peer."""
    rounds: int = 3
    """Rounds, of which the fastest counts: what else the machine does can only slow one down."""
    checked_users: int = 8
    """Users whose lists are compared with a scoring of the whole catalogue."""
    single_users: int = 200
    """Users whose lists are written one by one."""
    device: str = "cpu"
    """Where both decode: cpu, cuda, cuda:1 …"""
    threads: int = field(default_factory=torch.get_num_threads)
    """Threads of torch."""
    seed: int = 0
    """Seed of codes, histories and weights."""
    quick: bool = False
    """Only see that it runs: a tiny catalogue, tiny models, no target; replaces all settings of size."""
    out: Path | None = None
    """Write the results as JSON to this file too."""

    def __post_init__(self) -> None:
        require(1 <= self.k <= self.beams, f"k is {self.k} and beams {self.beams}; expected 1 <= k <= beams")
        require(self.beams <= self.items, f"beams is {self.beams}; expected no more than items ({self.items})")
        require(self.peer_users <= self.users, f"peer_users is {self.peer_users}; expected at most {self.users}")
        require(self.checked_users <= self.users, f"checked_users is {self.checked_users}; expected at most users")
        require(min(self.rounds, self.threads, self.peer_users) >= 1, "rounds, threads, peer_users: expected 1 or more")


QUICK: dict[str, Any] = {
    "items": 300,
    "codebook_size": 16,
    "history": 5,
    "k": 5,
    "beams": 10,
    "width": 32,
    "users": 8,
    "peer_users": 4,
    "batch_sizes": (4, 8),
    "peer_batch_sizes": (2, 4),
    "rounds": 1,
    "checked_users": 2,
}


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to decode."""

    name: str
    """What the table calls it."""
    parameters: int
    """Parameters of its model."""
    users: int
    """Histories that it decodes in a round."""
    batch_sizes: tuple[int, ...]
    """Batch sizes to try."""
    decode: Callable[[Tensor], Tensor]
    """Histories (B, T) of item indices to lists (B, K) of item indices."""


def main() -> int:
    """Measure, check, print, write; 1 where the target is missed or a check fails."""
    settings = tyro.cli(DecodeSettings, description=__doc__)
    if settings.quick:
        settings = replace(settings, **QUICK)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    generator = np.random.default_rng(settings.seed)
    codes = draw_codes(settings.items, settings.codebook_size, generator)
    histories = torch.from_numpy(generator.integers(0, settings.items, (settings.users, settings.history)))
    histories, trie = histories.to(settings.device), build_trie(codes)
    policy = make_policy(codes, settings).move(settings.device)
    try:
        peer = make_peer(codes, trie, count(policy), settings)
    except SagerecError as error:
        print(error, file=sys.stderr)
        return 1
    record = describe_run("decode", settings)
    record["versions"]["transformers"] = peer_version()

    one_pass = partial(our_lists, policy, settings=settings, widen=False)
    proven = partial(our_lists, policy, settings=settings, widen=True)
    ours = settings.users, settings.batch_sizes
    contenders = [
        Contender("ours, one pass", count(policy), *ours, lambda batch: one_pass(batch).items),
        Contender("ours, proven exact", count(policy), *ours, lambda batch: proven(batch).items),
        Contender("Hugging Face generate", count(peer.model), settings.peer_users, settings.peer_batch_sizes, peer),
    ]
    batch_size = {c.name: fastest_batch_size(c, histories) for c in contenders}
    results = race(contenders, batch_size, histories, settings)
    lists = {c.name: results[c.name].pop("lists") for c in contenders}
    first_pass, exact = one_pass(histories), proven(histories)
    checks = [{"name": f"{name}: items of the trie, distinct", "ok": distinct(rows)} for name, rows in lists.items()]
    checks += [
        {"name": "ours, proven exact: every list is proven", "ok": bool(exact.exact.all())},
        {
            "name": f"ours, proven exact: equal to a scoring of all items ({settings.checked_users} users)",
            "ok": equals_full_scoring(policy, histories, exact, settings),
        },
    ]
    peer_rate = results["Hugging Face generate"]["users_per_second"]
    for result in results.values():
        result["ratio"] = result["users_per_second"] / peer_rate
    limits = [
        {
            "name": f"{c.name}: users a second over Hugging Face's",
            "measured": results[c.name]["ratio"],
            "bound": "at least",
            "limit": TARGET_RATIO,
            "ok": results[c.name]["ratio"] >= TARGET_RATIO,
        }
        for c in contenders[:2]
        if not settings.quick
    ]
    record |= {
        "results": {
            "contenders": list(results.values()),
            "items_alone_after_codes": [
                float((trie.size[states] == 1).float().mean())
                for states in trie.walk(policy.codes.cpu())[:, 1:].unbind(1)
            ],
            "proven_in_one_pass": float(first_pass.exact.float().mean()),
            "probability_of_lists": float(exact.logprobs.exp().sum(dim=1).mean()),
        },
        "checks": checks,
        "limits": limits,
        "ok": all(entry["ok"] for entry in checks + limits),
    }
    if not settings.quick:
        policies: dict[str, AnyPolicy] = {
            "LazyDecoder": policy,
            "item scores": make_item_scores(codes, settings).move(settings.device),
        }
        record["results"]["over_encoding"] = {
            name: over_encoding(one, histories, settings) for name, one in policies.items()
        }
    show(record)
    if settings.out is not None:
        write_json(settings.out, record)
    return 0 if record["ok"] else 1


def draw_codes(n_items: int, codebook_size: int, generator: np.random.Generator) -> np.ndarray:
    """Codes (N, 4): items fall on products (three codes), and those on families (two codes), on some more often."""
    families, products = 3 * n_items // 2, 10 * n_items
    family_of_product = (families * generator.random(products) ** 1.5).astype(np.int64)
    product_of_item = (products * generator.random(n_items) ** 1.5).astype(np.int64)
    first_two = generator.integers(0, codebook_size, (families, 2), dtype=np.int32)[family_of_product[product_of_item]]
    third = generator.integers(0, codebook_size, products, dtype=np.int32)[product_of_item]
    return separate(np.column_stack([first_two, third]), np.zeros(n_items))


def make_policy(codes: np.ndarray, settings: DecodeSettings) -> LazyDecoder:
    """The LazyDecoder with random weights and a head of the deviation asked for."""
    shape = LazyDecoderSettings(width=settings.width, max_items=settings.history)
    vectors = torch.randn(settings.items, settings.width).numpy()
    policy = LazyDecoder(shape, make_space(codes, vectors=vectors)).eval()
    nn.init.normal_(policy.head, std=settings.head_deviation)
    return policy


def make_item_scores(codes: np.ndarray, settings: DecodeSettings) -> ItemScores:
    """Item scores with random weights, frozen as for serving."""
    vectors = torch.randn(settings.items, settings.width).numpy()
    shape = ItemScoresSettings(width=settings.width, max_items=settings.history)
    policy = ItemScores(shape, make_space(codes, vectors=vectors)).eval()
    policy.freeze()
    return policy


def over_encoding(policy: AnyPolicy, histories: Tensor, settings: DecodeSettings) -> dict[str, Any]:
    """Milliseconds of encoding and of proven lists by users a call, their ratio, and quantiles of one user's list."""

    def encode(batch: Tensor) -> None:
        with torch.no_grad():
            policy.encode(batch, lengths_of(batch))
        settle(settings)

    def lists(batch: Tensor) -> None:
        our_lists(policy, batch, settings=settings, widen=True)
        settle(settings)

    rows = {}
    for users in sorted({1, 32, *settings.batch_sizes, settings.users}):
        seconds: dict[str, list[float]] = {"encoding": [], "lists": []}
        for _ in range(3 + max(settings.rounds, 100 // users)):
            for name, call in (("encoding", encode), ("lists", lists)):
                seconds[name].append(timed(partial(call, histories[:users]))[1])
        row = {name: 1e3 * min(values[3:]) for name, values in seconds.items()}
        rows[str(users)] = row | {
            "ratio": row["lists"] / row["encoding"],
            "users_per_second": 1e3 * users / row["lists"],
        }
    single = [timed(partial(lists, histories[i % len(histories)][None]))[1] for i in range(settings.single_users)]
    p50, p99 = np.quantile(single, [0.5, 0.99])
    return {"users": rows, "one_user_ms": {"p50": 1e3 * float(p50), "p99": 1e3 * float(p99)}}


def settle(settings: DecodeSettings) -> None:
    """Wait for a GPU."""
    if settings.device != "cpu":
        torch.cuda.synchronize(settings.device)


def lengths_of(histories: Tensor) -> Tensor:
    """(B,) lengths of histories that are all full."""
    return torch.full((len(histories),), histories.shape[1], device=histories.device)


def our_lists(policy: AnyPolicy, histories: Tensor, *, settings: DecodeSettings, widen: bool) -> BeamLists:
    """Lists of histories (B, T)."""
    lengths = lengths_of(histories)
    return exact_lists(policy, histories, lengths, k=settings.k, beams=settings.beams, widen=widen)


@dataclass(frozen=True, slots=True)
class Peer:
    """Hugging Face's constrained beam search over the same codes."""

    model: Any
    """A Qwen3ForCausalLM."""
    generation: Any
    """Its GenerationConfig."""
    tokens: Tensor
    """(N, L) int64 token of each code of each item: every level has its own."""
    level_offsets: Tensor
    """(L,) int64 what a level adds to a code."""
    allowed: dict[tuple[int, ...], list[int]]
    """Tokens that may follow each prefix."""
    trie: Trie
    """To read the items off the codes."""

    def __call__(self, histories: Tensor) -> Tensor:
        """Lists (B, K) of histories (B, T). Raises: TrieError where `generate` wrote no item."""
        edge = torch.full((len(histories), 1), BEGIN_TOKEN, device=histories.device)
        prompt = torch.cat([edge, self.tokens[histories].flatten(1), torch.full_like(edge, ANSWER_TOKEN)], dim=1)
        length = prompt.shape[1]
        written = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=self.generation,
            prefix_allowed_tokens_fn=lambda _, tokens: self.allowed[tuple(tokens[length:].tolist())],
        )
        states = self.trie.walk(written[:, length:] - self.level_offsets)[:, -1]
        return self.trie.item[states].long().view(len(histories), -1)


def make_peer(codes: np.ndarray, trie: Trie, parameters: int, settings: DecodeSettings) -> Peer:
    """The peer with random weights, and as many parameters as asked for, to a step of the feed-forward width.

    Raises: MissingExtraError without transformers.
    """
    try:
        from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    except ImportError as error:
        raise MissingExtraError(
            "transformers is not installed, and this benchmark's peer needs it; install it with: "
            'pip install "sagerec[bench]"'
        ) from error
    sizes = codes.max(axis=0) + 1
    offsets = FIRST_CODE_TOKEN + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    tokens = codes + offsets
    layers, heads = 3, 4  # the LazyDecoder's two encoder layers and its decoder layer

    def make(inner: int) -> Any:
        config = Qwen3Config(
            vocab_size=FIRST_CODE_TOKEN + int(sizes.sum()),
            hidden_size=settings.width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=settings.width // heads,
            tie_word_embeddings=True,
            bos_token_id=BEGIN_TOKEN,
            eos_token_id=None,
            pad_token_id=PADDING_TOKEN,
        )
        return Qwen3ForCausalLM(config).eval()

    least = 8
    missing = parameters - count(make(least))
    inner = least + 8 * max(round(missing / (layers * 3 * settings.width) / 8), 0)
    generation = GenerationConfig(
        num_beams=settings.beams,
        num_return_sequences=settings.k,
        do_sample=False,
        max_new_tokens=codes.shape[1],
        pad_token_id=PADDING_TOKEN,
        eos_token_id=None,
    )
    return Peer(
        make(inner).to(settings.device),
        generation,
        torch.from_numpy(tokens).to(settings.device),
        torch.from_numpy(offsets).to(settings.device),
        prefix_dictionary([tuple(row) for row in tokens.tolist()]),
        trie.to(settings.device),
    )


def peer_version() -> str:
    """Version of transformers."""
    import transformers

    return str(transformers.__version__)


def count(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def decode_all(contender: Contender, histories: Tensor, batch_size: int) -> Tensor:
    """Lists of all histories, batch by batch, on the CPU, which waits for a GPU."""
    return torch.cat([contender.decode(batch) for batch in torch.split(histories, batch_size)]).cpu()


def fastest_batch_size(contender: Contender, histories: Tensor) -> int:
    """The batch size that takes the least time a user, each warmed up and then timed on as many users as it holds."""
    seconds = {}
    for size in contender.batch_sizes:
        users = histories[: contender.users]
        decode_all(contender, users[:size], size)
        most = users[: max(size, max(contender.batch_sizes) // 2)]
        seconds[size] = timed(partial(decode_all, contender, most, size))[1] / len(most)
    return min(seconds, key=lambda size: seconds[size])


def race(
    contenders: list[Contender], batch_size: dict[str, int], histories: Tensor, settings: DecodeSettings
) -> dict[str, dict[str, Any]]:
    """Rounds in which the contenders take turns; the row of each, with its lists."""
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    peaks = {c.name: 0 for c in contenders}
    lists = {}
    for _ in range(settings.rounds):
        for c in contenders:
            reset_peak()
            users = histories[: c.users]
            lists[c.name], elapsed = timed(partial(decode_all, c, users, batch_size[c.name]))
            seconds[c.name].append(elapsed / len(users))
            peaks[c.name] = max(peaks[c.name], peak_bytes())
    return {
        c.name: {
            "name": c.name,
            "parameters": c.parameters,
            "users": c.users,
            "batch_size": batch_size[c.name],
            "milliseconds_per_user": min(seconds[c.name]) * 1e3,
            "milliseconds_per_user_of_rounds": [1e3 * value for value in seconds[c.name]],
            "users_per_second": 1 / min(seconds[c.name]),
            "peak_gb": peaks[c.name] / GB,
            "lists": lists[c.name],
        }
        for c in contenders
    }


def distinct(lists: Tensor) -> bool:
    """Whether every row of (B, K) holds K different items."""
    ordered = lists.sort(dim=1).values
    return bool((ordered >= 0).all() and (ordered[:, 1:] != ordered[:, :-1]).all())


@torch.no_grad()
def equals_full_scoring(policy: LazyDecoder, histories: Tensor, lists: BeamLists, settings: DecodeSettings) -> bool:
    """Whether lists hold the K best of all items, by log-probability (ties may swap), for the first users."""
    every = torch.arange(policy.space.n_items, device=policy.device)
    for user in range(settings.checked_users):
        context = policy.encode(histories[user : user + 1], lengths_of(histories[user : user + 1]))
        scores = policy.target_logprobs(context.hidden[0].expand(policy.space.n_items, -1), every).sum(dim=1)
        best = scores.topk(settings.k).values
        listed = scores[lists.items[user]]
        if not (torch.allclose(best, listed, atol=1e-4) and torch.allclose(best, lists.logprobs[user], atol=1e-4)):
            return False
    return True


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    console = Console()
    console.print(f"{machine_line(record)}, transformers {record['versions']['transformers']}")
    settings, results = record["settings"], record["results"]
    size = f"{settings['items']:,} items, {settings['beams']} beams, histories of {settings['history']}"
    rows = table(
        f"Top {settings['k']} of {size}",
        ["decoder", "parameters", "batch", "users", "ms/user", "users/s", "peak GB", "ratio"],
    )
    for row in results["contenders"]:
        rows.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['batch_size']}",
            f"{row['users']}",
            f"{row['milliseconds_per_user']:.2f}",
            f"{row['users_per_second']:.1f}",
            f"{row['peak_gb']:.2f}",
            f"{row['ratio']:.1f}",
        )
    console.print(rows)
    console.print(
        f"one pass proves {results['proven_in_one_pass']:.1%} of the lists exact; a list holds "
        f"{results['probability_of_lists']:.1%} of the probability"
    )
    for name, found in results.get("over_encoding", {}).items():
        rows = table(
            f"Proven lists of {name} over encoding alone", ["users", "encoding ms", "lists ms", "ratio", "users/s"]
        )
        for users, row in found["users"].items():
            figures = (row["encoding"], row["lists"], row["ratio"], row["users_per_second"])
            rows.add_row(users, *(f"{value:,.2f}" for value in figures))
        console.print(rows)
        console.print("one user: p50 {p50:.2f} ms, p99 {p99:.2f} ms".format(**found["one_user_ms"]))
    for check in record["checks"]:
        console.print(f"{'[green]ok[/]' if check['ok'] else '[red]failed[/]'}  {check['name']}")
    show_limits(console, record)


if __name__ == "__main__":
    sys.exit(main())
