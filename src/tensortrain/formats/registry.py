"""Formats by name: a new one is one new file with ``@register`` on its class.

Names have underscores; a hyphen in their place, as files of earlier versions have it, is understood.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensortrain.errors import ShapeError

if TYPE_CHECKING:
    from .base import Format

__all__ = ["format_names", "get_format", "register"]

_FORMATS: dict[str, Format] = {}


def register(cls: type[Format]) -> type[Format]:
    """Class decorator: make a format known by its name."""
    _FORMATS[cls.name] = cls()
    return cls


def format_names() -> tuple[str, ...]:
    """Names of all registered formats."""
    return tuple(sorted(_FORMATS))


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ShapeError: No format has that name.
    """
    try:
        return _FORMATS[name if name in _FORMATS else name.replace("-", "_")]
    except (KeyError, TypeError, AttributeError):
        raise ShapeError(
            f"a format must be registered: found {name!r}, known are {list(format_names())}. "
            "Choose one of these, or register a Format of that name."
        ) from None
