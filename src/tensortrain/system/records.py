"""Frozen dataclasses as JSON and back, with the types of their fields checked: JSON does not see to that.

``to_plain(record)`` is what ``json.dumps`` takes; ``read_record(Class, value)`` reads it again. Fields hold numbers,
texts, records, dicts, tuples of these, or ``None`` where their annotation says so. A class with ``to_dict`` and
``from_dict`` of its own is asked for those.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

__all__ = ["Record", "RecordError", "read_record", "to_plain", "typed"]

_R = TypeVar("_R")
_NAMES = {int: "an integer", str: "text", bool: "true or false", list: "a list", dict: "an object"}


class RecordError(TypeError, ValueError):
    """A value does not fit its field; the text is ``{where} has {actual}, expected {expected}``."""


class Record:
    """Base of frozen dataclasses that keep every list given to a field as a tuple, so that equality is by value."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            object.__setattr__(self, field.name, _as_tuples(getattr(self, field.name)))


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def to_plain(value: Any) -> Any:
    """Reduce a value to what JSON can hold; numbers that are not finite become ``None``."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if callable(getattr(value, "to_dict", None)):
        return to_plain(value.to_dict())
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if callable(getattr(value, "item", None)):  # a scalar of torch or NumPy
        return to_plain(value.item())
    return str(value)  # paths, dtypes, devices


def read_record(record: type[_R], value: Any, where: str) -> _R:
    """Build a dataclass from what was read as JSON.

    Args:
        record: The class.
        value: A dict with an entry for each field; those with a default may be missing.
        where: Names the value in errors.

    Raises:
        RecordError: A key is missing or unknown, or a value is of another type.
    """
    value = typed(value, dict, where)
    fields = dataclasses.fields(record)  # type: ignore[arg-type]
    required = {field.name for field in fields if _has_no_default(field)}
    faults = sorted(required - value.keys()) + sorted(value.keys() - {field.name for field in fields})
    if faults:
        known = ", ".join(field.name for field in fields)
        raise RecordError(f"{where} has missing or unknown {', '.join(faults)}, expected {known}")
    hints = _hints(typing.cast(Any, record))
    return record(**{key: _decode(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def typed(value: Any, kind: type, where: str = "a value") -> Any:
    """The value, if it is of one of JSON's types; true and false are no integers.

    Raises:
        RecordError: It is of another type.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RecordError(f"{where} has {type(value).__name__}, expected {_NAMES.get(kind, kind.__name__)}")
    return value


@cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _decode(hint: Any, value: Any, where: str) -> Any:
    """Read ``value`` as the type ``hint``; ``where`` names it in the error."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return None if value is None else _decode(arguments[0], value, where)
    if origin is typing.Literal:
        return _one_of(arguments, value, where)
    if origin is tuple:
        return _decode_tuple(arguments, typed(value, list, where), where)
    if origin is dict:
        return typed(value, dict, where)
    if callable(getattr(hint, "from_dict", None)):
        return hint.from_dict(typed(value, dict, where))
    if dataclasses.is_dataclass(hint):
        return read_record(typing.cast(type, hint), value, where)
    return _decode_float(value, where) if hint is float else typed(value, hint, where)


def _decode_tuple(hints: tuple[Any, ...], items: list[Any], where: str) -> tuple[Any, ...]:
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(items)
    if len(items) != len(hints):
        raise RecordError(f"{where} has {len(items)} entries, expected {len(hints)}")
    return tuple(_decode(hint, item, f"{where}[{k}]") for k, (hint, item) in enumerate(zip(hints, items, strict=True)))


def _decode_float(value: Any, where: str) -> float:
    if value is None:  # written for a number that was not finite
        return math.nan
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RecordError(f"{where} has {type(value).__name__}, expected a number")
    return float(value)


def _one_of(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in choices:
        raise RecordError(f"{where} has {value!r:.60}, expected one of {', '.join(map(str, choices))}")
    return value
