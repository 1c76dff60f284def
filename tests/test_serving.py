"""The server: what it answers, refuses, logs and counts; swaps of versions; all in this process, through ASGI."""

import asyncio
import gc
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.catalogue.dataset import CATEGORIES
from sagerec.decoding.beam import exact_lists
from sagerec.recommend import load
from sagerec.run.additions import add_items
from sagerec.run.folder import Run
from sagerec.serving import answers
from sagerec.serving import app as serving_app
from sagerec.serving.app import create_app
from sagerec.serving.batching import QueueFullError
from sagerec.serving.gate import ADMIN_TOKEN, TOKEN, JsonLines
from sagerec.serving.queries import Query
from sagerec.serving.settings import COLD_EVENTS, ServeSettings
from sagerec.serving.versions import begin, open_version

SETTINGS = ServeSettings(device="cpu", wait_seconds=0)


def start(run: Path, state: Path, settings: ServeSettings = SETTINGS) -> TestClient:
    """A client of a server that is not running yet."""
    begin(run, state, settings.policy)
    return TestClient(create_app(run, state, settings), raise_server_exceptions=False)


def wait_ready(client: TestClient) -> TestClient:
    """The client, once its server answers."""
    for _ in range(600):
        if client.get("/ready").status_code == 200:
            return client
        time.sleep(0.05)
    raise AssertionError(client.get("/ready").text)


@pytest.fixture(scope="module")
def client(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server of the small run."""
    with start(small_run.folder, tmp_path_factory.mktemp("state")) as client:
        yield wait_ready(client)


@pytest.fixture(scope="module")
def ids(small_run: Run) -> list[str]:
    """Item ids."""
    found: list[str] = small_run.data.item_ids.ids.to_list()
    return found


@pytest.fixture(scope="module")
def ranked(small_run: Run, ids: list[str]) -> Callable[[list[str]], list[tuple[str, float]]]:
    """Every item and its score, best first: what filters are compared with."""
    policy = small_run.policy(device="cpu")

    def rank(history: list[str]) -> list[tuple[str, float]]:
        items = torch.tensor([[ids.index(item) for item in history]])
        lists = exact_lists(policy, items, torch.tensor([len(history)]), k=len(ids), beams=len(ids))
        pairs = zip(lists.items[0].tolist(), lists.logprobs[0].tolist(), strict=True)
        return [(ids[item], score) for item, score in pairs if item >= 0]

    return rank


def ask(client: TestClient, **query: Any) -> dict[str, Any]:
    """The answer to a query that has one."""
    got = client.post("/recommend", json=query)
    assert got.status_code == 200, got.text
    answer: dict[str, Any] = got.json()
    return answer


def names(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def test_the_least_request_is_answered_as_the_library_answers(client: TestClient, small_run: Run, ids: Any) -> None:
    history = [ids[3], ids[1], ids[4]]
    answer = ask(client, history=history)
    table = load(small_run.folder, device="cpu").recommend(history)
    assert names(answer) == table["item_id"].to_list()
    assert [item["title"] for item in answer["items"]] == table["title"].to_list()
    assert [item["score"] for item in answer["items"]] == pytest.approx(table["score"].to_list(), abs=1e-4)
    categories = small_run.data.items[CATEGORIES].to_list()
    assert answer["items"][0]["categories"] == categories[ids.index(names(answer)[0])]
    assert {key: answer[key] for key in ("policy", "unknown", "short", "seed")} == {
        "policy": "policy",
        "unknown": [],
        "short": None,
        "seed": None,
    }
    assert answer["version"] == client.get("/info").json()["version"]


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_filters_are_exact(client: TestClient, small_run: Run, ids: Any, ranked: Any, data: st.DataObject) -> None:
    """Against every item scored, and the filters applied to that: the k best of what remains."""
    categories = dict(zip(ids, small_run.data.items[CATEGORIES].to_list(), strict=True))
    every = sorted({name for found in categories.values() for name in found})
    some, item = st.lists(st.sampled_from(every), max_size=3), st.sampled_from(ids)
    history = data.draw(st.lists(item, min_size=1, max_size=5))
    k = data.draw(st.integers(1, 40))
    filters: dict[str, Any] = {
        "categories_in": data.draw(st.none() | some),
        "categories_out": data.draw(some),
        "items_in": data.draw(st.none() | st.lists(item, max_size=60)),
        "items_out": data.draw(st.lists(item, max_size=20)),
        "cold_only": data.draw(st.booleans()),
        "min_score": data.draw(st.none() | st.floats(-9, -2)),
    }
    exclude = data.draw(st.booleans())
    counts = np.bincount(
        small_run.data.event_items[small_run.split.mask("train", "align")], minlength=small_run.data.n_items
    )
    expected = [
        (name, score)
        for name, score in ranked(history)
        if (filters["categories_in"] is None or set(categories[name]) & set(filters["categories_in"]))
        and not set(categories[name]) & set(filters["categories_out"])
        and (filters["items_in"] is None or name in filters["items_in"])
        and name not in filters["items_out"]
        and not (exclude and name in history)
        and (not filters["cold_only"] or counts[ids.index(name)] <= COLD_EVENTS)
        and (filters["min_score"] is None or score >= filters["min_score"])
    ][:k]
    answer = ask(client, history=history, k=k, exclude_history=exclude, filters=filters)
    assert names(answer) == [name for name, _ in expected]
    assert [found["score"] for found in answer["items"]] == pytest.approx([s for _, s in expected], abs=1e-4)
    assert (answer["short"] is None) == (len(expected) == k)


@given(most=st.integers(1, 4), k=st.integers(1, 60), first=st.integers(0, 199))
@settings(max_examples=15, deadline=None)
def test_a_diversity_filter_is_exact(
    client: TestClient, small_run: Run, ids: Any, ranked: Any, most: int, k: int, first: int
) -> None:
    """Place by place the best item whose narrowest category is not full yet, from every item scored."""
    categories = dict(zip(ids, map(set, small_run.data.items[CATEGORIES].to_list()), strict=True))
    sizes = Counter(name for found in categories.values() for name in found)
    full: Counter[str] = Counter()
    expected: list[str] = []
    for name, _ in ranked([ids[first]]):
        # Of equally small categories the last by name.
        narrowest = max(categories[name], key=lambda c: (-sizes[c], c))
        if name != ids[first] and full[narrowest] < most and len(expected) < k:
            expected.append(name)
            full[narrowest] += 1
    answer = ask(client, history=[ids[first]], k=k, filters={"max_per_category": most})
    assert names(answer) == expected


def test_fewer_than_k_are_said_to_be_fewer(client: TestClient, ids: Any) -> None:
    answer = ask(client, history=[ids[0]], k=5, filters={"items_in": [ids[0], ids[7], "nope"]})
    assert names(answer) == [ids[7]]
    assert answer["short"] == "1 of 5: the filters leave no more"
    assert answer["unknown"] == ["nope"]
    assert ask(client, history=[ids[0]], k=500)["short"] == "199 of 500: history and catalogue leave no more"
    floor = ask(client, history=[ids[0]], k=5, filters={"min_score": 0})
    assert floor["short"] == "0 of 5: no other item has a score of 0.0 or above"
    nothing = ask(client, history=[ids[0]], kind="slate", filters={"items_in": []})
    assert (nothing["items"], nothing["short"]) == ([], "0 of 10: the filters leave no more")


def test_unknown_ids_are_named_or_refused(client: TestClient, ids: Any) -> None:
    answer = ask(client, history=["nope", ids[2], "neither", "nope"])
    assert answer["unknown"] == ["nope", "neither"]
    assert names(answer) == names(ask(client, history=[ids[2]]))
    refused = client.post("/recommend", json={"history": [ids[2], "nope"], "unknown": "refuse"})
    assert refused.status_code == 422
    assert refused.json() == {"error": "history has 1 unknown ids, the first 'nope'; expected none"}
    none = client.post("/recommend", json={"history": ["nope"]})
    assert none.status_code == 422
    assert none.json() == {"error": "history has no id of the catalogue, the first is 'nope'; expected at least one"}
    wrong = client.post("/recommend", json={"history": [ids[0]], "filters": {"categories_in": ["x"]}})
    assert wrong.status_code == 422
    assert wrong.json()["error"].startswith("filters.categories_in has 'x'; expected some of the ")
    other = client.post("/recommend", json={"history": [ids[0]], "policy": "policy-x"})
    assert other.json() == {"error": "policy is 'policy-x'; expected one of policy"}


def test_a_drawn_slate_hangs_on_its_seed_alone(client: TestClient, ids: Any) -> None:
    query = {"history": [ids[5]], "kind": "slate", "k": 6, "temperature": 1.0, "filters": {"items_out": ids[:50]}}
    one = ask(client, **query, seed=11)
    assert len(set(names(one))) == 6
    assert not set(names(one)) & set(ids[:50])
    others = [{**query, "seed": seed, "history": [ids[seed]]} for seed in range(5)]
    both = client.post("/recommend/batch", json={"queries": [*others, {**query, "seed": 11}]}).json()["answers"]
    assert names(both[-1]) == names(one)
    assert names(ask(client, **query, seed=12)) != names(one)
    drawn = ask(client, **query)
    assert names(ask(client, **query, seed=drawn["seed"])) == names(drawn)
    assert all(sum(item["logprobs"]) == pytest.approx(item["score"], abs=1e-4) for item in one["items"])
    assert all(len(item["tokens"]) >= len(item["logprobs"]) for item in one["items"])
    greedy = ask(client, history=[ids[5]], kind="slate", k=1)
    assert names(greedy) == names(ask(client, history=[ids[5]], k=1))
    assert greedy["seed"] is None


def test_a_batch_answers_each_query_as_if_alone(client: TestClient, ids: Any) -> None:
    queries = [
        {"history": [ids[i]], "k": 1 + 7 * i, "filters": {"cold_only": i % 2 == 1, "items_out": ids[i : i + 3]}}
        for i in range(8)
    ]
    together = client.post("/recommend/batch", json={"queries": queries}).json()["answers"]
    for query, answer in zip(queries, together, strict=True):
        alone = ask(client, **query)
        assert names(alone) == names(answer)
    wrong = client.post("/recommend/batch", json={"queries": [queries[0], {"history": ["nope"]}]})
    assert wrong.json()["error"].startswith("queries[1]: history has no id of the catalogue")


def test_items_are_found_by_words_and_ids(client: TestClient, small_run: Run, ids: Any) -> None:
    item = client.get(f"/items/{ids[9]}").json()
    assert item["title"] == small_run.data.titles([9])[0]
    word = item["title"].split()[0]
    found = client.get("/items", params={"words": word.upper(), "limit": 100}).json()["items"]
    assert ids[9] in [one["item_id"] for one in found]
    assert all(word.lower() in one["title"].lower() for one in found)
    assert client.get("/items/no/such").json()["error"].startswith("no item 'no/such'; expected one of the 200")
    assert client.get("/items?limit=0").status_code == 422
    assert client.get("/items?limit=0").json()["error"].startswith("limit is '0'; expected greater than or equal to 1")


REFUSED = [
    (b"", "the body is no JSON"),
    (b"{", "the body is no JSON"),
    (b'{"history": ["a"], "k": NaN}', "k is nan; expected"),
    (b'{"history": ["a"], "k": 1e999}', "k is inf; expected"),
    (b'{"history": ["\xff\xfe"]}', "the body is no JSON"),
    (b'{"history": ["\\ud800"]}', "the body is no JSON"),
    (b"[" * 100_000, "the body is no JSON"),
    (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "the body is no JSON"),
    (b"[]", "the body is a list of 0; expected"),
    (b"null", "the body is null; expected"),
    (b'{"k": 3}', "history is missing; expected it"),
    (b'{"history": "a"}', "history is 'a'; expected a valid array"),
    (b'{"history": []}', "history is a list of 0; expected"),
    (b'{"history": [1]}', "history[0] is 1; expected a valid string"),
    (b'{"history": ["a", null]}', "history[1] is null; expected a valid string"),
    (b'{"history": [""]}', "history[0] is ''; expected"),
    (b'{"history": ["a"], "": 1}', "'' is no field of a query; expected some of history, k, policy"),
    (b'{"history": ["a"], "kind": "slate", "k": 101}', "k is 101; expected at most 100 items of a slate"),
    (b'{"history": ["' + b"a" * 513 + b'"]}', "history[0] is 'aaa"),
    (b'{"history": ["a"], "k": 0}', "k is 0; expected greater than or equal to 1"),
    (b'{"history": ["a"], "k": 1001}', "k is 1001; expected less than or equal to 1000"),
    (b'{"history": ["a"], "k": ' + b"9" * 4000 + b"}", "k is a whole number of many digits; expected"),
    (b'{"history": ["a"], "k": "10"}', "k is '10'; expected a valid integer"),
    (b'{"history": ["a"], "k": true}', "k is true; expected a valid integer"),
    (b'{"history": ["a"], "hystory": 1}', "hystory is no field of a query; expected some of history, k, policy"),
    (b'{"history": ["a"], "filters": {"x": 1}}', "filters.x is no field of a query; expected some of categories_in"),
    (b'{"history": ["a"], "filters": {"min_score": NaN}}', "filters.min_score is nan; expected a finite number"),
    (b'{"history": ["a"], "filters": 3}', "filters is 3; expected"),
    (b'{"history": ["a"], "kind": "both"}', "kind is 'both'; expected 'list' or 'slate'"),
    (b'{"history": ["a"], "seed": 3}', "temperature, top_p and seed are of slates"),
    (b'{"history": ["a"], "kind": "slate", "temperature": 1e-9}', "temperature is 1e-09; expected 0, or at least"),
    (
        b'{"history": ["a"], "kind": "slate", "filters": {"min_score": 0}}',
        "min_score and max_per_category are of lists",
    ),
    (b'{"history": ["a"], "kind": "slate", "seed": -1}', "seed is -1; expected greater than or equal to 0"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_what_is_malformed_is_refused_by_name(client: TestClient, body: bytes, message: str) -> None:
    got = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert got.status_code == 422
    assert got.json()["error"].startswith(message), got.text
    assert len(got.content) < 1000


def test_a_body_of_another_type_or_too_long_is_refused(client: TestClient) -> None:
    other = client.post("/recommend", content=b"{}", headers={"content-type": "text/plain"})
    assert (other.status_code, other.json()["error"]) == (415, "content-type is text/plain; expected application/json")
    many = client.post("/recommend", json={"history": ["a"] * 10**6})
    assert many.status_code == 413
    assert many.json()["error"].endswith("bytes; expected at most 1,048,576")
    ids = client.post("/recommend", json={"history": ["a"] * 10_001})
    assert (ids.status_code, ids.json()["error"][:43]) == (422, "history is a list of 10,001; expected list ")

    def chunks() -> Iterator[bytes]:
        """A body that does not say how long it is."""
        yield from [b"[" * 2**16] * 17

    streamed = client.post("/recommend", content=chunks(), headers={"content-type": "application/json"})
    assert streamed.status_code == 413
    assert client.get("/nope").status_code == 404
    assert client.get("/recommend").json() == {"error": "method GET; expected POST"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["history", "k", "policy", "exclude_history", "filters", "kind", "temperature", "top_p", "seed", "unknown"]


def test_a_thousand_malformed_requests_are_no_fault_of_the_server(client: TestClient) -> None:
    """Random JSON for the body, for each field, and random bytes: never a 5xx, always a reason."""
    seen: dict[int, int] = {}

    def send(body: bytes) -> None:
        path = "/recommend/batch" if len(body) % 3 == 0 else "/recommend"
        got = client.post(path, content=body, headers={"content-type": "application/json"})
        seen[got.status_code] = seen.get(got.status_code, 0) + 1
        assert got.status_code == 422, (body, got.text)
        assert "; expected " in got.json()["error"]
        assert "Traceback" not in got.text

    @given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1) | JSON)
    @settings(max_examples=600, deadline=None)
    def of_json(value: Any) -> None:
        send(json.dumps(value).encode())

    @given(st.binary(max_size=200))
    @settings(max_examples=400, deadline=None)
    def of_bytes(body: bytes) -> None:
        send(body)

    of_json()
    of_bytes()
    assert sum(seen.values()) >= 1000


def test_openapi_describes_queries_and_answers(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    known = set(schema["components"]["schemas"])
    assert {"Query", "QueryBatch", "FilterQuery", "Answer", "AnswerBatch", "Item", "Problem"} <= known
    text = json.dumps(schema)
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= known
    assert schema["paths"]["/recommend"]["post"]["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Query"
    }
    assert schema["components"]["schemas"]["Query"]["required"] == ["history"]


def test_logs_are_json_and_hold_no_history(
    client: TestClient, ids: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO):
        ask(client, history=[ids[8], "secret-item"])
        client.get(f"/items/{ids[8]}")

        def broken(jobs: Any) -> list[Any]:
            raise ValueError(f"of {ids[8]}")

        monkeypatch.setattr(client.app.state.service.batcher, "_decode", broken)  # type: ignore[attr-defined]
        failed = client.post("/recommend", json={"history": [ids[8]]})
    assert failed.status_code == 500
    assert failed.json() == {"error": "the server failed; its log says where"}
    lines = [JsonLines().format(record) for record in caplog.records if record.name.startswith("sagerec")]
    said = [json.loads(line) for line in lines]
    requests = [one for one in said if one["logger"] == "sagerec.serving.requests"]
    assert requests[0]["route"] == "/recommend"
    assert (requests[0]["status"], requests[0]["queries"], requests[0]["policy"]) == (200, 1, "policy")
    assert any(one.get("error") == "ValueError" for one in said)
    assert not any(ids[8] in line or "secret-item" in line for line in lines)


def test_metrics_count_requests_and_batches(client: TestClient, ids: Any) -> None:
    def count(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    name = 'sagerec_requests_total{route="/recommend",status="200"}'
    before, rows = count(name), count("sagerec_batch_rows_sum")
    ask(client, history=[ids[0]])
    client.post("/recommend/batch", json={"queries": [{"history": [ids[0]]}] * 3})
    assert count(name) == before + 1
    assert count("sagerec_batch_rows_sum") == rows + 4
    assert count("sagerec_request_seconds_count") > 0


def test_tokens_guard_questions_and_admin_routes(
    small_run: Run, ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: TestClient
) -> None:
    off = client.post("/admin/reload")
    assert off.status_code == 404
    assert "admin routes are off" in off.json()["error"]
    monkeypatch.setenv(TOKEN, "reader")
    monkeypatch.setenv(ADMIN_TOKEN, "writer")
    with start(small_run.folder, tmp_path) as guarded:
        wait_ready(guarded)
        query: dict[str, Any] = {"json": {"history": [ids[0]]}}
        for headers in ({}, {"authorization": "Bearer writer"}, {"authorization": "reader"}):
            got = guarded.post("/recommend", **query, headers=headers)
            assert got.status_code == 401
            assert got.headers["www-authenticate"] == "Bearer"
        assert guarded.post("/recommend", **query, headers={"authorization": "Bearer reader"}).status_code == 200
        assert [guarded.get(path).status_code for path in ("/", "/health", "/page/page.js")] == [200, 200, 200]
        assert [guarded.get(path).status_code for path in ("/info", "/items", "/metrics")] == [401, 401, 401]
        assert guarded.post("/admin/rollback", headers={"authorization": "Bearer reader"}).status_code == 401
        none = guarded.post("/admin/rollback", headers={"authorization": "Bearer writer"})
        assert none.status_code == 409
        assert none.json()["error"].startswith("there is no earlier version")


def test_reload_takes_new_items_and_rollback_brings_the_old_version_back(
    small_run: Run, ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version's answers are whole its own; a damaged run is refused, and the version in use goes on."""
    monkeypatch.setenv(ADMIN_TOKEN, "t")
    admin = {"authorization": "Bearer t"}
    run = tmp_path / "run"
    shutil.copytree(small_run.folder, run)
    with start(run, tmp_path / "state") as client:
        first = wait_ready(client).get("/ready").json()["version"]
        same = client.post("/admin/reload", headers=admin).json()
        assert (same["version"], same["changed"], same["generation"]) == (first, False, 0)
        before = ask(client, history=[ids[0]], k=250)
        new = small_run.data.items.head(1).with_columns(item_id=pl.lit("fresh"), title=pl.lit("A fresh item"))
        new.write_parquet(tmp_path / "new.parquet")
        add_items(run, tmp_path / "new.parquet")
        assert ask(client, history=[ids[0]], k=250) == before  # what is written meanwhile is not what is served
        swap = client.post("/admin/reload", headers=admin).json()
        assert (swap["previous"], swap["changed"], swap["generation"]) == (first, True, 1)
        after = ask(client, history=[ids[0]], k=250)
        assert after["version"] == swap["version"] != first
        assert set(names(after)) - set(names(before)) == {"fresh"}
        back = client.post("/admin/rollback", headers=admin).json()
        assert (back["version"], back["previous"], back["generation"]) == (first, swap["version"], 2)
        assert ask(client, history=[ids[0]], k=250) == before
        weights = run / "policy" / "model.safetensors"
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        stamp = weights.stat()
        weights.unlink()
        weights.write_bytes(bytes(damaged))
        os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # only reading it whole shows the damage
        refused = client.post("/admin/reload", headers=admin)
        assert refused.status_code == 409
        assert "was changed after it was written" in refused.json()["error"]
        assert refused.json()["error"].endswith("; the version in use goes on")
        assert ask(client, history=[ids[0]], k=250) == before
        assert sorted(p.name for p in (tmp_path / "state" / "versions").iterdir()) == sorted([first, swap["version"]])


def test_a_request_that_takes_too_long_is_ended(
    small_run: Run, ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit is of the request: the batch goes on, and the server answers the next one."""
    real = answers.answer
    slow = {"seconds": 0.0}

    def answer(jobs: Any) -> list[Any]:
        time.sleep(slow["seconds"])
        return real(jobs)

    monkeypatch.setattr(serving_app, "answer", answer)
    with start(small_run.folder, tmp_path, replace(SETTINGS, timeout_seconds=0.4, queue=1)) as client:
        wait_ready(client)
        many = client.post("/recommend/batch", json={"queries": [{"history": [ids[0]]}] * 2})
        assert many.json() == {"error": "queries has 2; expected at most 1"}
        slow["seconds"] = 0.8
        late = client.post("/recommend", json={"history": [ids[0]]})
        assert late.status_code == 504
        assert late.json()["error"].startswith("not answered in 0.4 s")
        slow["seconds"] = 0.0
        time.sleep(0.8)
        assert client.post("/recommend", json={"history": [ids[0]]}).status_code == 200


@pytest.mark.parametrize(
    ("message", "status", "error"),
    [
        (None, 408, "the body was not sent in 0.05 s; expected it at once"),
        ({"type": "http.disconnect"}, 499, "the client went away"),
    ],
)
def test_a_body_that_does_not_come_is_the_fault_of_its_sender(
    small_run: Run, tmp_path: Path, message: dict[str, Any] | None, status: int, error: str
) -> None:
    """Before, the one was a 504, and the other a 500 with two errors in the log."""
    app = create_app(small_run.folder, tmp_path, replace(SETTINGS, timeout_seconds=0.05))
    scope = {"type": "http", "method": "POST", "path": "/recommend", "query_string": b"", "app": app}
    headers = [(b"content-type", b"application/json"), (b"content-length", b"9")]
    sent: list[Any] = []

    async def receive() -> Any:
        if message is None:
            await asyncio.sleep(60)
        return message

    async def send(part: Any) -> None:
        sent.append(part)

    asyncio.run(app({**scope, "headers": headers}, receive, send))
    assert sent[0]["status"] == status
    assert json.loads(sent[1]["body"]) == {"error": error}


def test_what_is_decoded_place_by_place_holds_up_no_one_for_long(client: TestClient, ids: Any) -> None:
    """Else one request for 256 slates of 1,000 items keeps the decoding thread for minutes after its time is up."""
    version = client.app.state.service.store.current  # type: ignore[attr-defined]
    queries: list[dict[str, Any]] = [
        {"k": 10},
        {"k": 100, "kind": "slate"},
        {"k": 1000, "filters": {"max_per_category": 1}},
    ]
    jobs = [answers.resolve(version, Query.model_validate({"history": ids[:1], **query})) for query in queries]
    assert [job.most_rows(SETTINGS) for job in jobs] == [SETTINGS.batch, 12, 1]
    assert len({job.group for job in jobs}) == 3


def test_what_lives_with_a_version_is_not_looked_through_for_rubbish(client: TestClient) -> None:
    assert client.get("/ready").status_code == 200
    assert gc.get_freeze_count() > 10_000


def test_a_worker_of_several_takes_no_request_before_it_answers(small_run: Run, tmp_path: Path) -> None:
    with start(small_run.folder, tmp_path, replace(SETTINGS, workers=2)) as client:
        assert client.get("/ready").status_code == 200


def test_a_path_is_one_path(client: TestClient, ids: Any) -> None:
    got = client.post("/recommend/", json={"history": [ids[0]]}, follow_redirects=False)
    assert got.status_code == 404
    assert got.json()["error"].startswith("no such path; expected one of ")


def test_a_full_queue_refuses_before_it_reads(client: TestClient, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(jobs: int) -> None:
        raise QueueFullError(513, 512, 3)

    monkeypatch.setattr(client.app.state.service.batcher, "check_room", full)  # type: ignore[attr-defined]
    for body in (b"no JSON", json.dumps({"history": [ids[0]]}).encode()):
        got = client.post("/recommend", content=body, headers={"content-type": "application/json"})
        assert got.status_code == 429
        assert got.headers["retry-after"] == "3"
        assert got.json() == {"error": "513 queries would wait, of at most 512; come back in 3 s"}
    assert client.get("/health").status_code == 200


def test_weights_are_the_pages_of_their_file(small_run: Run, tmp_path: Path) -> None:
    """Large weights of an opened version lie in the mapped file, not in memory of the process."""
    record = begin(small_run.folder, tmp_path)
    version = open_version(tmp_path, record.current, "cpu")
    weight = version.policies["policy"].state_dict()["item_embedding.weight"]
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("model.safetensors")
    ]
    assert any(low <= weight.data_ptr() < high for low, high in ranges)
    trie = version.policies["policy"].space.trie
    assert not trie.size.is_pinned()
    linked = tmp_path / "versions" / record.current / "policy" / "model.safetensors"
    assert linked.samefile(small_run.folder / "policy" / "model.safetensors") or not linked.is_symlink()
