"""Settings on disk: frozen dataclasses to JSON and back, where an unknown key is an error."""

import dataclasses
import math
from collections.abc import Callable
from itertools import product
from typing import Any, Literal, TypeVar, get_args, get_origin

from sagerec.errors import SettingsError

S = TypeVar("S")


def to_json(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain JSON values (tuples become lists)."""
    return {
        field.name: list(value) if isinstance(value := getattr(settings, field.name), tuple) else value
        for field in dataclasses.fields(settings)
    }


def from_json(cls: type[S], values: dict[str, Any]) -> S:
    """Read a settings dataclass back.

    Raises: SettingsError for a key that the dataclass does not have, or one that is missing.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise SettingsError(f"{cls.__name__}: unknown setting {unknown[0]!r}; expected some of {', '.join(names)}")
    missing = [name for name in names if name not in values]
    if missing:
        raise SettingsError(f"{cls.__name__}: setting {missing[0]!r} is missing; expected all of {', '.join(names)}")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise SettingsError(f"{cls.__name__}: {error}") from error


def grid_points(axes: dict[str, tuple[Any, ...]], given: dict[str, Any]) -> list[dict[str, Any]]:
    """Every choice of one value an axis, `given` first, whether it is one of them or not."""
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    return [given, *(point for point in points if point != given)]


def require(condition: bool, message: str) -> None:
    """Raise SettingsError with `message` unless `condition` holds; used by `__post_init__` checks."""
    if not condition:
        raise SettingsError(message)


def require_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Raise SettingsError unless `value` is a finite number (a whole one) in the range that the bounds leave.

    The message names the bounds that do not hold: "batch_users is 0; expected at least 1".
    """
    holds: dict[str, tuple[float | None, Callable[[float], bool]]] = {
        "at least": (least, lambda bound: value >= bound),
        "above": (above, lambda bound: value > bound),
        "at most": (most, lambda bound: value <= bound),
        "below": (below, lambda bound: value < bound),
    }
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise SettingsError(f"{name} is {value!r}; expected a {'whole ' if whole else ''}number")
    require(abs(value) < math.inf or math.isnan(value), f"{name} is {value}; expected a finite number")
    broken = [f"{word} {bound:g}" for word, (bound, test) in holds.items() if bound is not None and not test(bound)]
    require(not broken, f"{name} is {value}; expected {' and '.join(broken)}")


def require_choices(settings: Any) -> None:
    """Raise SettingsError for a field of type `Literal` whose value is none of its choices."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            choices = ", ".join(map(str, get_args(field.type)))
            raise SettingsError(f"{field.name} is {value!r}; expected one of {choices}")
