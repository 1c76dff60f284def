"""Load over HTTP/1.1 for `serve.py`: requests at given times (open loop), or one after another on each connection.

An open loop does not wait for answers: a request is due at its time, and its latency counts from there, so a server
that falls behind is seen to. Only a loopback address is loaded.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sagerec.config import require
from sagerec.serving.server import is_loopback

MOST_CONNECTIONS = 1024


@dataclass(slots=True)
class Outcome:
    """What became of the requests of one load."""

    seconds: float = 0.0
    """From the first request due to the last answer."""
    statuses: Counter[str] = field(default_factory=Counter)
    """Answers by status, and `lost` for requests without one."""
    latencies: list[float] = field(default_factory=list)
    """Seconds of each request answered with 200, from when it was due."""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        ordered = np.sort(self.latencies) * 1e3
        quantiles = {
            f"p{q:g}_ms": round(float(np.quantile(ordered, q / 100)), 1) for q in (50, 90, 99, 99.9) if len(ordered)
        }
        answered = len(self.latencies)
        return {
            "seconds": round(self.seconds, 1),
            "requests": sum(self.statuses.values()),
            "answers_per_second": round(answered / max(self.seconds, 1e-9), 1),
            "statuses": dict(sorted(self.statuses.items())),
            **quantiles,
        }


class Client:
    """Connections to one server that are kept and used again."""

    def __init__(self, host: str, port: int) -> None:
        require(is_loopback(host), f"host is {host!r}; expected an address of this machine, such as 127.0.0.1")
        self._host, self._port = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._room = asyncio.Semaphore(MOST_CONNECTIONS)

    async def ask(self, method: str, path: str, body: bytes = b"", token: str = "") -> tuple[int, bytes]:
        """Status and body of an answer. Raises: OSError, EOFError where the connection breaks."""
        async with self._room:
            fresh = not self._idle
            reader, writer = self._idle.pop() if self._idle else await self._connect()
            try:
                writer.write(self._request(method, path, body, token))
                found = await self._read(reader)
            except (OSError, EOFError):
                writer.close()
                if fresh:
                    raise
                # A kept connection may have been closed by the server before it read anything of the request.
                reader, writer = await self._connect()
                writer.write(self._request(method, path, body, token))
                found = await self._read(reader)
            except asyncio.CancelledError:
                writer.close()
                raise
            if found[2]:
                writer.close()
            else:
                self._idle.append((reader, writer))
            return found[0], found[1]

    def _request(self, method: str, path: str, body: bytes, token: str) -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-length: {len(body)}\r\n"
        head += "content-type: application/json\r\n" + (f"authorization: Bearer {token}\r\n" if token else "")
        return head.encode() + b"\r\n" + body

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port)

    async def _read(self, reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        length = int(head.partition(b"content-length:")[2].partition(b"\r")[0])
        return status, await reader.readexactly(length), b"connection: close" in head

    def close(self) -> None:
        """Close what is kept."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


OnAnswer = Callable[[int, bytes], None]


async def _one(client: Client, body: bytes, due: float, outcome: Outcome, on_answer: OnAnswer | None) -> None:
    try:
        status, answer = await client.ask("POST", "/recommend", body)
    except (OSError, EOFError):
        outcome.statuses["lost"] += 1
        return
    outcome.statuses[str(status)] += 1
    if status == 200:
        outcome.latencies.append(time.perf_counter() - due)
        if on_answer is not None:
            on_answer(status, answer)


async def open_loop(
    client: Client,
    bodies: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    seed: int,
    on_answer: OnAnswer | None = None,
    until: Awaitable[Any] | None = None,
) -> Outcome:
    """Requests of a Poisson process of `rate` a second, for `seconds`, or as long as `until` is not done."""
    rng, outcome, running = np.random.default_rng(seed), Outcome(), set[asyncio.Task[None]]()
    ending = None if until is None else asyncio.ensure_future(until)
    begin = due = time.perf_counter()
    number = 0
    while due < begin + seconds and (ending is None or not ending.done()):
        due += rng.exponential(1 / rate)
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(_one(client, bodies[number % len(bodies)], due, outcome, on_answer))
        running.add(task)
        task.add_done_callback(running.discard)
        number += 1
    if ending is not None:
        await ending
    if running:
        await asyncio.wait(running)
    outcome.seconds = time.perf_counter() - begin
    return outcome


async def closed_loop(client: Client, bodies: Sequence[bytes], *, connections: int, seconds: float) -> Outcome:
    """Each of so many connections asks again as soon as it is answered: what the server can do at most."""
    outcome = Outcome()
    begin = time.perf_counter()

    async def ask_on(first: int) -> None:
        number = first
        while (due := time.perf_counter()) < begin + seconds:
            await _one(client, bodies[number % len(bodies)], due, outcome, None)
            number += connections

    await asyncio.gather(*(ask_on(i) for i in range(connections)))
    outcome.seconds = time.perf_counter() - begin
    return outcome
