"""Printing results: tables for people, one JSON document for programs."""

from __future__ import annotations

import json as json_module
import sys
from typing import Any

from tensortrain.system.records import to_plain

__all__ = ["print_json", "print_rich"]

_WIDTH = 100  # of pipes and logs, where a terminal's width is not known


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; numbers that are not finite become null.

    A stream that does not take all of Unicode gets ASCII with JSON's own escapes.
    """
    ascii_only = not (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    print(json_module.dumps(to_plain(value), indent=1, allow_nan=False, ensure_ascii=ascii_only))


def print_rich(*things: Any) -> None:
    """Print tables and lines on stdout, in colour on a terminal."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH)
    for thing in things:
        console.print(thing, markup=False, highlight=False)
