"""Settings on disk: frozen dataclasses to JSON and back, where an unknown key is an error."""

import dataclasses
import math
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from sagerec.errors import SettingsError

S = TypeVar("S")


def to_json(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain JSON values (tuples become lists)."""
    return {
        field.name: list(value) if isinstance(value := getattr(settings, field.name), tuple) else value
        for field in dataclasses.fields(settings)
    }


ADDED = "added"
"""Key of a field's metadata: the setting came later than files which hold the others."""


def added(default: Any) -> Any:
    """The default of a setting that came later than files which hold the others."""
    return dataclasses.field(default=default, metadata={ADDED: True})


def full_path(name: str) -> str:
    """The full path of a folder that is there, so that it is found from anywhere; any other name as it is."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def from_json(cls: type[S], values: dict[str, Any]) -> S:
    """Read a settings dataclass back.

    A setting that was `added` takes its default where older files lack it.

    Raises: SettingsError for a key that the dataclass does not have, or one that is missing.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise SettingsError(f"{cls.__name__}: unknown setting {unknown[0]!r}; expected some of {', '.join(names)}")
    later = {field.name for field in dataclasses.fields(cls) if ADDED in field.metadata}  # type: ignore[arg-type]
    missing = [name for name in names if name not in values and name not in later]
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


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """What a number may be; made by `at_least`, `above` and `between`."""

    low: float
    high: float
    expected: str
    """What is expected of a number that is too low."""
    expected_high: str
    """What is expected of one that is too high."""
    open_low: bool = False
    open_high: bool = False

    def miss(self, value: float) -> str | None:
        """What is expected in the place of `value`; None where it is within."""
        if not (value > self.low if self.open_low else value >= self.low):  # NaN is not
            return self.expected
        return None if (value < self.high if self.open_high else value <= self.high) else self.expected_high


def at_least(low: float, most: float = 10**9) -> Bounds:
    """From `low` on; `most` is where a slip is likelier than a wish."""
    text = f"{low:,} or above" if low == 0 else f"at least {low:,}"
    return Bounds(low, most, text, f"at most {most:,}")


def above(low: float, most: float = 1e9) -> Bounds:
    """Above `low`."""
    return Bounds(low, most, f"above {low:,}", f"at most {most:,g}", open_low=True)


def between(low: float, high: float, *, below: bool = False) -> Bounds:
    """From `low` to `high`, or to `below` it."""
    text = f"from {low:,} to below {high:,}" if below else f"{low:,} to {high:,}"
    return Bounds(low, high, text, text, open_high=below)


WHOLE, SEED = 2**63 - 1, between(0, 2**63 - 1)
PLAIN: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    bool: "True or False",
    str: "text",
    NoneType: "nothing",
}
"""Types of fields whose values are checked, in words."""


def check_fields(settings: Any, **bounds: Bounds) -> None:
    """Check each field of a settings dataclass: of its type and choices, finite, of at most 64 bits, a seed of at least
    0, within the bounds given. Of a tuple each entry is checked.

    Raises: SettingsError `NAME is GOT; expected …`.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        limits = bounds.get(field.name, SEED if field.name == "seed" else None)
        for entry in value if isinstance(value, tuple) else (value,):
            if (expected := _miss(field.type, entry, limits)) is not None:
                raise SettingsError(f"{field.name} is {entry!r}; expected {expected}")


def _miss(kind: Any, value: Any, limits: Bounds | None) -> str | None:
    """What is expected of a field of a type in the place of `value`; None where that will do."""
    kinds = (kind,) if get_origin(kind) in (None, Literal) else get_args(kind)
    choices = [choice for k in kinds if get_origin(k) is Literal for choice in get_args(k)]
    if choices:
        return None if value in choices or (value is None and NoneType in kinds) else f"one of {', '.join(choices)}"
    plain = [k for k in kinds if k in PLAIN]
    if any(k not in PLAIN and isinstance(k, type) and isinstance(value, k) for k in kinds):
        return None
    if plain and type(value) not in plain and not (type(value) is int and float in plain):
        return PLAIN[plain[0]] if limits is None else f"{PLAIN[plain[0]]}, {limits.expected}"
    if isinstance(value, int) and abs(value) > WHOLE:
        return f"at most {WHOLE}"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number" if limits is None else f"a finite number, {limits.expected}"
    return None if limits is None or value is None else limits.miss(value)
