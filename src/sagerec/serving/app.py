"""The HTTP server: routes over a store of versions and a batcher."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from sagerec.artifacts import package_versions
from sagerec.errors import SagerecError
from sagerec.serving.answers import Job, QueryError, answer, resolve
from sagerec.serving.batching import Batcher, QueueFullError
from sagerec.serving.bodies import RefusedError, explain, json_response, read_model
from sagerec.serving.gate import ADMIN_TOKEN, TOKEN, Endpoint, Gate
from sagerec.serving.metrics import Metrics
from sagerec.serving.queries import Answer, AnswerBatch, FoundItems, Item, Problem, Query, QueryBatch
from sagerec.serving.settings import MAX_BODY_BYTES, MAX_IDS, MAX_K, MAX_ROWS, MAX_SLATE, ServeSettings
from sagerec.serving.store import Store
from sagerec.serving.versions import Version

logger = logging.getLogger(__name__)
NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}
"""Metrics and logs are ours; FastAPI's take as long as the rest of a request."""
SWITCH_SECONDS = 1e-4
"""How long the event loop and the decoding thread may keep the interpreter from each other."""
PAGE = Path(str(files("sagerec.serving"))) / "page"
PROBLEMS: dict[int | str, dict[str, Any]] = {
    422: {"model": Problem, "description": "The query cannot be answered."},
    429: {"model": Problem, "description": "Too many wait; come back after Retry-After seconds."},
    503: {"model": Problem, "description": "The server is warming up."},
    504: {"model": Problem, "description": "Not answered in time."},
}


class Service:
    """What the routes share."""

    def __init__(self, run: Path, state: Path, settings: ServeSettings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.store = Store(run, state, settings)
        self.batcher: Batcher | None = None

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Warm up, beside the first requests where no other worker can answer these; at the end answer what waits."""
        torch.set_num_threads(self.settings.threads)
        # Each of a batch's hundreds of tensor operations takes the interpreter's lock anew, and would wait 5 ms for it.
        sys.setswitchinterval(SWITCH_SECONDS)
        self.batcher = Batcher(
            answer,
            most_rows=lambda job: job.most_rows(self.settings),
            queue=self.settings.queue,
            wait_seconds=self.settings.wait_seconds,
            patience_seconds=self.settings.timeout_seconds / 2,
            on_batch=self.metrics.on_batch,
        )
        following = asyncio.create_task(self.store.follow())
        while self.settings.workers > 1 and not (self.store.current or self.store.failure):
            await asyncio.sleep(0.02)
        yield
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        await asyncio.to_thread(self.batcher.stop)

    def refusal(self, path: str) -> tuple[int, str, dict[str, str]] | None:
        """Status, reason and headers where a question is refused before it is read, which costs least under load."""
        if self.batcher is not None and path.startswith("/recommend"):
            try:
                self.batcher.check_room(1)
            except QueueFullError as error:
                return 429, str(error), {"retry-after": str(error.retry_seconds)}
        return None

    def version(self) -> Version:
        """The version that answers. Raises: RefusedError until there is one."""
        if (version := self.store.current) is None:
            raise RefusedError(503, self.store.failure or "the server is warming up; expected soon", retry_after="2")
        return version

    async def ask(self, request: Request, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """The answers of queries, all of one version. Raises: RefusedError."""
        version = self.version()
        assert self.batcher is not None
        if len(queries) > self.settings.queue:
            raise RefusedError(422, f"queries has {len(queries)}; expected at most {self.settings.queue}")
        jobs = [_resolve(version, query, at if len(queries) > 1 else None) for at, query in enumerate(queries)]
        request.scope["noted"] |= {"queries": len(jobs), "policy": jobs[0].policy, "version": version.id}
        try:
            futures = self.batcher.submit(jobs)
        except QueueFullError as error:
            raise RefusedError(429, str(error), retry_after=str(error.retry_seconds)) from None
        finally:
            self.metrics.waiting.set(self.batcher.waiting)
        together = asyncio.gather(*futures)
        gone = asyncio.create_task(_disconnected(request))
        gone.add_done_callback(lambda gone: together.cancel())
        try:
            return await together
        except asyncio.CancelledError:
            self.batcher.forget()
            if gone.done():
                raise RefusedError(499, "the client went away") from None
            raise
        finally:
            gone.cancel()


def _resolve(version: Version, query: Query, place: int | None) -> Job:
    try:
        return resolve(version, query)
    except QueryError as error:
        raise RefusedError(422, str(error) if place is None else f"queries[{place}]: {error}") from None


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI is told of a body that `read_model` reads."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


class App(FastAPI):
    """FastAPI, which is told of the models that it does not read itself."""

    def openapi(self) -> dict[str, Any]:
        """The description of the routes."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for model in (Query, QueryBatch):
                described = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schema["components"]["schemas"] |= described.pop("$defs", {}) | {model.__name__: described}
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(run: Path, state: Path, settings: ServeSettings) -> FastAPI:
    """The application of one worker."""
    service = Service(run, state, settings)
    app = App(title="sagerec", lifespan=service.lifespan, docs_url=None, redoc_url=None, telemetry=NO_TELEMETRY)
    app.router.redirect_slashes = False
    direct: dict[str, Endpoint] = {}
    app.add_middleware(
        Gate,
        metrics=service.metrics,
        refusal=service.refusal,
        direct=direct,
        token=os.environ.get(TOKEN, ""),
        admin_token=os.environ.get(ADMIN_TOKEN, ""),
    )
    app.state.service = service

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, error: RefusedError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def refuse_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return json_response({"error": explain({**first, "loc": first["loc"][1:]}, Query)}, 422)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        paths = ", ".join(sorted(app.openapi()["paths"]))
        said = {
            404: f"no such path; expected one of {paths}",
            405: f"method {request.method}; expected {(error.headers or {}).get('Allow', 'another')}",
        }
        return json_response({"error": said.get(error.status_code, error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return json_response({"error": "the server failed; its log says where"}, 500)

    async def timed(request: Request, model: type[Any]) -> list[dict[str, Any]]:
        read = False
        try:
            async with asyncio.timeout(settings.timeout_seconds):
                body = await read_model(request, model)
                read = True
                return await service.ask(request, body.queries if isinstance(body, QueryBatch) else [body])
        except TimeoutError:
            if not read:
                said = f"the body was not sent in {settings.timeout_seconds:g} s; expected it at once"
                raise RefusedError(408, said, connection="close") from None
            raise RefusedError(504, f"not answered in {settings.timeout_seconds:g} s; ask for less, or later") from None

    @app.post("/recommend", response_model=Answer, responses=PROBLEMS, openapi_extra=_takes(Query))
    async def recommend(request: Request) -> Response:
        """The next items for a history."""
        return json_response((await timed(request, Query))[0])

    @app.post("/recommend/batch", response_model=AnswerBatch, responses=PROBLEMS, openapi_extra=_takes(QueryBatch))
    async def recommend_batch(request: Request) -> Response:
        """The answers of several queries, all of one version."""
        return json_response({"answers": await timed(request, QueryBatch)})

    direct |= {"/recommend": recommend, "/recommend/batch": recommend_batch}

    @app.get("/items", response_model=FoundItems)
    async def search(
        words: str = Parameter("", max_length=200, description="Words that the title holds."),
        limit: int = Parameter(20, ge=1, le=100),
    ) -> Response:
        """Items by words of their titles, those taken most often first."""
        version = service.version()
        found = await asyncio.to_thread(version.catalogue.search, words, limit)
        items = [version.catalogue.describe(item) for item in found]
        return json_response({"items": items, "version": version.id})

    @app.get("/items/{item_id:path}", response_model=Item, responses={404: {"model": Problem}})
    async def item(item_id: str) -> Response:
        """An item by its id."""
        version = service.version()
        if (place := version.catalogue.places.get(item_id)) is None:
            raise RefusedError(
                404, f"no item {item_id[:60]!r}; expected one of the {len(version.catalogue):,} of the catalogue"
            )
        return json_response(version.catalogue.describe(place))

    @app.get("/health")
    async def health() -> Response:
        """Whether the process answers at all."""
        return json_response({"status": "alive"})

    @app.get("/ready", responses={503: {"model": Problem}})
    async def ready() -> Response:
        """Whether a version has warmed up and answers."""
        return json_response({"status": "ready", "version": service.version().id})

    @app.get("/info")
    async def info() -> Response:
        """What is served: run, hashes, versions, policies, categories, bounds."""
        return json_response(describe(service))

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times in the Prometheus text format."""
        return Response(await asyncio.to_thread(service.metrics.text), media_type="text/plain; version=0.0.4")

    async def swap(kind: str) -> Response:
        try:
            done = await (service.store.reload() if kind == "reload" else service.store.rollback())
        except SagerecError as error:
            service.metrics.swaps.labels(kind, "refused").inc()
            raise RefusedError(409, f"{error}; the version in use goes on") from None
        service.metrics.swaps.labels(kind, "done").inc()
        return json_response(asdict(done))

    @app.post("/admin/reload", responses={409: {"model": Problem}})
    async def reload() -> Response:
        """Serve the run as it is now."""
        return await swap("reload")

    @app.post("/admin/rollback", responses={409: {"model": Problem}})
    async def rollback() -> Response:
        """Serve the version before."""
        return await swap("rollback")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


def describe(service: Service) -> dict[str, Any]:
    """What /info says."""
    version, record = service.version(), service.store.record
    assert record is not None
    catalogue, settings = version.catalogue, service.settings
    sizes = (catalogue.category_offsets[1:] - catalogue.category_offsets[:-1]).tolist()
    return {
        "run": version.run,
        "version": version.id,
        "previous": record.previous,
        "generation": record.generation,
        "policies": list(version.policies),
        "hashes": version.hashes,
        "items": len(catalogue),
        "cold_items": int(catalogue.cold.sum()),
        "categories": dict(zip(catalogue.category_names, sizes, strict=True)),
        "limits": {
            "body_bytes": MAX_BODY_BYTES,
            "k": MAX_K,
            "slate": MAX_SLATE,
            "ids": MAX_IDS,
            "queries": min(MAX_ROWS, settings.queue),
            "timeout_seconds": settings.timeout_seconds,
        },
        "packages": package_versions(),
        "process": os.getpid(),
    }
