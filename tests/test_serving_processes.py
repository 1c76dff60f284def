"""The command itself: two workers behind one port, one killed, a reload that both take, SIGTERM."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sagerec.cli import main
from sagerec.run.folder import Run
from sagerec.serving.server import is_loopback
from tests.conftest import ENVIRONMENT

HOST = "127.0.0.1"


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of one request, on a connection of its own."""
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"content-type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def workers_of(port: int, wanted: int, seconds: float = 600) -> dict[int, str]:
    """Process id and version of so many workers that answer."""
    found: dict[int, str] = {}
    end = time.monotonic() + seconds
    while len(found) < wanted:
        assert time.monotonic() < end, found
        try:
            status, info = ask(port, "GET", "/info")
        except (OSError, http.client.HTTPException):
            status, info = 0, {}
        if status == 200:
            found[info["process"]] = info["version"]
        else:
            time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def served(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Port and process of `sagerec serve` with two workers."""
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    (folder / "run").symlink_to(small_run.folder)
    command = [sys.executable, "-m", "sagerec.cli", "serve", str(folder / "run"), "--port", str(port)]
    command += ["--workers", "2", "--device", "cpu", "--timeout-seconds", "100", "--shutdown-seconds", "60"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=ENVIRONMENT | {"SAGEREC_ADMIN_TOKEN": "t"}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield port, process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(300)


def test_two_workers_share_a_port_survive_a_kill_and_end_on_sigterm(
    served: tuple[int, subprocess.Popen[bytes]], small_run: Run
) -> None:
    port, process = served
    workers = workers_of(port, 2)
    assert len(set(workers.values())) == 1
    query = {"history": [small_run.data.item_ids.ids[0]]}
    expected = ask(port, "POST", "/recommend", query)
    assert expected[0] == 200

    os.kill(min(workers), signal.SIGKILL)
    answered = sum(ask_or_lost(port, query) == expected for _ in range(20))
    assert answered >= 19  # a connection that the dead one had taken up may be lost, no more
    assert len(workers_of(port, 2)) == 2  # a new worker stands in its place

    status, swap = ask(port, "POST", "/admin/reload", authorization="Bearer t")
    assert (status, swap["changed"]) == (200, False)
    assert ask(port, "POST", "/recommend", query) == expected

    found: list[Any] = []
    under_way = threading.Thread(
        target=lambda: found.append(
            ask(port, "POST", "/recommend/batch", {"queries": [{**query, "kind": "slate", "k": 40}] * 32})
        )
    )
    under_way.start()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    under_way.join(300)
    assert found
    assert found[0][0] == 200
    assert process.wait(300) in (0, -signal.SIGTERM)
    with pytest.raises(OSError, match=r"refused|reset"):
        ask(port, "GET", "/health")


def ask_or_lost(port: int, query: Any) -> Any:
    try:
        return ask(port, "POST", "/recommend", query)
    except (OSError, http.client.HTTPException):
        return None


def test_what_cannot_be_served_is_one_line(tmp_path: Path, small_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path)]) == 1
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["serve", str(small_run.folder), "--policy", "policy-x"]) == 1
    assert "policy-x is missing; expected an artefact" in " ".join(capsys.readouterr().err.split())
    assert main(["serve", str(small_run.folder), "--policy", "../policy"]) == 2
    assert main(["serve", str(small_run.folder), "--port", "70000"]) == 2
    assert "--port is 70000; expected 0 to 65,535" in " ".join(capsys.readouterr().err.split())


def test_a_missing_extra_is_named(
    small_run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(small_run.folder)]) == 1
    assert 'install it with: pip install "sagerec[serve]"' in " ".join(capsys.readouterr().err.split())


def test_loopback_addresses_are_known() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com")] == [False] * 4
