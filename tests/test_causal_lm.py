"""The causal-lm policy: every layout equals naive passes of its model, over titles and over Semantic IDs."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sagerec.actions.space import ActionSpace, make_space
from sagerec.actions.titles import Titles, end_token, index_titles, load_tokenizer, write_titles
from sagerec.actions.trie import PADDING, build_trie
from sagerec.decoding.beam import exact_lists
from sagerec.decoding.slates import slate_logprobs, write_slates
from sagerec.errors import SettingsError
from sagerec.policies.causal_lm import CausalLM, CausalLMSettings
from sagerec.policies.free_writing import Readings, search_freely
from sagerec.policies.language import make_language, only_rows, prompt, read_language, readable_positions
from sagerec.policies.language_tasks import tasks_loss
from sagerec.policies.packing import share_rows
from sagerec.policies.protocol import Policy
from tests.language_models import LAYOUTS, config_of, save_model

pytest.importorskip("transformers")
TITLES = [
    *("red soap", "red soap bar", "blue soap", "green tea shampoo", "green tea", "nail file"),
    *("nail polish red", "nail polish blue", "comb", "brush big", "brush small", "red brush"),
]
CODES = np.array([[a, b, c] for a, b, c in itertools.product(range(3), range(2), range(2))], dtype=np.int32)
HISTORIES = [[0, 3, 5], [7, 1], [2]]
ITEMS, LENGTHS = torch.tensor([[0, 3, 5], [7, 1, 0], [2, 0, 0]]), torch.tensor([3, 2, 1])


@pytest.fixture(scope="module")
def models() -> Iterator[Path]:
    """A folder with a model of each layout."""
    with TemporaryDirectory() as name:
        for layout in (*LAYOUTS, "gemma2"):
            save_model(Path(name) / layout, layout, TITLES)
        yield Path(name)


@lru_cache
def titles(folder: Path) -> Titles:
    """The titles as the model in `folder` writes them."""
    tokenizer = load_tokenizer(str(folder))
    tokens, written, _ = write_titles(TITLES, tokenizer, max_tokens=32, instead=TITLES)
    end, n = end_token(tokenizer), len(TITLES)
    table = np.full((n, max(map(len, tokens)) + 1), PADDING, dtype=np.int32)
    for row, own in zip(table, tokens, strict=True):
        row[: len(own) + 1] = [*own, end]
    arrays = {
        "tokens": table[table != PADDING],
        "lengths": (table != PADDING).sum(axis=1),
        "end": np.array([end]),
        "vectors": np.eye(n, dtype=np.float32),
        "points": np.eye(n, dtype=np.float32),
        "groups": np.arange(n),
    }
    return index_titles(arrays, written, build_trie(table), model=str(folder), tokenizer=folder)


def policy_of(folder: Path, *, codes: bool = False, **settings: Any) -> CausalLM:
    """A policy of the model in `folder`, in evaluation mode."""
    space: ActionSpace = make_space(CODES) if codes else titles(folder)
    made = CausalLMSettings(model=str(folder), **settings)
    language = make_language(made.model, space, instruction=made.instruction, dtype=made.dtype)
    policy = CausalLM(made, space, language)
    policy.describe(TITLES)
    return policy.eval()


@torch.no_grad()
def naive_logprob(policy: CausalLM, history: list[int], before: list[int], item: int) -> float:
    """The twin: log P(item | history, before) of one plain forward pass over the text, token by token."""
    space, base = policy.space, policy.base.tolist()

    def text_of(one: int) -> list[int]:
        return [token + base[depth] for depth, token in enumerate(space.sequence(one))]

    start = [*policy.prefix.tolist(), *(t for one in [*history, *before] for t in text_of(one))]
    logits = policy.language.plain()(torch.tensor([start + text_of(item)])).logits[0].float()
    sequences = {one: space.sequence(one) for one in range(space.n_items) if one not in before}
    total, own = 0.0, space.sequence(item)
    for depth, token in enumerate(own):
        legal = sorted({s[depth] for s in sequences.values() if s[:depth] == own[:depth]})
        row = logits[len(start) + depth - 1][torch.tensor(legal) + base[depth]]
        total += float(row.log_softmax(0)[legal.index(token)])
    return total


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, "gemma2"])
def test_lists_slates_and_losses_equal_naive_passes(models: Path, layout: str, codes: bool) -> None:
    policy = policy_of(models / layout, codes=codes, instruction="What they took:" if layout == "llama" else "")
    lists = exact_lists(policy, ITEMS, LENGTHS, k=5, beams=5)
    assert bool(lists.exact.all())
    for user, history in enumerate(HISTORIES):
        scores = torch.tensor([naive_logprob(policy, history, [], item) for item in range(len(TITLES))])
        assert float(scores.exp().sum()) == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(lists.logprobs[user], scores.topk(5).values, rtol=1e-4, atol=1e-4)
    found = write_slates(policy, ITEMS, LENGTHS, k=4, slates=3, generator=torch.Generator().manual_seed(1))
    again = slate_logprobs(policy, ITEMS, LENGTHS, found.items)
    torch.testing.assert_close(again.tokens.logprobs, found.tokens.logprobs, rtol=1e-5, atol=1e-5)
    for user, slate, place in itertools.product(range(3), range(3), range(4)):
        items = found.items[user, slate].tolist()
        assert len(set(items)) == 4
        expected = naive_logprob(policy, HISTORIES[user], items[:place], items[place])
        assert float(found.scores()[user, slate, place]) == pytest.approx(expected, abs=1e-4)
    targets = torch.tensor([[3, 5, 9], [1, 4, 0], [6, 0, 0]])
    counted = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    pairs = [([0], 3), ([0, 3], 5), ([0, 3, 5], 9), ([7], 1), ([7, 1], 4), ([2], 6)]
    mean = -np.mean([naive_logprob(policy, history, [], item) for history, item in pairs])
    assert float(policy.next_item_loss(ITEMS, targets, counted).detach()) == pytest.approx(mean, abs=1e-4)


def gradients(policy: CausalLM, value: Tensor) -> list[Tensor]:
    return [g for g in torch.autograd.grad(value, list(policy.parameters()), allow_unused=True) if g is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_prefixes_give_the_gradient_of_naive_copies(models: Path, layout: str) -> None:
    """G slates after one context, read at once, against each slate alone after its own copy of the context."""
    policy, k = policy_of(models / layout), 3
    slates = torch.tensor([[[1, 0, 4], [1, 9, 10], [8, 2, 7]]])
    together = slate_logprobs(policy, ITEMS[:1], LENGTHS[:1], slates).tokens.logprobs.sum()
    alone = torch.stack(
        [slate_logprobs(policy, ITEMS[:1], LENGTHS[:1], slates[:, [g]]).tokens.logprobs.sum() for g in range(k)]
    ).sum()
    assert float(together.detach()) == pytest.approx(float(alone.detach()), abs=1e-4)
    for one, other in zip(gradients(policy, together), gradients(policy, alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_slates", [2, 4, 6])
def test_slates_of_like_rows_see_themselves_alone(models: Path, n_slates: int) -> None:
    """After a long history several slates stand in one row; two users, items of different lengths."""
    policy = policy_of(models / "qwen3")
    history = torch.tensor([[0, 3, 5, 7, 1, 2, 11], [2, 8, 6, 9, 0, 0, 0]])
    lengths = torch.tensor([7, 4])
    drawn = [torch.randperm(12, generator=torch.Generator().manual_seed(i))[:2] for i in range(2 * n_slates)]
    slates = torch.stack(drawn).view(2, n_slates, 2)
    assert share_rows(policy.space.lengths(slates), 40)[1] < n_slates
    together = slate_logprobs(policy, history, lengths, slates).tokens.logprobs
    alone = [slate_logprobs(policy, history, lengths, slates[:, [g]]).tokens for g in range(n_slates)]
    place = torch.cat([own.item // 2 * 2 * n_slates + 2 * g + own.item % 2 for g, own in enumerate(alone)])
    expected = torch.cat([own.logprobs for own in alone])[place.argsort(stable=True)]
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_pieces_and_recomputing_change_nothing(models: Path) -> None:
    whole = policy_of(models / "qwen3")
    parts = policy_of(models / "qwen3", micro_tokens=64, recompute=True)
    slates = torch.tensor([[[1, 0], [1, 9]], [[8, 2], [4, 5]], [[0, 1], [2, 3]]])
    targets, counted = torch.tensor([[3, 5, 9], [1, 4, 0], [6, 0, 0]]), torch.tensor([[True] * 3] * 3)
    counted &= torch.arange(3) < LENGTHS[:, None]
    for compute in (
        lambda policy: slate_logprobs(policy, ITEMS, LENGTHS, slates).tokens.logprobs.sum(),
        lambda policy: policy.next_item_loss(ITEMS, targets, counted),
    ):
        one, other = compute(whole), compute(parts)
        torch.testing.assert_close(one, other)
        for a, b in zip(gradients(whole, one), gradients(parts, other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_pass_equals_the_calls_that_the_protocol_makes(models: Path) -> None:
    policy = policy_of(models / "qwen2")
    slates, reach = torch.tensor([[[1, 0, 4], [1, 9, 10]]]), torch.tensor([2, 1, 3, 0, 2, 2])
    for given in (None, policy.encode(ITEMS[:1], LENGTHS[:1])):
        begun, found = policy.read_slates(ITEMS[:1], LENGTHS[:1], slates, reach, context=given)
        twin, expected = Policy.read_slates(policy, ITEMS[:1], LENGTHS[:1], slates, reach)
        torch.testing.assert_close(begun.hidden, twin.hidden, rtol=1e-4, atol=1e-5)
        assert [len(own.hidden) for own in found] == [5, 4, 1]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-4, atol=1e-5)


def test_old_history_is_dropped_by_whole_items(models: Path) -> None:
    """With room for the two last items alone, a history of three reads as its two last ones, and a first target that
    then has no history does not count.
    """
    policy = policy_of(models / "qwen3")
    sizes = [len(policy.space.sequence(item)) for item in HISTORIES[0]]
    policy.budget = sizes[1] + sizes[2]
    expected = policy.encode(torch.tensor([[3, 5]]), torch.tensor([2])).hidden
    torch.testing.assert_close(policy.encode(ITEMS[:1], LENGTHS[:1]).hidden, expected)
    whole = torch.tensor([[0, 3, 5]])
    policy.budget = sizes[1] + sizes[2] + len(policy.space.sequence(9))
    assert sizes[0] > 0
    loss = policy.next_item_loss(whole, torch.tensor([[3, 5, 9]]), torch.ones(1, 3, dtype=torch.bool))
    kept = [naive_logprob(policy, [3], [], 5), naive_logprob(policy, [3, 5], [], 9)]
    assert float(loss.detach()) == pytest.approx(-np.mean(kept), abs=1e-4)
    assert float(policy.n_targets(whole, torch.tensor([[3, 5, 9]]), torch.ones(1, 3, dtype=torch.bool))) == 2


@torch.no_grad()
def test_free_writing_is_beam_search_over_the_vocabulary(models: Path) -> None:
    """Against a search with the same number of beams over plain passes of the model."""
    policy = policy_of(models / "qwen3", codes=True)
    base = policy.base.tolist()
    found = policy.write_freely(ITEMS, LENGTHS, k=4, beams=100)
    rows = policy.language.plain()
    for user, history in enumerate(HISTORIES):
        start = [t + base[d] for one in history for d, t in enumerate(policy.space.sequence(one))]
        scored: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(3):
            texts = torch.tensor([[*policy.prefix.tolist(), *start, *text] for _, text in scored])
            logprobs = rows(texts).logits[:, -1].float().log_softmax(1).tolist()
            pairs = zip(scored, logprobs, strict=True)
            longer = [(s + x, [*text, t]) for (s, text), row in pairs for t, x in enumerate(row)]
            scored = sorted(longer, key=lambda pair: -pair[0])[:100]
        ids = {tuple(c + base[d] for d, c in enumerate(code)): i for i, code in enumerate(CODES.tolist())}
        assert found[user].tolist() == [ids.get(tuple(text), -1) for _, text in scored[:4]]


@torch.no_grad()
def test_free_titles_are_those_that_end_first_and_are_most_probable(models: Path) -> None:
    """The twin keeps its own books over plain passes: of 40 beams the open ones go on, ended ones wait for the list."""
    policy = policy_of(models / "llama")
    plain, end = policy.language.plain(), titles(models / "llama").end
    found = search_freely(policy, ITEMS[:2], LENGTHS[:2], k=6, beams=40)
    for user, history in enumerate(HISTORIES[:2]):
        start = [*policy.prefix.tolist(), *(t for one in history for t in policy.space.sequence(one))]
        live: list[tuple[float, list[int]]] = [(0.0, [])]
        ended: list[tuple[float, list[int]]] = []
        for _ in range(policy.space.longest):
            logits = plain(torch.tensor([start + text for _, text in live])).logits[:, -1].float().log_softmax(1)
            pairs = zip(live, logits.tolist(), strict=True)
            longer = [(s + x, [*text, t]) for (s, text), row in pairs for t, x in enumerate(row)]
            longer = sorted(longer, key=lambda pair: -pair[0])[:40]
            ended += [pair for pair in longer if pair[1][-1] == end]
            live = [pair for pair in longer if pair[1][-1] != end]
        assert found[user] == [text for _, text in sorted(ended, key=lambda pair: -pair[0])[:6]]


def test_a_text_that_ends_early_waits_for_one_that_may_be_more_probable(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the end at once has .4; another token .6, after which the end has .9: .54 in all, the best of one."""
    policy = policy_of(models / "llama")
    end = titles(models / "llama").end
    other, calls = end + 1, iter((0.4, 0.9))

    def by_hand(language: Any, hidden: Tensor) -> Tensor:
        found = torch.full((len(hidden), policy.language.head()[0].shape[0]), -30.0)
        share = next(calls)
        found[:, end], found[:, other] = np.log(share), np.log(1 - share)
        return found

    monkeypatch.setattr("sagerec.policies.free_writing.vocabulary_logprobs", by_hand)
    assert search_freely(policy, ITEMS[:1], LENGTHS[:1], k=1, beams=2) == [[[other, end]]]


def test_an_instruction_is_a_turn_of_the_chat_template(models: Path) -> None:
    """The template writes what begins a text itself; without one it is put before the instruction's line."""
    tokenizer = load_tokenizer(str(models / "llama"))
    tokenizer.bos_token = tokenizer.eos_token
    begin, said = tokenizer.bos_token_id, tokenizer("red soap", add_special_tokens=False)["input_ids"]
    line = tokenizer("red soap\n", add_special_tokens=False)["input_ids"]
    assert prompt(tokenizer, "red soap").tolist() == [begin, *line]
    assert prompt(tokenizer, "").tolist() == [begin]
    tokenizer.chat_template = "{{ bos_token }}{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    assert prompt(tokenizer, "red soap").tolist() == [begin, *said]
    assert prompt(tokenizer, "").tolist() == [begin]


@torch.no_grad()
def test_as_many_positions_are_read_as_the_model_has(models: Path) -> None:
    policy = policy_of(models / "llama")
    states = policy.encode(ITEMS[:1], LENGTHS[:1])
    read = len(policy.prefix) + sum(len(policy.space.sequence(item)) for item in HISTORIES[0])
    one = torch.zeros(1, dtype=torch.int64)
    policy.language.max_positions = read + 1
    policy.read_tokens(states, one, one)
    policy.language.max_positions = read
    with pytest.raises(SettingsError, match=f"have {read + 1} tokens"):
        policy.read_tokens(states, one, one)


@pytest.mark.parametrize("codes", [False, True])
def test_sampled_texts_are_drawn_from_the_vocabulary_and_scored_in_one_pass(models: Path, codes: bool) -> None:
    """Each token against the distribution function of a plain pass over the text so far."""
    policy = policy_of(models / "qwen3", codes=codes)
    plain, end, base = policy.language.plain(), policy.language.end, policy.base.tolist()
    uniforms = torch.rand(2, 3, policy.space.longest, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    texts, items = policy.sample_texts(ITEMS[:2], LENGTHS[:2], uniforms, temperature=0.5)
    logprobs, entropy = policy.text_logprobs(ITEMS[:2], LENGTHS[:2], texts, temperature=0.5)
    found, first = iter(logprobs.tolist()), []
    for user, history in enumerate(HISTORIES[:2]):
        own = [t + base[d] for one in history for d, t in enumerate(policy.space.sequence(one))]
        for number in range(3):
            text: list[int] = texts[user, number][texts[user, number] >= 0].tolist()
            assert text[-1] == end or len(text) == policy.space.longest
            assert end not in text[:-1]
            assert int(items[user, number]) == policy.readings.item_of(text, nearest=False)
            for place, token in enumerate(text):
                logits = plain(torch.tensor([[*policy.prefix.tolist(), *own, *text[:place]]])).logits[0, -1].detach()
                row = (logits.double() / 0.5).log_softmax(0)
                below = float(row.exp()[:token].sum())
                assert below - 1e-5 <= float(uniforms[user, number, place]) <= below + float(row[token].exp()) + 1e-5
                assert next(found) == pytest.approx(float(row[token]), abs=1e-4)
                first += [float(-(row.exp() * row).sum())] if place == number == 0 else []
    assert float(entropy.detach()) == pytest.approx(np.mean(first), abs=1e-4)
    assert next(found, None) is None
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    written = [t + base[d] for d, t in enumerate(policy.space.sequence(4))]
    assert policy.readings.item_of(written, nearest=False) == 4
    assert policy.readings.item_of(written[:-1], nearest=False) == -1  # it has not ended


def test_the_loss_over_the_vocabulary_and_an_output_bias(models: Path) -> None:
    """free_weight adds the mean over targets of -log P of their tokens among all; a bias of the output layer counts."""
    policy = policy_of(models / "qwen3", free_weight=0.5)
    plain = policy.language.plain()
    head = torch.nn.Linear(32, policy.language.head()[0].shape[0])
    plain.set_output_embeddings(head)
    items, targets, counted = torch.tensor([[0, 3]]), torch.tensor([[3, 5]]), torch.tensor([[True, True]])
    expected = 0.0
    for history, item in (([0], 3), ([0, 3], 5)):
        start = [*policy.prefix.tolist(), *(t for one in history for t in policy.space.sequence(one))]
        own = policy.space.sequence(item)
        rows = plain(torch.tensor([start + own])).logits[0].float().log_softmax(1)
        free = sum(float(rows[len(start) + place - 1, token].detach()) for place, token in enumerate(own))
        expected -= (naive_logprob(policy, history, [], item) + 0.5 * free) / 2
    assert float(policy.next_item_loss(items, targets, counted).detach()) == pytest.approx(expected, abs=1e-3)


def test_free_texts_are_matched_as_they_read(models: Path) -> None:
    policy = policy_of(models / "qwen3")
    end, tokenizer = titles(models / "qwen3").end, policy.language.tokenizer
    readings = Readings(policy)
    assert readings.item_of([*tokenizer("RED  Soap")["input_ids"], end], nearest=False) == 0
    assert readings.item_of([*tokenizer("red soa")["input_ids"], end], nearest=False) == -1
    mixed = [*tokenizer("red ")["input_ids"], tokenizer.eos_token_id, *tokenizer("soap")["input_ids"], end]
    assert readings.item_of(mixed, nearest=False) == -1
    text = [*policy.space.sequence(8)[:-1], *policy.space.sequence(8)]
    assert readings.item_of(text, nearest=False) == -1
    assert readings.item_of(text, nearest=True) == 8


def test_new_tokens_begin_as_the_words_of_their_items(models: Path) -> None:
    policy = policy_of(models / "qwen2", codes=True)
    weight, first = policy.language.embedding().weight, policy.language.new_tokens[0]
    tokenizer = policy.language.tokenizer
    owners = [i for i, code in enumerate(CODES.tolist()) if code[0] == 1]
    pieces = [t for i in owners for t in tokenizer(TITLES[i], add_special_tokens=False)["input_ids"]]
    torch.testing.assert_close(weight[first + 1], weight[torch.tensor(pieces)].mean(dim=0), rtol=1e-4, atol=1e-6)
    assert tokenizer.convert_ids_to_tokens([first, first + 3, first + 6]) == ["<a_0>", "<b_0>", "<c_1>"]


def test_tasks_tie_codes_to_words(models: Path) -> None:
    """One row with one target: title -> ID, ID -> title and titles -> ID, each by a plain pass of the model."""
    policy = policy_of(models / "qwen3", codes=True, title_weight=0.5)
    items, targets, counted = torch.tensor([[0, 3]]), torch.tensor([[3, 5]]), torch.tensor([[False, True]])
    tokenizer, plain = policy.language.tokenizer, policy.language.plain()
    tokens = policy.item_tokens()

    def words(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def logprob(given: list[int], said: list[int], *, legal: bool) -> float:
        text = [*policy.prefix.tolist(), *given]
        rows = plain(torch.tensor([[*text, *said]])).logits[0].float()
        total = 0.0
        for place, token in enumerate(said):
            row = rows[len(text) + place - 1]
            among = sorted({own[place] for own in tokens if own[:place] == said[:place]}) if legal else range(len(row))
            total += float(row[list(among)].log_softmax(0)[list(among).index(token)].detach())
        return total

    expected = -np.mean(
        [
            logprob(words(f"ID of:\n{TITLES[5]}\n"), tokens[5], legal=True),
            logprob([*words("Title of:\n"), *tokens[5], *words("\n")], words(f"{TITLES[5]}\n"), legal=False),
            logprob(words(f"After:\n{TITLES[0]}\n{TITLES[3]}\n"), tokens[5], legal=True),
        ]
    )
    assert float(tasks_loss(policy, items, targets, counted).detach()) == pytest.approx(expected, abs=1e-3)
    alone = policy.next_item_loss(items, targets, counted)
    together = policy.train().next_item_loss(items, targets, counted)
    assert float((together - alone).detach()) == pytest.approx(0.5 * expected, abs=1e-3)


@pytest.mark.parametrize("train", ["all", "lora", "new-tokens"])
def test_what_is_trained_is_saved_as_a_plain_folder(models: Path, tmp_path: Path, train: Any) -> None:
    """A step of training, then: the folder loads without us, gives the same logits, and what is frozen stayed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sagerec.training.loop import make_optimizer

    pytest.importorskip("peft")
    policy = policy_of(models / "llama", codes=True, train=train, lora_rank=4)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimizer = make_optimizer(policy, 1e-2, 0.1)
    targets = torch.tensor([[3, 5, 9], [1, 4, 0], [6, 0, 0]])
    counted = torch.arange(3) < LENGTHS[:, None]
    for _ in range(2):
        optimizer.zero_grad()
        policy.next_item_loss(ITEMS, targets, counted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    rows = policy.language.embedding().weight, before[next(n for n in before if "embed_tokens" in n)]
    first = policy.language.new_tokens[0]
    if train == "new-tokens":
        assert len(changed) == 2
        assert all("embed_tokens" in n or "lm_head" in n for n in changed)
    if train != "all":
        assert torch.equal(rows[0][:first], rows[1][:first])
        assert not torch.equal(rows[0][first:], rows[1][first:])
    if train == "lora":
        assert any("lora_" in name for name in changed)
    expected = policy.encode(ITEMS, LENGTHS)
    policy.language.save(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = [*policy.prefix.tolist(), *tokenizer.convert_tokens_to_ids(["<a_0>", "<b_1>", "<c_1>", "<a_1>"])]
    torch.testing.assert_close(
        loaded(torch.tensor([text])).logits, policy.lm(torch.tensor([text])).logits, rtol=1e-4, atol=1e-4
    )
    again = read_language(tmp_path / "saved", policy.space, instruction="", dtype="float32")
    reread = CausalLM(policy.settings, policy.space, again).eval()
    torch.testing.assert_close(reread.encode(ITEMS, LENGTHS).hidden, expected.hidden, rtol=1e-4, atol=1e-4)


def test_adapters_in_bfloat16_are_saved_without_a_trace(models: Path, tmp_path: Path) -> None:
    """Saving changes no weight of the live policy, and rounds what is merged once."""
    pytest.importorskip("peft")
    policy = policy_of(models / "llama", train="lora", lora_rank=4, dtype="bfloat16")
    torch.manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.language.save(tmp_path / "saved")
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    layer = policy.language.plain().model.layers[0].self_attn.q_proj
    update = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * layer.scaling["default"]
    saved = load_file(tmp_path / "saved" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(saved, (layer.base_layer.weight.float() + update).to(torch.bfloat16))


def test_generation_settings_of_the_model_do_not_leak(models: Path, tmp_path: Path) -> None:
    """A folder that asks for sampling, top-k and a repetition penalty gives the lists of one that asks for nothing."""
    policy = policy_of(models / "llama")
    expected = exact_lists(policy, ITEMS, LENGTHS, k=5)
    policy.language.save(tmp_path)
    asks = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 9.0, "num_beams": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(asks))
    language = read_language(tmp_path, policy.space, instruction="", dtype="float32")
    other = CausalLM(policy.settings, policy.space, language).eval()
    found = exact_lists(other, ITEMS, LENGTHS, k=5)
    assert torch.equal(found.items, expected.items)
    other.language.save(tmp_path / "again")
    assert not asks.keys() & json.loads((tmp_path / "again" / "generation_config.json").read_text()).keys()


def test_windows_and_scalings_limit_what_is_read() -> None:
    assert readable_positions(config_of("mistral", 300, sliding_window=16)) == 16
    assert (
        readable_positions(config_of("qwen2", 300, use_sliding_window=True, sliding_window=8, max_window_layers=0)) == 8
    )
    assert readable_positions(config_of("qwen2", 300, use_sliding_window=False)) == 256
    longer = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    assert readable_positions(config_of("llama", 300, rope_parameters=longer)) == 64
    fixed = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert readable_positions(config_of("llama", 300, rope_parameters=fixed)) == 256


def test_what_cannot_be_read_is_refused_by_name(models: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="needs --model"):
        make_language("", make_space(CODES), instruction="", dtype="float32")
    with pytest.raises(SettingsError, match="cannot be read"):
        make_language(str(tmp_path), make_space(CODES), instruction="", dtype="float32")
    other = save_model(tmp_path / "other", "llama", ["quite", "different", "words"])
    with pytest.raises(SettingsError, match="written by the tokenizer of"):
        make_language(str(other), titles(models / "llama"), instruction="", dtype="float32")
    with pytest.raises(SettingsError, match="new-tokens would train nothing"):
        policy_of(models / "llama", train="new-tokens")
    with pytest.raises(SettingsError, match="titles are words"):
        policy_of(models / "llama", title_weight=1.0)
    broken = save_model(tmp_path / "broken", "llama", TITLES)
    weights = load_file(broken / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "layers.1" not in n}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match=r"lack \d+ of its weights, such as"):
        make_language(str(broken), make_space(CODES), instruction="", dtype="float32")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:100])
    with pytest.raises(SettingsError, match="cannot be read"):
        make_language(str(broken), make_space(CODES), instruction="", dtype="float32")
    with pytest.raises(SettingsError, match="max_tokens is 8"):
        policy_of(models / "llama", max_tokens=8)
    short = policy_of(models / "llama")
    short.language.max_positions = int(short.encode(ITEMS, LENGTHS).position.max()) + 1
    with pytest.raises(SettingsError, match="expected a lower max_tokens or k"):
        slate_logprobs(short, ITEMS, LENGTHS, torch.tensor([[[1, 0, 2]], [[1, 0, 2]], [[1, 0, 3]]]))


def test_adapters_begin_alike_and_gradients_of_new_rows_follow_the_device(models: Path) -> None:
    pytest.importorskip("peft")
    one, other = (policy_of(models / "llama", codes=True, train="lora").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    gradient = torch.ones(6, 2, device="meta")
    assert only_rows(slice(2, 4), gradient).device.type == "meta"
    assert only_rows(slice(2, 4), torch.ones(6, 2)).sum(dim=1).tolist() == [0, 0, 2, 2, 0, 0]


def test_settings_are_checked() -> None:
    with pytest.raises(SettingsError, match="train is 'some'; expected one of all, lora, new-tokens"):
        CausalLMSettings(train="some")  # type: ignore[arg-type]
    assert replace(CausalLMSettings(), max_items=3).max_items == 3
