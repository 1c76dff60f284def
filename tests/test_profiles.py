"""Who a user is, in words: what a language model reads between its instruction and the history."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sagerec
from sagerec.actions.titles import TitleSettings
from sagerec.catalogue.dataset import USERS, read_dataset
from sagerec.catalogue.profiles import after_words
from sagerec.catalogue.splits import Cases, Sequences, SplitSettings
from sagerec.cli import main
from sagerec.cli.data import describe_dataset
from sagerec.decoding.beam import exact_lists
from sagerec.decoding.cases import read_histories
from sagerec.decoding.slates import slate_logprobs, write_slates
from sagerec.errors import DatasetError, SettingsError
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.policies.causal_lm import CausalLM
from sagerec.policies.language_tasks import tasks_loss
from sagerec.policies.protocol import Policy
from sagerec.policies.registry import PolicySettings
from sagerec.policies.small_lm import SmallLMSettings, new_language_model
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import align, evaluate, make_actions, prepare, train, zero_shot
from sagerec.serving.lists import list_users
from sagerec.training.batches import make_windows, policy_windows
from sagerec.training.settings import TrainSettings
from sagerec.training.target_lists import cut, join_lists, list_loss
from tests.language_models import save_model
from tests.test_alignment import QUICK
from tests.test_causal_lm import HISTORIES, TITLES, naive_logprob, policy_of
from tests.test_serving import names, start, wait_ready

pytest.importorskip("transformers")
WHO = ["likes red things", "", "a nurse"]
TEMPLATE = "{% for turn in messages %}[{{ turn['content'] }}]{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
COLOURS = ("red", "blue")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", [*TITLES, *WHO])


def logprob_after(policy: CausalLM, text: str, history: list[int], before: list[int], item: int) -> float:
    """The twin: log P(item | text, history, before) of one plain pass, the text's parts between | as they stand."""
    tokenizer = policy.language.tokenizer
    start = [tokenizer.bos_token_id] if not text.startswith("[") else []
    for part in text.split("|"):
        start += tokenizer(part, add_special_tokens=False)["input_ids"]
    told: Any = SimpleNamespace(
        space=policy.space, base=policy.base, language=policy.language, prefix=torch.tensor(start, dtype=torch.int64)
    )
    return naive_logprob(told, history, before, item)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("instruction", ["", "What they took:", "template"])
@torch.no_grad()
def test_profiles_are_read_as_they_stand(model: Path, tmp_path: Path, instruction: str, codes: bool) -> None:
    """Lists, slates and the loss of users with a profile and without, in one batch, equal naive passes."""
    says = "What they took:" if instruction else ""
    policy = policy_of(model, codes=codes, instruction=says, profile_tokens=32)
    prefix, texts = f"{says}\n" if says else "", [f"{says}\n|{who}|\n" if says else f"{who}|\n" for who in WHO]
    if instruction == "template":
        policy.language.tokenizer.chat_template = TEMPLATE
        save = tmp_path / "templated"
        policy.language.plain().save_pretrained(save)
        policy.language.tokenizer.save_pretrained(save)
        policy = policy_of(save, codes=codes, instruction=says, profile_tokens=32)
        prefix, texts = f"[{says}]>>", [f"[{says}\n|{who}|]>>" for who in WHO]
    texts[1] = prefix
    items, lengths = np.array([[0, 3, 5], [7, 1, 0], [2, 0, 0]]), np.array([3, 2, 1])
    history, length = map(torch.from_numpy, after_words(policy.profile_words(WHO), items, lengths))
    lists = exact_lists(policy, history, length, k=5, beams=5)
    assert bool(lists.exact.all())
    found = write_slates(policy, history, length, k=3, slates=2, generator=torch.Generator().manual_seed(1))
    again = slate_logprobs(policy, history, length, found.items)
    torch.testing.assert_close(again.tokens.logprobs, found.tokens.logprobs, rtol=1e-5, atol=1e-5)
    for user, taken in enumerate(HISTORIES):
        scores = torch.tensor([logprob_after(policy, texts[user], taken, [], item) for item in range(len(TITLES))])
        torch.testing.assert_close(lists.logprobs[user], scores.topk(5).values, rtol=1e-4, atol=1e-4)
        for slate in range(2):
            own = found.items[user, slate].tolist()
            for place in range(3):
                expected = logprob_after(policy, texts[user], taken, own[:place], own[place])
                assert float(found.scores()[user, slate, place]) == pytest.approx(expected, abs=1e-4)
    windows = make_windows(
        Sequences(np.array([0, 3, 5, 9, 7, 1, 2, 6]), np.array([0, 4, 6, 8]), np.arange(3), items), 9
    )
    batch = map(torch.from_numpy, replace(windows, words=policy.profile_words(WHO)).batch(np.arange(3)))
    pairs = [(0, [0], 3), (0, [0, 3], 5), (0, [0, 3, 5], 9), (1, [7], 1), (2, [2], 6)]
    mean = -np.mean([logprob_after(policy, texts[user], taken, [], item) for user, taken, item in pairs])
    assert float(policy.next_item_loss(*batch)) == pytest.approx(mean, abs=1e-4)


def test_a_profile_is_one_line_that_never_costs_more_than_it_may(model: Path) -> None:
    policy = policy_of(model, profile_tokens=4)
    one, other, none, special = policy.profile_words(
        ["likes  red\nthings ", "likes red things", " \n", "<|endoftext|>"]
    )
    assert policy.profile_words(["<|endoftext|>likes red things"]) == [one]  # left out first, cut then
    assert policy.longest_prompt == len(policy.before_profile) + len(one)
    assert one == other
    assert len(one) == 4 + len(policy.after_profile)
    assert none == special == []
    assert max(one) < -1
    # Old items are dropped to make room for it, whole, and it never is.
    sizes = [len(policy.space.sequence(item)) for item in HISTORIES[0]]
    history, length = after_words([one], np.array([HISTORIES[0]]), np.array([3]))
    policy.budget = sizes[1] + sizes[2]
    token, _, place = policy._text(*map(torch.from_numpy, (history, length)))
    assert sorted({int(p) for p in place}) == [-1, len(one) + 1, len(one) + 2]
    assert len(token) == len(policy.before_profile) + len(one) + sizes[1] + sizes[2]
    with pytest.raises(SettingsError, match="a profile and two of the longest"):
        policy_of(model, profile_tokens=200, max_tokens=210)
    with pytest.raises(SettingsError, match="profile_tokens"):
        policy_of(model, profile_tokens=-1)


def test_a_profile_says_nothing_but_words(model: Path) -> None:
    """No token that begins a turn or stands for a code, no half of a character, no text that cannot be encoded."""
    from transformers import AddedToken

    policy = policy_of(model, codes=True, profile_tokens=6)
    tokenizer = policy.language.tokenizer
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("<turn>", special=False)])
    plain, *others = policy.profile_words(
        ["a comb", "a<|turn|> comb", "<turn>a comb", "<a_0>a comb<b_1>", "a comb\ud800"]
    )
    assert [sorted(own) == sorted(plain) for own in others[:1]] == [True]
    assert others[1] == others[2] == plain
    assert len(others[3]) == len(plain) + 1  # a mark in its place
    (cut,) = policy.profile_words(["é☕é☕é☕é☕"])
    text = tokenizer.decode([-2 - word for word in cut[: len(cut) - len(policy.after_profile)]])
    assert text
    assert "\ufffd" not in text


def test_a_template_without_a_place_for_it_is_refused(model: Path, tmp_path: Path) -> None:
    policy = policy_of(model)
    policy.language.tokenizer.chat_template = "{% for turn in messages %}hello{% endfor %}"
    policy.language.plain().save_pretrained(tmp_path)
    policy.language.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="no place for a profile"):
        policy_of(tmp_path, instruction="Say:", profile_tokens=8)
    assert not policy_of(tmp_path, instruction="Say:").reads_profiles  # and not missed where none is read


@given(data=st.data())
def test_histories_stand_after_their_words(data: st.DataObject) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)))
    words = [data.draw(st.lists(st.integers(-9, -2), max_size=3)) for _ in lengths]
    items = np.zeros((len(lengths), max(1, lengths.max())), dtype=np.int64)
    for row, length in zip(items, lengths, strict=True):
        row[:length] = data.draw(st.lists(st.integers(0, 99), min_size=int(length), max_size=int(length)))
    history, found = after_words(words, items, lengths)
    for row, own in enumerate(words):
        whole = [*own, *items[row, : lengths[row]]]
        assert (history[row, : found[row]].tolist(), found[row]) == (whole, len(whole))
        assert not history[row, found[row] :].any()


def test_policies_that_read_none_are_given_none() -> None:
    class Plain(Policy[Any, Any]):
        max_items = 2

    class Reader(Plain):
        reads_profiles = True

        def profile_words(self, profiles: Any) -> list[list[int]]:
            return [[-2 - len(profile)] if profile else [] for profile in profiles]

    who = pl.Series(["nobody", "", "abc"])
    sequences = Sequences(
        np.arange(7, dtype=np.int32), np.array([0, 4, 7]), np.array([2, 1]), np.arange(7), profiles=who
    )
    users, rows = np.array([2, 1]), np.array([3, 6])
    cases = Cases(users, np.array([3, 6]), rows, np.array([0, 4]), np.arange(7), profiles=who)
    assert policy_windows(Plain(), sequences).words == ()
    assert read_histories(Plain(), cases, np.arange(2))[0].tolist() == [[1, 2], [4, 5]]
    assert read_histories(Reader(), cases.take(np.array([0])), np.arange(1))[0].tolist() == [[-5, 1, 2]]
    assert read_histories(Reader(), cases, np.array([1, 0]))[0].tolist() == [[4, 5, 0], [-5, 1, 2]]
    windows = policy_windows(Reader(), sequences)  # each window of a user begins with it
    batch = windows.batch(np.arange(len(windows)))
    assert sorted(map(tuple, batch[0].tolist())) == [(-5, 0, 0), (-5, 1, 2), (4, 5, 0)]
    counted = {tuple(row): list(own) for row, own in zip(batch[0].tolist(), batch[2].tolist(), strict=True)}
    assert counted[-5, 1, 2] == [False, True, True]
    lengths, events = cut(*map(torch.from_numpy, batch))
    assert bool((lengths > torch.tensor([row[0] < 0 for row in batch[0].tolist()])).all())  # an item at least
    assert bool((events[:, 0] >= 1).all())


def write_colours(folder: Path) -> Path:
    """A log in which who a user is says what colour comes next, and the history says nothing."""
    rng = np.random.default_rng(0)
    things = ("soap", "comb", "nail", "tea", "brush", "oil")
    titles = [
        *("plain cup", "plain pen", "plain bag"),
        *(f"{colour} {thing}" for colour in COLOURS for thing in things),
    ]
    ids = [f"i{item}" for item in range(len(titles))]
    folder.mkdir()
    pl.DataFrame({"item_id": ids, "title": titles}).write_parquet(folder / "items.parquet")
    rows = []
    for user in range(300):
        taken = [*rng.permutation(3)[:2], 3 + user % 2 * 6 + rng.integers(6)]
        part = ("train", "align", "valid", "test")[np.searchsorted([180, 220, 260], user, side="right")]
        rows += [(f"u{user}", ids[item], t, part if t == 2 else "train") for t, item in enumerate(taken)]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "split"], orient="row")
    log.write_parquet(folder / "interactions.parquet")
    users = [(f"u{user}", f"likes {COLOURS[user % 2]}", 30) for user in range(300)]
    table = pl.DataFrame([*users, ("stranger", None, 1)], schema=["user_id", "profile", "age"], orient="row")
    table.write_parquet(folder / USERS)
    return folder


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose policy reads profiles, aligned; tests must not change it."""
    folder = tmp_path_factory.mktemp("colours")
    data = read_dataset(write_colours(folder / "data"))
    model = folder / "lm"
    new_language_model(
        model, [*data.texts(), "likes red", "likes blue"], SmallLMSettings(parameters="60K", vocabulary=320)
    )
    run = prepare(folder / "data", folder / "run", SplitSettings())
    make_actions(run, TitleSettings(model=str(model)))
    reader = PolicySettings(kind="causal-lm", model=str(model), max_items=4, profile_tokens=8, free_weight=0.2)
    train(run, reader, TrainSettings(epochs=12, batch_size=16, learning_rate=5e-3, validate_every=0))
    align(run, replace(QUICK, start="supervised", max_contexts=0), name="sage")
    return open_run(folder / "run")


def test_what_a_profile_tells_is_learnt_aligned_and_served(coloured: Run, tmp_path: Path) -> None:
    measured = EvaluateSettings(k=(6,), beams=15, bootstrap_samples=100)
    for name in ("policy", "policy-sage"):
        assert evaluate(coloured, measured, name=name, device="cpu")["metrics"]["recall@6"]["value"] > 0.9
    free = evaluate(coloured, replace(measured, lists="free"), device="cpu")
    assert free["metrics"]["recall@6"]["value"] > 0.5
    # The same weights without it hardly know better than chance, which is one half.
    blind = coloured.data
    guess = evaluate(Run(coloured.folder, replace(blind, profiles=None), coloured.split), replace(measured, beams=16))
    assert guess["metrics"]["recall@6"]["value"] < 0.75
    recommender = sagerec.load(coloured.folder, policy="policy-sage", device="cpu")
    for colour in COLOURS:
        for slate in (False, True):
            found = recommender.recommend(["i0", "i1"], k=4, profile=f"likes {colour}", slate=slate)
            assert all(title.startswith(colour) for title in found["title"][: 1 if slate else 4])


def test_every_history_of_an_alignment_says_whose_it_is(
    coloured: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts, loss, anchor, replay, checks and validations: none is given a history without the user's own words."""
    run = open_run(shutil.copytree(coloured.folder, tmp_path / "run"))
    reader = run.policy(device="cpu")
    known = {tuple(reader.profile_words([f"likes {colour}"])[0]): colour for colour in COLOURS}
    asked: list[tuple[str, str]] = []

    def watch(name: str) -> None:
        plain = getattr(CausalLM, name)

        def watched(self: CausalLM, items: torch.Tensor, *rest: Any, **more: Any) -> Any:
            for row in items.tolist():
                words = tuple(entry for entry in row if entry < 0)
                assert tuple(row[: len(words)]) == words
                asked.append((name, known[words]))
            return plain(self, items, *rest, **more)

        monkeypatch.setattr(CausalLM, name, watched)

    for name in ("encode", "next_item_loss", "n_targets", "text_logprobs", "sample_texts"):
        watch(name)
    quick = replace(QUICK, start="supervised", epochs=1, replay_weight=1.0, k=2, slates=4)
    align(run, quick, name="two")
    align(run, replace(quick, k=1, reward=("validity=1",)), name="free")
    assert set(asked) == {(name, colour) for name in {name for name, _ in asked} for colour in COLOURS}
    assert {name for name, _ in asked} >= {"encode", "next_item_loss", "sample_texts", "text_logprobs"}


def test_words_are_no_items_to_the_other_losses(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles of a history, and target lists, are made of its items alone."""
    policy = policy_of(model, codes=True, title_weight=1.0, profile_tokens=8)
    taken = Sequences(np.array([0, 3, 5, 9, 7, 1, 2, 6]), np.array([0, 4, 8]), np.arange(2), np.arange(8))
    windows = make_windows(taken, 3)
    told = replace(windows, words=[policy.profile_words(["likes red"])[0]] * len(windows))
    every = np.arange(len(windows))
    plain, spoken = ([torch.from_numpy(x) for x in w.batch(every)] for w in (windows, told))
    torch.testing.assert_close(tasks_loss(policy, *spoken), tasks_loss(policy, *plain))
    seen: list[Any] = []

    def join(events: torch.Tensor, taught: torch.Tensor, *, k: int) -> Any:
        seen.append(events)
        return join_lists(events, taught, k=k)

    def scored(*given: Any, excluded: torch.Tensor) -> torch.Tensor:
        seen.append(excluded)
        return torch.zeros(())

    monkeypatch.setattr("sagerec.training.target_lists.join_lists", join)
    monkeypatch.setattr("sagerec.training.target_lists.rest_loss", scored)
    cluster = torch.zeros(len(TITLES), dtype=torch.int64)
    swap = [torch.where(x == 0, 11, torch.where(x == 11, 0, x)) for x in spoken[:2]]  # so that 0 is not always had
    items, targets = (torch.where(x == 9, 0, s) for x, s in zip(spoken[:2], swap, strict=True))
    for seed in range(20):
        torch.manual_seed(seed)
        list_loss(policy, items, targets, spoken[2], cluster, variety=0.5, repeats=False)
    events, excluded = seen[::2], seen[1::2]
    assert all(bool((own >= -1).all()) for own in excluded)
    assert any(bool((own == 0).any()) for own in events)  # nor does a word stand for the item 0


def test_lists_of_users_read_who_they_are(coloured: Run, tmp_path: Path) -> None:
    red = {f"i{item}" for item in range(3, 9)}
    tables = {
        "known": pl.DataFrame({"user_id": ["u0", "u1"]}),
        "told": pl.DataFrame(
            {"user_id": ["x", "u0"], "history": [["i0", "i1"]] * 2, "profile": ["likes red", "likes blue"]}
        ),
        "strange": pl.DataFrame({"user_id": ["x"], "history": [["i0"]]}),
    }
    lists: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    for name, table in tables.items():
        table.write_parquet(tmp_path / f"{name}.parquet")
        list_users(coloured, tmp_path / f"{name}.parquet", tmp_path / f"{name}-lists.parquet", k=4, device="cpu")
        made = pl.read_parquet(tmp_path / f"{name}-lists.parquet")
        lists[name], scores[name] = made["items"].to_list(), made["scores"].to_list()
    assert [set(own) <= red for own in lists["told"]] == [True, False]
    recommender, data = sagerec.load(coloured.folder, device="cpu"), coloured.data
    for user, found in zip((0, 1), lists["known"], strict=True):
        row = int(data.user_ids.index([f"u{user}"])[0])
        history = data.item_ids.external(data.event_items[data.user_offsets[row] : data.user_offsets[row + 1]])
        expected = recommender.recommend(history, k=4, profile=f"likes {COLOURS[user]}")
        assert found == expected["item_id"].to_list() != recommender.recommend(history, k=4)["item_id"].to_list()
    assert lists["strange"] == [recommender.recommend(["i0"], k=4)["item_id"].to_list()]
    # Of whom the table says nothing, the log's users keep what the dataset says.
    pl.DataFrame({"user_id": ["u0", "u1"], "profile": [None, "likes red"]}).write_parquet(tmp_path / "some.parquet")
    list_users(coloured, tmp_path / "some.parquet", tmp_path / "some-lists.parquet", k=4, device="cpu")
    some = pl.read_parquet(tmp_path / "some-lists.parquet")["scores"].to_list()
    assert some[0] == pytest.approx(scores["known"][0], abs=1e-5)
    assert some[1] != pytest.approx(scores["known"][1], abs=1e-2)
    pl.DataFrame({"user_id": ["u0"], "profile": [3]}).write_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DatasetError, match="'profile' has type Int64"):
        list_users(coloured, tmp_path / "bad.parquet", tmp_path / "out.parquet")


def test_the_command_line_takes_a_profile(coloured: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", str(coloured.folder), "--history", "i0,i1", "--profile", "likes blue", "-k", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("blue ") == 3
    assert "red " not in printed


def test_profiles_are_part_of_the_dataset(coloured: Run, tmp_path: Path) -> None:
    folder = write_colours(tmp_path / "data")
    data = read_dataset(folder)
    assert data.profiles is not None
    assert data.profiles.to_list() == [f"likes {COLOURS[int(u[1:]) % 2]}" for u in data.user_ids.ids]
    before = prepare(folder, tmp_path / "run", SplitSettings()).manifest("dataset").content_hash
    users = pl.read_parquet(folder / USERS)
    users.filter(pl.col("user_id") != "u3").write_parquet(folder / USERS)
    run = prepare(folder, tmp_path / "run", SplitSettings())
    assert describe_dataset(run.data)["users_with_profile"] == 299
    assert run.manifest("dataset").content_hash != before
    assert run.data.profiles is not None
    assert dict(zip(run.data.user_ids.ids, run.data.profiles, strict=True))["u3"] == ""
    users.drop("profile").write_parquet(folder / USERS)  # another table of that name is carried along unread
    assert read_dataset(folder).profiles is None
    faults = {
        "more than once": pl.concat([users, users[:1]]),
        "'user_id' is missing": users.drop("user_id"),
        "expected text": users.with_columns(profile=1.5),
        "has no row": users.clear(),
    }
    for said, table in faults.items():
        table.write_parquet(folder / USERS)
        with pytest.raises(DatasetError, match=said) as error:
            read_dataset(folder)
        assert USERS in str(error.value)
    (folder / USERS).unlink()
    (folder / USERS).mkdir()
    with pytest.raises(DatasetError, match=USERS):
        read_dataset(folder)


def test_a_policy_that_reads_profiles_needs_some(coloured: Run, tmp_path: Path) -> None:
    folder = write_colours(tmp_path / "data")
    table = pl.read_parquet(folder / USERS)
    table.with_columns(user_id="x" + pl.col("user_id")).write_parquet(folder / USERS)  # of nobody in the log
    model = str(coloured.folder.parent / "lm")
    run = prepare(folder, tmp_path / "run", SplitSettings())
    make_actions(run, TitleSettings(model=model))
    reader = PolicySettings(kind="causal-lm", model=model, profile_tokens=8)
    with pytest.raises(SettingsError, match=r"none of its users .* expected users\.parquet"):
        train(run, reader, TrainSettings(epochs=1))
    with pytest.raises(SettingsError, match="none of its users"):
        zero_shot(run, reader)


def test_a_policy_that_reads_no_profile_says_so(small_run: Run) -> None:
    recommender = sagerec.load(small_run.folder, device="cpu")
    with pytest.raises(SettingsError, match="reads no profiles"):
        recommender.recommend(small_run.data.item_ids.external([1]), profile="a nurse")


def test_the_server_takes_a_profile_for_a_policy_that_reads_it(coloured: Run, small_run: Run, tmp_path: Path) -> None:
    """Queries of several users and of nobody, answered together, as the library answers each."""
    recommender = sagerec.load(coloured.folder, device="cpu")
    profiles = ["likes red", "likes blue", ""]
    with start(coloured.folder, tmp_path / "state") as client:
        wait_ready(client)
        queries = [{"history": ["i0", "i1"], "k": 4, "profile": profile} for profile in profiles]
        got = client.post("/recommend/batch", json={"queries": queries}).json()
        for profile, one in zip(profiles, got["answers"], strict=True):
            assert names(one) == recommender.recommend(["i0", "i1"], k=4, profile=profile)["item_id"].to_list()
        slate = client.post("/recommend", json={"history": ["i0"], "k": 2, "profile": "likes red", "kind": "slate"})
        found = recommender.recommend(["i0"], k=2, profile="likes red", slate=True)
        assert names(slate.json()) == found["item_id"].to_list()
        assert client.post("/recommend", json={"history": ["i0"], "profile": "x" * 4001}).status_code == 422
    with start(small_run.folder, tmp_path / "other") as client:
        wait_ready(client)
        ids = small_run.data.item_ids.ids.to_list()
        refused = client.post("/recommend", json={"history": ids[:1], "profile": "a nurse"})
        assert refused.status_code in (400, 422)
        assert "reads no profiles" in refused.text
