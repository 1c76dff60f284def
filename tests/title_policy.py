"""A second policy and a second action space, as small as they can be: a table of transitions over titles.

Items are written as the words of their titles, which are of uneven length, and an end word. The logit of a word is
table[last item, word] + bigram[word before, word]. The tests lead it through everything that the LazyDecoder goes
through; nothing outside this file knows it.

Shapes: as in `sagerec.policies.protocol`; V words.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from sagerec.actions.groups import group_log_softmax
from sagerec.actions.registry import ActionKind, register_actions
from sagerec.actions.space import ActionSpace, make_space
from sagerec.actions.trie import ROOT, Children
from sagerec.artifacts import read_manifest, write_artifact
from sagerec.catalogue.audit import write_events_used
from sagerec.catalogue.dataset import Dataset
from sagerec.catalogue.splits import Sequences
from sagerec.config import to_json
from sagerec.policies.protocol import Policy
from sagerec.policies.registry import PolicyKind, register_policy


@dataclass(frozen=True, slots=True)
class TitleSettings:
    """How titles become sequences."""

    seed: int = 0
    """Nothing is drawn."""


def tokenise(titles: list[str]) -> np.ndarray:
    """(N, L) int32 number of each word of the titles, an end word, and -1 after it."""
    words = {word: number for number, word in enumerate(["<end>", *sorted({w for t in titles for w in t.split()})])}
    table = np.full((len(titles), max(len(t.split()) for t in titles) + 1), -1, dtype=np.int32)
    for row, title in zip(table, titles, strict=True):
        tokens = [words[word] for word in title.split()] + [0]
        row[: len(tokens)] = tokens
    return table


def build_titles(
    folder: Path, data: Dataset, train: Sequences, settings: TitleSettings, *, made_from: dict[str, str]
) -> ActionSpace:
    """Words of the titles; the number of a title that stands several times makes it unique."""
    titles = enumerate(data.titles(range(data.n_items)))
    table = tokenise([f"{title} {i}" if i % 3 == 0 else f"{title} volume {i}" for i, title in titles])
    with write_artifact(folder, "titles", made_from=made_from, settings=to_json(settings), seed=settings.seed) as fresh:
        save_file({"tokens": table}, fresh / "titles.safetensors")
        write_events_used(fresh, train.rows)
    return read_titles(folder)


def read_titles(folder: Path) -> ActionSpace:
    """Read it back."""
    made = make_space(load_file(folder / "titles.safetensors")["tokens"])
    return replace(made, content_hash=read_manifest(folder, "titles").content_hash)


@dataclass(frozen=True, slots=True)
class TitleTableSettings:
    """Shape of the policy."""

    spread: float = 0.5
    """Deviation of the fresh weights."""


class Prefix(NamedTuple):
    """R partly written titles."""

    last: Tensor
    """(R,) item before."""
    word: Tensor
    """(R,) word before, V at the start."""


class TitleTable(Policy[Tensor, Prefix]):
    """The policy; its context is the last item of every state, (B, S)."""

    def __init__(self, settings: TitleTableSettings, space: ActionSpace) -> None:
        super().__init__()
        self.space, self.max_items, self.words = space, 50, space.trie.vocabulary
        self.table = nn.Parameter(settings.spread * torch.randn(space.n_items, self.words))
        self.bigram = nn.Parameter(settings.spread * torch.randn(self.words + 1, self.words))

    def encode(self, items: Tensor, lengths: Tensor, *, slates: int = 1) -> Tensor:
        return items.gather(1, lengths[:, None] - 1).expand(-1, slates)

    def append(self, context: Tensor, items: Tensor) -> Tensor:
        return items

    def extend(self, context: Tensor, slates: Tensor) -> Tensor:
        return torch.cat([context, slates.flatten(1)], dim=1)

    def begin(self, context: Tensor) -> Prefix:
        last = context.flatten()
        return Prefix(last, torch.full_like(last, self.words))

    def step(self, prefix: Prefix, rows: Tensor, tokens: Tensor) -> Prefix:
        return Prefix(prefix.last[rows], tokens)

    def follow(self, prefix: Prefix, rows: Tensor, tokens: Tensor, lengths: Tensor) -> list[Prefix]:
        begin = lengths.cumsum(0) - lengths
        longest = int(lengths.max()) if len(lengths) else 0
        longer = [lengths >= d for d in range(1, longest + 1)]
        return [Prefix(prefix.last[rows[m]], tokens[begin[m] + d]) for d, m in enumerate(longer)]

    def root_logits(self, prefix: Prefix) -> Tensor:
        tokens = self.space.trie.children(torch.full((1,), ROOT, device=self.device)).token
        return self.table[prefix.last][:, tokens] + self.bigram[self.words, tokens]

    def child_logits(self, prefix: Prefix, children: Children) -> Tensor:
        return self._logits(prefix.last[children.parent], prefix.word[children.parent], children.token)

    def _logits(self, last: Tensor, word: Tensor, token: Tensor) -> Tensor:
        return self.table[last, token] + self.bigram[word, token]

    def next_item_loss(self, items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        last, paths = items[counted], self.space.paths(targets[counted])
        before = self.space.trie.token[paths.parent].long()
        children = self.space.trie.children(paths.parent)
        word = torch.where(before < 0, self.words, before)[children.parent]
        logits = self._logits(last[paths.owner[children.parent]], word, children.token)
        steps = group_log_softmax(logits, children.parent, len(paths.node))
        return -steps[children.node == paths.node[children.parent]].sum() / len(last)


def register() -> None:
    """Make both known, as a user's own module would."""
    register_actions(TITLES)
    register_policy(TITLE_TABLE)


TITLES = ActionKind("titles", TitleSettings, build_titles, read_titles)
TITLE_TABLE = PolicyKind("title-table", TitleTableSettings, TitleTable)


def small_title_policy(titles: list[str], seed: int = 0) -> "TitleTable":
    """A policy over the given titles with random weights."""
    torch.manual_seed(seed)
    return TitleTable(TitleTableSettings(spread=1.0), make_space(tokenise(titles))).eval()
