"""Draw and print reports: terminal tables, figures, and one self-contained HTML page."""

from tensortrain.viz.report.html import write_html
from tensortrain.viz.report.terminal import inspect_table, report_table

__all__ = ["inspect_table", "report_table", "write_html"]
