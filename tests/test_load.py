"""The load generator against a server of a few lines: what it counts, and where it may be aimed."""

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sagerec.errors import SettingsError
from tests.test_benchmarks import FOLDER

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("load")


async def answer_by_turns(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: list[int]) -> None:
    """200, 429, and every third request cut off."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0]))
            seen.append(len(seen) % 3)
            if seen[-1] == 2:
                writer.close()
                return
            status = b"200 OK" if seen[-1] == 0 else b"429 Too Many Requests"
            await asyncio.sleep(0.002)
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def test_an_open_loop_counts_every_request_once(load: Any) -> None:
    async def work() -> None:
        seen: list[int] = []
        server = await asyncio.start_server(lambda r, w: answer_by_turns(r, w, seen), "127.0.0.1", 0)
        client = load.Client("127.0.0.1", server.sockets[0].getsockname()[1])
        found = await load.open_loop(client, [b"{}", b"{ }"], rate=200, seconds=0.5, seed=0)
        record = found.record()
        assert set(record["statuses"]) <= {"200", "429", "lost"}
        assert record["requests"] == sum(found.statuses.values())
        assert 60 <= record["requests"] <= 140  # 100 on average, ten standard deviations at most four away
        assert len(found.latencies) == found.statuses["200"] > 10
        assert record["p50_ms"] >= 2
        again = await load.closed_loop(client, [b"{}"], connections=3, seconds=0.2)
        assert again.statuses["429"] > 0
        client.close()
        server.close()

    asyncio.run(work())


def test_only_this_machine_is_loaded(load: Any) -> None:
    with pytest.raises(SettingsError, match="expected an address of this machine"):
        load.Client("192.0.2.1", 80)


def test_limits_are_those_of_the_issue(load: Any) -> None:
    """Capacity at .49, an error at half, a 503 at twice, memory 10 % up, one lost, one mixed, 80 % after a kill."""
    module = importlib.import_module("serve")
    part = {"statuses": {"200": 9}, "requests": 9}
    results = {
        "share_of_plain": 0.49,
        "half": {"statuses": {"200": 9, "504": 1}},
        "twice": {"statuses": {"200": 5, "429": 4, "503": 1}},
        "memory_mb": {"in twice": 100, "after twice": 110},
        "reloads": {"statuses": {"200": 9, "lost": 1}, "mixed_answers": 1},
        "kill": {"statuses": {"200": 8, "lost": 2}, "requests": 10},
    }
    assert [limit["ok"] for limit in module.check_limits(results)] == [False] * 7
    good = results | {
        "share_of_plain": 0.5,
        "half": part,
        "twice": {"statuses": {"200": 5, "429": 4}},
        "memory_mb": {"in twice": 100, "after twice": 101},
        "reloads": part | {"mixed_answers": 0},
        "kill": part,
    }
    assert all(limit["ok"] for limit in module.check_limits(good))
