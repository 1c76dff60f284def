"""What every request passes: tokens, headers, the count, and one line of the log, without what was asked."""

import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from fastapi import Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagerec.serving.bodies import RefusedError
from sagerec.serving.metrics import Metrics

logger = logging.getLogger("sagerec.serving.requests")
TOKEN, ADMIN_TOKEN = "SAGEREC_TOKEN", "SAGEREC_ADMIN_TOKEN"
"""Environment variables: with the first every question needs it, without the second there are no admin routes."""
OPEN = ("/", "/health", "/ready")
"""Paths that need no token, beside those of the page."""
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
]


Refused = tuple[int, str, dict[str, str]]
"""Status, reason and headers."""
Endpoint = Callable[[Request], Awaitable[Response]]


class JsonLines(logging.Formatter):
    """One JSON object a record. Of an error its type and place are said, and no message, which may quote a history."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": record.process,
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        said |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info and record.exc_info[0] is not None:
            place, trace = [], record.exc_info[2]
            while trace is not None:
                place.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
                trace = trace.tb_next
            said |= {"error": record.exc_info[0].__name__, "at": place[-5:]}
        return json.dumps(said, ensure_ascii=False)


def log_as_json() -> None:
    """Let this process write its log as JSON lines on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class Gate:
    """ASGI middleware around the routes."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        token: str,
        admin_token: str,
        refusal: Callable[[str], Refused | None],
        direct: Mapping[str, Endpoint],
    ) -> None:
        """`refusal` says of a path that needs no more than a look whether, and why, it is refused. POST to the paths of
        `direct` passes by FastAPI, whose way to a route takes as long as all else of a request.
        """
        self._app, self._metrics, self._busy, self._direct = app, metrics, refusal, direct
        self._token, self._admin_token = token.encode(), admin_token.encode()

    def _refusal(self, scope: Scope) -> Refused | None:
        """Status, reason and headers where a request may not pass."""
        path: str = scope["path"]
        admin = path.startswith("/admin/")
        if admin and not self._admin_token:
            return 404, f"admin routes are off; expected the server to be started with {ADMIN_TOKEN} set", {}
        needed = self._admin_token if admin else self._token
        if not needed or path in OPEN or path.startswith("/page/"):
            return self._busy(path)
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if hmac.compare_digest(given, b"Bearer " + needed):
            return self._busy(path)
        got = "another token" if given else "no token"
        return (
            401,
            f"got {got}; expected the header Authorization: Bearer, with the server's token",
            {"www-authenticate": "Bearer"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        noted: dict[str, Any] = {}
        scope["noted"] = noted
        direct = self._direct.get(scope["path"]) if scope["method"] == "POST" else None

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            if (refusal := self._refusal(scope)) is not None:
                await send_problem(observed, *refusal)
            elif direct is not None:
                await _answer(direct, scope, receive, observed)
            else:
                await self._app(scope, receive, observed)
        finally:
            took = time.monotonic() - started
            route = scope["path"] if direct else getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(took)
            fields = {"route": route, "method": scope["method"], "status": status, "ms": round(1e3 * took, 1), **noted}
            logger.info("request", extra={"fields": fields})


async def _answer(endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
    try:
        response = await endpoint(Request(scope, receive))
    except RefusedError as error:
        response = error.response()
    await response(scope, receive, send)


async def send_problem(send: Send, status: int, error: str, more: dict[str, str]) -> None:
    """Answer with a Problem, before any route is looked for."""
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in more.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
