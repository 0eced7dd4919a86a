"""Saving and loading as lower levels ask for it: the level of files fills in how when it is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["doors"]


class _Doors:
    save: Callable[[Any, Any], Path]
    load: Callable[[Any], Any]


doors = _Doors()
