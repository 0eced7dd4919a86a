"""Short forms for notes and messages."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["in_short", "named"]

_SHOWN = 8


def in_short(error: BaseException) -> str:
    """Class and text of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def named(names: Sequence[str]) -> str:
    """The first names of a list in quotes, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
