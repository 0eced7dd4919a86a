"""Draw and print: pictures of networks, and reports as terminal tables, figures, and one self-contained HTML page."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensortrain.viz.report.html import write_html
    from tensortrain.viz.report.terminal import inspect_table, report_table

__all__ = ["inspect_table", "report_table", "write_html"]

# Loaded when asked for: terminal tables need rich, for which an import of the package does not wait.
_HOMES = {"inspect_table": "terminal", "report_table": "terminal", "write_html": "html"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"{__name__} has no {name!r}.")
    return getattr(importlib.import_module(f"{__name__}.report.{_HOMES[name]}"), name)
