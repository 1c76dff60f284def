"""The co-occurrence prior: its counts, its sums against a dense twin, what is left out, and one policy for all uses."""

import math
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec import load
from sagerec.actions import neighbours as neighbours_module
from sagerec.actions.neighbours import Neighbours, count_neighbours
from sagerec.actions.semantic_ids.build import read_semantic_ids
from sagerec.catalogue.splits import Sequences
from sagerec.decoding.beam import beam_lists
from sagerec.decoding.slates import slate_logprobs, write_slates
from sagerec.policies.cooccurrence import CoOccurrence
from sagerec.policies.lazy_decoder import LazyDecoder, LazyDecoderSettings
from sagerec.policies.registry import read_policy
from sagerec.run.additions import add_items
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import audit
from tests.test_add_items import new_items
from tests.test_policy import N, all_logprobs, histories, small_log, small_policy


def log_of(*sequences: list[int]) -> Sequences:
    """A log by hand."""
    items = np.concatenate(sequences).astype(np.int32)
    offsets = np.cumsum([0, *(len(s) for s in sequences)])
    return Sequences(items, offsets, np.arange(len(sequences), dtype=np.int32), np.arange(len(items)))


def pair_counts(log: Sequences, n_items: int, *, without: int | None = None) -> np.ndarray:
    """(N, N) users who took both of two items, on the diagonal those who took one: the dense twin, pair by pair."""
    counts = np.zeros((n_items, n_items), dtype=np.int64)
    for user in range(len(log)):
        taken = sorted(set(log.items[log.offsets[user] : log.offsets[user + 1]].tolist()))
        for item in taken:
            counts[item, item] += 1
        if user != without:
            for one, other in combinations(taken, 2):
                counts[one, other] += 1
                counts[other, one] += 1
    return counts


def dense_prior(policy: LazyDecoder, counts: np.ndarray, history: list[int]) -> np.ndarray:
    """(N,) p of every item after a history, from all pairs: a (n + 1)^q log(1 + b K)."""
    module = policy.item_scores.cooccurrence
    assert module is not None
    n, summed = counts.diagonal(), np.zeros(len(counts))
    for distance, item in enumerate(reversed(history)):
        shares = 0.8**distance * counts[item] / (np.sqrt(n[item] * n) + 5)
        shares[item] = 0.0
        summed += shares
    a, b, q = (x.item() for x in (module.log_scale.exp(), module.log_sharpness.exp(), module.popularity))
    found: np.ndarray = a * (n + 1) ** q * np.log1p(b * summed)
    return found


def tuned(policy: LazyDecoder) -> LazyDecoder:
    """The policy with scalars that differ from the fresh ones."""
    module = policy.item_scores.cooccurrence
    assert module is not None
    with torch.no_grad():
        module.log_scale.fill_(0.4)
        module.log_sharpness.fill_(1.5)
        module.popularity.fill_(-0.3)
    return policy


def full_policy(**shape: Any) -> LazyDecoder:
    """A small policy whose space keeps every neighbour."""
    policy = small_policy(**shape)
    space = replace(policy.space, neighbours=count_neighbours(small_log(), N, N))
    whole = LazyDecoder(policy.settings, space)
    whole.load_state_dict(policy.state_dict())
    return tuned(whole).eval()


# --- counts ----------------------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    """Users take 0 1 0, 1 2 0 and 1 3: item 1 is thrice taken; with 0 twice, with 2 and 3 once. No user counts twice.

    Of one neighbour each, item 1 keeps 0; items 2 (with 0 and 1 once each) the one less often taken, for it is more
    like it: 1 / (sqrt(1 * 2) + 5) is above 1 / (sqrt(1 * 3) + 5).
    """
    log = log_of([0, 1, 0], [1, 2, 0], [1, 3])
    found = count_neighbours(log, 5, 10)
    assert found.item_counts.tolist() == [2, 3, 1, 1, 0]
    assert found.items.tolist() == [[1, 2, -1], [0, 2, 3], [0, 1, -1], [1, -1, -1], [-1, -1, -1]]
    assert found.counts.tolist() == [[2, 1, 0], [2, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert count_neighbours(log, 5, 1).items.tolist() == [[1], [0], [0], [1], [-1]]


@given(seed=st.integers(0, 100), most=st.integers(1, 12), chunk=st.integers(1, 3000))
@settings(max_examples=30, deadline=None)
def test_counts_equal_the_dense_twin(seed: int, most: int, chunk: int) -> None:
    """In chunks of any size: the kept counts are the largest of the row, and each is the pair's."""
    log = small_log(seed=seed, sequences=40)
    dense = pair_counts(log, N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours_module, "LARGEST_CHUNK", chunk)
        found = count_neighbours(log, N, most)
    assert found.item_counts.tolist() == dense.diagonal().tolist()
    np.fill_diagonal(dense, 0)
    for row, items, counts in zip(dense, found.items, found.counts, strict=True):
        there = items >= 0
        assert row[items[there]].tolist() == counts[there].tolist()
        assert counts.tolist() == sorted(counts, reverse=True)
        assert counts[there].tolist() == sorted(row[row > 0].tolist(), reverse=True)[:most]


def test_a_log_without_pairs_has_no_neighbours() -> None:
    """And a policy over it has a prior of 0."""
    nothing = count_neighbours(log_of([0], [1], [1, 1]), 3, 4)
    assert nothing.items.tolist() == [[-1], [-1], [-1]]
    prior = CoOccurrence(nothing, torch.tensor([2, 0, 1]))
    found = prior(torch.tensor([[0, 1]]), torch.ones(1, 1, 2, dtype=torch.bool))
    assert found.add_to(torch.zeros(3, 1)).tolist() == [[0.0]] * 3
    assert found.at(torch.zeros(3, dtype=torch.int64), torch.arange(3)).tolist() == [0.0] * 3


# --- the prior against the dense twin --------------------------------------------------------------------------------


@pytest.mark.parametrize("variable_length", [False, True])
def test_the_prior_equals_the_dense_twin(variable_length: bool) -> None:
    """Of every item after histories of uneven length, looked up and added to scores alike."""
    policy = full_policy(variable_length=variable_length)
    items, lengths = histories()
    counts = pair_counts(small_log(), N)
    expected = torch.tensor(
        np.array([dense_prior(policy, counts, row[:n].tolist()) for row, n in zip(items, lengths, strict=True)])
    ).float()
    with torch.no_grad():
        prior = policy.states(policy.encode(items, lengths)).prior
        assert prior is not None
        leaves = policy.item_scores.leaves
        added = prior.add_to(torch.zeros(N, 5))
        states, places = torch.arange(5).repeat_interleave(N), leaves.argsort().repeat(5)
        torch.testing.assert_close(added.T[:, leaves.argsort()], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(prior.at(states, places).view(5, N), expected, rtol=1e-4, atol=1e-6)
        some = prior.of_rows(torch.tensor([3, 1]))
        torch.testing.assert_close(some.add_to(torch.zeros(N, 2)), added[:, [3, 1]])


def test_training_leaves_out_what_each_sequence_added() -> None:
    """The loss on users 0 to 9 of the log, against the dense twin with that user's pairs taken out of the counts."""
    policy, log = full_policy(dropout=0.0, item_dropout=0.0), small_log()
    for user in range(10):
        taken = log.items[log.offsets[user] : log.offsets[user + 1]].astype(np.int64)
        counts = pair_counts(log, N, without=user)
        sequence = torch.from_numpy(taken)[None]
        expected = []
        with torch.no_grad():
            for place in range(len(taken) - 1):
                context = policy.encode(sequence[:, : place + 1], torch.tensor([place + 1]))
                prior = torch.from_numpy(dense_prior(policy, counts, taken[: place + 1].tolist())).float()
                expected.append(float(replaced_logprobs(policy, context.hidden[0, 0], prior)[taken[place + 1]]))
            everything = torch.ones(1, len(taken) - 1, dtype=torch.bool)
            found = float(policy.training_loss(sequence[:, :-1], sequence[:, 1:], everything))
            kept = float(policy.next_item_loss(sequence[:, :-1], sequence[:, 1:], everything))
        assert found == pytest.approx(-np.mean(expected), rel=1e-4)
        assert kept < found, "with its own pairs a sequence looks more likely than it is"


def replaced_logprobs(policy: LazyDecoder, hidden: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """(N,) log P of every item after a state (D,) under a dense prior (N,): node by node over the trie."""
    trie, space = policy.space.trie, policy.space
    width = policy.settings.width
    scores = policy.item_scores.vectors(torch.arange(N)) @ hidden[width:] + prior
    ways = [space.nodes[space.offsets[i] : space.offsets[i + 1]].tolist() for i in range(N)]
    under = {node: torch.tensor([i for i in range(N) if node in ways[i]]) for node in range(1, trie.n_nodes)}
    off = LazyDecoder(replace(policy.settings, item_scores=False), space).eval()
    off.load_state_dict({n: v for n, v in policy.state_dict().items() if not n.startswith("item_scores.")})
    total = torch.zeros(N)
    for item in range(N):
        prefix, state = off._decode(hidden[None, :width], None, 0, None), torch.tensor([0])
        for node in ways[item]:
            children = trie.children(state)
            logits = off.child_logits(prefix, children)
            logits = logits + torch.stack([scores[under[c]].logsumexp(0) for c in children.node.tolist()])
            at = children.node.tolist().index(node)
            total[item] += logits.log_softmax(0)[at]
            state = children.node[at : at + 1]
            if not bool(trie.is_leaf(state)):
                prefix = off.step(prefix, torch.tensor([0]), children.token[at : at + 1].long())
    return total


def test_windows_of_uneven_length_and_places_that_do_not_count() -> None:
    """A batch's loss is the mean over its places, one by one; only the last place counts in the second sequence."""
    policy = full_policy(dropout=0.0, item_dropout=0.0)
    items, targets = torch.tensor([[3, 9, 0], [7, 2, 5]]), torch.tensor([[9, 4, 0], [0, 0, 11]])
    counted = torch.tensor([[True, True, False], [False, False, True]])
    expected = []
    with torch.no_grad():
        for row, length, target in ((0, 1, 9), (0, 2, 4), (1, 3, 11)):
            context = policy.encode(items[row : row + 1], torch.tensor([length]))
            expected.append(-float(all_logprobs(policy, context)[0, target]))
        assert float(policy.next_item_loss(items, targets, counted)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_its_scalars_are_learnt() -> None:
    policy = full_policy().train()
    sequence = torch.from_numpy(small_log().items[:7].astype(np.int64))[None]
    loss = policy.training_loss(sequence[:, :-1], sequence[:, 1:], torch.ones(1, 6, dtype=torch.bool))
    loss.backward()  # type: ignore[no-untyped-call]
    module = policy.item_scores.cooccurrence
    assert module is not None
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert math.isfinite(float(parameter.grad))
        assert float(parameter.grad) != 0


# --- one distribution ------------------------------------------------------------------------------------------------


def test_lists_are_those_of_brute_force_and_probabilities_sum_to_one() -> None:
    policy = full_policy()
    items, lengths = histories()
    with torch.no_grad():
        every = all_logprobs(policy, policy.encode(items, lengths))
        torch.testing.assert_close(every.exp().sum(dim=1), torch.ones(5), rtol=0, atol=1e-5)
        found = beam_lists(policy, policy.encode(items, lengths), 5, k=10, beams=N)
        best = every.topk(10, dim=1)
    assert found.items.tolist() == best.indices.tolist()
    torch.testing.assert_close(found.logprobs, best.values, rtol=1e-4, atol=1e-4)


def test_slates_written_and_scored_are_of_one_distribution() -> None:
    """Item after item by `append`, all at once by `extend`: what was written joins the sums as the history does."""
    policy = full_policy()
    items, lengths = histories()
    generator = torch.Generator().manual_seed(3)
    slates = write_slates(policy, items, lengths, k=4, slates=3, generator=generator)
    with torch.no_grad():
        scored = slate_logprobs(policy, items, lengths, slates.items)
    torch.testing.assert_close(scored.tokens.logprobs, slates.tokens.logprobs, rtol=1e-4, atol=1e-4)
    assert scored.tokens.item.tolist() == slates.tokens.item.tolist()


def test_an_item_that_shares_its_sequence_is_no_neighbour() -> None:
    """Items 1 and 2 share a leaf, which 1 stands for: what occurred with 2 alone counts for nothing."""
    log = log_of([0, 1], [0, 2], [0, 2])
    prior = CoOccurrence(count_neighbours(log, 3, 5), torch.tensor([0, 1]))
    places, sums = prior.sums(torch.tensor([[0]]), torch.ones(1, 1, 1, dtype=torch.bool), None)
    assert places.tolist() == [[1]]
    assert sums.item() == pytest.approx(1 / (math.sqrt(3 * 1) + 5))


# --- the run ---------------------------------------------------------------------------------------------------------


def test_the_run_keeps_counts_of_training_events_alone(small_run: Run) -> None:
    """The artefact holds what the training sequences give; the audit passes over the rows that they are of."""
    train = small_run.split.sequences(small_run.data, "train")
    kept = read_semantic_ids(small_run.folder / "semantic_ids").neighbours
    assert kept is not None
    again = count_neighbours(train, small_run.data.n_items, 200)
    for name in ("items", "counts", "item_counts"):
        assert np.array_equal(getattr(kept, name), getattr(again, name))
    assert all(finding.counts["test"] == finding.counts["valid"] == 0 for finding in audit(small_run))


def test_a_policy_read_back_gives_the_same_lists(small_run: Run) -> None:
    policy = small_run.policy(device="cpu")
    again = read_policy(small_run.folder / "policy", read_semantic_ids(small_run.folder / "semantic_ids"))
    history, lengths = torch.tensor([[3, 1, 4], [9, 0, 0]]), torch.tensor([3, 1])
    with torch.no_grad():
        lists = [beam_lists(p, p.encode(history, lengths), 2, k=10, beams=20) for p in (policy, again)]
    assert torch.equal(lists[0].items, lists[1].items)
    assert torch.equal(lists[0].logprobs, lists[1].logprobs)
    assert "item_scores.cooccurrence.log_scale" in again.state_dict()


def test_added_items_have_no_neighbours(small_run: Run, tmp_path: Path) -> None:
    """And the others keep theirs; the policy serves on."""
    shutil.copytree(small_run.folder, tmp_path / "run")
    add_items(tmp_path / "run", new_items(small_run, tmp_path / "items.parquet"))
    before, after = (
        read_semantic_ids(folder / "semantic_ids").neighbours for folder in (small_run.folder, tmp_path / "run")
    )
    assert before is not None
    assert after is not None
    assert np.array_equal(after.items[:200], before.items)
    assert (after.items[200:] == -1).all()
    assert after.counts[200:].sum() == after.item_counts[200:].sum() == 0
    assert len(load(open_run(tmp_path / "run").folder, device="cpu").recommend(["new-0"], k=5)) == 5


def test_neighbours_grow_by_nothing() -> None:
    grown = Neighbours(np.array([[1], [0]]), np.array([[2], [2]]), np.array([2, 3])).grown(3)
    assert grown.items.tolist() == [[1], [0], [-1]]
    assert grown.counts.tolist() == [[2], [2], [0]]
    assert grown.item_counts.tolist() == [2, 3, 0]


def test_switched_off() -> None:
    """Without the prior nothing is kept with the weights, and nothing of the counts is read."""
    policy = small_policy(cooccurrence=False)
    assert policy.item_scores.cooccurrence is None
    assert policy.states(policy.encode(*histories())).prior is None
    assert not any("cooccurrence" in name for name in policy.state_dict())
    assert LazyDecoderSettings().cooccurrence
