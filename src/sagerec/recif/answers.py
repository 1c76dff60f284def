"""A run's policy on the benchmark: the itemic tokens of the messages are its history, its lists the predictions.

The run is of a dataset of `sagerec import recif`, whose items have the benchmark's Semantic IDs; its action space may
be these, others, or titles: the messages' IDs become the run's items, and what it writes becomes IDs again. Decoding is

- constrained: exact lists of items of the task's own map alone, each ID once;
- unconstrained, as published, for language models: beam search over the whole vocabulary. What is written counts as it
  comes: an item of another task, a repeat, or a text that is no item, which stays as it is and misses.

A policy over legal tokens alone has no unconstrained decoding. Texts other than the itemic tokens (a keyword, a user's
profile in words) are not read, and tasks that ask for text are left unanswered.

Shapes: N items, n samples, H keys of histories, K places.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from sagerec.actions.legal import NO_ITEM
from sagerec.actions.semantic_ids.existing import SEMANTIC_ID
from sagerec.actions.space import ActionSpace
from sagerec.catalogue.dataset import ITEM_ID, Dataset
from sagerec.catalogue.splits import Cases, learnt_counts
from sagerec.decoding.cases import list_cases
from sagerec.decoding.slates import Slates, slate_logprobs
from sagerec.errors import ArtifactError
from sagerec.policies.protocol import AnyPolicy
from sagerec.policies.registry import writes_freely
from sagerec.recif.items import LEVEL_SIZE, NO_KEY, codes_of, itemic_text
from sagerec.recif.layout import LABEL, TEXT, ItemMap
from sagerec.recif.metrics import KS
from sagerec.recif.predictions import Prediction
from sagerec.recif.tasks import Benchmark, Histories, Task
from sagerec.run.folder import Run

logger = logging.getLogger(__name__)
PLACES, WIDEST = max(KS), 16
BATCH = 512
UNANSWERED = "rows whose prompt holds no item that the run knows, which get no prediction"


def item_keys(data: Dataset) -> np.ndarray:
    """(N,) int64 key of each item's Semantic ID, whatever the run's action space. Raises: ArtifactError."""
    if SEMANTIC_ID not in data.items.columns:
        raise ArtifactError(
            f"the run's items have no column {SEMANTIC_ID!r}; make the run of a dataset of `sagerec import recif`"
        )
    codes = [pl.col(SEMANTIC_ID).str.extract(rf"<{level}_(\d+)>").cast(pl.Int64) for level in "abc"]
    key = (codes[0] * LEVEL_SIZE + codes[1]) * LEVEL_SIZE + codes[2]
    found = data.items.select(pl.col(ITEM_ID), key.alias("key"))
    if found["key"].null_count():
        item = found.filter(pl.col("key").is_null())[ITEM_ID][0]
        raise ArtifactError(f"item {item!r} of the run has no Semantic ID of three codes, such as <a_1><b_2><c_3>")
    return found["key"].to_numpy()


@dataclass(frozen=True, slots=True)
class KnownItems:
    """Keys of the run's items."""

    keys: np.ndarray
    """(N,) int64 key of each item."""
    distinct: np.ndarray
    """(M,) int64 the different keys, ascending."""
    stands: np.ndarray
    """(M,) int64 the item that stands for each."""

    @classmethod
    def of(cls, space: ActionSpace, keys: np.ndarray, counts: np.ndarray) -> "KnownItems":
        """Of items with keys (N,) and events learnt from (N,): of one key the most frequent that lists show."""
        listed = np.unique(space.listed_as(np.arange(space.n_items)))
        order = listed[np.lexsort([listed, -counts[listed], keys[listed]])]
        distinct, first = np.unique(keys[order], return_index=True)
        return cls(keys, distinct, order[first])

    def items(self, keys: np.ndarray) -> np.ndarray:
        """(n,) the item that stands for each of the keys (n,), NO_ITEM for one that no item has."""
        at = np.minimum(self.distinct.searchsorted(keys), len(self.distinct) - 1)
        found: np.ndarray = np.where(self.distinct[at] == keys, self.stands[at], NO_ITEM)
        return found


def make_cases(items: np.ndarray, offsets: np.ndarray) -> Cases:
    """Cases whose histories are items[offsets[j]:offsets[j + 1]]; they have no target."""
    nobody = np.zeros(len(offsets) - 1, dtype=np.int32)
    return Cases(
        users=nobody, targets=nobody, rows=offsets[1:], starts=offsets[:-1], event_items=items.astype(np.int32)
    )


def known_histories(histories: Histories, known: KnownItems, *, without_last: bool) -> tuple[Cases, np.ndarray]:
    """The histories in the run's items, those that it does not have left out, and (n,) the item of each's last key.

    `without_last` leaves that one out of the history: it is what is asked about.
    """
    lengths = np.diff(histories.offsets)
    last = np.full(len(lengths), NO_KEY)
    last[lengths > 0] = histories.keys[histories.offsets[1:][lengths > 0] - 1]
    items = known.items(histories.keys)
    kept = items != NO_ITEM
    if without_last:
        kept[histories.offsets[1:][lengths > 0] - 1] = False
    bounds = np.concatenate([[0], np.cumsum(kept)])[histories.offsets]
    return make_cases(items[kept], bounds), known.items(last)


def constrained_lists(
    policy: AnyPolicy,
    cases: Cases,
    known: KnownItems,
    item_map: ItemMap | None,
    *,
    exclude_history: bool,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The PLACES most probable keys of each case, exactly, best first, among those that the task's map has.

    A list with too many items of other tasks, or of one key, is decoded again, twice as long, up to WIDEST times it.
    """
    allowed = np.ones(len(known.keys), bool) if item_map is None else item_map.places(known.keys) >= 0
    found: list[list[int]] = [[] for _ in range(len(cases))]
    pending, width = np.arange(len(cases)), PLACES
    while len(pending):
        lists, _ = list_cases(
            policy, cases.take(pending), k=width, beams=max(50, width), exclude_history=exclude_history,
            batch_size=BATCH, on_batch=on_batch,
        )  # fmt: skip
        for case, items in zip(pending.tolist(), lists, strict=True):
            shown = items[items != NO_ITEM]
            shown = shown[allowed[shown]]
            found[case] = list(dict.fromkeys(known.keys[shown].tolist()))[:PLACES]
        on_batch = None
        again = width < min(WIDEST * PLACES, policy.space.n_sequences)
        pending = np.array([case for case in pending.tolist() if again and len(found[case]) < PLACES], dtype=np.int64)
        width *= 2
    return found


def read_batches(policy: AnyPolicy, cases: Cases) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Cases (b,) of like length with their histories (b, T) and lengths (b,) on the policy's device, until all are."""
    order = np.argsort(cases.rows - cases.starts, kind="stable")
    size = min(BATCH, policy.most_users)
    for begin in range(0, len(cases), size):
        index = order[begin : begin + size]
        history, lengths = (torch.from_numpy(x).to(policy.device) for x in cases.histories(index, policy.max_items))
        yield index, history, lengths


def free_lists(policy: AnyPolicy, cases: Cases, known: KnownItems) -> list[list[str]]:
    """What PLACES beams write over the whole vocabulary, best first: IDs of items, and other texts as they are."""
    found: list[list[str]] = [[] for _ in range(len(cases))]
    for index, history, lengths in read_batches(policy, cases):
        texts = policy.write_texts(history, lengths, k=PLACES, beams=PLACES)
        for case, own in zip(index.tolist(), texts, strict=True):
            found[case] = [text if item == NO_ITEM else sid_text(int(known.keys[item])) for item, text in own]
    return found


def sid_text(key: int) -> str:
    """The itemic tokens of a key."""
    return itemic_text(codes_of(key))


@torch.no_grad()
def candidate_probabilities(policy: AnyPolicy, cases: Cases, candidates: np.ndarray) -> np.ndarray:
    """(n,) P(candidate | history) of items (n,)."""
    found = np.zeros(len(cases))
    for index, history, lengths in read_batches(policy, cases):
        slates = torch.from_numpy(candidates[index].astype(np.int64)).to(policy.device).view(-1, 1, 1)
        scored = slate_logprobs(policy, history, lengths, slates)
        found[index] = Slates(slates, scored.tokens).scores()[:, 0, 0].double().exp().cpu().numpy()
    return found


@dataclass(frozen=True)
class RunPolicy:
    """A policy of a run as a system."""

    run: Run
    """The run."""
    policy_name: str = "policy"
    """Which of its policies."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …."""
    free: bool = False
    """Whether it writes over the whole vocabulary."""
    prefix: str = ""
    """What its name begins with."""

    @property
    def name(self) -> str:
        return f"{self.prefix}{self.policy_name}{'-unconstrained' if self.free else ''}"

    @property
    def ways(self) -> list["RunPolicy"]:
        """The policy, and beside it what it writes without a constraint, where it writes so."""
        described = self.run.manifest(self.policy_name).settings["policy"]
        return [self, replace(self, free=True)] if writes_freely(described) else [self]

    @property
    def excludes_history(self) -> bool:
        """Whether lists leave out the history: where no training sequence has an item twice."""
        return self.run.split.sequences(self.run.data, "train").excludes_history("auto")

    @property
    def about(self) -> dict[str, Any]:
        """How its predictions are made."""
        kept = self.free or not self.excludes_history
        notes = [
            f"the history is {'not ' if kept else ''}left out of lists",
            "label_pred's score is P(candidate | history), which says what comes next and not whether it is watched",
        ]
        if len(self.ways) == 1:
            notes.insert(0, "unconstrained decoding is not defined for a policy over legal tokens")
        return {
            "run": self.run.folder.name,
            "policy": self.policy_name,
            "policy_hash": self.run.manifest(self.policy_name).content_hash,
            "decoding": f"unconstrained, {PLACES} beams" if self.free else "constrained to the task's items, exact",
            "about": notes,
        }

    @cached_property
    def learnt(self) -> Mapping[int, int]:
        """Key -> events of the parts that the rows of a comparison learnt from."""
        distinct, at = np.unique(item_keys(self.run.data), return_inverse=True)
        counts = np.bincount(at, weights=learnt_counts(self.run.data, self.run.split)).astype(int)
        return dict(zip(distinct.tolist(), counts.tolist(), strict=True))

    def predictions(self, benchmark: Benchmark, faults: Counter[str]) -> Iterator[Prediction]:
        """Its answers, task by task; rows in whose prompt it knows no item get none."""
        policy = self.run.policy(self.policy_name, device=self.device)
        policy.eval()
        counts = learnt_counts(self.run.data, self.run.split)
        known = KnownItems.of(policy.space, item_keys(self.run.data), counts)
        for task in benchmark.tasks.values():
            if task.name in TEXT:
                logger.info("%s: %s asks for text, which the policy does not write", self.name, task.name)
                continue
            yield from self._answers(policy, known, task, faults)

    def _answers(self, policy: AnyPolicy, known: KnownItems, task: Task, faults: Counter[str]) -> Iterator[Prediction]:
        assert task.histories is not None, "read_benchmark(with_histories=True)"
        of_label = task.name == LABEL
        cases, candidates = known_histories(task.histories, known, without_last=of_label)
        answered = cases.rows > cases.starts
        if of_label:
            answered &= candidates != NO_ITEM
        index = np.flatnonzero(answered)
        if len(index) < len(task):
            faults[UNANSWERED] += len(task) - len(index)
        rows = task.rows[index].tolist()
        if of_label:
            for row, p in zip(rows, candidate_probabilities(policy, cases.take(index), candidates[index]), strict=True):
                yield Prediction(task.name, row, p_yes=float(p), p_no=1.0 - float(p))
            return
        chosen = cases.take(index)
        if self.free:
            lists = free_lists(policy, chosen, known)
        else:
            keys = constrained_lists(policy, chosen, known, task.map, exclude_history=self.excludes_history)
            lists = [list(map(sid_text, own)) for own in keys]
        for row, own in zip(rows, lists, strict=True):
            yield Prediction(task.name, row, predictions=own)
