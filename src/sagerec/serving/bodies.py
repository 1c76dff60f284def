"""Bodies in: bounded, read within the time of the request, and refused with what was got and what was expected."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from sagerec.serving.settings import MAX_BODY_BYTES, SHOWN

ModelT = TypeVar("ModelT", bound=BaseModel)


class RefusedError(Exception):
    """A request that is not answered: status, reason, headers."""

    def __init__(self, status: int, error: str, **headers: str) -> None:
        super().__init__(error)
        self.status, self.error = status, error
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> Response:
        """The answer that says so."""
        return json_response({"error": self.error}, self.status, self.headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer of plain values."""
    return Response(to_json(value), status_code=status, media_type="application/json", headers=dict(headers or {}))


async def read_body(request: Request) -> bytes:
    """The bytes of a request. Raises: RefusedError for another type than JSON, or for too many."""
    kind = request.headers.get("content-type", "nothing")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(415, f"content-type is {kind[:SHOWN]}; expected application/json")
    claimed = request.headers.get("content-length", "")
    if claimed.isdecimal() and len(claimed) < 20 and int(claimed) > MAX_BODY_BYTES:
        raise _too_long(f"{int(claimed):,}")
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise _too_long(f"more than {MAX_BODY_BYTES:,}")
            parts.append(part)
    except ClientDisconnect:
        raise RefusedError(499, "the client went away") from None
    return b"".join(parts)


def _too_long(got: str) -> RefusedError:
    return RefusedError(413, f"the body has {got} bytes; expected at most {MAX_BODY_BYTES:,}", connection="close")


async def read_model(request: Request, model: type[ModelT]) -> ModelT:
    """The body of a request as a model. Raises: RefusedError."""
    body = await read_body(request)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RefusedError(422, explain(error.errors(include_url=False, include_context=False)[0], model)) from None


def explain(first: Mapping[str, Any], model: type[BaseModel]) -> str:
    """The first thing that is wrong, in one line: where, what was got, what was expected."""
    kind, said = str(first["type"]), str(first["msg"])
    if kind == "json_invalid":
        return f"the body is no JSON ({said.removeprefix('Invalid JSON: ')}); expected an object with {_fields(model)}"
    where = _place(first["loc"])
    if kind == "missing":
        return f"{where} is missing; expected it"
    if kind == "extra_forbidden":
        return f"{where} is no field of a query; expected some of {_fields(_owner(model, first['loc'][:-1]))}"
    if kind == "value_error":
        return said.removeprefix("Value error, ")
    said = re.sub(r" should have (at (?:most|least) \d+ \w+).*", r" of \1", said)
    expected: str = said.removeprefix("Input should be ").removeprefix("Input should have ")
    return f"{where} is {_short(first['input'])}; expected {expected[:1].lower()}{expected[1:]}"


def _place(loc: tuple[int | str, ...]) -> str:
    """`filters.items_in[3]`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:SHOWN] or repr(part)}"
    return text.removeprefix(".") or "the body"


def _owner(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that holds what stands at a place."""
    for part in (part for part in loc if isinstance(part, str)):
        found: Any = model.model_fields[part].annotation
        inner = getattr(found, "__args__", (found,))[0]
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    return model


def _fields(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _short(value: Any) -> str:
    """The beginning of a value, as JSON readers write it; of a list its length."""
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    if isinstance(value, dict):
        return f"an object of {len(value):,} fields"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a whole number of many digits"
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
