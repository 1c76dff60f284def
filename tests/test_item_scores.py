"""Item scores: what lies under a node, and what the two experts are alone and together."""

import math

import numpy as np
import pytest
import torch

from sagerec.actions.space import make_space
from sagerec.actions.trie import ROOT
from sagerec.policies import item_scores
from sagerec.policies.item_scores import ItemScores, leaf_order
from sagerec.policies.lazy_decoder import LazyDecoder, States
from tests.test_policy import N, all_logprobs, histories, small_policy


def test_leaves_by_hand() -> None:
    """Sequences 1 0 | 0 2 1 | 0 2 0 | 2 | 0 1 in order: items 4, 2, 1, 0, 3; node 0 2 begins after item 4."""
    sequences = np.array([[1, 0, -1], [0, 2, 1], [0, 2, 0], [2, -1, -1], [0, 1, -1]])
    trie = make_space(sequences).trie
    items, first = leaf_order(trie)
    assert items.tolist() == [4, 2, 1, 0, 3]
    # Root; 0, 1, 2; 0 1, 0 2, 1 0; 0 2 0, 0 2 1.
    assert first.tolist() == [0, 0, 3, 4, 0, 1, 3, 1, 2]


@pytest.mark.parametrize("variable_length", [False, True])
@pytest.mark.parametrize("table", [2**26, 100])
def test_sums_under_nodes_equal_the_slow_twin(
    variable_length: bool, table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node by node: log sum exp of the scores of all items whose way leads through it, in chunks too."""
    monkeypatch.setattr(item_scores, "LARGEST_TABLE", table)
    space = small_policy(variable_length=variable_length).space
    scores = ItemScores(space, width=8, heads=2, layers=1, dropout=0.1).eval()
    states = 20 * torch.randn(4, 8)
    with torch.no_grad():
        scorer = scores.begin(states)
        each = (states @ scores.items.weight.T).double()
        under = {node: [i for i in range(N) if node in ways_of(space, i)] for node in range(1, space.trie.n_nodes)}
        inner = (~space.trie.is_leaf(torch.arange(space.trie.n_nodes))).nonzero()[:, 0]
        for node in inner.tolist():
            children = space.trie.children(torch.full((4,), node))
            expected = [
                float(each[row, under[child]].logsumexp(0))
                for row, child in zip(children.parent.tolist(), children.node.tolist(), strict=True)
            ]
            found = scores.under(scorer, children, space.trie)
            torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
            if node == ROOT:
                torch.testing.assert_close(scores.at_root(scorer).flatten(), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("table", [2**20, 100])
@pytest.mark.parametrize("cooccurrence", [False, True])
def test_gradients_of_the_root_equal_the_slow_twin(
    cooccurrence: bool, table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a dense log-sum-exp with every score written down, by torch's own backward pass."""
    monkeypatch.setattr(item_scores, "LARGEST_TABLE", table)
    policy = small_policy(cooccurrence=cooccurrence)
    module, first = policy.item_scores, policy.space.first_tokens()
    states = policy.states(policy.encode(*histories()))
    leaf = states._replace(hidden=states.hidden.detach().requires_grad_())
    inputs = [leaf.hidden, module.items.weight, *(module.cooccurrence.parameters() if module.cooccurrence else ())]
    fast = module.at_root(module.begin(leaf.hidden[:, policy.settings.width :], leaf.prior))
    scores = item_scores_of(policy, leaf)
    slow = torch.stack([scores[:, first == token].logsumexp(1) for token in np.unique(first)], dim=1)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 1, slow.numel()).view_as(slow)
    gradients = [torch.autograd.grad((sums * weights).sum(), inputs, retain_graph=True) for sums in (fast, slow)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def item_scores_of(policy: LazyDecoder, states: States) -> torch.Tensor:
    """(R, N) x . v + p of every item after R states: the slow twin."""
    every = torch.arange(N)
    scores = states.hidden[:, policy.settings.width :] @ policy.item_scores.vectors(every).T
    if states.prior is not None:
        places = policy.item_scores.leaves.argsort()
        rows = [states.prior.at(torch.full((N,), row), places) for row in range(len(scores))]
        scores = scores + torch.stack(rows)
    return scores


def ways_of(space: object, item: int) -> list[int]:
    """The nodes on the way of an item."""
    nodes, offsets = space.nodes, space.offsets  # type: ignore[attr-defined]
    found: list[int] = nodes[offsets[item] : offsets[item + 1]].tolist()
    return found


@pytest.mark.parametrize("variable_length", [False, True])
def test_without_code_logits_the_policy_is_the_softmax_of_the_scores(variable_length: bool) -> None:
    """With c = 0 each step is exp(LSE of the child - LSE of the node): the product over the way telescopes."""
    policy = small_policy(variable_length=variable_length)
    with torch.no_grad():
        policy.head.zero_()
        policy.head_bias.zero_()
        context = policy.encode(*histories())
        scores = item_scores_of(policy, policy.states(context))
        torch.testing.assert_close(all_logprobs(policy, context), scores.log_softmax(1), rtol=1e-4, atol=1e-4)


def test_without_item_vectors_a_child_counts_by_its_items() -> None:
    """With s = 0 the logit of a child is c + log size: the root's is checked against the code logits."""
    policy = small_policy(content=False, cooccurrence=False)
    with torch.no_grad():
        policy.item_scores.items.weight.zero_()
        prefix = policy.begin(policy.encode(*histories()))
        children = policy.space.trie.children(torch.tensor([ROOT]))
        codes = prefix.output @ policy.head[children.token].T + policy.head_bias[children.token]
        expected = codes + policy.space.trie.size[children.node].log()
        torch.testing.assert_close(policy.root_logits(prefix), expected, rtol=1e-4, atol=1e-4)


def test_training_averages_in_what_each_expert_says_alone() -> None:
    """Without dropout: (-log P - w log softmax(s) - w log P of the codes without scores) / (1 + 2 w)."""
    policy = small_policy(dropout=0.0, item_dropout=0.0, expert_weight=0.3)
    items, targets = torch.tensor([[3, 9, 0], [7, 2, 5]]), torch.tensor([[9, 4, 0], [2, 5, 11]])
    counted = torch.tensor([[True, True, False], [True, True, True]])
    codes_alone = small_policy(dropout=0.0, item_scores=False)
    codes_alone.load_state_dict({n: v for n, v in policy.state_dict().items() if not n.startswith("item_scores.")})
    with torch.no_grad():
        together, codes = (p.next_item_loss(items, targets, counted) for p in (policy, codes_alone))
        alone = 0.0
        for row, place in counted.nonzero().tolist():
            context = policy.encode(items[row : row + 1], torch.tensor([place + 1]))
            alone -= float(item_scores_of(policy, policy.states(context)).log_softmax(1)[0, targets[row, place]]) / 5
        found = policy.train().next_item_loss(items, targets, counted)
    assert float(found) == pytest.approx(float(together + 0.3 * (codes + alone)) / 1.6, rel=1e-5)


def test_a_sum_of_far_lower_scores_stays_finite() -> None:
    """Scores 0 and -200: exp(-200) is 0 in float32, and the sum under the second child is taken for the floor."""
    space = make_space(np.array([[0], [1]]))
    scores = ItemScores(space, width=4, heads=2, layers=1, dropout=0.0)
    with torch.no_grad():
        scores.items.weight.zero_()
        scores.items.weight[1, 0] = -200
        found = scores.at_root(scores.begin(torch.tensor([[1.0, 0, 0, 0]])))
    assert found.tolist() == [[0.0, pytest.approx(math.log(1e-30))]]
