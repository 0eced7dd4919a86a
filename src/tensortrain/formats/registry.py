"""Formats by name: a new one is one new file with ``@register`` on its class.

Names have underscores; a hyphen in their place, as files of earlier versions have it, is understood.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensortrain.errors import ShapeError

if TYPE_CHECKING:
    from .base import Format

__all__ = ["current_name", "format_names", "get_format", "register"]

_FORMATS: dict[str, Format] = {}


def register(cls: type[Format]) -> type[Format]:
    """Class decorator: make a format known by its name."""
    _FORMATS[cls.name] = cls()
    return cls


def format_names() -> tuple[str, ...]:
    """Names of all registered formats."""
    return tuple(sorted(_FORMATS))


def current_name(name: str) -> str:
    """The name of a format with underscores, where it was written with hyphens; any other as it is."""
    written = name.replace("-", "_")
    return written if name not in _FORMATS and written in _FORMATS else name


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ShapeError: No format has that name.
    """
    if isinstance(name, str):
        found = _FORMATS.get(name) or _FORMATS.get(name.replace("-", "_"))
        if found is not None:
            return found
    raise ShapeError(
        f"a format must be registered: found {name!r}, known are {list(format_names())}. "
        "Choose one of these, or register a Format of that name."
    )
